"""The mixture-of-experts layer: grouped router, exactly balanced dispatch, expert products, combine (DESIGN 3).

How a token flows, on a mesh whose `expert` axis has R devices (each owns G/R groups and holds 1/R of the expert group's tokens):

    router                own tokens only, no communication
    token all-gather      every device of the expert axis sees all their tokens: each needs every token once, so this is the
                          fewest bytes possible, and the number of rows per device is tokens*K/R for any routing
    routing all-gather    slots of every expert on each device, from which each slot's row at its expert's owner follows
    routing all-to-all    rows and weights of the groups a device owns (a few bytes per token)
    dispatch              bijective permutation of the rows by expert: a gather, and its backward is a gather
    expert products       64 groups (released size) of varying sizes with a fixed sum
    combine               inverse permutation and sum over a token's experts
    token reduce-scatter  sums the devices' contributions, each keeps its own tokens

`expert_parallel_mlp` is all of it; its collectives carry the names `token_all_gather`, `routing_all_gather`,
`routing_all_to_all`, `expert_weight_all_gather` and `token_reduce_scatter` in the compiled program.
"""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from interns1pro_jax import sharding
from interns1pro_jax.config import ConfigError, TextConfig
from interns1pro_jax.layers.lora import ExpertAdapters
from interns1pro_jax.layers.parameter import normal, parameter
from interns1pro_jax.layers.router import Router, Routing
from interns1pro_jax.ops.expert_products import EXPERT_PRODUCTS, ExpertMlp, ExpertProducts, with_adapters
from interns1pro_jax.ops.permutation import PLAN, combine, destinations, dispatch, make_plan, permute_slots
from interns1pro_jax.ops.varying import as_varying, varying_axes
from pallas_kernels.order import all_after
from pallas_kernels.routing_reference import CHUNK


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ExpertStack:
    """Expert weights of a whole run of layers and the layer to use. While decoding, the products read the layer's weights in
    place: slicing the layer out would copy all its experts for the few that a handful of tokens choose."""

    wi_LEDF: Float[Array, "L E D two_F"]
    wo_LEFD: Float[Array, "L E F D"]
    layer: Int[Array, ""]


class Moe(nnx.Module):
    def __init__(self, config: TextConfig, *, rngs: nnx.Rngs):
        sharding.check_expert_axis(config)
        self.config = config
        e, d, f = config.num_experts, config.hidden_size, config.moe_intermediate_size
        init = normal(config.initializer_range)
        self.router = Router(config, rngs=rngs)
        self.wi_EDF = parameter(rngs, init, (e, d, 2 * f), ("expert", "expert_embed", None), config.param_dtype)
        self.wo_EFD = parameter(rngs, init, (e, f, d), ("expert", None, "expert_embed"), config.param_dtype)
        lora = config.lora
        self.lora = None if lora is None or not lora.experts else ExpertAdapters(config, lora, rngs=rngs)

    def __call__(
        self,
        streams: tuple[Float[Array, "_ T D"], ...],
        routings: tuple[Routing, ...],
        experts: ExpertStack | None = None,
        chunks: int = 1,
        first: tuple[Float[Array, "R ..."], ...] = (),
    ) -> tuple[Float[Array, "_ T D"], ...]:
        """The layer's output for every stream, whose routing its `router` has given. `experts` replaces the layer's own weights by a stack
        of which one layer is used; `chunks` and `first` as in `expert_parallel_mlp`."""
        if experts is None:
            experts = ExpertStack(self.wi_EDF[...][None], self.wo_EFD[...][None], jnp.int32(0))
        products = EXPERT_PRODUCTS[self.config.expert_products]
        return expert_parallel_mlp(streams, routings, experts, chunks, products, self.lora, first)


