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

from interns1pro_jax import sharding
from interns1pro_jax.config import TextConfig
from interns1pro_jax.layers.attention import Attention, AttentionContext, LayerCache
from interns1pro_jax.layers.mlp import Mlp
from interns1pro_jax.layers.moe import ExpertStack, Moe
from interns1pro_jax.layers.parameter import ones, parameter
from interns1pro_jax.layers.router import RouterStats, Routing
from interns1pro_jax.ops.attention import OPERANDS, OUTPUT
from interns1pro_jax.ops.context import reading_order
from interns1pro_jax.ops.norm import rms_norm
from interns1pro_jax.ops.permutation import PLAN
from pallas_kernels.order import after

Streams = tuple[Float[Array, "_ T D"], ...]

# Names of values inside a block, besides those of `ops.attention`.
_INPUT = "block_input"


def _keeping(*names: str, offloaded: tuple[str, ...] = (), dots: bool = False) -> Callable[[Callable], Callable]:
    """Recomputes all but the values of these names, products with weights if `dots`, and the order of the experts' rows; those `offloaded`
    wait in the host's memory."""
    policies = jax.checkpoint_policies
    if dots:
        policy = policies.save_from_both_policies(policies.dots_with_no_batch_dims_saveable, policies.save_only_these_names(PLAN, *names))
    elif offloaded:
        policy = policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[PLAN, *names],
            names_which_can_be_offloaded=list(offloaded),
            offload_src="device",
            offload_dst="pinned_host",
        )
    else:
        policy = policies.save_only_these_names(PLAN, *names)
    return lambda body: jax.checkpoint(body, policy=policy, prevent_cse=False)  # the scan around it already prevents it


# What the backward pass keeps of a block, by name; docs/architecture.md has the table with what each costs.
REMAT: dict[str, Callable[[Callable], Callable]] = {
    "none": lambda body: body,
    "full": _keeping(),  # keeps the block's input
    "attention": _keeping(OUTPUT),
    "attention_operands": _keeping(OUTPUT, *OPERANDS),
    "dots": _keeping(dots=True),
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
        streams: Streams,
        contexts: tuple[AttentionContext, ...],
        inputs: tuple[LayerInputs, ...],
        cache: LayerCache | None = None,
        experts: ExpertStack | None = None,
        trace: bool = False,
        moe_chunks: int = 1,
    ) -> tuple[Streams, LayerCache | None, tuple[BlockOutput, ...]]:
        """Streams are rows that do not need each other, and share the gathered weights: while the tokens of one are on their way to the
        experts or back, another is computed."""
        eps, dtype = self.config.rms_norm_eps, streams[0].dtype
        moe = self.moe if hasattr(self, "moe") else None
        weights, kernel = self.attention.gathered(dtype), None if moe is None else moe.router.gathered()
        first = (*weights.values(), *(() if kernel is None else (kernel,)))
        hidden, attended, outputs = [], [], []
        routings: list[Routing] = []
        for x_BTD, context, layer in zip(streams, contexts, inputs, strict=True):
            x_BTD = checkpoint_name(x_BTD, _INPUT)
            # Kept apart, or XLA makes one slow instruction of the queries' projection and the norm, and of their gradients.
            normed = jax.lax.optimization_barrier(rms_norm(x_BTD, self.attention_norm_D[...], eps))
            if routings:  # the stream before first, whose tokens are then on their way
                context = dataclasses.replace(context, segment_ids=_after(context.segment_ids, routings[-1].weights_BTGC))
            attention, cache = self.attention(normed, context, weights, cache)
            x_BTD = x_BTD + attention
            h_BTD = rms_norm(x_BTD, self.mlp_norm_D[...], eps)
            out = BlockOutput()
            if moe is not None:
                valid_BT = context.segment_ids > 0
                routing, stats, logits = moe.router(
                    h_BTD, kernel=kernel, valid_BT=valid_BT, replay_BTGC=layer.replay_BTGC, probe_R=layer.probe_R
                )
                routings.append(routing)
                out = BlockOutput(ids_BTGC=routing.ids_BTGC, stats=stats)
                if trace:
                    out = dataclasses.replace(out, router_logits_BTE=logits, weights_BTGC=routing.weights_BTGC)
            if trace:
                out = dataclasses.replace(out, attention_BTD=attention)
            hidden.append(h_BTD)
            attended.append(x_BTD)
            outputs.append(out)
        mlp = self.mlp(tuple(hidden)) if moe is None else moe(tuple(hidden), tuple(routings), experts, moe_chunks, first)
        streams = tuple(x + y for x, y in zip(attended, mlp, strict=True))
        if trace:
            outputs = [dataclasses.replace(o, hidden_BTD=x, mlp_BTD=y) for o, x, y in zip(outputs, streams, mlp, strict=True)]
        return streams, cache, tuple(outputs)


