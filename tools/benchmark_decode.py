"""Speed of generation: `python -m tools.benchmark_decode --config bench-cpu [--batch 8] [--devices 8] [--dtype bfloat16]`.

Prints new tokens per second, the prompt's prefill included (median and best of several repetitions after compilation), compile
time, peak memory, and the share of the machine's matrix-product peak, measured in the same run. Greedy, no stop token.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import jax
import numpy as np
from absl import app, flags

from interns1pro_jax.config import ConfigError
from interns1pro_jax.infer.generate import generate
from interns1pro_jax.models.inputs import ModelInputs
from interns1pro_jax.models.interns1pro import create_model
from interns1pro_jax.sharding import make_mesh
from tools import benchmark, benchmark_configs

_CONFIG = flags.DEFINE_string("config", "bench-cpu", f"One of {', '.join(benchmark_configs.CONFIGS)}.")
_BATCH = flags.DEFINE_multi_integer("batch", [1, 8], "Rows decoded together; may be given several times.", lower_bound=1)
_DEVICES = flags.DEFINE_integer("devices", 1, "Emulated CPU devices, all on the mesh axis `expert`.", lower_bound=1)
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Dtype of activations, products and parameters.")
_REPETITIONS = flags.DEFINE_integer("repetitions", 5, "Generations that are timed.", lower_bound=1)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}.")
    try:
        bench = benchmark_configs.get(_CONFIG.value)
        benchmark.prepare(_DEVICES.value)
        peak = benchmark.matmul_peak(_DTYPE.value)
        with jax.set_mesh(make_mesh(expert=_DEVICES.value)):
            model = create_model(bench.model(_DTYPE.value, _DTYPE.value))
            for batch in _BATCH.value:
                run(bench, model, batch, peak)
    except ConfigError as error:
        sys.exit(f"error: {error}")


def run(bench: benchmark_configs.Benchmark, model, batch: int, peak: benchmark.Peak) -> None:  # type: ignore[no-untyped-def]
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, bench.text.vocab_size, (batch, bench.prompt), dtype=np.int32)
    positions = np.broadcast_to(np.arange(bench.prompt, dtype=np.int32), (batch, bench.prompt))
    arrays: list[Any] = [tokens, positions, np.ones((batch, bench.prompt), np.int32)]
    inputs = ModelInputs(*arrays)
    start = time.perf_counter()
    generate(model, inputs, bench.new_tokens)
    first_seconds = time.perf_counter() - start
    timing = benchmark.measure(lambda: generate(model, inputs, bench.new_tokens), _REPETITIONS.value)
    whole = bench.prompt + bench.new_tokens
    flops = benchmark_configs.useful_flops(bench.text, batch * whole, whole, training=False)
    title = (
        f"{_CONFIG.value} decoding: batch {batch}, {bench.prompt} + {bench.new_tokens} tokens, {_DEVICES.value} device(s), {_DTYPE.value}"
    )
    lines = benchmark.speed_lines(timing, batch * bench.new_tokens, flops, peak) | {
        "compile time": f"{first_seconds - timing.median:.1f} s",
        "peak memory": f"{benchmark.resident_peak_gib():.2f} GiB resident",
    }
    benchmark.report(title, lines)


if __name__ == "__main__":
    app.run(main)