def expert_parallel_mlp(
    streams: tuple[Float[Array, "_ T D"], ...],
    routings: tuple[Routing, ...],
    experts: ExpertStack,
    chunks: int = 1,
    products: ExpertProducts = EXPERT_PRODUCTS["dtype"],
    adapters: ExpertAdapters | None = None,
    first: tuple[Float[Array, "R ..."], ...] = (),
) -> tuple[Float[Array, "_ T D"], ...]:
    """Sum over each token's experts of `weight * down(silu(gate x) * up x)`, computed where the experts are.

    Batch over (data, fsdp, expert), sequence over context; experts over (expert, fsdp). The weight is applied before the down
    projection, so that the backward does not need that projection's output.

    With `chunks` > 1 each device's tokens go through in so many parts, and the backward recomputes each part from its tokens: rows,
    hidden values and gathered tokens then take memory for the parts that are computed together only (gathered weights serve all). One part
    of every stream goes together, of a single stream two (of an odd number of parts, one): while one is computed, another is on its way.

    The experts' matrices are gathered after `first`, other weights that are `gathered`: what is small and needed soon should not share the
    links with what is large. Those out of the experts come last: in the order in which they are needed.

    Raises:
      ConfigError: several streams cannot share the chunks, or a stream's tokens on a device do not divide into its share of them, each of
        whole routing chunks.
    """
    together = len(streams) if len(streams) > 1 else 2 - chunks % 2
    if len(streams) > 1 and chunks % len(streams):
        raise ConfigError(
            f"moe_chunks={chunks}: {len(streams)} streams cannot share them; choose a multiple of {len(streams)}, or one stream."
        )
    for x_BTD in streams if chunks > 1 else ():
        tokens, parts = x_BTD.shape[0] * x_BTD.shape[1] // sharding.shards("batch") // sharding.shards("sequence"), chunks // len(streams)
        if tokens % (parts * CHUNK):
            stream = f", one of {len(streams)} streams" if len(streams) > 1 else ""
            raise ConfigError(
                f"moe_chunks={chunks}: the {tokens} tokens of a device ({x_BTD.shape[0]} rows of {x_BTD.shape[1]} on "
                f"{sharding.shards('batch')} x {sharding.shards('sequence')} devices{stream}) do not divide into {parts} multiples "
                f"of {CHUNK}; choose another number of chunks."
            )
    per_token = sharding.spec("batch", "sequence", None)
    return jax.shard_map(
        partial(
            _local_mlp,
            ranks=sharding.axis_size("expert"),
            gathers=sharding.axis_size("fsdp") > 1,
            together=together,
            steps=max(1, chunks // together),
            products=products,
            scale=0.0 if adapters is None else adapters.scale,
        ),
        in_specs=(
            (per_token,) * len(streams),
            (Routing.specs(),) * len(streams),
            PartitionSpec(None, "expert", "fsdp", None),
            PartitionSpec(None, "expert", None, "fsdp"),
            PartitionSpec(),
            PartitionSpec() if adapters is None else tuple(jax.typeof(x).sharding.spec for x in adapters.arrays()),
            tuple(jax.typeof(x).sharding.spec for x in first),
        ),
        out_specs=(per_token,) * len(streams),
    )(streams, routings, experts.wi_LEDF, experts.wo_LEFD, experts.layer, None if adapters is None else adapters.arrays(), first)


def _local_mlp(
    streams,
    routings,
    wi_LEDF,
    wo_LEFD,
    layer,
    adapters,
    first,
    *,
    ranks: int,
    gathers: bool,
    together: int,
    steps: int,
    products: ExpertProducts,
    scale: float,
):
    """One device's part; arguments are its shards. `together` parts are computed in each of so many `steps`."""
    like, dtype = streams[0], streams[0].dtype
    own_experts = wi_LEDF.shape[1]
    offset = layer * own_experts
    if wi_LEDF.shape[0] == 1 or gathers:
        wi_LEDF = jax.lax.dynamic_slice_in_dim(wi_LEDF, layer, 1) if wi_LEDF.shape[0] > 1 else wi_LEDF
        wo_LEFD = jax.lax.dynamic_slice_in_dim(wo_LEFD, layer, 1) if wo_LEFD.shape[0] > 1 else wo_LEFD
        offset = None
    # Typed as varying before they are gathered, so that the backward scatters a gradient over fsdp before it sums the shards
    # over data and context.
    wi, wo = (as_varying(w.astype(dtype), varying_axes(like)) for w in (wi_LEDF, wo_LEFD))
    if gathers:
        # Parts of a row are gathered in an order that is not that of a matrix in memory, and all of it laid out anew. Transposed, they
        # are whole rows.
        wo = jnp.swapaxes(wo, 2, 3)
        wi = all_after(wi, *first)
        # Not before the first of several streams has passed its router: where this begins the step waits for the transfer before.
        wo = all_after(wo, wi, *(routing.weights_BTGC for routing in routings[: len(streams) - 1]))
        wos, wis = (_gathered(together, w) for w in (wo, wi))
    else:
        wis, wos = (wi,) * together, (wo,) * together
    expert_mlp = products.mlp
    if adapters is not None:
        wi_a, wi_b, wo_a, wo_b = (as_varying(w.astype(dtype), varying_axes(like)) for w in adapters)
        with jax.named_scope("adapter_all_gather"):
            wi_a, wo_b = jax.lax.all_gather(wi_a, "fsdp", axis=1, tiled=True), jax.lax.all_gather(wo_b, "fsdp", axis=2, tiled=True)
        expert_mlp = with_adapters(products.product, (wi_a, wi_b), (wo_a, wo_b), scale)

    mlp = partial(_chunk_mlp, transposed=gathers, expert_mlp=expert_mlp, ranks=ranks, own_experts=own_experts, offset=offset)
    tokens = []
    for x_BTD, routing in zip(streams, routings, strict=True):
        per_token = (x_BTD, routing.ids_BTGC, routing.ranks_BTGC, routing.weights_BTGC)
        tokens.append((*(x.reshape(-1, *x.shape[2:]) for x in per_token), routing.counts_NE))
    if together == steps == 1:
        return (mlp(tokens[0], wis[0], wos[0]).reshape(like.shape),)
    if len(streams) < together:
        tokens = [jax.tree.map(lambda x, i=i: jnp.split(x, together)[i], tokens[0]) for i in range(together)]

    def step(parts):
        part_mlp = jax.checkpoint(mlp, policy=jax.checkpoint_policies.save_only_these_names(PLAN))
        return [part_mlp(part, wi, wo) for part, wi, wo in zip(parts, wis, wos, strict=True)]

    outs = step(tokens) if steps == 1 else jax.lax.map(step, jax.tree.map(lambda x: x.reshape(steps, -1, *x.shape[1:]), tokens))
    if len(streams) < together:
        return (jnp.concatenate([out.reshape(-1, out.shape[-1]) for out in outs]).reshape(like.shape),)
    return tuple(out.reshape(x.shape) for out, x in zip(outs, streams, strict=True))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gathered(chunks: int, weight: jax.Array) -> tuple[jax.Array, ...]:
    """Weights gathered over fsdp along their second last dimension, once for all parts. The gradient of each of those that go together is
    scattered by itself and only then added: to add up whole matrices reads and writes fsdp times as much."""
    with jax.named_scope("expert_weight_all_gather"):
        return (jax.lax.all_gather(weight, "fsdp", axis=2, tiled=True),) * chunks


def _scattered(chunks: int, _: None, gradients: tuple[jax.Array, ...]) -> tuple[jax.Array]:
    with jax.named_scope("expert_weight_all_gather"):
        parts = [jax.lax.psum_scatter(gradient, "fsdp", scatter_dimension=2, tiled=True) for gradient in gradients]
    if chunks > 1:  # or XLA adds first and scatters once
        parts = jax.lax.optimization_barrier(parts)
    return (sum(parts[1:], start=parts[0]),)


_gathered.defvjp(lambda chunks, weight: (_gathered(chunks, weight), None), _scattered)


@jax.custom_vjp
def _tokens_first(x_TD: jax.Array, *weights: jax.Array) -> tuple[jax.Array, ...]:
    """All of them. Backward, the gradient of the tokens is sent before those of the weights: it is needed sooner, and takes less time."""
    return x_TD, *weights


def _backward(_: None, gradients: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    # Behind a barrier, or XLA would make an all-reduce of the scatter that one number is taken from.
    grad_TD, *of_weights = gradients
    grad_TD = jax.lax.optimization_barrier(grad_TD)
    return grad_TD, *(all_after(gradient, grad_TD) for gradient in of_weights)


_tokens_first.defvjp(lambda *arrays: (arrays, None), _backward)


def _chunk_mlp(tokens, wi, wo, *, transposed: bool, expert_mlp: ExpertMlp, ranks: int, own_experts: int, offset):
    """Some tokens of every device of the expert axis through the experts of this one, and back; `tokens` are this device's, with
    their routing. `transposed` are the matrices `wo`."""
    x_TD, ids_TGC, ranks_TGC, weights_TGC, counts_NE = tokens
    wi, wo = wi.reshape(-1, *wi.shape[2:]), wo.reshape(-1, *wo.shape[2:])
    own_slots = ids_TGC.shape[1] // ranks * ids_TGC.shape[2]

    def exchange(x_TGC):
        """From own tokens and all groups to all tokens and own groups, [N, S]. On the way tokens come last: a row of the few numbers of
        a token takes a whole register in XLA's gradient of this."""
        x_RM = jnp.moveaxis(x_TGC.reshape(-1, ranks * own_slots), 0, 1).reshape(ranks, -1)
        x_RM = jax.lax.all_to_all(x_RM, "expert", split_axis=0, concat_axis=0, tiled=True)
        return jnp.moveaxis(x_RM.reshape(ranks, own_slots, -1), 1, 2).reshape(-1, own_slots)

    with jax.named_scope("routing_all_gather"):
        sizes_RE = jax.lax.all_gather(counts_NE.sum(0), "expert")
    rank = jax.lax.axis_index("expert")
    dest_TGC = destinations(ids_TGC, ranks_TGC, counts_NE, sizes_RE, rank)
    with jax.named_scope("routing_all_to_all"):
        dest_NS, weights_NS = exchange(dest_TGC), exchange(weights_TGC)
    x_TD, wi, wo = _tokens_first(x_TD, wi, wo)
    with jax.named_scope("token_all_gather"):
        x_ND = jax.lax.all_gather(x_TD, "expert", tiled=True)
    plan = make_plan(dest_NS, jax.lax.dynamic_slice_in_dim(sizes_RE.sum(0), rank * own_experts, own_experts))

    rows_MD = dispatch(x_ND, plan)
    weights_M = permute_slots(weights_NS, plan)
    out_MD = expert_mlp(rows_MD, wi, wo, weights_M, plan.group_sizes_G, transposed=transposed, group_offset=offset)
    out_ND = combine(out_MD, plan)
    with jax.named_scope("token_reduce_scatter"):
        return jax.lax.psum_scatter(out_ND, "expert", tiled=True)
