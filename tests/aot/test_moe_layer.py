"""The expert layer, compiled for real TPU pods at the released sizes, communicates and computes what DESIGN section 3 says, no more.

Compiling its kernels takes a minute or two per chip, so one chip stands for all unless INTERNS1PRO_AOT_CHIPS names others
(`INTERNS1PRO_AOT_CHIPS=v5p,v6e,tpu7x pytest tests/aot`).
"""

import dataclasses
import os
import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import NamedSharding

from interns1pro_jax import sharding
from interns1pro_jax.config import ModelConfig
from interns1pro_jax.flops import HARDWARE
from interns1pro_jax.layers.decoder import REMAT
from interns1pro_jax.layers.moe import Moe
from interns1pro_jax.train import aot

TOPOLOGIES = {"v5p": "v5p:4x2x2", "v6e": "v6e:4x4", "tpu7x": "tpu7x:2x2x2"}  # 16 devices each
FSDP, EXPERT = 2, 8
ROWS, LENGTH = 1, 1024  # of each device
MIB = 1 << 20

pytestmark = pytest.mark.skipif(not aot.can_compile(), reason="compiling for TPUs needs libtpu (Linux on x86-64)")


@pytest.fixture(scope="module", params=os.environ.get("INTERNS1PRO_AOT_CHIPS", "tpu7x").split(","))
def compiled(request) -> tuple[str, aot.Program]:
    """Forward and backward of a scan over two layers, each of which is recomputed in full."""
    config = dataclasses.replace(ModelConfig().text, dtype="bfloat16", param_dtype="bfloat16")
    mesh = aot.pod_mesh(TOPOLOGIES[request.param], fsdp=FSDP, expert=EXPERT)

    def abstract(shape, dtype, spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    with jax.set_mesh(mesh):
        layers = nnx.eval_shape(lambda: nnx.vmap(lambda key: Moe(config, rngs=nnx.Rngs(key)))(jax.random.split(jax.random.key(0), 2)))
        graph, params = nnx.split(layers)
        params = jax.tree.map(lambda x: abstract(x.shape, x.dtype, x.sharding.spec), params)
        shape = (ROWS * FSDP * EXPERT, LENGTH)
        x = abstract((*shape, config.hidden_size), jnp.bfloat16, sharding.spec("batch", "sequence", None))
        valid = abstract(shape, jnp.bool_, sharding.spec("batch", "sequence"))

        def loss(params, x, valid):
            def layer(x, params):
                moe = nnx.merge(graph, params)
                routing, stats, _ = moe.router(x, valid_BT=valid)
                (y,) = moe((x,), (routing,))
                return x + y, stats.z

            x, z = jax.lax.scan(REMAT["full"](layer), x, params)
            return jnp.sum(x.astype(jnp.float32) ** 2) + z.sum()

        return request.param, aot.compile_for(mesh, jax.grad(loss, argnums=(0, 1)), params, x, valid)


def test_collectives(compiled):
    _, program = compiled
    config = ModelConfig().text
    tokens = ROWS * LENGTH * EXPERT * config.hidden_size * 2
    weights = config.num_experts // EXPERT * config.hidden_size * config.moe_intermediate_size * 2
    router = [c for c in program.collectives if "router/" in c.scope]  # its matrix and its gradient
    # Where the devices of `expert` are no ring of the torus, the compiler pads a reduce-scatter and completes it by a small exchange.
    completions = [c for c in program.collectives if c.kind == "collective-permute" and not c.scope and c.axes == ("expert",)]
    assert len(completions) <= 2 and all(c.bytes <= tokens // 16 for c in completions)
    found = sorted((c.kind, c.axes, c.bytes) for c in program.collectives if c.bytes > MIB and c not in router + completions)
    expected = 3 * [("all-gather", ("expert",), tokens)] + 2 * [("reduce-scatter", ("expert",), tokens)]
    for size in (weights, 2 * weights):
        expected += 2 * [("all-gather", ("fsdp",), size)] + [("reduce-scatter", ("fsdp",), size)]
    assert [c[:2] for c in found] == [c[:2] for c in sorted(expected)]
    assert all(size <= c[2] <= 17 * size // 16 for c, (_, _, size) in zip(found, sorted(expected), strict=True))
    assert all(c.bytes <= 4 * config.hidden_size * config.num_experts for c in router)


def test_work_is_that_of_the_products(compiled):
    """Four products with the up matrices and three with the down matrices: the recomputation needs no down projection."""
    _, program = compiled
    config = ModelConfig().text
    rows = ROWS * LENGTH * EXPERT
    up = 2 * rows * config.hidden_size * 2 * config.moe_intermediate_size
    assert program.kernel_flops == 4 * up + 3 * up // 2
    assert program.flops - program.kernel_flops < 0.05 * program.kernel_flops


def test_slots_are_neither_scattered_nor_sorted(compiled):
    """And only rows of activations are gathered: numbers of slots are permuted by a kernel. The products' tables are small."""
    _, program = compiled
    gathers = 0
    for line in program.text.splitlines():
        if found := re.search(r" = \(?\w+\[([\d,]+)\].* ((?:select-and-)?scatter|sort|gather)\(", line):
            length, *row = map(int, found[1].split(","))
            of_rows = found[2] == "gather" and row == [ModelConfig().text.hidden_size]
            assert length < ROWS * LENGTH or of_rows, line[:200]
            gathers += of_rows
    assert gathers


def test_where_rows_lie_is_found_once(compiled):
    """The backward keeps it: what is permuted there are the gradients of the weights."""
    _, program = compiled
    kernels = re.findall(r"%(invert|permute)[.\d]* = .*/(rematted_computation/)?(?:invert|permute)/pallas_call", program.text)
    assert sorted(kernels) == [("invert", ""), ("permute", ""), ("permute", "")]


def test_memory_and_warnings(compiled):
    chip, program = compiled
    assert program.hbm < HARDWARE[chip].hbm
    assert "nvoluntary" not in program.warnings
