"""A mixture of trillions of tokens, simulated: `python -m tools.simulate_mixture [--tokens 6e12] [--row 4096]`.

Makes the manifests and tables of many sources (the shards themselves are never read) and plans batches with the code that training
runs: memory of a host, time to open and to go to a far step, how exact the shares are, whether anything comes twice, and how equal the
ranks' attention costs are with and without dealing.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from interns1pro_jax.data.balance import deal, spread
from interns1pro_jax.data.mixture import Mixture, Source
from interns1pro_jax.data.packing import RowSize, plan_rows
from interns1pro_jax.data.plan import PipelineConfig, make_plan
from interns1pro_jax.data.sources import ROWS, Manifest, PreparedSource, Shard

_SHARD = 65536  # records


def make_sources(root: Path, tokens: float, count: int, row: RowSize) -> list[Source]:
    """Sources with manifests of shards that are not there, and tables of costs that take no room on the disk."""
    shares = np.geomspace(1, 1e-3, count) / np.geomspace(1, 1e-3, count).sum()
    found = []
    for number, share in enumerate(shares.tolist()):
        records = int(tokens * share) // row.tokens
        directory = root / f"source-{number:02d}"
        (directory / "index").mkdir(parents=True)
        sizes = [min(_SHARD, records - start) for start in range(0, records, _SHARD)]
        shards = tuple(Shard(f"shards/{i:06d}.array_record", size, size * 8192, "0" * 64) for i, size in enumerate(sizes))
        manifest = Manifest(ROWS, shards, records, records * row.tokens, records * row.tokens, row, "made up", None, {}, 0, "", {})
        (directory / "manifest.json").write_bytes(manifest.to_json())
        np.lib.format.open_memmap(directory / "index/costs.npy", "w+", np.float32, (records,)).flush()
        found.append(Source(str(directory), float(f"{share**0.8:.4g}")))  # small sources come more often than their size
    return found


def resident_mib() -> tuple[float, float]:
    """Memory of this process now: its own, and pages of files, which the system takes back when it needs them."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["RssAnon"].split()[0]) / 1024, int(lines["RssFile"].split()[0]) / 1024


def scale(arguments: argparse.Namespace, console: Console) -> None:
    row, size, far = RowSize(arguments.row), arguments.batch_size, arguments.step
    with tempfile.TemporaryDirectory() as folder:
        chosen = make_sources(Path(folder), arguments.tokens, arguments.sources, row)
        before, start = resident_mib(), time.perf_counter()
        opened = [PreparedSource(source.path) for source in sorted(chosen, key=lambda source: source.path)]
        config = PipelineConfig(row, size, seed=1)
        mixture = Mixture(chosen, [prepared.size for prepared in opened], seed=1, align=size)
        plan = make_plan(mixture, opened, config, arguments.ranks, [0] * len(opened))
        plan.batch(0)
        to_open = time.perf_counter() - start
        start = time.perf_counter()
        plan.batch(far)
        to_seek = time.perf_counter() - start
        start = time.perf_counter()
        for step in range(far + 1, far + 101):
            plan.batch(step)
        per_batch = (time.perf_counter() - start) / 100
        own, mapped = (now - earlier for now, earlier in zip(resident_mib(), before, strict=True))
        records, shards = sum(len(s) for s in opened), sum(len(s.manifest.shards) for s in opened)
        console.print(
            f"{len(opened)} sources, {shards:,} shards, {records:,} rows of {row.tokens} tokens, {records * row.tokens:.3g} tokens"
        )
        console.print(f"opened, first batch planned in {to_open:.2f} s; batch {far:,} in {to_seek * 1e3:.1f} ms; "
                      f"following ones {per_batch * 1e3:.1f} ms each of {size} rows")  # fmt: skip
        console.print(
            f"memory of a process for it: {own:.0f} MiB of its own, {mapped:.0f} MiB of file pages that were touched and can be dropped"
        )
        exactness(mixture, console)


def exactness(mixture: Mixture, console: Console) -> None:
    weights = np.array(mixture.stages[0].rates)
    worst, worst_relative = 0.0, 0.0
    generator = np.random.default_rng(0)
    for start in generator.integers(0, 10**9, 50).tolist():
        counts = np.bincount(mixture.draws(start, start + 10_000).source, minlength=len(weights))
        worst = max(worst, float(abs(counts - 10_000 * weights).max()))
        worst_relative = max(worst_relative, float((abs(counts - 10_000 * weights) / (10_000 * weights))[weights > 0.05].max()))
    long = np.array(mixture.counts(10**9 // 256 * 256)) - (10**9 // 256 * 256) * weights
    console.print(
        f"shares: of 10,000 draws from any place a source has at most {worst:.1f} too many or too few ({worst / 1e4:.2%} of the draws; "
        f"{worst_relative:.2%} of its share for shares above 5 %); after 10^9 draws at most {abs(long).max():.1f}"
    )
    draws = mixture.draws(0, 3_000_000)
    twice = 0
    for source in range(len(weights)):
        mine = draws.source == source
        pairs = np.stack([draws.epoch[mine], draws.record[mine]])
        twice += pairs.shape[1] - np.unique(pairs, axis=1).shape[1]
    console.print(f"without replacement: of 3,000,000 draws {twice} are records that came before in the same epoch of their source")


def balance(console: Console) -> None:
    """Spread of the ranks' attention costs: how much longer than the mean the dearest takes."""
    generator = np.random.default_rng(0)
    table = Table(title="how much longer than the mean rank the dearest one takes for attention, with documents of lognormal lengths")
    for name in ("rows of", "rows per rank", "as they come", "dealt, window 1", "window 4", "window 16"):
        table.add_column(name, justify="right")
    ranks = 64
    for tokens in (4096, 32768):
        lengths = np.minimum(np.exp(generator.normal(6.1, 1.2, 16 * 8 * ranks * tokens // 900)) + 1, 131_072).astype(np.int64)[:, None]
        costs = np.concatenate([plan_rows(part, RowSize(tokens), np.arange(len(part))).costs for part in np.array_split(lengths, 16)])
        costs = costs[generator.permutation(len(costs))]
        for per_rank in (1, 2, 4, 8):
            size = ranks * per_rank
            rows = costs[: len(costs) // (16 * size) * 16 * size]
            if not len(rows):
                continue
            line = [f"{spread(rows.reshape(-1, size), ranks):.1%}"]
            for window in (1, 4, 16):
                dealt = [part[deal(part, size, ranks, 0)] for part in rows.reshape(-1, window * size)]
                line.append(f"{spread(np.concatenate(dealt), ranks):.1%}")
            table.add_row(f"{tokens:,}", str(per_rank), *line)
    console.print(table)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=float, default=6e12, help="of the whole mixture")
    parser.add_argument("--row", type=int, default=4096, help="tokens of a row")
    parser.add_argument("--sources", type=int, default=40, help="the smallest has a thousandth of the largest")
    parser.add_argument("--batch_size", type=int, default=1024, help="rows")
    parser.add_argument("--ranks", type=int, default=512, help="data-parallel ranks")
    parser.add_argument("--step", type=int, default=10**6, help="the far step")
    arguments = parser.parse_args(argv)
    console = Console(width=150, highlight=False)
    scale(arguments, console)
    balance(console)


if __name__ == "__main__":
    main()
