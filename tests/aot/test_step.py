"""The training step of every recipe for a TPU pod, cut to a few layers and to sixteen devices of its chip: exactly the communication of
DESIGN section 3, and work and memory that are linear in the layers.

At the released sizes the kernels take minutes to compile, so narrow layers of recipes that together have every choice stand for them,
unless INTERNS1PRO_AOT_CHIPS names chips: then all their recipes are compiled, at the released widths
(`INTERNS1PRO_AOT_CHIPS=v5p,v6e,tpu7x pytest tests/aot/test_step.py`).
"""

import dataclasses
import functools
import os
import tempfile
from collections import Counter
from pathlib import Path

import gin
import jax.numpy as jnp
import pytest

from experiments import launch
from interns1pro_jax.config import ModelConfig, TextConfig
from interns1pro_jax.footprint import weights_of
from interns1pro_jax.train import aot, hlo
from interns1pro_jax.train.hlo import Collective
from interns1pro_jax.train.step import StepConfig
from interns1pro_jax.train.step_report import StepReport
from pallas_kernels.attention_forward import columns_of
from pallas_kernels.routing_reference import CHUNK
from tests import recipes

FSDP, EXPERT = 2, 8
TOPOLOGIES = {"v5p": "v5p:4x2x2", "v6e": "v6e:4x4", "tpu7x": "tpu7x:2x2x2"}  # 16 devices each
NARROW = dict(hidden_size=512, num_attention_heads=8, num_experts=64, moe_intermediate_size=256, vocab_size=2048)
FEW = 2**15  # bytes of what is left aside: scalars and statistics; and routing

CHIPS = os.environ.get("INTERNS1PRO_AOT_CHIPS")
PODS = sorted(path.stem for chip in TOPOLOGIES for path in recipes.DIRECTORY.glob(f"*_{chip}_*.gin"))
CHOSEN = ["pretrain_tpu7x_128", "pretrain_v5p_512", "pretrain_v6e_1024"]

pytestmark = pytest.mark.skipif(not aot.can_compile(), reason="compiling for TPUs needs libtpu (Linux on x86-64)")


@dataclasses.dataclass(frozen=True)
class Choices:
    """What recipes choose of how a layer is computed."""

    chip: str
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
        assert step == StepConfig(step.remat, step.moe_chunks), "a choice that no test knows"
        # What waits in the host's memory is computed and sent as if it waited on the device. Compiled are steps that keep it there: of two
        # layers with copies to the host XLA takes one out of its loops.
        remat = "full" if step.remat == "offload" else step.remat
        return Choices(
            mesh.topology.partition(":")[0], remat, step.moe_chunks, text.dtype, text.param_dtype, optimizer.moment_dtype,
            optimizer.stochastic_rounding, row.tokens,
        )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Compiled:
    choices: Choices
    text: TextConfig
    report: StepReport
    collectives: list[Collective]
    exchanges: int  # of the places and weights of tokens' rows


def shortened(choices: Choices) -> int:
    """Tokens of the shortest row that goes through the experts in as many parts."""
    return max(2 * CHUNK, choices.moe_chunks * CHUNK)


def rows(choices: Choices) -> int:
    """Of a device: four, where its tokens go through the experts in two parts, which are then streams of rows."""
    return 4 if choices.moe_chunks == 2 else 1


