"""The whole training step, two layers compiled for a TPU pod: exactly the communication of DESIGN section 3.

At the released sizes its kernels take minutes to compile, so narrow layers on one chip stand for them unless INTERNS1PRO_AOT_CHIPS
names chips (`INTERNS1PRO_AOT_CHIPS=v5p,v6e,tpu7x pytest tests/aot/test_step.py`).
"""

import dataclasses
import os
from collections import Counter

import pytest

from experiments.compile_only import compile_step
from interns1pro_jax.config import ModelConfig
from interns1pro_jax.data.packing import RowSize
from interns1pro_jax.data.plan import PipelineConfig
from interns1pro_jax.optim.optimizer import OptimizerConfig
from interns1pro_jax.optim.schedule import constant
from interns1pro_jax.sharding import MeshConfig
from interns1pro_jax.train import aot, hlo
from interns1pro_jax.train.step import StepConfig

TOPOLOGIES = {"v5p": "v5p:4x2x2", "v6e": "v6e:4x4", "tpu7x": "tpu7x:2x2x2"}  # 16 devices each
FSDP, EXPERT, LAYERS = 2, 8, 2
RELEASED = "INTERNS1PRO_AOT_CHIPS" in os.environ
LENGTH = 1024 if RELEASED else 256
TEXT = dataclasses.replace(ModelConfig().text, num_hidden_layers=LAYERS, param_dtype="float32")
if not RELEASED:
    NARROW = dict(hidden_size=1024, num_attention_heads=8, num_experts=128, moe_intermediate_size=512, vocab_size=8192)
    TEXT = dataclasses.replace(TEXT, **NARROW)
FEW = 2**16  # bytes of what is left aside: scalars, statistics, routing
OFFLOADED = ("all_gather", "reduce_scatter", "all_reduce")
OPTIONS = {f"xla_tpu_enable_sparse_core_collective_offload_{name}": "true" for name in OFFLOADED} | {
    "xla_tpu_enable_all_gather_offload_tracing": "true",
    "xla_tpu_enable_reduce_scatter_offload_tracing": "true",
    "xla_tpu_use_tc_device_shape_on_sc": "true",
    "xla_sc_disable_megacore_partitioning": "true",
}

pytestmark = pytest.mark.skipif(not aot.can_compile(), reason="compiling for TPUs needs libtpu (Linux on x86-64)")


@pytest.fixture(scope="module", params=os.environ.get("INTERNS1PRO_AOT_CHIPS", "tpu7x").split(","))
def compiled(request):
    """The step's report and its collectives."""
    report, text = compile_step(
        model=ModelConfig(TEXT, None, None),
        mesh=MeshConfig(fsdp=FSDP, expert=EXPERT, topology=TOPOLOGIES[request.param]),
        pipeline=PipelineConfig(RowSize(LENGTH), batch_size=FSDP * EXPERT),
        optimizer=OptimizerConfig(),
        schedule=constant(1e-4),
        step=StepConfig(remat="full"),
        compiler_options=OPTIONS,
        title="two layers",
    )
    mesh = aot.pod_mesh(TOPOLOGIES[request.param], fsdp=FSDP, expert=EXPERT)
    return report, [c for c in hlo.collectives(text, mesh) if c.bytes > FEW]


def test_collectives(compiled):
    """Bytes of every kind over every axis. Weights come axis by axis, an `expert` part of them first; everything is recomputed, so
    that weights are gathered twice, and gradients are split once."""
    text, d = TEXT, TEXT.hidden_size
    tokens = 2 * LENGTH * EXPERT * d
    experts = 2 * text.num_experts // EXPERT * 3 * d * text.moe_intermediate_size
    projections = 2 * 2 * d * (text.num_attention_heads + text.num_key_value_heads) * text.head_dim + 4 * d * text.num_experts
    head = 2 * d * text.vocab_size
    expected = {
        ("all-gather", "expert"): LAYERS * (3 * tokens + 2 * projections // FSDP) + head // FSDP,
        ("reduce-scatter", "expert"): LAYERS * (2 * tokens + projections // FSDP) + head // FSDP,
        ("all-gather", "fsdp"): LAYERS * 2 * (experts + projections) + head,
        ("reduce-scatter", "fsdp"): LAYERS * (experts + projections) + head,
    }
    found = Counter()
    for collective in compiled[1]:
        found[collective.kind, "+".join(collective.axes)] += collective.times * collective.bytes
    embedded = found.pop(("all-to-all", "fsdp+expert"))  # token embeddings, from parts of the width to parts of the batch, and back
    assert embedded == 2 * 2 * LENGTH * d
    assert set(found) == set(expected)
    for key, size in expected.items():
        assert abs(found[key] / size - 1) < 0.02, (key, found[key], size)


def test_collectives_go_on_while_something_is_computed(compiled):
    report, collectives = compiled
    synchronous = [c for c in collectives if c.kind != "all-to-all" and not c.asynchronous]
    assert report.topology.startswith("v5p") or not synchronous


def test_work_memory_and_warnings(compiled):
    """Full rematerialisation computes everything but the last product of a layer twice: four thirds of the useful work at most."""
    report, _ = compiled
    useful = report.text_flops / report.devices
    assert useful < report.product_flops + report.kernel_flops < 1.5 * useful
    assert report.memory.total < report.hbm
    assert report.involuntary == 0
    assert 0 < report.mfu < 1
