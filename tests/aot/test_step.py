"""The training step of every recipe for a TPU pod, cut to two layers and to sixteen devices of its chip: exactly the communication of
DESIGN section 3, that of the layers asynchronous but for what is small, and work and memory that are linear in the layers.

Recipes whose layers are computed alike are compiled once, at the released sizes and with the recipe's rows, as far as the compiler's
schedule (`scheduled.py`); a narrow one to the end. Left out are towers and the network between slices.
"""

import dataclasses
import functools
from collections import Counter
from typing import Any

import gin
import jax.numpy as jnp
import pytest

from experiments import launch
from interns1pro_jax.config import ModelConfig, TextConfig
from interns1pro_jax.flops import hardware_of, text_flops
from interns1pro_jax.footprint import footprint, kept_bytes, weights_of
from interns1pro_jax.layers.decoder import stream_rows
from interns1pro_jax.sharding import MeshConfig
from interns1pro_jax.train import aot, hlo, hlo_cost
from interns1pro_jax.train.hlo import Collective
from interns1pro_jax.train.step import StepConfig
from interns1pro_jax.train.step_report import StepReport
from interns1pro_jax.train.timeline import FROM_HOST, TO_HOST, Player
from pallas_kernels.attention import is_short
from pallas_kernels.attention_forward import columns_of
from pallas_kernels.chips import CHIPS
from pallas_kernels.routing_reference import CHUNK
from tests import recipes
from tests.aot import scheduled

FSDP, EXPERT = 2, 8
TOPOLOGIES = {"v5p": "v5p:4x2x2", "v6e": "v6e:4x4", "tpu7x": "tpu7x:2x2x2"}  # 16 devices each
FEW = 2**20  # bytes of what is left aside: scalars and statistics; and routing
SMALL = 2**23  # of what may be waited for: on tpu7x it is not worth its turn on the SparseCores (configs/meshes/tpu7x.gin)
KEYS = 512  # that the gradients of attention take at once
NARROW = dict(hidden_size=512, num_attention_heads=8, num_experts=64, moe_intermediate_size=256, vocab_size=2048)

PODS = sorted(path.stem for chip in TOPOLOGIES for path in recipes.DIRECTORY.glob(f"*_{chip}_*.gin"))

pytestmark = pytest.mark.skipif(not aot.can_compile(), reason="compiling for TPUs needs libtpu (Linux on x86-64)")


@dataclasses.dataclass(frozen=True)
class Choices:
    """What recipes choose of how a layer is computed. rows: of a device."""

    chip: str
    rows: int
    remat: str
    moe_chunks: int
    dtype: str
    param_dtype: str
    moment_dtype: str
    stochastic_rounding: bool
    length: int

    @staticmethod
    @functools.cache
    def of(recipe: str) -> "Choices":
        with recipes.recipe(recipe):
            names = ("MeshConfig", "TextConfig", "StepConfig", "OptimizerConfig", "RowSize")
            mesh, text, step, optimizer, row = (gin.get_configurable(name)() for name in names)
            rows = gin.query_parameter("PipelineConfig.batch_size") // mesh.size
        assert step == StepConfig(step.remat, step.moe_chunks) and mesh.context == 1, "a choice that no test knows"
        # What waits in the host's memory is computed and sent as if it waited on the device; of two layers with copies to the host XLA
        # would take one out of its loops.
        remat = "full" if step.remat == "offload" else step.remat
        return Choices(
            mesh.topology.partition(":")[0], rows, remat, step.moe_chunks, text.dtype, text.param_dtype, optimizer.moment_dtype,
            optimizer.stochastic_rounding, row.tokens,
        )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Compiled:
    """Two layers, or more, of a recipe. hbm: bytes of all that the program lays out. arguments: of what it is given. exchanges: of places
    and weights of tokens' rows."""

    choices: Choices
    text: TextConfig
    length: int
    mesh: MeshConfig
    collectives: list[Collective]
    exchanges: int
    product_flops: float
    kernel_flops: float
    arguments: int
    hbm: int
    involuntary: int


