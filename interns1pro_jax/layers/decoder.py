"""A decoder block and a run of equal blocks, stacked so that any number of layers compiles as one (spec 2.1)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from interns1pro_jax.config import TextConfig
from interns1pro_jax.layers.attention import Attention, AttentionContext, LayerCache
from interns1pro_jax.layers.mlp import Mlp
from interns1pro_jax.layers.moe import ExpertStack, Moe
from interns1pro_jax.layers.parameter import ones, parameter
from interns1pro_jax.layers.router import RouterStats
from interns1pro_jax.ops.attention import OPERANDS, OUTPUT
from interns1pro_jax.ops.context import reading_order
from interns1pro_jax.ops.norm import rms_norm

# Names of values inside a block, besides those of `ops.attention`.
_INPUT = "block_input"


def _full(body: Callable) -> Callable:
    return jax.checkpoint(body, prevent_cse=False)  # the scan around it already prevents it


def _keeping(*names: str, offloaded: tuple[str, ...] = ()) -> Callable[[Callable], Callable]:
    """Recomputes all but the values of these names; those `offloaded` wait in the host's memory."""
    policies = jax.checkpoint_policies
    if offloaded:
        policy = policies.save_and_offload_only_these_names(
            names_which_can_be_saved=list(names),
            names_which_can_be_offloaded=list(offloaded),
            offload_src="device",
            offload_dst="pinned_host",
        )
    else:
        policy = policies.save_only_these_names(*names)
    return lambda body: jax.checkpoint(body, policy=policy, prevent_cse=False)


# What the backward pass keeps of a block, by name; docs/architecture.md has the table with what each costs.
REMAT: dict[str, Callable[[Callable], Callable]] = {
    "none": lambda body: body,
    "full": _full,  # keeps the block's input
    "attention": _keeping(OUTPUT),
    "attention_operands": _keeping(OUTPUT, *OPERANDS),
    "dots": lambda body: jax.checkpoint(body, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable, prevent_cse=False),
    "offload": _keeping(offloaded=(_INPUT,)),
    "offload_attention": _keeping(offloaded=(_INPUT, OUTPUT)),
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockOutput:
    """Everything a block yields besides the residual stream; stacked over the layers of a run. Router fields are None in dense
    blocks, and trace fields unless a trace was asked for."""

    ids_BTGC: Int[Array, "B T G C"] | None = None
    stats: RouterStats | None = None
    hidden_BTD: Float[Array, "B T D"] | None = None
    attention_BTD: Float[Array, "B T D"] | None = None
    mlp_BTD: Float[Array, "B T D"] | None = None
    router_logits_BTE: Float[Array, "B T E"] | None = None
    weights_BTGC: Float[Array, "B T G C"] | None = None

    def in_reading_order(self) -> BlockOutput:
        """Outputs of a run, whose tokens are in the order of `ops.context`, in reading order."""
        tokens = dataclasses.replace(self, stats=None)
        return dataclasses.replace(jax.tree.map(lambda x: reading_order(x, 2), tokens), stats=self.stats)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerInputs:
    """Optional per-layer inputs of a run, with a leading layer axis: recorded routing and gradient probes (`layers.router`)."""

    replay_BTGC: Int[Array, "L B T G C"] | None = None
    probe_R: Float[Array, "L R"] | None = None


class DecoderBlock(nnx.Module):
    def __init__(self, config: TextConfig, moe: bool, *, rngs: nnx.Rngs):
        self.config = config
        self.attention_norm_D = parameter(rngs, ones, (config.hidden_size,), (None,), config.param_dtype)
        self.attention = Attention(config, rngs=rngs)
        self.mlp_norm_D = parameter(rngs, ones, (config.hidden_size,), (None,), config.param_dtype)
        if moe:
            self.moe = Moe(config, rngs=rngs)
        else:
            self.mlp = Mlp(config, rngs=rngs)

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        context: AttentionContext,
        inputs: LayerInputs,
        cache: LayerCache | None = None,
        experts: ExpertStack | None = None,
        trace: bool = False,
        moe_chunks: int = 1,
    ) -> tuple[Float[Array, "B T D"], LayerCache | None, BlockOutput]:
        eps = self.config.rms_norm_eps
        x_BTD = checkpoint_name(x_BTD, _INPUT)
        # Kept apart, or XLA makes one slow instruction of the queries' projection and the norm, and of their gradients.
        normed = jax.lax.optimization_barrier(rms_norm(x_BTD, self.attention_norm_D[...], eps))
        attention, cache = self.attention(normed, context, cache)
        x_BTD = x_BTD + attention
        h = rms_norm(x_BTD, self.mlp_norm_D[...], eps)
        out = BlockOutput()
        if hasattr(self, "moe"):
            mlp, routing, stats, logits = self.moe(
                h,
                valid_BT=context.segment_ids > 0,
                replay_BTGC=inputs.replay_BTGC,
                probe_R=inputs.probe_R,
                experts=experts,
                chunks=moe_chunks,
            )
            out = BlockOutput(ids_BTGC=routing.ids_BTGC, stats=stats)
            if trace:
                out = dataclasses.replace(out, router_logits_BTE=logits, weights_BTGC=routing.weights_BTGC)
        else:
            mlp = self.mlp(h)
        x_BTD = x_BTD + mlp
        if trace:
            out = dataclasses.replace(out, hidden_BTD=x_BTD, attention_BTD=attention, mlp_BTD=mlp)
        return x_BTD, cache, out


