"""Averages the weights of several checkpoints of a run, as after a stable learning rate or for a choice of the best.

    python -m tools.average_checkpoints runs/sft/checkpoints out --last 3          # the newest three
    python -m tools.average_checkpoints runs/sft/checkpoints out --steps 500 900   # these

One checkpoint after the other is added up in float32, so that two models are in memory, split over the devices, however many are averaged.
The result is a checkpoint that `tools.convert`, `train.weights` and `read_weights` take.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx

from interns1pro_jax.checkpoint.errors import CheckpointError
from interns1pro_jax.checkpoint.weights import read_weights, write_weights
from interns1pro_jax.config import ConfigError
from interns1pro_jax.models.interns1pro import InternS1Pro
from interns1pro_jax.sharding import make_mesh


def average(directory: Path, steps: Sequence[int]) -> InternS1Pro:
    """The mean of the weights of these checkpoints, computed in float32, in the dtypes of the first."""
    model, _ = read_weights(directory, steps[0])
    graph, state = nnx.split(model)
    dtypes = jax.tree.map(lambda x: x.dtype, state)
    total = jax.tree.map(lambda x: x.astype(jnp.float32), state)
    add = jax.jit(lambda total, state: jax.tree.map(lambda t, x: t + x, total, state), donate_argnums=0)
    for step in steps[1:]:
        total = add(total, nnx.split(read_weights(directory, step)[0])[1])
        print(f"step {step} added", flush=True)
    return nnx.merge(graph, jax.tree.map(lambda t, dtype: (t / len(steps)).astype(dtype), total, dtypes))


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(prog="average_checkpoints", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="directory of a run's checkpoints")
    parser.add_argument("destination", type=Path, help="directory to make")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--steps", type=int, nargs="+", help="checkpoints to average")
    which.add_argument("--last", type=int, help="average so many of the newest")
    parser.add_argument("--fsdp", type=int, default=1, help="devices over which weights are split")
    parser.add_argument("--expert", type=int, default=1, help="devices over which expert groups are split")
    arguments = parser.parse_args(argv)
    there = sorted(int(path.name) for path in arguments.source.glob("*") if path.name.isdecimal())
    steps = sorted(set(arguments.steps)) if arguments.steps else there[max(0, len(there) - arguments.last) :]
    try:
        if len(steps) < 2:
            raise ConfigError(f"an average needs two checkpoints or more; {arguments.source} has {there or 'none'}, chosen are {steps}.")
        with jax.set_mesh(make_mesh(fsdp=arguments.fsdp, expert=arguments.expert)):
            write_weights(
                arguments.destination, average(arguments.source, steps), steps[-1], f"mean of steps {steps} of {arguments.source}"
            )
    except (CheckpointError, ConfigError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{arguments.destination}: mean of the checkpoints of steps {steps}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
