"""Speed of the data pipeline, from shards to batches: `python -m tools.benchmark_data [--threads 1] [--repetitions 5]`.

Made-up sources of realistic sizes go through the whole pipeline: plan, shards, decoding, rows, batches. For each it prints tokens per
second on the clock and per second of CPU time, and the share of each stage; then what hosts of TPU slices take at most, by the
arithmetic of the bfloat16 peak, in units of one core. Use a quiet machine: only the figure per CPU-second does not mind other work.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import io
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table

from interns1pro_jax.config import ModelConfig
from interns1pro_jax.data import pipeline, plan, preparation, sources
from interns1pro_jax.data.encoding import DocumentEncoder
from interns1pro_jax.data.examples import Example, Medium, StoredImage, StoredSignal
from interns1pro_jax.data.image_processing import PixelBounds, grid_of
from interns1pro_jax.data.mixture import Mixture, Source
from interns1pro_jax.data.packing import RowSize
from interns1pro_jax.data.pipeline import Batches, ReadConfig, RowReader
from interns1pro_jax.data.plan import PipelineConfig, make_plan
from interns1pro_jax.data.preparation import PartBuilder, PreparationConfig
from interns1pro_jax.data.sources import DOCUMENTS, ROWS, PreparedSource
from interns1pro_jax.flops import HARDWARE, text_flops
from interns1pro_jax.models.time_series_inputs import required_sizes
from interns1pro_jax.models.vision_inputs import tokens_per_item
from tools import benchmark

_VOCABULARY, _PLAIN = 151_936, 151_643  # ids, and those that are text
_MEAN, _SPREAD = 6.1, 1.2  # of the logarithm of a document's length: 900 tokens on average, many short and some long ones
_PIXELS = (768, 1024)  # of a photograph
_HOST_CHIPS = 4


@dataclasses.dataclass(frozen=True)
class Case:
    """A source and how it is read."""

    name: str
    kind: str
    row: RowSize
    batch_size: int
    chunk_tokens: int
    make: Callable[[np.random.Generator], Iterator[Example]]


class _Ids:
    """Stands for a tokenizer where ids are made up."""

    vocab_size, fingerprint = _VOCABULARY, "made up"


def texts(total: int, generator: np.random.Generator) -> Iterator[Example]:
    """Documents of Zipf-distributed ids."""
    frequent = (np.random.default_rng(0).zipf(1.2, 1 << 20) % _PLAIN).astype(np.int32)
    while total > 0:
        length = int(min(np.exp(generator.normal(_MEAN, _SPREAD)) + 2, 131_072))
        start = int(generator.integers(len(frequent) - length))
        yield Example(frequent[start : start + length], np.ones(length, bool), (), RowSize(length), "text")
        total -= length


def _with_media(medium: Medium, placeholders: int, size: tuple[int, ...], text: int, generator: np.random.Generator) -> Example:
    model = ModelConfig()
    token = model.image_token_id if isinstance(medium, StoredImage) else model.ts_token_id
    ids = generator.integers(0, _PLAIN, text + placeholders).astype(np.int32)
    ids[10 : 10 + placeholders] = token
    trained = ids != token
    return Example(ids, trained, (medium,), RowSize(len(ids), *size), "media")


def images(count: int, bounds: PixelBounds, generator: np.random.Generator) -> Iterator[Example]:
    """Photographs of 1024 x 768 pixels in JPEG with a caption of 200 tokens."""
    model = ModelConfig()
    assert model.vision is not None
    grid = grid_of(*_PIXELS, model.vision, bounds)
    for _ in range(count):
        rough = generator.integers(0, 256, (12, 16, 3), np.uint8)  # smooth, as photographs are
        smooth = np.asarray(Image.fromarray(rough).resize(_PIXELS[::-1], Image.Resampling.BICUBIC)).astype(np.int16)
        noisy = np.clip(smooth + generator.integers(-8, 9, smooth.shape), 0, 255).astype(np.uint8)
        file = io.BytesIO()
        Image.fromarray(noisy).save(file, "JPEG", quality=90)
        placeholders = tokens_per_item(grid, model.vision)
        yield _with_media(StoredImage(file.getvalue(), grid), placeholders, (grid[1] * grid[2],), 200, generator)


def signals(count: int, generator: np.random.Generator) -> Iterator[Example]:
    """Recordings of three channels, 4000 samples at 100 Hz, with a description of 150 tokens."""
    for _ in range(count):
        medium = StoredSignal(generator.normal(size=(4000, 3)).astype(np.float32), 100.0)
        needed = required_sizes([[medium.signal()]])
        size = (0, needed.values, needed.rows, needed.pairs, needed.patch_width)
        yield _with_media(medium, medium.signal().tokens, size, 150, generator)


def cases(tokens: int) -> list[Case]:
    text = functools.partial(texts, tokens)
    bounds = PixelBounds(largest=262_144)
    signal = next(signals(1, np.random.default_rng(0))).size
    many = dataclasses.replace(
        RowSize(4096),
        samples=24 * signal.samples,
        signal_rows=24 * signal.signal_rows,
        signal_pairs=24 * signal.signal_pairs,
        patch_width=signal.patch_width,
    )
    return [
        Case("text, chunks of 64 k tokens, rows of 4 k", DOCUMENTS, RowSize(4096), 32, 65536, text),
        Case("text, chunks of 64 k tokens, rows of 32 k", DOCUMENTS, RowSize(32768), 4, 65536, text),
        Case("text, packed rows of 4 k", ROWS, RowSize(4096), 32, 0, text),
        Case("text, packed rows of 32 k", ROWS, RowSize(32768), 4, 0, text),
        Case(
            "images 1024 x 768 and text, rows of 4 k",
            DOCUMENTS,
            RowSize(4096, patches=12_288),
            2,
            0,
            functools.partial(images, 200, bounds),
        ),
        Case("signals 3 x 4000 and text, rows of 4 k", DOCUMENTS, many, 4, 0, functools.partial(signals, 600)),
    ]


def prepare(case: Case, directory: Path) -> PreparedSource:
    """Writes the source of a case."""
    encoder: Any = DocumentEncoder(_Ids(), ModelConfig(), PixelBounds())  # type: ignore[arg-type]
    config = PreparationConfig(case.kind, case.row, case.chunk_tokens)
    builder = PartBuilder(config, encoder, str(directory), 0)
    for example in case.make(np.random.default_rng(1)):
        builder.add_example(example)
    preparation.complete(str(directory), [builder.finish()], config, encoder, "")
    return PreparedSource(str(directory))


def open_batches(case: Case, source: PreparedSource, reading: ReadConfig) -> Batches:
    """The whole pipeline over one source."""
    block = max(128 * case.row.tokens * len(source) // source.manifest.tokens, 1)  # draws that give about 128 rows
    config = PipelineConfig(case.row, case.batch_size, block=block)
    mixture = Mixture([Source(source.directory, 1.0)], [source.size], align=1)
    planned = make_plan(mixture, [source], config, 1, [0])
    reader = RowReader(planned, np.arange(case.batch_size), ModelConfig(), [np.zeros(0, np.int32)])
    return Batches(reader, planned, reading)


STAGES = ("plan", "read shards", "decode records", "decode media", "fill rows", "make batches")


@contextlib.contextmanager
def stage_times() -> Iterator[dict[str, float]]:
    """Measures CPU seconds of each stage while it is entered; a stage within another counts for itself only."""
    seconds = dict.fromkeys(STAGES, 0.0)
    stack = threading.local()

    def timed(stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            inner, stack.inner = getattr(stack, "inner", 0.0), 0.0
            start = time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                whole = time.thread_time() - start
                seconds[stage] += whole - stack.inner
                stack.inner = inner + whole

        return run

    places: list[tuple[str, Any, str]] = [
        ("plan", plan.BatchPlan, "batch"),
        ("read shards", sources.PreparedSource, "bytes_of"),
        ("decode records", sources, "decode_record"),
        ("decode media", pipeline.AssembledRow, "put_media"),
        ("fill rows", pipeline.RowReader, "assemble"),
        ("make batches", pipeline, "_batch_of"),
    ]
    kept = [(owner, name, getattr(owner, name)) for _, owner, name in places]
    try:
        for stage, owner, name in places:
            setattr(owner, name, timed(stage, getattr(owner, name)))
        yield seconds
    finally:
        for owner, name, function in kept:
            setattr(owner, name, function)


@dataclasses.dataclass(frozen=True)
class Result:
    """Tokens (padding excluded) per second, medians; shares of the stages; filled part of the rows; patches and samples per CPU-second."""

    wall: float
    cpu: float
    shares: dict[str, float]
    fill: float
    patches: float
    samples: float


def measure(case: Case, source: PreparedSource, reading: ReadConfig, repetitions: int) -> Result:
    """Times some batches from different places in the run."""
    steps = max(int(6e6 // (case.row.tokens * case.batch_size)), 2) if case.row.text_only else 6
    batches = open_batches(case, source, reading)
    batch = batches[0]
    wall, cpu, tokens = [], [], []
    for repetition in range(repetitions):
        first, count = 1 + repetition * steps, 0
        wall_start, cpu_start = time.perf_counter(), time.process_time()
        for step in range(first, first + steps):
            batch = batches[step]
            count += int(np.count_nonzero(batch.inputs.segment_ids))
        wall.append(time.perf_counter() - wall_start)
        cpu.append(time.process_time() - cpu_start)
        tokens.append(count)
    batches.close()
    inline = open_batches(case, source, ReadConfig(0, 0))
    with stage_times() as seconds:
        for step in range(steps):
            inline[step]
    inline.close()
    total = sum(seconds.values())
    vision, series = batch.inputs.vision, batch.inputs.time_series
    per_batch = np.median(cpu) / steps
    return Result(
        float(np.median(np.array(tokens) / wall)),
        float(np.median(np.array(tokens) / cpu)),
        {stage: spent / total for stage, spent in seconds.items()},
        sum(tokens) / (repetitions * steps * case.batch_size * case.row.tokens),
        float(np.count_nonzero(vision.frame_ids) / per_batch) if vision is not None else 0.0,
        float(np.count_nonzero(series.values) / per_batch) if series is not None else 0.0,
    )


def report(results: dict[str, Result], console: Console) -> None:
    """The measurements, and what hosts take."""
    table = Table(title="from shards to batches, one process")
    for name in ("source", "Mtokens/s", "per CPU-s", "rows full", *STAGES):
        table.add_column(name, justify="left" if name == "source" else "right")
    for name, result in results.items():
        shares = [f"{result.shares[stage]:.0%}" for stage in STAGES]
        table.add_row(name, f"{result.wall / 1e6:.2f}", f"{result.cpu / 1e6:.2f}", f"{result.fill:.1%}", *shares)
    console.print(table)
    for name, result in results.items():
        if result.patches:
            console.print(f"{name}: {result.patches:,.0f} patches per CPU-second")
        if result.samples:
            console.print(f"{name}: {result.samples:,.0f} samples per CPU-second")
    wanted = Table(title="what a host takes at most: its devices at their bfloat16 peak, rows of 4 k, nothing else computed")
    for name in ("slice", "tokens/s of a host", "cores: text from chunks", "packed rows", "every row full of images", "of signals"):
        wanted.add_column(name, justify="left" if name == "slice" else "right")
    chunk, packed = (next(r for name, r in results.items() if word in name).cpu for word in ("chunks", "packed"))
    picture, signal = (result for result in results.values() if result.patches or result.samples)
    for label, chip in (("v5p-512 recipe", "v5p"), ("tpu7x-256 recipe", "tpu7x")):
        hardware = HARDWARE[chip]
        tokens = _HOST_CHIPS * hardware.devices_per_chip * hardware.peak / (3 * text_flops(ModelConfig().text, 4096))
        cores = [tokens / speed for speed in (chunk, packed, picture.cpu, signal.cpu)]
        wanted.add_row(label, f"{tokens:,.0f}", *(f"{each:.4f}" if each < 0.01 else f"{each:.2f}" for each in cores))
    console.print(wanted)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="that make batches")
    parser.add_argument("--processes", type=int, default=0, help="that make batches")
    parser.add_argument("--repetitions", type=int, default=5, help="of each case")
    parser.add_argument("--tokens", type=int, default=16_000_000, help="of the text that is made up")
    arguments = parser.parse_args(argv)
    benchmark.prepare(1)
    flags.FLAGS.mark_as_parsed()  # Grain's worker processes look at absl's flags
    console = Console(width=170)
    reading = ReadConfig(arguments.threads, 2, arguments.processes)
    results: dict[str, Result] = {}
    with tempfile.TemporaryDirectory() as folder:
        for number, case in enumerate(track(cases(arguments.tokens), "measuring", console=console)):
            results[case.name] = measure(case, prepare(case, Path(folder) / str(number)), reading, arguments.repetitions)
    report(results, console)
    benchmark.report(
        f"{arguments.threads} threads, {arguments.processes} processes, medians of {arguments.repetitions}",
        {"numpy": np.__version__, "peak memory": f"{benchmark.resident_peak_gib():.2f} GiB"},
    )


if __name__ == "__main__":
    main()
