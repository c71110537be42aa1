"""What saves cost the loop: `python -m tools.benchmark_checkpoints [--every 50] [--steps 150] [--megabytes 64]`.

Trains a step of matrix products on one device twice, with a state of `--megabytes` MB that is saved every so many steps and at the end, and
without saves. Prints what the clock of the loop says: the share of its time that it waited for a save, and how much longer a step took
while saves were written behind it. On a host whose cores also compute, the second is the larger. An accelerator wants longer steps:
`--products 50 --width 8192`.
"""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging
from flax import nnx
from rich.console import Console

from interns1pro_jax.checkpoint.manager import CheckpointManager
from interns1pro_jax.sharding import make_mesh
from interns1pro_jax.train.faults import empty_history
from interns1pro_jax.train.journal import Journal
from interns1pro_jax.train.loop import LoopConfig, train
from interns1pro_jax.train.state import TrainState

_EVERY = flags.DEFINE_integer("every", 50, "Steps between saves.", lower_bound=1)
_STEPS = flags.DEFINE_integer("steps", 150, "Steps of each run.", lower_bound=2)
_MEGABYTES = flags.DEFINE_integer("megabytes", 64, "Of the state.", lower_bound=1)
_WIDTH = flags.DEFINE_integer("width", 1024, "Of the matrices.", lower_bound=1)
_PRODUCTS = flags.DEFINE_integer("products", 4, "Of a step.", lower_bound=1)
_COLUMNS = 1024  # of the state


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}.")
    logging.set_verbosity(logging.WARNING)
    with jax.set_mesh(make_mesh()):
        _run(None, 3)  # compiles
        without, with_saves = _run(None), _run(_EVERY.value)
    saves = -(-_STEPS.value // _EVERY.value)
    total = sum(with_saves[phase] for phase in ("step", "data", "save"))
    print(f"{jax.devices()[0].device_kind}, JAX {jax.__version__}")
    print(f"{_STEPS.value} steps, a state of {_MEGABYTES.value} MB, saved every {_EVERY.value} steps ({saves} saves)")
    print(f"the loop waits for saves: {with_saves['save']:.3f} s of {total:.2f} s, {with_saves['save'] / total:.2%}")
    print(
        f"steps: {without['step']:.2f} s without saves, {with_saves['step']:.2f} s with ({with_saves['step'] / without['step'] - 1:+.2%})"
    )


def _run(every: int | None, steps: int | None = None) -> dict[str, float]:
    """Seconds by phase of a run; without saves but the one at the end, whose time is left out, where `every` is None."""
    state = TrainState(
        step=jnp.int32(0),
        params=nnx.State({"w": nnx.Param(jnp.ones((_MEGABYTES.value * 2**20 // (4 * _COLUMNS), _COLUMNS)))}),
        buffers=nnx.State({}),
        opt_state=(),
        tokens_seen=jnp.zeros(2, jnp.uint32),
        skipped=jnp.int32(0),
        history=empty_history(2),
    )
    with tempfile.TemporaryDirectory() as directory, CheckpointManager(Path(directory) / "checkpoints", {}) as checkpoints:
        journal = Journal(Path(directory))
        config = LoopConfig(steps or _STEPS.value, checkpoint_every=every, log_every=10**6)
        console = Console(quiet=True)
        train(state, _step, _Batches(), config, workdir=Path(directory), checkpoints=checkpoints, journal=journal, console=console)
        return journal.clock.seconds


class _Batches:
    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        return {"x": np.full(1, 1e-3, np.float32)}


@jax.jit
def _step(state: TrainState, batch: dict[str, jax.Array]) -> tuple[TrainState, dict[str, jax.Array]]:
    x = y = jnp.eye(_WIDTH.value) + batch["x"]
    for _ in range(_PRODUCTS.value):
        y = y @ x
        y = y / jnp.linalg.norm(y)
    weights: Any = state.params["w"]
    ones = jnp.float32(1)
    metrics = dict(loss=y.mean(), tokens=ones, grad_norm=ones, learning_rate=ones, applied=ones)
    params = nnx.State({"w": weights.replace(weights[...] + y.sum() * 1e-9)})
    return dataclasses.replace(state, step=state.step + 1, params=params), metrics


if __name__ == "__main__":
    app.run(main)
