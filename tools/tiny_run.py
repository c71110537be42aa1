"""A tiny real training run, to be killed and started again, for the tests and for `tools.soak`.

    python -m tools.tiny_run WORKDIR [--steps N] [--kill EVENT WHERE | --term STEP | --hang STEP] [--cache DIR] [--process I COUNT ADDRESS]

With `--kill` the process kills itself with SIGKILL right before an audit event of the interpreter on a path that ends with
WHERE: `os.mkdir` of a checkpoint's temporary directory opens a save, the `os.rename` to the checkpoint's name makes it complete,
the `os.rename` to `deleted` takes it away. The event `step` is the start of a training step, WHERE its number. `--term` sends
SIGTERM at the start of a step instead, `--hang` never returns from it. `--cache` keeps compiled programs in a directory. With `--process`
it is process I of COUNT that find each other at ADDRESS; the devices of all are those of one process alone.
"""

import argparse
import dataclasses
import os
import signal
import sys
import threading
from pathlib import Path

DEVICES = 4

_COUNT = int(sys.argv[sys.argv.index("--process") + 2]) if "--process" in sys.argv else 1
os.environ["JAX_PLATFORMS"] = "cpu"
# Nearly all of its time would go into compiling.
_FLAGS = f"--xla_force_host_platform_device_count={DEVICES // _COUNT} --xla_backend_optimization_level=0"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAGS}"

import jax
import numpy as np

from interns1pro_jax.checkpoint.manager import CheckpointManager
from interns1pro_jax.config import ModelConfig, TextConfig
from interns1pro_jax.models.inputs import Batch, ModelInputs
from interns1pro_jax.models.interns1pro import create_model
from interns1pro_jax.optim.optimizer import OptimizerConfig, make_optimizer
from interns1pro_jax.optim.schedule import warmup_stable_decay
from interns1pro_jax.sharding import make_mesh
from interns1pro_jax.train.loop import LoopConfig, train
from interns1pro_jax.train.state import init_state
from interns1pro_jax.train.step import StepConfig, make_train_step

CONFIG = TextConfig(
    vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_experts=16,
    router_n_groups=8, moe_intermediate_size=16, max_position_embeddings=64, dtype="bfloat16", param_dtype="float32",
)  # fmt: skip


class RandomBatches:
    """Sequences that depend on the step alone, and can be learnt: from token t the next is 3 t or 3 t + 1."""

    def __getitem__(self, step: int) -> Batch:
        rng = np.random.default_rng(step)
        tokens = np.empty((8, 17), np.int32)
        tokens[:, 0] = rng.integers(0, CONFIG.vocab_size, 8)
        for place in range(1, 17):
            tokens[:, place] = (3 * tokens[:, place - 1] + rng.integers(0, 2, 8)) % CONFIG.vocab_size
        positions = np.broadcast_to(np.arange(16, dtype=np.int32), (8, 16))
        return Batch(ModelInputs(tokens[:, :-1], positions, np.ones((8, 16), np.int32)), tokens[:, 1:])  # type: ignore[arg-type]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("workdir", type=Path)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--every", type=int, default=3, help="steps between checkpoints")
    parser.add_argument("--mesh", type=int, nargs=2, default=(2, 2), metavar=("FSDP", "EXPERT"))
    parser.add_argument("--microbatches", type=int, default=1)
    parser.add_argument("--dtype", default="bfloat16", help="of activations and products")
    parser.add_argument("--kill", nargs=2, metavar=("EVENT", "WHERE"), default=("", ""))
    parser.add_argument("--term", metavar="STEP")
    parser.add_argument("--hang", metavar="STEP")
    parser.add_argument("--cache", metavar="DIR")
    parser.add_argument("--process", nargs=3, metavar=("I", "COUNT", "ADDRESS"))
    arguments = parser.parse_args()
    if arguments.process:
        index, count, address = arguments.process
        jax.distributed.initialize(address, int(count), int(index), heartbeat_timeout_seconds=30, shutdown_timeout_seconds=30)
    if arguments.cache:
        jax.config.update("jax_compilation_cache_dir", arguments.cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)

    def happens(event: str, details: tuple) -> None:
        if event == arguments.kill[0] and any(str(x).endswith(arguments.kill[1]) for x in details):
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(happens)
    fsdp, expert = arguments.mesh
    with jax.set_mesh(make_mesh(fsdp=fsdp, expert=expert, devices=jax.devices()[: fsdp * expert])):
        optimizer = make_optimizer(OptimizerConfig(), warmup_stable_decay(1e-2, arguments.steps, warmup_steps=2))
        config = dataclasses.replace(CONFIG, dtype=arguments.dtype)
        graphdef, state = init_state(create_model(ModelConfig(config, None, None)), optimizer)
        step_fn = make_train_step(graphdef, config, optimizer, StepConfig(microbatches=arguments.microbatches))
        done = 0

        def step(state, batch):
            nonlocal done
            done = done or int(state.step)
            number, done = f"/{done}", done + 1
            happens("step", (number,))
            if number == f"/{arguments.term}":
                os.kill(os.getpid(), signal.SIGTERM)
            if number == f"/{arguments.hang}":
                threading.Event().wait()
            return step_fn(state, batch)

        with CheckpointManager(arguments.workdir / "checkpoints", {"seed": 0}, keep_last=1) as checkpoints:
            loop = LoopConfig(arguments.steps, checkpoint_every=arguments.every, hang_seconds=2 if arguments.hang else None)
            train(state, step, RandomBatches(), loop, workdir=arguments.workdir, checkpoints=checkpoints)


if __name__ == "__main__":
    main()
