"""A run whose step is only arithmetic, for laws of the loop: one wrong bit or batch shows in all later losses."""

import dataclasses
import io

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.console import Console

from interns1pro_jax.checkpoint.manager import CheckpointManager
from interns1pro_jax.train.faults import FaultPolicy, empty_history, remember
from interns1pro_jax.train.loop import LoopConfig, train
from interns1pro_jax.train.metrics import read_records
from interns1pro_jax.train.state import TrainState, add_tokens

WINDOW = 4
POLICY = FaultPolicy(max_grad_norm=500, spike_deviations=100, window=WINDOW)


def make_state() -> TrainState:
    return TrainState(
        step=jnp.int32(0),
        params=nnx.State({"w": nnx.Param(jnp.ones(4))}),
        buffers=nnx.State({}),
        opt_state=(),
        tokens_seen=jnp.zeros(2, jnp.uint32),
        skipped=jnp.int32(0),
        history=empty_history(WINDOW),
    )


@jax.jit
def step_fn(state, batch):
    """A chaotic map, so that one wrong bit or batch shows in all later losses. Its judgement of bad steps is that of the real one."""
    x = batch["x"].mean()
    w = 3.9 * (state.params["w"][...] % 1) * (1 - state.params["w"][...] % 1) + x % 10 * 1e-3
    loss = jnp.where(x < 1000, w.sum(), x - 1000)
    limits = POLICY.limits(state.history)
    good = jnp.isfinite(loss) & (loss <= limits).all()
    w = jnp.where(good, w, state.params["w"][...])
    tokens = jnp.float32(10)
    metrics = dict(loss=loss, tokens=tokens, grad_norm=loss, learning_rate=jnp.float32(0.1), applied=good, load=w.reshape(2, 2))
    after = dataclasses.replace(
        state,
        step=state.step + 1,
        params=nnx.State({"w": state.params["w"].replace(w)}),
        tokens_seen=add_tokens(state.tokens_seen, tokens),
        skipped=state.skipped + jnp.where(good, 0, 1),
        history=remember(state.history, state.step - state.skipped, loss, loss, good),
    )
    return after, metrics | {"limits": limits}


class Numbers:
    """Batch n is n everywhere; chosen batches are poisoned, or do something while they are made."""

    def __init__(self, poisoned=(), on=None, poison=np.nan):
        self.asked, self.poisoned, self.on, self.poison = [], poisoned, on or {}, poison

    def __getitem__(self, step):
        self.asked.append(step)
        self.on.get(step, lambda: None)()
        return {"x": np.full((8, 2), self.poison if step in self.poisoned else step, np.float32)}


def run(workdir, steps=10, batches=None, identity=None, step=step_fn, output=None, evaluate=None, data=None, **config):
    console = Console(file=output or io.StringIO(), force_terminal=False)
    with CheckpointManager(workdir / "checkpoints", identity or {}) as checkpoints:
        config = LoopConfig(steps=steps, **{"checkpoint_every": 4, "log_every": 5, **config})
        return train(
            make_state(),
            step,
            batches or Numbers(),
            config,
            workdir=workdir,
            checkpoints=checkpoints,
            data=data,
            evaluate=evaluate,
            console=console,
        )


def losses(workdir):
    return [(record["step"], record["loss"], record["tokens_seen"]) for record in read_records(workdir)]
