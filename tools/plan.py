"""What do I need? Memory and time of a task on so many chips, or the smallest slice for a task; by arithmetic, in seconds.

    python -m tools.plan --chips 512 --type v5p --seq 4096        every task on these chips
    python -m tools.plan --task sft --seq 32768                   the smallest slice of every type that the task fits
    python -m tools.plan --chips 256 --type tpu7x --task train --all   every mesh, not only the best
    python -m tools.plan --recipes                                     the recipes for TPUs as they are

Tasks: train (AdamW, float32 parameters), sft (the same state, long rows), lora (frozen weights), rl (training and rollout in turns),
serve (weights and key/value cache). `experiments.launch --compile_only` says the same of one recipe exactly.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import gin
import jax
from rich.console import Console
from rich.table import Table

from experiments import bindings, launch
from interns1pro_jax.config import ConfigError, ModelConfig
from interns1pro_jax.flops import GIB, HARDWARE, hardware_of, text_flops
from interns1pro_jax.footprint import FULLEST, TASKS, Footprint, best_step, footprint, meshes

LARGEST = 4096  # chips that the search for the smallest slice goes up to


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chips", type=int, help="size of the slice; without it, the smallest one is found")
    parser.add_argument("--type", choices=sorted(HARDWARE), help="of the chips; without it, all types")
    parser.add_argument("--seq", type=int, default=4096, help="tokens of a row or a served sequence (default 4096)")
    parser.add_argument("--task", choices=TASKS, help="without it, all tasks")
    parser.add_argument("--config", default=None, help="config.json of the model; default the released sizes")
    parser.add_argument("--bf16_moments", action="store_true", help="AdamW's moments in bfloat16")
    parser.add_argument("--fp8_weights", action="store_true", help="frozen and served weights in FP8")
    parser.add_argument("--recipes", action="store_true", help="the recipes of configs/recipes for TPUs, as they are")
    parser.add_argument("--all", action="store_true", help="every sensible mesh, not only the best")
    arguments = parser.parse_args(argv)
    jax.config.update("jax_platforms", "cpu")
    if arguments.recipes:
        Console(width=150).print(recipes())
        return
    try:
        console = Console(width=max(Console().width, 170))
        model = ModelConfig.from_hf(arguments.config) if arguments.config else ModelConfig()
        options = {"moment_bytes": 2 if arguments.bf16_moments else 4, "weight_bytes": 1 if arguments.fp8_weights else 2}
        console.print(plan(model, arguments.type, arguments.chips, arguments.seq, arguments.task, options, arguments.all))
        console.print(
            "Modelled, not measured. GiB are of one device; a chip of tpu7x is two. remat and parts are `StepConfig.remat` and "
            "`.moe_chunks`: the fastest that fit of those that recipes use. train and sft have the same state. `serve` and the rollout of "
            "`rl` are lower bounds: weights and cache read once per token."
        )
    except ConfigError as error:
        sys.exit(f"error: {error}")


def plan(
    model: ModelConfig, chip: str | None, chips: int | None, length: int, task: str | None, options: dict[str, int], every: bool
) -> Table:
    """The table that answers: for each task and type of chip the best mesh, or every mesh; the smallest slice where `chips` is None."""
    table = Table(title=f"{'smallest slice' if chips is None else f'{chips} chips'} for rows of {length:,} tokens")
    words = ("task", "chips", "mesh of devices", "remat", "bound by")
    numbers = ("parts", "tokens/device", "state GiB", "step GiB", "total", "fits", "seconds", "tokens/s/chip", "MFU")
    for name in (*words[:4], *numbers, words[4]):
        table.add_column(name, justify="left" if name in words else "right", no_wrap=name in numbers)
    for each in (task,) if task else TASKS:
        for name in (chip,) if chip else HARDWARE:
            found = on_chips(each, model, name, chips, length, options) if chips else smallest(each, model, name, length, options)
            if not found:
                table.add_row(each, name, f"{'these' if chips else f'up to {LARGEST}'} chips cannot hold it")
            for each_found in found if every else found[:1]:
                table.add_row(*row(model, each_found, name, length))
    return table


def recipes() -> Table:
    """The recipes for TPUs, at their own meshes and batches."""
    table = Table(title="recipes, by arithmetic")
    for name in ("recipe", "chips", "tokens/device", "state", "gradients", "kept", "working", "total GiB", "of the limit"):
        table.add_column(name, justify="left" if name in ("recipe", "chips") else "right")
    bindings.register()
    gin.add_config_file_search_path(str(launch.ROOT))
    for path in sorted((launch.ROOT / "configs" / "recipes").glob("*.gin")):
        gin.clear_config()
        launch.parse([str(path)], [])
        model, mesh, optimizer = (gin.get_configurable(name)() for name in ("ModelConfig", "MeshConfig", "OptimizerConfig"))
        if mesh.topology is None:
            continue
        pipeline, step = gin.get_configurable("PipelineConfig")(), gin.get_configurable("StepConfig")()
        hardware = hardware_of(mesh.topology)
        sizes = {
            "parameter_bytes": jax.numpy.dtype(model.text.param_dtype).itemsize,
            "moment_bytes": jax.numpy.dtype(optimizer.moment_dtype).itemsize,
            "remat": step.remat,
            "moe_chunks": step.moe_chunks,
        }
        rows = pipeline.batch_size * mesh.context // mesh.size
        found = footprint("train", model, hardware, mesh, pipeline.row.tokens, rows, **sizes)
        if found is None:
            raise ConfigError(f"{path.name}: its mesh cannot hold the model.")
        memory = {part: size / GIB for part, size in found.memory.items()}
        state = memory["parameters"] + memory["optimizer"]
        parts = (state, memory["gradients"], memory["kept"], memory["working"], found.total / GIB)
        chips = f"{mesh.size // hardware.devices_per_chip} {hardware.name}"
        table.add_row(path.stem, chips, f"{found.tokens:,}", *(f"{part:.1f}" for part in parts), f"{found.total / found.hbm:.0%}")
    gin.clear_config()
    return table


def on_chips(task: str, model: ModelConfig, chip: str, chips: int, length: int, options: dict[str, int]) -> list[Footprint]:
    """The footprints of all sensible meshes of so many chips: those that fit first, the fastest of them first, else the smallest."""
    hardware = HARDWARE[chip]
    tried = (best_step(task, model, hardware, mesh, length, **options) for mesh in meshes(hardware, chips, length))
    found = [each for each in tried if each is not None]
    return sorted(found, key=lambda each: (not each.fits, -each.rate if each.fits else each.total))


def smallest(task: str, model: ModelConfig, chip: str, length: int, options: dict[str, int]) -> list[Footprint]:
    """The footprints that fit the smallest slice that the task fits at all."""
    chips = 1
    while chips <= LARGEST:
        fitting = [each for each in on_chips(task, model, chip, chips, length, options) if each.fits]
        if fitting:
            return fitting
        chips *= 2
    return []


def row(model: ModelConfig, found: Footprint, chip: str, length: int) -> list[str]:
    """A line of the table."""
    hardware, mesh = HARDWARE[chip], found.mesh
    state = sum(size for part, size in found.memory.items() if part in ("parameters", "optimizer", "weights", "adapters"))
    shown = " x ".join(f"{axis} {size}" for axis, size in mesh.sizes.items() if size > 1) or "one device"
    useful = 3 * text_flops(model.text, length) * found.rate / hardware.devices_per_chip / hardware.peak
    return [
        found.task,
        f"{mesh.size // hardware.devices_per_chip} {chip}",
        shown,
        found.remat or "",
        str(found.moe_chunks or ""),
        f"{found.tokens:,}",
        f"{state / GIB:.1f}",
        f"{(found.total - state) / GIB:.1f}",
        f"{found.total / found.hbm:.0%} of {found.hbm / GIB:.0f}",
        "yes" if found.fits else f"no: over {FULLEST:.0%}",
        f"{found.seconds:.3g}",
        f"{found.rate:,.0f}",
        "" if found.task in ("rl", "serve") else f"{useful:.0%}",
        found.bound,
    ]


if __name__ == "__main__":
    main()
