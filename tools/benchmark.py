"""What the benchmarks share: preparing the process, timing, the machine's own peak, and printing."""

from __future__ import annotations

import dataclasses
import os
import resource
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from interns1pro_jax.host_memory import keep_freed_memory


def prepare(devices: int) -> None:
    """Sets up the CPU backend with so many emulated devices; must run before JAX looks for devices."""
    flag = f"--xla_force_host_platform_device_count={devices}"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()
    jax.config.update("jax_platforms", "cpu")
    keep_freed_memory()


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of several repetitions: on the clock, and of all the process's threads together."""

    wall: tuple[float, ...]
    cpu: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.wall)

    @property
    def best(self) -> float:
        return min(self.wall)

    @property
    def least_cpu(self) -> float:
        return min(self.cpu)


def measure(run: Callable[[], Any], repetitions: int) -> Timing:
    """Times `run`, which must wait for its own results, after one call that is not counted."""
    run()
    wall, cpu = [], []
    for _ in range(repetitions):
        wall_start, cpu_start = time.perf_counter(), time.process_time()
        run()
        wall.append(time.perf_counter() - wall_start)
        cpu.append(time.process_time() - cpu_start)
    return Timing(tuple(wall), tuple(cpu))


@dataclasses.dataclass(frozen=True)
class Peak:
    """The fastest matrix product found on this machine, in operations per second."""

    wall: float
    per_cpu_second: float


def matmul_peak(dtype: str, repetitions: int = 5) -> Peak:
    """Measures products of `dtype` operands with fp32 results at sizes that suit XLA:CPU; the best of each counts.

    It is the ceiling for anything built from XLA's products here and now, on a machine that may be busy with other work.
    """
    peaks = []
    for rows, inner, columns in ((2048, 512, 512), (2048, 2048, 2048), (512, 512, 8192)):
        product = jax.jit(lambda x, y: jnp.dot(x, y, preferred_element_type=jnp.float32))
        x, y = jnp.ones((rows, inner), dtype), jnp.ones((inner, columns), dtype)
        flops = 2 * rows * inner * columns
        calls = -(-(2 * 10**10) // flops)  # long enough for the clock of CPU time

        def multiply(x=x, y=y, product=product, calls=calls) -> None:  # type: ignore[no-untyped-def]
            for _ in range(calls):
                product(x, y).block_until_ready()

        timing = measure(multiply, repetitions)
        peaks.append(Peak(calls * flops / timing.best, calls * flops / timing.least_cpu))
    return Peak(max(p.wall for p in peaks), max(p.per_cpu_second for p in peaks))


def resident_peak_gib() -> float:
    """Largest memory use of this process so far, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def program_gib(program: jax.stages.Compiled) -> str:
    """Memory that a compiled program needs, by the compiler's own account."""
    memory = program.memory_analysis()
    if memory is None:
        return "not reported"
    arguments, temporaries = memory.argument_size_in_bytes / 2**30, memory.temp_size_in_bytes / 2**30
    return f"{arguments:.2f} GiB arguments + {temporaries:.2f} GiB temporaries per device"


def speed_lines(timing: Timing, tokens: int, flops: int, peak: Peak) -> dict[str, str]:
    """Tokens per second, and the rate of useful operations beside the measured peak of matrix products."""
    wall, cpu = flops / timing.best, flops / timing.least_cpu
    return {
        "tokens/s": f"{tokens / timing.median:.1f} median, {tokens / timing.best:.1f} best of {len(timing.wall)}",
        "tokens per CPU-second": f"{tokens / timing.least_cpu:.1f}",
        "useful GFLOP/s": f"{wall / 1e9:.1f} (per CPU-second {cpu / 1e9:.1f})",
        "matmul peak GFLOP/s": f"{peak.wall / 1e9:.1f} (per CPU-second {peak.per_cpu_second / 1e9:.1f})",
        "share of peak": f"{wall / peak.wall:.1%} (per CPU-second {cpu / peak.per_cpu_second:.1%})",
    }


def report(title: str, lines: dict[str, str]) -> None:
    print(title)
    for key, value in lines.items():
        print(f"  {key:<24}{value}")
    load = os.getloadavg()[0]
    print(f"  {'machine':<24}{os.cpu_count()} CPUs, load {load:.1f}, jax {jax.__version__}", flush=True)
