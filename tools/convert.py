"""Converts checkpoints: the released layout (safetensors), with or without FP8, and the checkpoints of this project's runs.

    python -m tools.convert runs/sft/checkpoints out                        # a run's newest weights, in the released layout
    python -m tools.convert runs/sft/checkpoints out --step 500 --quantization fp8 --carry Intern-S1-Pro
    python -m tools.convert Intern-S1-Pro weights --to orbax                # a checkpoint that `read_weights` reads
    python -m tools.convert Intern-S1-Pro-FP8 Intern-S1-Pro-BF16 --to hf --quantization none

What is only read and written stays the same to the byte, FP8 scales included. A conversion that was interrupted goes on with the next
file when it is started again. On several hosts every process runs the same command with --distributed; each reads and writes the bytes of
its own devices. Exits with 1 where the checkpoint, the disk or the configuration is at fault.
"""

from __future__ import annotations

import argparse
import dataclasses
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jax
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from interns1pro_jax.checkpoint.errors import CheckpointError
from interns1pro_jax.checkpoint.hf_export import MAX_FILE_BYTES, export_model, released_scheme
from interns1pro_jax.checkpoint.hf_import import load_model
from interns1pro_jax.checkpoint.safetensors_io import open_checkpoint
from interns1pro_jax.checkpoint.weights import read_weights, write_weights
from interns1pro_jax.config import ConfigError
from interns1pro_jax.sharding import make_mesh


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    arguments = _parser().parse_args(argv)
    if arguments.distributed:
        jax.distributed.initialize()
    try:
        started = time.monotonic()
        with jax.set_mesh(make_mesh(fsdp=arguments.fsdp, expert=arguments.expert)):
            _convert(arguments)
    except (CheckpointError, ConfigError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{arguments.destination}: done in {time.monotonic() - started:.0f} s; this process held {peak:.2f} GiB at its peak")
    return 0


def _convert(arguments: argparse.Namespace) -> None:
    source, destination = arguments.source, arguments.destination
    is_released = (source / "config.json").exists()
    to = arguments.to or ("orbax" if is_released else "hf")
    _check_effects(arguments, is_released, to)
    if is_released:
        model, step = load_model(source, param_dtype=arguments.dtype), 0
    else:
        model, step = read_weights(source, arguments.step, param_dtype=arguments.dtype)
    followed = arguments.like or (source if is_released else None)
    like = None if followed is None else open_checkpoint(followed)
    config = model.config
    match arguments.quantization:
        case "fp8":
            config = dataclasses.replace(config, quantization=released_scheme(config))
        case "none":
            config = dataclasses.replace(config, quantization=None)
    identity = f"{source.absolute()} {step}"
    if to == "orbax":
        write_weights(destination, model, step, identity)
        return
    carry = arguments.carry or (source if is_released else None)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=jax.process_index() != 0) as bar:
        task = bar.add_task(f"writing {destination}", total=None)
        export_model(
            model,
            config,
            destination,
            dtype=arguments.dtype,
            like=None if arguments.dtype else like,
            carry=carry,
            max_file_bytes=int(arguments.max_file_gb * 1e9),
            identity=identity,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )


def _check_effects(arguments: argparse.Namespace, is_released: bool, to: str) -> None:
    """An option that would be passed over is a mistake."""
    for option, reason in (
        ("step", "the source is in the released layout" if is_released else ""),
        ("quantization", "checkpoints of runs are not quantised" if to == "orbax" else ""),
        ("like", "checkpoints of runs have one dtype" if to == "orbax" else "--dtype is given" if arguments.dtype else ""),
        ("carry", "checkpoints of runs hold weights only" if to == "orbax" else ""),
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
    parser.add_argument("--fsdp", type=int, default=1, help="devices over which weights are split")
    parser.add_argument("--expert", type=int, default=1, help="devices over which expert groups are split")
    parser.add_argument("--distributed", action="store_true", help="one of several processes")
    return parser


if __name__ == "__main__":
    sys.exit(main())
