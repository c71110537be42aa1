"""Converts checkpoints: the released layout (safetensors), with or without FP8, and the checkpoints of this project's runs.

    python -m tools.convert runs/sft/checkpoints out                        # a run's newest weights, in the released layout
    python -m tools.convert runs/sft/checkpoints out --step 500 --quantization fp8 --carry Intern-S1-Pro
    python -m tools.convert Intern-S1-Pro weights --to orbax                # a checkpoint that `read_weights` reads
    python -m tools.convert Intern-S1-Pro-FP8 Intern-S1-Pro-BF16 --to hf --quantization none

Every family of `interns1pro_jax/families.py` goes both ways. What is only read and written stays the same to the byte, FP8 scales
included. No model is made: one host with a few times the largest tensor of memory converts any. A conversion that was interrupted goes on
with the next file when it is started again. Into the released layout several processes may work together, on one or several hosts that
all see the directories; each reads what goes into its own files:

    python -m tools.convert runs/sft/checkpoints out --distributed                    # started by SLURM, MPI or on the hosts of a TPU slice
    python -m tools.convert runs/sft/checkpoints out --distributed 10.0.0.1:9000 2 0  # anywhere else: address of the first of 2, this is 0

Exits with 1 where the checkpoint, the disk or the configuration is at
fault. `python -m tools.inspect_checkpoint out --verify` checks what was written by its checksums.
"""

from __future__ import annotations

import argparse
import dataclasses
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import absl.logging
import jax
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from interns1pro_jax.checkpoint.destination import MAX_FILE_BYTES
from interns1pro_jax.checkpoint.errors import CheckpointError
from interns1pro_jax.checkpoint.safetensors_io import open_checkpoint
from interns1pro_jax.checkpoint.sources import HfSource, RunSource
from interns1pro_jax.checkpoint.stored_tensors import released_scheme
from interns1pro_jax.checkpoint.stream import write_hf, write_run
from interns1pro_jax.config import ConfigError, ModelConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    arguments = _parser().parse_args(argv)
    jax.config.update("jax_platforms", "cpu")  # what else there is would only be kept from others
    absl.logging.set_verbosity(absl.logging.ERROR)  # Orbax's, of arrays that it does not write itself
    started = time.monotonic()
    try:
        _join(arguments.distributed)
        written = _convert(arguments)
    except (CheckpointError, ConfigError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    seconds = time.monotonic() - started
    print(
        f"{arguments.destination}: {written / 1e9:,.2f} GB in {seconds:.0f} s ({written / 1e9 / seconds:.2f} GB/s, checks and checksums "
        f"included); this process held {peak:.2f} GiB at its peak"
    )
    return 0


def _join(distributed: Sequence[str] | None) -> None:
    """Joins the other processes, if there are any."""
    if distributed is None:
        return
    if len(distributed) not in (0, 3) or not all(text.isdecimal() for text in distributed[1:]):
        raise ConfigError(f"--distributed {' '.join(distributed)} must be nothing or HOST:PORT COUNT NUMBER.")
    try:
        if distributed:
            address, count, number = distributed
            jax.distributed.initialize(address, int(count), int(number))
        else:
            jax.distributed.initialize()
    except (ValueError, RuntimeError) as error:
        raise ConfigError(f"--distributed {' '.join(distributed)}: the processes do not find each other ({error}).") from error


def _convert(arguments: argparse.Namespace) -> int:
    """Returns the bytes that this process has written."""
    source, destination = arguments.source, arguments.destination
    is_released = (source / "config.json").exists()
    to = arguments.to or ("orbax" if is_released else "hf")
    _check_effects(arguments, is_released, to)
    step = 0
    weights: HfSource | RunSource
    if is_released:
        weights = HfSource(open_checkpoint(source), ModelConfig.from_hf(source).with_dtypes(param_dtype=arguments.dtype))
    else:
        weights = RunSource(source, arguments.step)
        step = weights.step
        if to == "hf" and (times := weights.times_read()) >= 2:
            print(f"{source} keeps several layers together, so all of it is read about {times:.0f} times for each pass.")
    followed = arguments.like or (source if is_released else None)
    like = None if followed is None else open_checkpoint(followed)
    config = weights.config
    match arguments.quantization:
        case "fp8":
            config = dataclasses.replace(config, quantization=released_scheme(config))
        case "none":
            config = dataclasses.replace(config, quantization=None)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    written = 0
    with Progress(*columns, disable=jax.process_index() != 0) as bar:
        tasks: dict[str, TaskID] = {}

        def progress(what: str, done: int, total: int) -> None:
            nonlocal written
            written = max(written, done) if what == "writing" else written
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done, total=total)

        if to == "orbax":
            write_run(weights, destination, step, dtype=arguments.dtype, progress=progress)
        else:
            write_hf(
                weights,
                config,
                destination,
                dtype=arguments.dtype,
                like=None if arguments.dtype else like,
                carry=arguments.carry or (source if is_released else None),
                max_file_bytes=int(arguments.max_file_gb * 1e9),
                progress=progress,
            )
    return written


def _check_effects(arguments: argparse.Namespace, is_released: bool, to: str) -> None:
    """An option that would be passed over is a mistake."""
    for option, reason in (
        ("step", "the source is in the released layout" if is_released else ""),
        ("quantization", "checkpoints of runs are not quantised" if to == "orbax" else ""),
        ("like", "checkpoints of runs have one dtype" if to == "orbax" else "--dtype is given" if arguments.dtype else ""),
        ("carry", "checkpoints of runs hold weights only" if to == "orbax" else ""),
        ("distributed", "one process writes a checkpoint of a run" if to == "orbax" else ""),
    ):
        if reason and getattr(arguments, option) not in (None, "keep"):
            raise ConfigError(f"--{option} {getattr(arguments, option)} has no effect, because {reason}; drop it.")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="directory in the released layout, or of a run's checkpoints")
    parser.add_argument("destination", type=Path, help="directory to make")
    parser.add_argument("--to", choices=("hf", "orbax"), help="what to make; default the one that the source is not")
    parser.add_argument("--step", type=int, help="of a run's checkpoints; default the newest")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of what is not quantised; default as stored")
    parser.add_argument("--quantization", choices=("keep", "fp8", "none"), default="keep", help="default keep, what the source has")
    parser.add_argument("--like", type=Path, help="keep this checkpoint's dtypes and, where exact, its FP8 scales; default the source")
    parser.add_argument("--carry", type=Path, help="take tokenizer, template and processor files from here; default the source")
    parser.add_argument("--max_file_gb", type=float, default=MAX_FILE_BYTES / 1e9, help="size of a file of weights")
    parser.add_argument(
        "--distributed", nargs="*", metavar="HOST:PORT COUNT NUMBER", help="one of several processes; the three where no cluster tells them"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
