"""The balanced MoE layer: equal to its definition, and equally loaded devices for any routing."""

import dataclasses
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from interns1pro_jax import sharding
from interns1pro_jax.config import ConfigError
from interns1pro_jax.layers.moe import ExpertStack, Moe, expert_parallel_mlp
from interns1pro_jax.layers.router import route_tokens
from interns1pro_jax.ops.expert_products import EXPERT_PRODUCTS
from interns1pro_jax.sharding import make_mesh
from pallas_kernels.routing_reference import CHUNK
from tests.tiny import text_config

GROUPS, PER_GROUP, D, F = 8, 4, 32, 16
MESHES = [{}, {"expert": 8}, {"fsdp": 2, "expert": 4}, {"fsdp": 4, "expert": 2}, {"fsdp": 8}]


def weights(seed=0):
    wi, wo = (
        jax.random.normal(jax.random.key(seed + i), s) for i, s in enumerate([(GROUPS * PER_GROUP, D, 2 * F), (GROUPS * PER_GROUP, F, D)])
    )
    return wi / D**0.5, wo / F**0.5


def routings():
    """In-group ids [B, T, G, 1]: adversarial (all tokens to one expert of each group, or of one group), random."""
    random = np.random.default_rng(0).integers(0, PER_GROUP, (8, 6, GROUPS, 1))
    return {
        "one expert": np.full_like(random, 2),
        "first group skewed": np.where(np.arange(GROUPS)[:, None] == 0, 3, random),
        "random": random,
    }


def place(x, *dims):
    return sharding.constrain(jnp.asarray(x), *dims)


def routing_of(ids, w):
    """What the router gives for recorded ids, with other weights."""
    logits = place(jnp.zeros((*ids.shape[:2], GROUPS * PER_GROUP)), "batch", "sequence", None)
    routing = route_tokens(logits, jnp.asarray(ids), groups=GROUPS, chosen=ids.shape[-1])
    return dataclasses.replace(routing, weights_BTGC=place(w, "batch", "sequence", None, None))


@partial(jax.jit, static_argnames=("chunks", "products"))
def layer(x, ids, w, wi, wo, chunks=1, products=EXPERT_PRODUCTS["dtype"]):
    routing = routing_of(ids, w)
    stack = ExpertStack(
        place(wi[None], None, "expert", "expert_embed", None), place(wo[None], None, "expert", None, "expert_embed"), jnp.int32(0)
    )
    return expert_parallel_mlp((place(x, "batch", "sequence", None),), (routing,), stack, chunks, products)[0]


def by_definition(x, ids, w, wi, wo):
    out = np.zeros_like(x)
    for b, t, g in np.ndindex(ids.shape[:3]):
        e = g * PER_GROUP + ids[b, t, g, 0]
        gate, up = np.split(np.asarray(x[b, t] @ wi[e], np.float64), 2)
        out[b, t] += w[b, t, g, 0] * ((gate / (1 + np.exp(-gate)) * up) @ wo[e])
    return out


@pytest.mark.parametrize("mesh_sizes", MESHES, ids=str)
def test_equals_its_definition_for_any_routing(mesh_sizes):
    x = np.random.default_rng(1).normal(size=(8, 6, D)).astype(np.float32)
    w = np.random.default_rng(2).uniform(size=(8, 6, GROUPS, 1)).astype(np.float32)
    wi, wo = (np.asarray(a) for a in weights())
    with jax.set_mesh(make_mesh(**mesh_sizes)):
        for name, ids in routings().items():
            np.testing.assert_allclose(layer(x, ids, w, wi, wo), by_definition(x, ids, w, wi, wo), atol=1e-4, err_msg=name)