def compile_cut(recipe: str, layers: int) -> Compiled:
    """By the command that a user gives: the recipe, a row or four per device, fewer layers and devices (of one slice), and no towers."""
    choices = Choices.of(recipe)
    topology = TOPOLOGIES[choices.chip]
    widths = {} if CHIPS else NARROW
    bindings = {f"TextConfig.{name}": value for name, value in {"num_hidden_layers": layers, **widths}.items()}
    bindings |= {"ModelConfig.vision": None, "ModelConfig.time_series": None, "OptimizerConfig.freeze": (), "RowSize.patches": 0}
    bindings |= {
        "RowSize.samples": 0,
        "RowSize.signal_rows": 0,
        "RowSize.signal_pairs": 0,
        "PipelineConfig.batch_size": rows(choices) * FSDP * EXPERT,
    }
    bindings |= {} if CHIPS else {"RowSize.tokens": shortened(choices)}
    bindings |= {
        "StepConfig.remat": choices.remat,
        "MeshConfig.topology": topology,
        "MeshConfig.slices": 1,
        "MeshConfig.fsdp": FSDP,
        "MeshConfig.expert": EXPERT,
    }
    with recipes.recipe(recipe, *(f"{name} = {value!r}" for name, value in bindings.items())), tempfile.TemporaryDirectory() as workdir:
        text = gin.get_configurable("TextConfig")()
        launch.run(Path(workdir), compile_only=True)
        report = StepReport.from_json((Path(workdir) / "step.json").read_text())
        program = (Path(workdir) / "step.hlo").read_text()
    mesh = aot.pod_mesh(topology, fsdp=FSDP, expert=EXPERT)
    collectives = list(hlo.collectives(program, mesh))
    exchanges = sum(c.times for c in collectives if "routing_all_to_all" in c.scope)
    return Compiled(choices, text, report, [c for c in collectives if c.bytes > FEW and "routing_" not in c.scope], exchanges)


def by_kind(collectives: list[Collective]) -> Counter[tuple[str, str]]:
    """Bytes of every kind over every axis."""
    found: Counter[tuple[str, str]] = Counter()
    for collective in collectives:
        found[collective.kind, "+".join(collective.axes or ("no axes",))] += collective.times * collective.bytes
    return found


def test_the_chosen_recipes_have_every_choice():
    """A new recipe whose layer is computed in a way that no chosen one is must be added to them. Rows are shortened, all numbers of parts
    above two are pairs in a loop, and what parameters and moments are kept in concerns the optimizer, not a layer."""

    def choices(recipe: str) -> dict[str, object]:
        values = dataclasses.asdict(Choices.of(recipe))
        kept = dict.fromkeys(("length", "param_dtype", "moment_dtype", "stochastic_rounding"))
        return values | kept | {"moe_chunks": min(values["moe_chunks"], 3)}

    for name in choices(CHOSEN[0]):
        assert {choices(recipe)[name] for recipe in CHOSEN} == {choices(recipe)[name] for recipe in PODS}, name