def cut(recipe: str, layers: int) -> dict[str, Any]:
    """Bindings for fewer layers and devices (of one slice), and no towers."""
    choices = Choices.of(recipe)
    return {
        "TextConfig.num_hidden_layers": layers,
        "ModelConfig.vision": None,
        "ModelConfig.time_series": None,
        "OptimizerConfig.freeze": (),
        "RowSize.patches": 0,
        "RowSize.samples": 0,
        "RowSize.signal_rows": 0,
        "RowSize.signal_pairs": 0,
        "PipelineConfig.batch_size": choices.rows * FSDP * EXPERT,
        "StepConfig.remat": choices.remat,
        "MeshConfig.topology": TOPOLOGIES[choices.chip],
        "MeshConfig.slices": 1,
        "MeshConfig.fsdp": FSDP,
        "MeshConfig.expert": EXPERT,
    }


def compiled(recipe: str, bindings: dict[str, Any], program: str, hbm: int, involuntary: int) -> Compiled:
    with recipes.recipe(recipe, *(f"{name} = {value!r}" for name, value in bindings.items())):
        text, row, mesh = (gin.get_configurable(name)() for name in ("TextConfig", "RowSize", "MeshConfig"))
    found = hlo.collectives(program, aot.pod_mesh(mesh.topology, fsdp=FSDP, expert=EXPERT))
    exchanges = sum(c.times for c in found if "routing_all_to_all" in c.scope)
    large = [c for c in found if c.bytes > FEW and "routing_" not in c.scope]
    # Where arrays do not divide into a ring's parts, the compiler pads a scatter and completes it by a small exchange (v6e).
    large = [c for c in large if c.kind != "collective-permute" or c.bytes > SMALL]
    parsed = hlo.computations(program)
    entry = parsed[next(reversed(parsed))].values()
    arguments = sum(hlo.bytes_of(i.type) for i in entry if i.opcode == "parameter")
    return Compiled(
        Choices.of(recipe), text, row.tokens, mesh, large, exchanges, *hlo_cost.product_flops(parsed), arguments, hbm, involuntary
    )


def compile_to_schedule(recipe: str, layers: int) -> Compiled:
    bindings = cut(recipe, layers)
    found = scheduled.schedule(recipe, bindings)
    return compiled(recipe, bindings, found.text, found.hbm, found.warnings.count("nvoluntary full rematerialization"))


def by_kind(collectives: list[Collective]) -> Counter[tuple[str, str]]:
    """Bytes of every kind over every axis."""
    found: Counter[tuple[str, str]] = Counter()
    for collective in collectives:
        found[collective.kind, "+".join(collective.axes or ("no axes",))] += collective.times * collective.bytes
    return found