def _after(numbers: jax.Array, first: jax.Array) -> jax.Array:
    specs = tuple(jax.typeof(x).sharding.spec for x in (numbers, first))
    return jax.shard_map(after, in_specs=specs, out_specs=specs[0])(numbers, first)


def stack_blocks(config: TextConfig, moe: bool, count: int, *, rngs: nnx.Rngs) -> DecoderBlock:
    """`count` blocks whose parameters have a leading layer axis."""

    @nnx.vmap(in_axes=0, out_axes=0)
    def make(key: jax.Array) -> DecoderBlock:
        return DecoderBlock(config, moe, rngs=nnx.Rngs(key))

    return make(jax.random.split(rngs.params(), count))


def stream_rows(rows: int, moe_chunks: int) -> tuple[int, ...]:
    """Rows of each stream that a device's rows go in: two, if each has two rows or more and the chunks can be shared between them (an even
    number; for an odd number of rows, two chunks). Of a single row of as many tokens as the model is wide XLA keeps activations by columns,
    and to copy them back takes longer than what a stream hides (compiled for v5p)."""
    shared = moe_chunks == 2 or (moe_chunks % 2 == 0 and rows % 2 == 0)
    return (rows - rows // 2, rows // 2) if shared and rows > 3 else (rows,)


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
    `layers.moe.expert_parallel_mlp`. Rows go in the streams of `stream_rows`."""
    graph, params = nnx.split(blocks)
    counts = stream_rows(len(x_BTD) // sharding.shards("batch"), moe_chunks)

    def split(tree: Any, axis: int = 0) -> tuple[Any, ...]:
        leaves, structure = jax.tree.flatten(tree)
        parts = [sharding.split_rows(x, counts, axis) for x in leaves]
        return tuple(jax.tree.unflatten(structure, [part[i] for part in parts]) for i in range(len(counts)))

    contexts = split(context)
    replays = split(inputs.replay_BTGC, 1)

    def body(streams: Streams, layer: tuple[Any, LayerInputs, tuple[Any, ...]]) -> tuple[Streams, tuple[BlockOutput, ...]]:
        params, inputs, replays = layer
        each = tuple(dataclasses.replace(inputs, replay_BTGC=replay) for replay in replays)
        streams, _, outputs = nnx.merge(graph, params)(streams, contexts, each, trace=trace, moe_chunks=moe_chunks)
        return streams, outputs

    shared = dataclasses.replace(inputs, replay_BTGC=None)
    streams, outputs = jax.lax.scan(REMAT[remat](body), split(x_BTD), (params, shared, replays))
    return sharding.join_rows(streams), jax.tree.map(lambda *parts: sharding.join_rows(parts, 1), *outputs)


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
        (x,), cache, (out,) = block((x,), (context,), (layer_inputs,), LayerCache(keys, values, index), stack, trace=trace)
        assert cache is not None
        return (x, cache.keys_LBSKH, cache.values_LBSKH), out

    layers = jnp.arange(keys_LBSKH.shape[0], dtype=jnp.int32)
    (x_BTD, keys, values), outputs = jax.lax.scan(body, (x_BTD, keys_LBSKH, values_LBSKH), (params, inputs, layers))
    return x_BTD, (keys, values), outputs