@pytest.mark.parametrize("mesh_sizes", MESHES[1:], ids=str)
def test_rows_per_device_are_tokens_times_k_over_groups(mesh_sizes):
    """What each device multiplies, whatever the routing: a static number of rows, all of them assigned to its experts."""
    assigned: list[int] = []
    shapes: set[int] = set()

    def counted(product):
        def count(*operands, **options):
            shapes.add(operands[0].shape[0])
            jax.debug.callback(lambda sizes: assigned.append(int(sizes.sum())), operands[-1])
            return product(*operands, **options)

        return count

    exact = EXPERT_PRODUCTS["dtype"]
    products = dataclasses.replace(exact, mlp=counted(exact.mlp))
    with jax.set_mesh(make_mesh(**mesh_sizes)):
        ranks, devices = sharding.axis_size("expert"), 8
        rows = (8 * 6 * ranks // devices) * GROUPS // ranks  # tokens of an expert group's devices, times the groups of one
        x, w = np.zeros((8, 6, D), np.float32), np.ones((8, 6, GROUPS, 1), np.float32)
        for name, ids in routings().items():
            assigned.clear()
            jax.block_until_ready(layer(x, ids, w, *weights(), products=products))
            jax.effects_barrier()
            assert shapes == {rows} and assigned == [rows] * devices, name


def test_one_compiled_program_serves_every_routing():
    x, w = np.ones((8, 6, D), np.float32), np.ones((8, 6, GROUPS, 1), np.float32)
    traces = []
    with jax.set_mesh(make_mesh(expert=8)):

        @jax.jit
        def run(ids):
            traces.append(1)
            return layer_placed(ids)

        wi, wo = weights()
        wi, wo = place(wi[None], None, "expert", "expert_embed", None), place(wo[None], None, "expert", None, "expert_embed")
        x, w = place(x, "batch", "sequence", None), place(w, "batch", "sequence", None, None)

        def layer_placed(ids):
            return expert_parallel_mlp((x,), (routing_of(ids, w),), ExpertStack(wi, wo, jnp.int32(0)))[0]

        for ids in routings().values():
            run(place(ids, "batch", "sequence", None, None)).block_until_ready()
    assert len(traces) == 1


def test_collectives_of_the_layer_are_named_and_counted():
    """Forward and backward of a sharded layer: tokens gathered and scattered on `expert`, weights on `fsdp`; no scatter-add of
    activations anywhere."""
    with jax.set_mesh(make_mesh(fsdp=2, expert=4)):
        x, w = np.ones((8, 6, D), np.float32), np.ones((8, 6, GROUPS, 1), np.float32)
        ids = routings()["random"]
        gradient = jax.grad(lambda x, w, wi, wo: (layer(x, ids, w, wi, wo) ** 2).sum(), (0, 1, 2, 3))
        lowered = jax.jit(gradient).lower(x, w, *weights())
    named = lowered.as_text(debug_info=True)
    for name in ("token_all_gather", "routing_all_gather", "routing_all_to_all", "expert_weight_all_gather", "token_reduce_scatter"):
        assert name in named
    text = lowered.as_text()
    assert text.count('"stablehlo.all_gather"') == 5  # tokens forward, output gradient backward, two weights, counts
    assert text.count('"stablehlo.reduce_scatter"') == 4  # output forward, token gradient backward, two weight gradients
    assert text.count('"stablehlo.all_to_all"') == 3  # rows, weights, weight gradients: a few bytes per token
    scattered = re.findall(r'"stablehlo\.scatter".*?\}\) : \(tensor<(\w+)>', text, re.DOTALL)
    # Indices of the permutation, and on CPU the weight gradient [experts, K, N] of one expert at a time; no rows of activations.
    assert scattered and all(operand.endswith("i32") or len(operand.split("x")) == 4 for operand in scattered)


@pytest.mark.parametrize("sizes", [dict(data=2, fsdp=2, expert=2), dict(context=2, fsdp=2, expert=2)], ids=str)
def test_weight_gradients_are_scattered_before_they_are_summed_over_replicas(sizes):
    """What crosses `data` and `context` is a device's shard of the gradient, not the gathered whole."""
    with jax.set_mesh(make_mesh(**sizes)):
        x, w = np.ones((8, 6, D), np.float32), np.ones((8, 6, GROUPS, 1), np.float32)
        gradient = jax.grad(lambda wi, wo: (layer(x, routings()["random"], w, wi, wo) ** 2).sum(), (0, 1))
        text = jax.jit(gradient).lower(*weights()).as_text()
    experts = GROUPS * PER_GROUP // 2
    reduced = re.findall(r'"stablehlo\.all_reduce".*?\}\) : \(tensor<(\w+)>', text, re.DOTALL)
    assert f"1x{experts}x{D // 2}x{2 * F}xf32" in reduced and f"1x{experts}x{F}x{D // 2}xf32" in reduced
    assert f"1x{experts}x{D}x{2 * F}xf32" not in reduced


@pytest.mark.parametrize("mesh_sizes", [{}, {"expert": 4}, {"fsdp": 2, "expert": 2}], ids=str)
def test_a_layer_of_a_stack_equals_the_layer_alone(mesh_sizes):
    x = np.random.default_rng(1).normal(size=(4, 3, D)).astype(np.float32)
    ids, w = routings()["random"][:4, :3], np.ones((4, 3, GROUPS, 1), np.float32)
    stacks = [weights(seed) for seed in (0, 10, 20)]
    with jax.set_mesh(make_mesh(**mesh_sizes)):
        alone = np.asarray(layer(x, ids, w, *stacks[1]))
        wi, wo = (np.stack([np.asarray(s[i]) for s in stacks]) for i in range(2))
        stack = ExpertStack(place(wi, None, "expert", "expert_embed", None), place(wo, None, "expert", None, "expert_embed"), jnp.int32(1))
        routing = jax.jit(routing_of)(ids, w)
        x = place(x, "batch", "sequence", None)
        np.testing.assert_allclose(jax.jit(expert_parallel_mlp)((x,), (routing,), stack)[0], alone, atol=1e-5)


def test_chunks_equal_the_whole_and_take_less_memory():
    rows, length = 8, 4 * CHUNK
    x = np.random.default_rng(1).normal(size=(rows, length, D)).astype(np.float32)
    ids = np.random.default_rng(2).integers(0, PER_GROUP, (rows, length, GROUPS, 1))
    w = np.random.default_rng(3).uniform(size=ids.shape).astype(np.float32)

    def gradients(chunks):
        objective = jax.value_and_grad(lambda x, w, wi, wo: (layer(x, ids, w, wi, wo, chunks) ** 2).sum(), (0, 1, 2, 3))
        compiled = jax.jit(objective).lower(x, w, *weights()).compile()
        return compiled(x, w, *weights()), compiled.memory_analysis().temp_size_in_bytes

    with jax.set_mesh(make_mesh(fsdp=2, expert=4)):
        (wanted, whole), (got, part) = gradients(1), gradients(4)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * np.abs(b).max())
    assert part < 0.7 * whole  # two of the four parts at a time


def test_streams_must_share_the_chunks():
    x = jnp.zeros((2, CHUNK, D))
    with jax.set_mesh(make_mesh()), pytest.raises(ConfigError, match="moe_chunks=3: 2 streams cannot share them"):
        expert_parallel_mlp((x, x), (None, None), None, 3)


def test_expert_axis_must_divide_the_groups():
    with jax.set_mesh(make_mesh(expert=8)), pytest.raises(ConfigError, match=r"expert=8 must divide router_n_groups=4"):
        Moe(text_config(router_n_groups=4), rngs=nnx.Rngs(0))
