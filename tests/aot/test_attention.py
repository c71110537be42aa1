"""The attention layer, compiled for a real TPU pod at the released sizes: one gather of keys and values per pass, kernels, no scores."""

import math
import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import NamedSharding

from interns1pro_jax import sharding
from interns1pro_jax.config import ModelConfig
from interns1pro_jax.layers.attention import Attention, AttentionContext
from interns1pro_jax.layers.decoder import REMAT
from interns1pro_jax.ops.attention import dot_product_attention
from interns1pro_jax.train import aot, hlo
from pallas_kernels.attention import is_short
from pallas_kernels.chips import CHIPS

CONTEXT, LENGTH = 4, 8192
MIB = 1 << 20

pytestmark = pytest.mark.skipif(not aot.can_compile(), reason="compiling for TPUs needs libtpu (Linux on x86-64)")


@pytest.fixture(scope="module")
def compiled() -> aot.Program:
    """Forward and backward of two layers over one row that four devices share; each layer is recomputed but for the result of attention."""
    config = ModelConfig().text
    mesh = aot.pod_mesh("v5p:2x2x1", context=CONTEXT)

    def abstract(shape, dtype, *dims):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, sharding.spec(*dims)))

    with jax.set_mesh(mesh):
        layers = nnx.eval_shape(lambda: nnx.vmap(lambda key: Attention(config, rngs=nnx.Rngs(key)))(jax.random.split(jax.random.key(0), 2)))
        graph, params = nnx.split(layers)
        params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, x.sharding.spec)), params)
        table = abstract((1, config.num_key_value_heads, LENGTH, config.head_dim), jnp.bfloat16, "batch", None, "sequence", None)
        context = AttentionContext(
            table, table, abstract((1, LENGTH), jnp.int32, "batch", "sequence"), abstract((1, LENGTH), jnp.int32, "batch", None)
        )
        x = abstract((1, LENGTH, config.hidden_size), jnp.bfloat16, "batch", "sequence", None)

        def loss(params, x, context):
            def layer(x, params):
                attention = nnx.merge(graph, params)
                return x + attention(x, context, attention.gathered(x.dtype))[0], None

            x, _ = jax.lax.scan(REMAT["attention"](layer), x, params)
            return jnp.sum(x.astype(jnp.float32) ** 2)

        return aot.compile_for(mesh, jax.grad(loss, argnums=(0, 1)), params, x, context)


def test_keys_and_values_are_gathered_and_nothing_else(compiled):
    config = ModelConfig().text
    kv = LENGTH * 2 * config.num_key_value_heads * config.head_dim * 2
    # Gradients of weights are all-reduced: the devices share a row, not the weights.
    moved = [(c.kind, c.bytes // MIB) for c in compiled.collectives if c.kind != "all-reduce" and c.bytes > MIB]
    assert sorted(moved) == 2 * [("all-gather", kv // MIB)] + [("reduce-scatter", kv // MIB)]
    assert all(c.axes == ("context",) for c in compiled.collectives)


def test_kernels_and_memory(compiled):
    kernels = [line for line in compiled.text.splitlines() if 'custom_call_target="tpu_custom_call"' in line]
    names = [re.search(r"%\w*?(norm_and_rotary|attention_forward|attention_gradient)", kernel)[1] for kernel in kernels]
    assert sorted(names) == ["attention_forward", "attention_gradient", *3 * ["norm_and_rotary"]], kernels
    config = ModelConfig().text
    scores = LENGTH // CONTEXT * LENGTH * config.num_attention_heads * 2
    assert compiled.hbm < scores


def laid_out_anew(text: str, size: int) -> list[str]:
    """Instructions that copy or transpose arrays of so many numbers."""
    sized = [i for of in hlo.computations(text).values() for i in of.values() if math.prod(hlo.shape_of(i.type)) == size]
    assert any("attention" in i.name for i in sized)
    return [i.name for i in sized if i.opcode in ("copy", "transpose")]


def test_nothing_of_the_size_of_the_result_is_laid_out_anew(compiled):
    """Norm and rotary, attention and the output projection, forward and backward, take each other's layouts."""
    config = ModelConfig().text
    assert not laid_out_anew(compiled.text, LENGTH // CONTEXT * config.num_attention_heads * config.head_dim)


def test_the_longest_rows_that_stay_in_vector_memory():
    """Rows for which the bound of our kernels' memory is within the chip's compile, and their results are not laid out anew for the product
    or the gradients; twice as long ones have splash's. Here on tpu7x, where the bound is closest."""
    mesh = aot.pod_mesh("tpu7x:2x2x1", fsdp=8)

    def kernels(length):
        """The program, and how often each of ours is called."""

        def abstract(heads):
            shape, spec = (mesh.size, heads, length, 128), sharding.spec("batch", None, "sequence", None)
            return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, spec))

        ids = jax.ShapeDtypeStruct((mesh.size, length), jnp.int32, sharding=NamedSharding(mesh, sharding.spec("batch", "sequence")))

        def loss(q, k, v, w_FD, ids):
            q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))  # as norm and rotary write them
            out = dot_product_attention(q, k, v, q_segment_ids=ids, kv_segment_ids=ids, causal=True)
            y = jnp.einsum("btf,fd->btd", out.reshape(*out.shape[:2], -1), w_FD)
            return jnp.sum(y.astype(jnp.float32) ** 2)

        with jax.set_mesh(mesh):
            w_FD = jax.ShapeDtypeStruct((4 * 128, 256), jnp.bfloat16, sharding=NamedSharding(mesh, sharding.spec(None, None)))
            program = aot.compile_for(mesh, jax.grad(loss, argnums=(0, 1, 2, 3)), abstract(4), abstract(2), abstract(2), w_FD, ids)
        calls = [x.split("=")[0] for x in program.text.splitlines()]
        return program, tuple(sum(f"%attention_{name}" in call for call in calls) for name in ("forward", "gradient"))

    program, called = kernels(16384)
    assert called == (1, 1) and is_short(16384, 128, "bfloat16", CHIPS["tpu7x"])
    assert not is_short(2 * 16384, 128, "bfloat16", CHIPS["tpu7x"])
    assert not laid_out_anew(program.text, 16384 * 4 * 128)