def stack_blocks(config: TextConfig, moe: bool, count: int, *, rngs: nnx.Rngs) -> DecoderBlock:
    """`count` blocks whose parameters have a leading layer axis."""

    @nnx.vmap(in_axes=0, out_axes=0)
    def make(key: jax.Array) -> DecoderBlock:
        return DecoderBlock(config, moe, rngs=nnx.Rngs(key))

    return make(jax.random.split(rngs.params(), count))


def run_blocks(
    blocks: DecoderBlock,
    x_BTD: Float[Array, "B T D"],
    context: AttentionContext,
    inputs: LayerInputs,
    *,
    remat: str = "none",
    moe_chunks: int = 1,
    trace: bool = False,
) -> tuple[Float[Array, "B T D"], BlockOutput]:
    """Applies stacked blocks one after the other; outputs are stacked over layers. `remat` names an entry of `REMAT`; `moe_chunks` as in
    `layers.moe.expert_parallel_mlp`."""
    graph, params = nnx.split(blocks)

    def body(x: jax.Array, layer: tuple[Any, LayerInputs]) -> tuple[jax.Array, BlockOutput]:
        x, _, out = nnx.merge(graph, layer[0])(x, context, layer[1], trace=trace, moe_chunks=moe_chunks)
        return x, out

    return jax.lax.scan(REMAT[remat](body), x_BTD, (params, inputs))


def _is_expert_weight(path: tuple[Any, ...], _: Any) -> bool:
    return "moe" in path and path[-1] in ("wi_EDF", "wo_EFD")


def run_blocks_cached(
    blocks: DecoderBlock,
    x_BTD: Float[Array, "B T D"],
    context: AttentionContext,
    inputs: LayerInputs,
    keys_LBSKH: Float[Array, "L B S K H"],
    values_LBSKH: Float[Array, "L B S K H"],
    *,
    trace: bool = False,
) -> tuple[Float[Array, "B T D"], tuple[jax.Array, jax.Array], BlockOutput]:
    """`run_blocks` over a key/value cache. Cache and expert weights are not sliced per layer but updated and read in place."""
    experts: Any
    graph, experts, *rest = nnx.split(blocks, _is_expert_weight, ...)
    (params,) = rest
    # The scan must not slice the expert weights: its blocks are merged with empty ones, and read the stack instead.
    no_experts = jax.tree.map(lambda w: jnp.zeros((0, *w.shape[2:]), w.dtype), experts)

    def body(carry: tuple[jax.Array, jax.Array, jax.Array], layer: tuple[Any, LayerInputs, jax.Array]):
        x, keys, values = carry
        state, layer_inputs, index = layer
        stack = ExpertStack(experts["moe"]["wi_EDF"][...], experts["moe"]["wo_EFD"][...], index) if experts else None
        block = nnx.merge(graph, no_experts, state)
        x, cache, out = block(x, context, layer_inputs, LayerCache(keys, values, index), stack, trace=trace)
        assert cache is not None
        return (x, cache.keys_LBSKH, cache.values_LBSKH), out

    layers = jnp.arange(keys_LBSKH.shape[0], dtype=jnp.int32)
    (x_BTD, keys, values), outputs = jax.lax.scan(body, (x_BTD, keys_LBSKH, values_LBSKH), (params, inputs, layers))
    return x_BTD, (keys, values), outputs
