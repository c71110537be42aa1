"""Compiles the TPU kernels for v5p, v6e and tpu7x without a TPU and models their times, beside public kernels in the same run.

    python -m tools.kernel_report                                     # everything; about ten minutes
    python -m tools.kernel_report --chips v6e --ops up_fwd --rows 32768 --no-peers --tree
    python -m tools.kernel_report --kernel grouped fp8 --no-peers     # products in FP8 beside those in bfloat16
    python -m tools.kernel_report --kernel plain                      # plain matrix products, whose work is known
    python -m tools.kernel_report --kernel routing                    # the router's kernels beside what XLA estimates for plain jax.numpy
    python -m tools.kernel_report --kernel rotary                     # norm and rotary encoding of queries and keys, beside the same
    python -m tools.kernel_report --kernel attention                  # attention forward and its gradients, causal
    python -m tools.kernel_report --keep compiled                     # a second time: only what changed is compiled
    python -m tools.kernel_report --output kernel_report              # also report.md, report.json and report.png there

Needs libtpu (extra `tpu`); tokamax's kernels are shown if it is installed (extra `peers`). Nothing is run on a chip: cycles are
those of the compiler's static schedule, bytes those of the kernel's own order of transfers, and time is a simulation of both
(`tools/kernels/simulate.py`), whose parts add up (`tools/kernels/parts.py`). Exits with 1 if a kernel of this project does not
compile, 2 if nothing can be compiled here.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import sys
from collections.abc import Sequence
from pathlib import Path

from tools.kernels import fp8, picture, registry, table
from tools.kernels.chips import CHIPS
from tools.kernels.compile import CompileError, Compiler
from tools.kernels.products import PRODUCTS, SIZES
from tools.kernels.report import Runner
from tools.kernels.simulate import Memory


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    arguments = _parser().parse_args(argv)
    memory = Memory(arguments.hbm_efficiency, arguments.transfer_latency_us * 1e-6)
    chips, products = [CHIPS[name] for name in arguments.chips], [PRODUCTS[name] for name in arguments.ops]
    contenders = {name: cases for name, cases in registry.GROUPED.items() if arguments.peers or name == registry.OURS}
    try:
        with Compiler(arguments.keep) as compiler:
            runner = Runner(compiler, memory, lambda line: print(line, file=sys.stderr, flush=True))
            for kernel in arguments.kernel:
                if kernel == "grouped":
                    runner.grouped(contenders, chips, products, arguments.rows, arguments.sizes)
                elif kernel == "fp8":
                    runner.grouped(registry.FP8, chips, fp8.products(products), arguments.rows, arguments.sizes)
                else:
                    runner.others(kernel, registry.OTHERS[kernel], chips)
    except CompileError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    report = runner.report
    together = {name: [name] for name in contenders} | {table.BEST_PEER: [name for name in contenders if name != registry.OURS]}
    sums = report.sums(arguments.ops, together)
    assumptions = {
        "versions": ", ".join(f"{name} {version}" for name, version in _versions().items()),
        "HBM bandwidth": f"{memory.efficiency:.0%} of the published peak, in times and rooflines",
        "latency of a transfer": f"{memory.latency * 1e6:g} us",
    } | {f"sizes {name!r}": SIZES[name] for name in arguments.sizes}
    text = table.markdown(report, sums, registry.OURS, assumptions)
    print(text)
    if arguments.tree:
        print("\n\n".join(f"{record.chip} {record.case}\n{record.tree}" for record in report.compiled if record.tree))
    if arguments.output:
        arguments.output.mkdir(parents=True, exist_ok=True)
        (arguments.output / "report.md").write_text(text)
        (arguments.output / "report.json").write_text(table.as_json(report, sums, assumptions))
        if sums:
            picture.draw(sums, [registry.OURS, table.BEST_PEER], arguments.output / "report.png")
    peers = set(registry.GROUPED) - {registry.OURS}
    return int(any(record.error and record.kernel not in peers for record in report.compiled))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="kernel_report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def several(flag: str, known: Sequence[str], default: Sequence[str], text: str) -> None:
        parser.add_argument(flag, nargs="+", choices=known, default=default, metavar="NAME", help=f"{text}: {', '.join(known)}")

    several("--kernel", ["grouped", "fp8", *registry.OTHERS], ["grouped"], "what to report on")
    several("--chips", list(CHIPS), list(CHIPS), "chips to compile for")
    several("--ops", list(PRODUCTS), list(PRODUCTS), "grouped products")
    several("--sizes", list(SIZES), list(SIZES), "how rows are divided into groups")
    parser.add_argument("--rows", nargs="+", type=int, default=[8192, 32768, 65536], help="rows of all groups together")
    parser.add_argument("--peers", action=argparse.BooleanOptionalAction, default=True, help="public kernels beside ours")
    parser.add_argument("--hbm_efficiency", type=float, default=1.0, help="share of the HBM bandwidth reached; 0.83 is pessimistic")
    parser.add_argument("--transfer_latency_us", type=float, default=0.0, help="microseconds that a transfer takes besides its bytes")
    parser.add_argument("--tree", action="store_true", help="print the loops and branches of all schedules")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep compilations there, and take those that did not change from there")
    parser.add_argument("--output", type=Path, metavar="DIR", help="write report.md, report.json and report.png to this directory")
    return parser


def _versions() -> dict[str, str]:
    found = {}
    for name in ("jax", "libtpu", "tokamax"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


if __name__ == "__main__":
    sys.exit(main())
