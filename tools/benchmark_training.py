"""Speed of the training step: `python -m tools.benchmark_training --config bench-cpu [--devices 8] [--dtype bfloat16]`.

Prints tokens per second (median and best of several steps after compilation), compile time, peak memory, and the share of the
machine's matrix-product peak, measured in the same run. The step is the one that training runs: loss, router losses,
gradients, clipping, AdamW, metrics.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import jax
import numpy as np
from absl import app, flags

from interns1pro_jax.config import ConfigError
from interns1pro_jax.layers.decoder import REMAT
from interns1pro_jax.models.inputs import Batch, ModelInputs
from interns1pro_jax.models.interns1pro import create_model
from interns1pro_jax.optim.optimizer import OptimizerConfig, make_optimizer
from interns1pro_jax.optim.schedule import constant
from interns1pro_jax.sharding import make_mesh
from interns1pro_jax.train.feed import place_batch
from interns1pro_jax.train.state import init_state
from interns1pro_jax.train.step import StepConfig, make_train_step
from tools import benchmark, benchmark_configs

_CONFIG = flags.DEFINE_string("config", "bench-cpu", f"One of {', '.join(benchmark_configs.CONFIGS)}.")
_DEVICES = flags.DEFINE_integer("devices", 1, "Emulated CPU devices, all on the mesh axis `expert`.", lower_bound=1)
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Dtype of activations and products.")
_REMAT = flags.DEFINE_enum("remat", "none", list(REMAT), "What the backward pass recomputes.")
_REPETITIONS = flags.DEFINE_integer("repetitions", 5, "Steps that are timed.", lower_bound=1)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}.")
    try:
        run(benchmark_configs.get(_CONFIG.value))
    except ConfigError as error:
        sys.exit(f"error: {error}")


def run(bench: benchmark_configs.Benchmark) -> None:
    benchmark.prepare(_DEVICES.value)
    peak = benchmark.matmul_peak(_DTYPE.value)
    rows = max(bench.batch, _DEVICES.value)  # every device needs a row
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, bench.text.vocab_size, (rows, bench.sequence + 1), dtype=np.int32)
    positions = np.broadcast_to(np.arange(bench.sequence, dtype=np.int32), (rows, bench.sequence))
    arrays: list[Any] = [tokens[:, :-1], positions, np.ones((rows, bench.sequence), np.int32)]
    labels: Any = tokens[:, 1:]
    with jax.set_mesh(make_mesh(expert=_DEVICES.value)):
        optimizer = make_optimizer(OptimizerConfig(), constant(1e-4))
        config = bench.model(_DTYPE.value, "float32")
        graphdef, state = init_state(create_model(config), optimizer)
        batch = place_batch(Batch(ModelInputs(*arrays), labels))
        start = time.perf_counter()
        jitted: Any = make_train_step(graphdef, config.text, optimizer, StepConfig(remat=_REMAT.value))
        step = jitted.lower(state, batch).compile()
        compile_seconds = time.perf_counter() - start

        metrics: dict[str, jax.Array] = {}

        def train_step() -> None:
            nonlocal state, metrics
            state, metrics = jax.block_until_ready(step(state, batch))

        timing = benchmark.measure(train_step, _REPETITIONS.value)
    count = rows * bench.sequence
    flops = benchmark_configs.useful_flops(bench.text, count, bench.sequence, training=True)
    title = (
        f"{_CONFIG.value} training: {rows} x {bench.sequence} tokens, {_DEVICES.value} device(s), {_DTYPE.value} "
        f"(parameters float32), remat {_REMAT.value}"
    )
    lines = benchmark.speed_lines(timing, count, flops, peak) | {
        "compile time": f"{compile_seconds:.1f} s",
        "step memory": benchmark.program_gib(step),
        "peak memory": f"{benchmark.resident_peak_gib():.2f} GiB resident",
        "loss": f"{float(metrics['loss']):.4f} after {_REPETITIONS.value + 1} steps on one batch",
    }
    benchmark.report(title, lines)


if __name__ == "__main__":
    app.run(main)
