"""What a recipe may bind. The library knows no gin: its functions and dataclasses are registered here, under their own names."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Sequence
from typing import Any

import gin
import jax

from experiments.expand import expand
from experiments.expansion_study import expansion_study
from experiments.train import train
from interns1pro_jax import config, sharding
from interns1pro_jax.data import corpus, image_processing, mixture, packing, pipeline, plan
from interns1pro_jax.expansion.assignment import ExpansionConfig
from interns1pro_jax.infer import sampling
from interns1pro_jax.optim import batch_warmup, muon, optimizer, schedule
from interns1pro_jax.train.faults import FaultPolicy
from interns1pro_jax.train.loop import LoopConfig
from interns1pro_jax.train.objective import Objective
from interns1pro_jax.train.step import StepConfig

_DATACLASSES = (
    config.ModelConfig,
    config.TextConfig,
    config.VisionConfig,
    config.TimeSeriesConfig,
    config.FopeConfig,
    config.RouterConfig,
    config.LoraConfig,
    sharding.MeshConfig,
    packing.RowSize,
    corpus.Corpus,
    image_processing.PixelBounds,
    mixture.CurriculumStage,
    mixture.Source,
    pipeline.ReadConfig,
    plan.PipelineConfig,
    sampling.Sampling,
    muon.MuonConfig,
    batch_warmup.BatchWarmup,
    optimizer.OptimizerConfig,
    FaultPolicy,
    ExpansionConfig,
    Objective,
    LoopConfig,
    StepConfig,
)
_FUNCTIONS = (schedule.warmup_stable_decay, schedule.constant, schedule.cosine, expand, expansion_study, train)


def register() -> None:
    """Makes everything above bindable; call once."""
    for target in (*_DATACLASSES, *_FUNCTIONS):
        gin.external_configurable(_as_function(target), name=target.__name__)


def _as_function(target: Callable[..., Any]) -> Callable[..., Any]:
    """Gin would subclass a class, and an instance of the subclass is not equal to one of the class; a function it leaves alone."""
    if not inspect.isclass(target):
        return target

    def build(*args: Any, **kwargs: Any) -> Any:
        return target(*args, **kwargs)

    build.__signature__ = inspect.signature(target)  # type: ignore[attr-defined]
    build.__name__ = build.__qualname__ = target.__name__
    build.__doc__ = target.__doc__
    return build


# openxla.org/xla/determinism: no operations of random order, no kernels chosen by the clock.
_DETERMINISTIC = ("--xla_gpu_exclude_nondeterministic_ops=true", "--xla_gpu_autotune_level=0")


@gin.configurable
def platform(
    compile_only: bool = False,
    emulated_cpu_devices: int | None = None,
    xla_flags: Sequence[str] = (),
    distributed: bool = False,
    deterministic: bool = False,
) -> None:
    """Prepares the backend; must run before JAX looks for devices.

    Args:
      compile_only: nothing will run; a CPU is enough, whatever the hardware of the recipe.
      emulated_cpu_devices: run on this many emulated CPU devices instead of the accelerators present.
      xla_flags: added to XLA_FLAGS. Options of the compiler belong to the step (`train.compiler_options`).
      deterministic: two runs give equal bits on GPUs too, whose fastest kernels add in any order and are chosen by timing them; on TPUs and
        CPUs they do anyway.
      distributed: this process is one of several, which find each other through their cluster (TPU slices, SLURM, MPI, Kubernetes).

    Raises:
      ConfigError: `distributed`, but the cluster is none that JAX knows.
    """
    if compile_only:
        jax.config.update("jax_platforms", "cpu")
        return
    if deterministic:
        xla_flags = (*xla_flags, *_DETERMINISTIC)
    if emulated_cpu_devices is not None:
        xla_flags = (*xla_flags, f"--xla_force_host_platform_device_count={emulated_cpu_devices}")
        jax.config.update("jax_platforms", "cpu")
    if xla_flags:
        os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *xla_flags]).strip()
    if distributed:
        try:
            jax.distributed.initialize()
        except ValueError as error:
            raise config.ConfigError(
                f"platform.distributed=True, but JAX finds no cluster to join ({error}); start the processes by one that it knows, or "
                "set it to False for one process."
            ) from error