def expected_bytes(compiled: Compiled) -> dict[tuple[str, str], int]:
    """Weights come axis by axis, an `expert` part of them first. Everything but perhaps attention is recomputed, so that weights are
    gathered twice and tokens three times, in however many parts; gradients are split once, those of experts for each of two parts that go
    together."""
    text, d, layers = compiled.text, compiled.text.hidden_size, compiled.text.num_hidden_layers
    together = 2 - compiled.choices.moe_chunks % 2
    tokens = 2 * compiled.choices.rows * compiled.length * EXPERT * d
    experts = 2 * text.num_experts // EXPERT * 3 * d * text.moe_intermediate_size
    projections = 2 * 2 * d * (text.num_attention_heads + text.num_key_value_heads) * text.head_dim + 4 * d * text.num_experts
    # Few tokens are looked up where parts of the width are and exchanged; of many, the table is gathered (`ops.embedding`).
    few = compiled.choices.rows * FSDP * EXPERT * compiled.length <= text.vocab_size
    ends = (1 if few else 2) * 2 * d * text.vocab_size  # head, and perhaps embedding
    looked_up = {("all-to-all", "fsdp+expert"): 2 * 2 * compiled.choices.rows * compiled.length * d} if few else {}
    # On v5p the compiler makes an all-reduce of one of their scatters, of whose result each device takes its part.
    summed = 2 * d * text.vocab_size // FSDP if compiled.choices.chip == "v5p" else 0
    return (
        looked_up
        | ({("all-reduce", "expert"): summed} if summed else {})
        | {
            ("all-gather", "expert"): layers * (3 * tokens + 2 * projections // FSDP) + ends // FSDP,
            ("reduce-scatter", "expert"): layers * (2 * tokens + projections // FSDP) + ends // FSDP - summed,
            ("all-gather", "fsdp"): layers * 2 * (experts + projections) + ends,
            ("reduce-scatter", "fsdp"): layers * (together * experts + projections) + ends,
        }
    )


def expected_kernel_flops(compiled: Compiled) -> int:
    """Four products with the up matrices of experts and three with the down matrices; scores and what is made of them two products
    forward, twice where attention is recomputed, and five backward. Of scores on the diagonal stairs are computed."""
    text, length = compiled.text, compiled.length
    up = 2 * compiled.choices.rows * length * text.num_experts_per_tok * text.hidden_size * 2 * text.moe_intermediate_size
    scores = 2 * compiled.choices.rows * length**2 * text.num_attention_heads * text.head_dim
    forward = 2 if compiled.choices.remat == "attention" else 4
    stairs, gradient = ((1 + min(columns, length) / length) / 2 for columns in (columns_of(length), KEYS))
    return int(text.num_hidden_layers * (4 * up + 3 * up // 2 + (forward * stairs + 5 * gradient) * scores))


def layer_of(recipe: str) -> Choices:
    """What the program of its layers depends on: of rows how many streams they are, and nothing of what moments are kept in."""
    choices = Choices.of(recipe)
    streams = len(stream_rows(choices.rows, choices.moe_chunks))
    return dataclasses.replace(choices, rows=streams, moment_dtype="", stochastic_rounding=False)


LAYERS = {layer_of(recipe): recipe for recipe in reversed(PODS)}  # the first recipe of each
DEEPER = LAYERS[layer_of("text_cpt_v5p_512")]


@pytest.mark.parametrize("recipe", sorted(set(LAYERS.values()) - {DEEPER}))
def test_communication_work_and_memory_of_two_layers(recipe):
    check(compile_to_schedule(recipe, layers=2))


def test_two_layers_more_need_twice_what_a_layer_needs():
    """So that a few layers tell what ninety-four do: communication, work of kernels and state are exactly what the formulas say, and these
    are linear; memory grows by parameters, moments and gradients, by two copies of the parameters in bfloat16, by what is kept of a layer
    and the gap beside it."""
    two, four = (compile_to_schedule(DEEPER, layers) for layers in (2, 4))
    check(two)
    check(four)
    before, after = (state_bytes(found) for found in (two, four))
    grown = {name: after[name] - before[name] for name in after}
    copies = grown["parameters"] // jnp.dtype(two.choices.param_dtype).itemsize * 2 * 2
    kept = [kept_bytes(found.text, found.length * found.choices.rows, found.choices.remat) for found in (two, four)]
    assert four.hbm - two.hbm == pytest.approx(sum(grown.values()) + copies + 2 * (kept[1] - kept[0]), rel=0.1)  # gaps between them


def test_inputs_of_layers_go_to_the_host_and_come_back_meanwhile():
    recipe, layers = "long_v5p_512", 4
    bindings = cut(recipe, layers) | {"StepConfig.remat": "offload"}
    found = scheduled.schedule(recipe, bindings)
    choices, text = Choices.of(recipe), found.text
    mesh, hardware = aot.pod_mesh(TOPOLOGIES[choices.chip], fsdp=FSDP, expert=EXPERT), hardware_of(choices.chip)
    busy = Player(text, mesh, hardware).times().links
    inputs = choices.rows * choices.length * 2 * ModelConfig().text.hidden_size
    for way in (TO_HOST, FROM_HOST):
        # XLA rotates the loop, whose first turn then sends what nothing reads.
        assert layers <= busy[way] * hardware.host_link / inputs <= layers + 1
    program = hlo.computations(text)
    waited_for = [
        instruction.name
        for name in hlo.control_flow(program)
        for instruction in program[name].values()
        if instruction.opcode in ("copy", "dynamic-slice", "dynamic-update-slice")
        and any("S(5)" in program[name][operand].type for operand in instruction.operands)
    ]
    assert not waited_for


def test_the_machine_code_of_a_narrow_step_and_its_report(tmp_path):
    """By `experiments.launch --compile_only` to its end."""
    recipe = "pretrain_v5p_512"
    narrow = {f"TextConfig.{name}": value for name, value in NARROW.items()} | {"RowSize.tokens": 2 * CHUNK}
    bindings = cut(recipe, layers=2) | narrow
    with recipes.recipe(recipe, *(f"{name} = {value!r}" for name, value in bindings.items())):
        launch.run(tmp_path, compile_only=True)
    report = StepReport.from_json((tmp_path / "step.json").read_text())
    found = compiled(recipe, bindings, (tmp_path / "step.hlo").read_text(), report.memory.total, report.involuntary)
    assert (report.mesh["fsdp"], report.mesh["expert"], report.tokens) == (FSDP, EXPERT, found.choices.rows * FSDP * EXPERT * 2 * CHUNK)
    assert found.kernel_flops == report.kernel_flops == expected_kernel_flops(found)
    state = state_bytes(found)
    assert report.memory.parameters == report.memory.gradients == state["parameters"]
    assert state["optimizer"] <= report.memory.optimizer < state["optimizer"] + FEW
    assert state["parameters"] + state["optimizer"] < report.memory.total < report.hbm
    assert report.involuntary == 0
    assert 0 < report.mfu < 1


def state_bytes(found: Compiled) -> dict[str, int]:
    """Of a device: what stays between steps, and the gradients, which are like the parameters."""
    choices = found.choices
    numbers = sum(weight.per_device(found.mesh.sizes) for weight in weights_of(ModelConfig(found.text, None, None)))
    parameters, moment = (jnp.dtype(dtype).itemsize * numbers for dtype in (choices.param_dtype, choices.moment_dtype))
    return {"parameters": parameters, "optimizer": 2 * moment, "gradients": parameters}


def check(found: Compiled) -> None:
    """Of all but splash's rows the kernels' work is exact. Full rematerialisation computes everything but the last product of a layer
    twice, four thirds of the useful work; splash's gradients more."""
    choices, moved, expected = found.choices, by_kind(found.collectives), expected_bytes(found)
    assert set(moved) == set(expected)
    # Where wide arrays do not divide into a ring's parts, the compiler pads them.
    padded = 0.001 if found.choices.chip == "v6e" else 0.0
    assert all(abs(moved[key] - size) <= padded * size for key, size in expected.items()), (moved, expected)
    # Of every part places and weights, and backward the weights' gradient alone: where rows lie is kept.
    assert found.exchanges == 3 * found.text.num_hidden_layers * found.choices.moe_chunks
    in_layers = [c for c in found.collectives if c.times > 1 and c.bytes > SMALL]
    assert len(by_kind(in_layers)) == 4  # gathers and scatters over both axes
    assert all(c.asynchronous for c in in_layers), [c for c in in_layers if not c.asynchronous]
    useful = 3 * found.choices.rows * found.length * text_flops(found.text, found.length)
    short = is_short(found.length, found.text.head_dim, choices.dtype, CHIPS[choices.chip])
    assert useful < found.product_flops + found.kernel_flops < (1.34 if short else 1.4) * useful
    assert not short or found.kernel_flops == expected_kernel_flops(found)
    state = state_bytes(found)
    kept = state["parameters"] + state["optimizer"]
    assert kept <= found.arguments < 1.01 * kept  # the rest is the batch
    # The plan's working memory is that of many layers.
    hardware = hardware_of(found.mesh.topology)
    planned = footprint(
        "train", ModelConfig(found.text, None, None), hardware, found.mesh, found.length, choices.rows, remat=choices.remat,
        parameter_bytes=jnp.dtype(choices.param_dtype).itemsize, moment_bytes=jnp.dtype(choices.moment_dtype).itemsize,
        moe_chunks=choices.moe_chunks,
    )  # fmt: skip
    assert kept + state["gradients"] < found.hbm < min(1.2 * planned.total, hardware.hbm)
    assert found.involuntary == 0
