"""Compiles the training step of a recipe for the hardware that its mesh names, on a machine without it, and reports what it needs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import jax
import optax
from jax.sharding import Mesh
from rich.console import Console
from rich.markdown import Markdown

from interns1pro_jax.config import ConfigError, ModelConfig
from interns1pro_jax.data.pipeline import AssembledRow, collate
from interns1pro_jax.data.plan import PipelineConfig
from interns1pro_jax.flops import GIB, hardware_of
from interns1pro_jax.layers.lora import trained_kind
from interns1pro_jax.optim.optimizer import OptimizerConfig, make_optimizer
from interns1pro_jax.sharding import MeshConfig
from interns1pro_jax.train import aot
from interns1pro_jax.train.feed import abstract_batch
from interns1pro_jax.train.objective import MEAN_OVER_TOKENS, Objective
from interns1pro_jax.train.state import abstract_init
from interns1pro_jax.train.step import StepConfig, make_train_step
from interns1pro_jax.train.step_picture import draw
from interns1pro_jax.train.step_report import StepReport, make_report, markdown, shard_bytes


def compile_step(
    *,
    model: ModelConfig,
    mesh: MeshConfig,
    pipeline: PipelineConfig,
    optimizer: OptimizerConfig,
    schedule: optax.Schedule,
    step: StepConfig,
    objective: Objective = MEAN_OVER_TOKENS,
    compiler_options: Mapping[str, str],
    title: str,
    keep: Path | None = None,
) -> tuple[StepReport, str]:
    """Compiles the step that a run of these arguments would take: for the topology of `mesh`, or where it has none for as many CPU
    devices, which tells memory and work but no times. Returns the report and the text of the program. A program that `keep` holds
    (`aot.compile_for`) is not compiled again.

    Raises:
      ConfigError: the arguments contradict each other, or the step does not fit the memory of a device; with the numbers.
    """
    hardware = hardware_of(mesh.topology) if mesh.topology else None
    target = target_mesh(mesh)
    with jax.set_mesh(target):
        optim = make_optimizer(optimizer, schedule, trained_kind(model))
        graphdef, state = abstract_init(model, optim)
        batch = abstract_batch(collate([AssembledRow.empty(pipeline.row.tokens)], pipeline.row, model), pipeline.batch_size)
        needed = shard_bytes(state) + shard_bytes(state.params)
        if hardware and needed > hardware.hbm:
            raise ConfigError(
                f"parameters, gradients and optimizer alone need {needed / GIB:.1f} GiB of each of {target.size} devices, which have "
                f"{hardware.hbm / GIB:.2f}; use more devices, or OptimizerConfig.moment_dtype='bfloat16'."
            )
        step_fn = make_train_step(graphdef, model.text, optim, step, objective=objective)
        options = compiler_options if mesh.topology else None
        program = aot.compile_for(target, step_fn, state, batch, compiler_options=options, keep=keep)
        report = make_report(
            program,
            target,
            hardware,
            title=title,
            topology=mesh.topology,
            model=model,
            row=pipeline.row,
            step=step,
            state=state,
            batch=batch,
        )
        return report, program.text


def target_mesh(mesh: MeshConfig) -> Mesh:
    """The mesh over the devices of its topology, which need not exist, or over as many emulated CPU devices."""
    if mesh.topology:
        return aot.pod_mesh(mesh.topology, mesh.slices, **mesh.sizes)
    jax.config.update("jax_num_cpu_devices", mesh.size)
    return mesh.make(jax.devices("cpu")[: mesh.size])


def write(report: StepReport, text: str, workdir: Path, console: Console) -> None:
    """Writes `step.md`, `step.json`, `step.png` and the compiled program's text `step.hlo` to `workdir`, and shows the first."""
    workdir.mkdir(parents=True, exist_ok=True)
    page = markdown(report)
    (workdir / "step.hlo").write_text(text)
    (workdir / "step.json").write_text(report.to_json())
    draw(report, workdir / "step.png")
    (workdir / "step.md").write_text(f"{page}\n![memory and modelled times](step.png)\n")
    console.print(Markdown(page))
    console.print(f"report: {workdir / 'step.md'}")
