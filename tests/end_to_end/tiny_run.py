"""A tiny real training run, to be killed and started again.

    tiny_run.py WORKDIR [--kill EVENT WHERE | --term STEP] [--cache DIR]

With `--kill` the process kills itself with SIGKILL right before an audit event of the interpreter on a path that ends with
WHERE: `os.mkdir` of a checkpoint's temporary directory opens a save, the `os.rename` to the checkpoint's name makes it complete,
the `os.rename` to `deleted` takes it away. The event `step` is the start of a training step, WHERE its number. `--term` sends
SIGTERM at the start of a step instead. `--cache` keeps compiled programs in a directory.
"""

import argparse
import os
import signal
import sys
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"

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
from interns1pro_jax.train.step import make_train_step

STEPS, EVERY = 12, 3
CONFIG = TextConfig(
    vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_experts=16,
    router_n_groups=8, moe_intermediate_size=16, max_position_embeddings=64, dtype="bfloat16", param_dtype="float32",
)  # fmt: skip


class RandomBatches:
    """Tokens that depend on the step alone."""

    def __getitem__(self, step: int) -> Batch:
        tokens = np.random.default_rng(step).integers(0, CONFIG.vocab_size, (8, 16), dtype=np.int32)
        positions = np.broadcast_to(np.arange(16, dtype=np.int32), tokens.shape)
        return Batch(ModelInputs(tokens, positions, np.ones_like(tokens)), np.roll(tokens, -1, axis=1))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("workdir", type=Path)
    parser.add_argument("--kill", nargs=2, metavar=("EVENT", "WHERE"), default=("", ""))
    parser.add_argument("--term", metavar="STEP")
    parser.add_argument("--cache", metavar="DIR")
    arguments = parser.parse_args()
    if arguments.cache:
        jax.config.update("jax_compilation_cache_dir", arguments.cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)

    def happens(event: str, details: tuple) -> None:
        if event == arguments.kill[0] and any(str(x).endswith(arguments.kill[1]) for x in details):
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(happens)
    with jax.set_mesh(make_mesh(fsdp=2, expert=2)):
        optimizer = make_optimizer(OptimizerConfig(), warmup_stable_decay(1e-2, STEPS, warmup_steps=2))
        graphdef, state = init_state(create_model(ModelConfig(CONFIG, None, None)), optimizer)
        step_fn = make_train_step(graphdef, CONFIG, optimizer)

        def step(state, batch):
            happens("step", (number := f"/{state.step}",))
            if number == f"/{arguments.term}":
                os.kill(os.getpid(), signal.SIGTERM)
            return step_fn(state, batch)

        with CheckpointManager(arguments.workdir / "checkpoints", {"seed": 0}, keep_last=1) as checkpoints:
            config = LoopConfig(STEPS, checkpoint_every=EVERY)
            train(state, step, RandomBatches(), config, workdir=arguments.workdir, checkpoints=checkpoints)


if __name__ == "__main__":
    main()
