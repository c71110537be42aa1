"""Arithmetic of memory and time, held against compiled programs and against itself."""

import dataclasses
import json
from pathlib import Path

import pytest

from interns1pro_jax.config import ConfigError, ModelConfig
from interns1pro_jax.flops import HARDWARE, active_parameters, hardware_of, text_flops
from interns1pro_jax.footprint import FULLEST, ROWS, TASKS, best_step, footprint, meshes, topology_of, weights_of
from interns1pro_jax.sharding import MeshConfig
from interns1pro_jax.train.step_report import StepReport
from tools import plan

# Of steps that train the whole model, or its decoder alone.
TRAINED = ("pretrain", "long", "text_v5p", "multimodal_cpt", "sft")
FIGURES = [
    file for file in sorted((Path(__file__).resolve().parents[1] / "docs" / "pods_report").glob("*.json")) if file.stem.startswith(TRAINED)
]
assert FIGURES, "the reports of compiled recipes are part of the repository"
MODEL = ModelConfig()
TEXT = ModelConfig(MODEL.text, None, None)


def test_sizes_are_those_of_the_release():
    """908 B parameters in experts, 22 B active; at 4k the FLOPs per token of a training step are 149 billion."""
    assert sum(w.per_device(MeshConfig().sizes) for w in weights_of(TEXT) if "_EDF" in w.name or "_EFD" in w.name) == 908_385_583_104
    assert round(active_parameters(MODEL.text) / 1e9, 2) == 21.73
    assert round(3 * text_flops(MODEL.text, 4096) / 1e9, 1) == 149.3


@pytest.mark.parametrize("file", FIGURES, ids=lambda path: path.stem)
def test_plan_is_that_of_compiled_programs(file):
    """State to the byte, all memory and the time of a step within 10 %."""
    report = StepReport.from_json(file.read_text())
    mesh = MeshConfig(**report.mesh, topology=report.topology)
    rows = report.tokens // report.length * mesh.context // report.devices
    model = MODEL if report.tower_flops else TEXT
    parameter_bytes = round(report.memory.parameters / sum(w.per_device(mesh.sizes) for w in weights_of(model)))
    options = dict(remat=report.remat, moe_chunks=report.moe_chunks, parameter_bytes=parameter_bytes)
    options["moment_bytes"] = round(report.memory.optimizer / report.memory.parameters * parameter_bytes / 2)
    found = footprint("train", model, hardware_of(report.topology), mesh, report.length, rows, **options)
    assert found.memory["parameters"] == report.memory.parameters
    assert abs(found.total / report.memory.total - 1) < 0.1, json.dumps(found.memory)
    assert abs(found.seconds / report.step_seconds - 1) < 0.1, (found.seconds, report.step_seconds)


@pytest.mark.parametrize("task", TASKS)
def test_more_devices_need_less_each_and_more_rows_need_more(task):
    def total(fsdp, rows):
        return footprint(task, TEXT, HARDWARE["v5p"], MeshConfig(fsdp=fsdp, expert=8), 4096, rows).total

    assert total(64, 1) < total(32, 1) < total(32, 4)


def test_a_task_that_freezes_weights_needs_less():
    mesh = MeshConfig(fsdp=64, expert=8)
    lora, train, rl = (footprint(task, TEXT, HARDWARE["v5p"], mesh, 4096, 2) for task in ("lora", "train", "rl"))
    assert lora.total < train.total <= rl.total and lora.seconds < train.seconds < rl.seconds
    smaller = footprint("train", TEXT, HARDWARE["v5p"], mesh, 4096, 2, moment_bytes=2)
    assert train.total - smaller.total == train.memory["parameters"]


@pytest.mark.parametrize("name", HARDWARE)
def test_slices_have_the_shapes_that_can_be_ordered(name):
    for chips in (8, 64, 256, 512):
        topology, slices = topology_of(HARDWARE[name], chips)
        shape = [int(n) for n in topology.partition(":")[2].split("x")]
        product = slices
        for n in shape:
            product *= n
        assert product == chips and max(shape) <= 2 * min(shape)
        for mesh in meshes(HARDWARE[name], chips, 32768):
            assert mesh.size == chips * HARDWARE[name].devices_per_chip
    with pytest.raises(ConfigError, match="96 chips: slices have a power of two"):
        topology_of(HARDWARE[name], 96)


def test_the_smallest_slice_fits_and_half_of_it_does_not():
    for task in ("train", "serve"):
        options = {"moment_bytes": 4, "weight_bytes": 2}
        (best, *_) = plan.smallest(task, TEXT, "v5p", 4096, options)
        assert best.fits and best.total <= FULLEST * best.hbm
        half = plan.on_chips(task, TEXT, "v5p", best.mesh.size // 2, 4096, options)
        assert not any(each.fits for each in half)


def test_meshes_that_do_not_divide_are_left_out():
    assert footprint("train", TEXT, HARDWARE["v5p"], MeshConfig(fsdp=3, expert=8), 4096) is None
    assert footprint("train", TEXT, HARDWARE["v5p"], MeshConfig(context=3), 4096) is None
    with pytest.raises(ConfigError, match="task 'walk' is unknown"):
        footprint("walk", TEXT, HARDWARE["v5p"], MeshConfig(), 4096)


def test_the_fastest_step_that_fits_is_taken():
    hardware, mesh = HARDWARE["v5p"], MeshConfig(fsdp=64, expert=8)
    best = best_step("train", TEXT, hardware, mesh, 4096)
    steps = dict(remat=best.remat, moe_chunks=best.moe_chunks)
    assert best.fits and best == footprint("train", TEXT, hardware, mesh, 4096, best.tokens // 4096, **steps)
    tried = [
        footprint("train", TEXT, hardware, mesh, 4096, rows, remat=remat, moe_chunks=2) for remat in ("full", "attention") for rows in ROWS
    ]
    assert all(not each.fits or each.tokens > 65536 or each.rate <= best.rate for each in tried)


@pytest.mark.parametrize(("task", "chip", "chips"), [("train", "tpu7x", 256), ("sft", "v5p", 512)])
def test_rows_of_32k_fit_where_recipes_train_them(task, chip, chips):
    """`long_tpu7x_256` and `sft_v5p_512`."""
    best, *_ = plan.on_chips(task, MODEL, chip, chips, 32768, {"moment_bytes": 2, "weight_bytes": 2})
    assert best.fits


def test_plan_answers_in_a_table(capsys):
    plan.main(["--chips", "256", "--type", "v6e", "--task", "train"])
    assert "no: over 92%" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="error: 3 chips"):
        plan.main(["--chips", "3", "--type", "v5p"])


def test_reports_survive_their_file(tmp_path):
    for file in FIGURES[:1]:
        report = StepReport.from_json(file.read_text())
        assert StepReport.from_json(report.to_json()) == report and dataclasses.asdict(report)