def expected_bytes(compiled: Compiled) -> dict[tuple[str, str], int]:
    """Weights come axis by axis, an `expert` part of them first. Everything but perhaps attention is recomputed, so that weights are
    gathered twice and tokens three times, in however many parts; gradients are split once, those of experts for each of two parts that go
    together."""
    text, d, layers = compiled.text, compiled.text.hidden_size, compiled.text.num_hidden_layers
    together = 2 - compiled.choices.moe_chunks % 2
    tokens = 2 * rows(compiled.choices) * compiled.report.length * EXPERT * d
    experts = 2 * text.num_experts // EXPERT * 3 * d * text.moe_intermediate_size
    projections = 2 * 2 * d * (text.num_attention_heads + text.num_key_value_heads) * text.head_dim + 4 * d * text.num_experts
    # Few tokens are looked up where parts of the width are and exchanged; of many, the table is gathered (`ops.embedding`).
    few = rows(compiled.choices) * FSDP * EXPERT * compiled.report.length <= text.vocab_size
    ends = (1 if few else 2) * 2 * d * text.vocab_size  # head, and perhaps embedding
    looked_up = {("all-to-all", "fsdp+expert"): 2 * 2 * rows(compiled.choices) * compiled.report.length * d} if few else {}
    return looked_up | {
        ("all-gather", "expert"): layers * (3 * tokens + 2 * projections // FSDP) + ends // FSDP,
        ("reduce-scatter", "expert"): layers * (2 * tokens + projections // FSDP) + ends // FSDP,
        ("all-gather", "fsdp"): layers * 2 * (experts + projections) + ends,
        ("reduce-scatter", "fsdp"): layers * (together * experts + projections) + ends,
    }


def expected_kernel_flops(compiled: Compiled) -> int:
    """Four products with the up matrices of experts and three with the down matrices; scores and what is made of them two products
    forward, twice where attention is recomputed, and five backward. Forward, of scores on the diagonal stairs are computed."""
    text, length = compiled.text, compiled.report.length
    up = 2 * rows(compiled.choices) * length * text.num_experts_per_tok * text.hidden_size * 2 * text.moe_intermediate_size
    scores = 2 * rows(compiled.choices) * length**2 * text.num_attention_heads * text.head_dim
    forward = 2 if compiled.choices.remat == "attention" else 4
    stairs = (1 + min(columns_of(length), length) / length) / 2
    return int(text.num_hidden_layers * (4 * up + 3 * up // 2 + (forward * stairs + 5) * scores))


# All of a program in one test, so that processes that share the tests compile it once.
@pytest.mark.parametrize("recipe", PODS if CHIPS else CHOSEN[1:])
def test_communication_work_and_memory(recipe):
    choices = Choices.of(recipe)
    if CHIPS and choices.chip not in CHIPS.split(","):
        pytest.skip(f"INTERNS1PRO_AOT_CHIPS={CHIPS} does not name {choices.chip}")
    if CHIPS and recipe != (first := next(name for name in PODS if Choices.of(name) == choices)):
        pytest.skip(f"its layers are those of {first}")
    compiled = compile_cut(recipe, layers=2)
    check_communication(compiled)
    check_work_and_memory(compiled)


@pytest.mark.skipif(bool(CHIPS), reason="INTERNS1PRO_AOT_CHIPS compiles two layers of each recipe")
def test_two_layers_more_need_twice_what_a_layer_needs():
    """So that a few layers tell what ninety-four do: communication, work of kernels and state of two and of four layers are exactly what
    the formulas say, which are linear; temporaries grow by gradients, by two copies of the parameters in bfloat16 and by what is kept of a
    layer, laid out twice."""
    two, four = (compile_cut(CHOSEN[0], layers) for layers in (2, 4))
    for compiled in (two, four):
        check_communication(compiled)
        check_work_and_memory(compiled)
    before, after = two.report.memory, four.report.memory
    parameters = after.parameters - before.parameters
    assert after.optimizer - before.optimizer == 2 * parameters
    assert abs(after.batch - before.batch) < 0.01 * parameters  # all else that the program is given
    temporaries = [m.gradients + m.kept + m.working for m in (before, after)]
    assert temporaries[1] - temporaries[0] == pytest.approx(2 * parameters + 2 * (after.kept - before.kept), rel=0.15)  # gaps between them


def check_communication(compiled: Compiled) -> None:
    found, expected = by_kind(compiled.collectives), expected_bytes(compiled)
    assert set(found) == set(expected)
    # Where wide arrays do not divide into a ring's parts, the compiler pads them.
    assert all(abs(found[key] - size) <= (0.02 * size if CHIPS else 0) for key, size in expected.items()), (found, expected)
    # Of every part places and weights, and backward the weights' gradient alone: where rows lie is kept.
    assert compiled.exchanges == 3 * compiled.text.num_hidden_layers * compiled.choices.moe_chunks
    # Small collectives need not be asynchronous, and on v5p those of experts are not all.
    moved = ("expert_weight_all_gather", "token_all_gather", "token_reduce_scatter")
    synchronous = [c for c in compiled.collectives if any(name in c.scope for name in moved) and not c.asynchronous]
    assert not CHIPS or compiled.choices.chip == "v5p" or not synchronous


def check_work_and_memory(compiled: Compiled) -> None:
    """Full rematerialisation computes everything but the last product of a layer twice: four thirds of the useful work at most."""
    report = compiled.report
    useful = report.text_flops / report.devices
    assert useful < report.product_flops + report.kernel_flops < 1.5 * useful
    assert CHIPS or report.kernel_flops == expected_kernel_flops(compiled)
    weights = weights_of(ModelConfig(compiled.text, None, None))
    assert report.memory.parameters == sum(w.per_device(report.mesh) for w in weights) * jnp.dtype(compiled.choices.param_dtype).itemsize
    assert report.memory.total < report.hbm
    assert report.involuntary == 0
    assert 0 < report.mfu < 1
