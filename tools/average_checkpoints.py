"""Averages the weights of several checkpoints of a run, as after a stable learning rate or for a choice of the best.

    python -m tools.average_checkpoints runs/sft/checkpoints out --last 3          # the newest three
    python -m tools.average_checkpoints runs/sft/checkpoints out --steps 500 900   # these

Means are computed in float32, a few boxes of weights of all checkpoints at a time, so that a host without accelerators averages models of
any size. The result is a checkpoint that `tools.convert`, `train.weights` and `read_weights` take; its adapters are merged.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from interns1pro_jax.checkpoint.errors import CheckpointError
from interns1pro_jax.checkpoint.hf_names import HfParameter
from interns1pro_jax.checkpoint.sources import RunSource, steps_in
from interns1pro_jax.checkpoint.stream import write_run
from interns1pro_jax.config import ConfigError


class Mean:
    """The weights of these checkpoints' mean, computed in float32, in the dtypes of the first: a `checkpoint.sources.Source`.

    Raises:
      ConfigError: there are less than two.
      CheckpointError: one of them cannot be read, or is of another model.
    """

    def __init__(self, directory: Path, steps: Sequence[int]):
        if len(steps) < 2:
            raise ConfigError(
                f"an average needs two checkpoints or more; {directory} has {steps_in(directory) or 'none'}, chosen are {list(steps)}."
            )
        self._sources = [RunSource(directory, step) for step in steps]
        self.config = self._sources[0].config
        self.identity = f"mean of steps {list(steps)} of {directory.absolute()}"
        for source in self._sources:
            if source.config != self.config:
                raise CheckpointError(
                    f"{source.directory} is of another model than {self._sources[0].directory}; average checkpoints of one run."
                )

    def dtype(self, parameter: HfParameter) -> np.dtype:
        return self._sources[0].dtype(parameter)

    def experts_together(self, parameter: HfParameter) -> int:
        return self._sources[0].experts_together(parameter)

    def read(self, parameter: HfParameter, box: Sequence[slice]) -> np.ndarray:
        first, *rest = self._sources
        total = first.read(parameter, box).astype(np.float32)
        for source in rest:
            total += source.read(parameter, box)
        return (total / len(self._sources)).astype(self.dtype(parameter))


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(prog="average_checkpoints", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="directory of a run's checkpoints")
    parser.add_argument("destination", type=Path, help="directory to make")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--steps", type=int, nargs="+", help="checkpoints to average")
    which.add_argument("--last", type=int, help="average so many of the newest")
    arguments = parser.parse_args(argv)
    if arguments.last is not None and arguments.last < 2:
        parser.error(f"--last {arguments.last} is no average; give 2 or more.")
    steps = sorted(set(arguments.steps)) if arguments.steps else steps_in(arguments.source)[-arguments.last :]
    try:
        mean = Mean(arguments.source, steps)
        with Progress(TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn()) as bar:
            tasks: dict[str, TaskID] = {}

            def progress(what: str, done: int, total: int) -> None:
                if what not in tasks:
                    tasks[what] = bar.add_task(what, total=total)
                bar.update(tasks[what], completed=done, total=total)

            write_run(mean, arguments.destination, steps[-1], progress=progress)
    except (CheckpointError, ConfigError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{arguments.destination}: mean of the checkpoints of steps {steps}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
