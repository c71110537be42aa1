"""Routing on TPU: choice, probabilities and the counting sort's ranks in one pass over the router's logits, gradients in another.

Tokens lie on lanes and experts on sublanes, so that a group of 64 experts is 8 vector registers and what is found in it (largest
logit, sums) is left on rows of tokens. Ranks are prefix counts over the tokens of a chunk: the one-hot choices times a triangle of
ones, exact in bfloat16 with float32 sums. They start anew in every chunk, so no step waits for another, and both cores of a chip that
has two share the work; a sum over chunks, tiny, makes them places (`Routes`).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.routing_reference import CHUNK, Routes, check_operands
from pallas_kernels.shapes import varying_like

BLOCK = 512  # tokens of a grid step: long enough to hide its overhead, short enough that filling the pipeline does not show
UNROLLED = 2  # chunks of one pass of a kernel's loop: one hides the latencies of the other
_LANES, _SUBLANES = 128, 8  # of a vector register

Interpret = bool | pltpu.InterpretParams


def takes(experts: int, groups: int) -> bool:
    """Whether the kernel's layout holds this many experts: whole sublanes in a group, whole lanes in all. Toy models have fewer."""
    return experts // groups % _SUBLANES == 0 and experts % _LANES == 0


@dataclasses.dataclass(frozen=True)
class _Shape:
    tokens: int
    groups: int
    size: int
    chosen: int
    temperature: float
    interpret: Interpret

    @property
    def experts(self) -> int:
        return self.groups * self.size

    @property
    def slots(self) -> int:
        return self.groups * self.chosen

    @property
    def block(self) -> int:
        return min(BLOCK, pl.cdiv(self.tokens, CHUNK) * CHUNK)

    @property
    def grid(self) -> tuple[int]:
        return (pl.cdiv(self.tokens, self.block),)


def route(
    logits_TE: jax.Array,
    replay_TGC: jax.Array | None = None,
    probe: jax.Array | None = None,
    *,
    groups: int,
    chosen: int,
    temperature: float = 1.0,
    interpret: Interpret = False,
) -> Routes:
    """Chooses experts in every group. Differentiable from the probabilities to the logits (and to `probe`).

    Args:
      logits_TE: float32. The experts are `groups` contiguous groups of a multiple of 8; a multiple of 128 in all.
      replay_TGC: ids to use instead of the largest; one that is no expert of a group leaves the choice to the logits.
      probe: a scalar without influence. Its gradient is the squared norm of the logits' gradient outside the chosen experts.
      chosen: experts of each group that a token takes.
      temperature: the gradient of the probabilities is that of softmax(logits / temperature); 1 is the true one.
      interpret: emulates the kernels on any platform.

    Raises:
      ValueError: ranks, shapes or sizes do not fit together or to the kernel.
      TypeError: dtypes that the kernels do not take.
    """
    check_operands(logits_TE, replay_TGC, probe, groups, chosen, temperature)
    num_tokens, num_experts = logits_TE.shape
    size = num_experts // groups
    if not takes(num_experts, groups):
        raise ValueError(
            f"the routing kernel takes groups of a multiple of {_SUBLANES} experts, a multiple of {_LANES} in all; got {groups} groups "
            f"of {size}. Use route_reference for other sizes."
        )
    shape = _Shape(num_tokens, groups, size, chosen, float(temperature), interpret)
    return _route(shape, logits_TE, replay_TGC, probe)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _route(shape: _Shape, logits_TE: jax.Array, replay_TGC: jax.Array | None, probe: jax.Array | None) -> Routes:
    del probe
    return _choose(shape, logits_TE, replay_TGC)


def _forward(shape: _Shape, logits_TE: jax.Array, replay_TGC: jax.Array | None, probe: jax.Array | None):  # type: ignore[no-untyped-def]
    routes = _route(shape, logits_TE, replay_TGC, probe)
    return routes, (logits_TE, routes.ids_TGC, probe)


def _backward(shape: _Shape, saved: tuple[Any, ...], grads: Routes):  # type: ignore[no-untyped-def]
    logits_TE, ids_TGC, probe = saved
    options: dict[str, Any] = dict(groups=shape.groups, temperature=shape.temperature, interpret=shape.interpret)
    grad_TE, outside_T = route_gradient(logits_TE, ids_TGC, grads.probs_TGC, **options)
    return grad_TE, None, None if probe is None else outside_T.sum()


_route.defvjp(_forward, _backward)


def _choose(shape: _Shape, logits_TE: jax.Array, replay_TGC: jax.Array | None) -> Routes:
    replay = () if replay_TGC is None else (_to_lanes(replay_TGC.astype(jnp.int32)),)
    slots = [_lanes((shape.chosen, shape.groups), dtype, shape) for dtype in (jnp.int32, jnp.float32, jnp.int32)]
    chunks = shape.block // CHUNK
    counts = _Output((shape.grid[0], chunks, shape.experts), jnp.int32, pl.BlockSpec((1, chunks, shape.experts), lambda i: (i, 0, 0)))
    kernel = functools.partial(_choose_kernel, shape=shape)
    ids, probs, ranks, counts = _call(kernel, "route", shape, (_to_lanes(logits_TE), *replay), [*slots, counts])
    ids_TGC, probs_TGC, ranks_TGC = (_from_lanes(x, shape.tokens) for x in (ids, probs, ranks))
    return Routes(ids_TGC, probs_TGC, ranks_TGC, counts.reshape(-1, shape.experts)[: pl.cdiv(shape.tokens, CHUNK)])


def route_gradient(
    logits_TE: jax.Array, ids_TGC: jax.Array, grad_TGC: jax.Array, *, groups: int, temperature: float = 1.0, interpret: Interpret = False
) -> tuple[jax.Array, jax.Array]:
    """Gradient [T, E] of the logits from that of the probabilities, and [T] the squared norm of its part outside the chosen experts."""
    num_tokens, num_experts = logits_TE.shape
    shape = _Shape(num_tokens, groups, num_experts // groups, ids_TGC.shape[-1], temperature, interpret)
    operands = tuple(_to_lanes(x) for x in (logits_TE, ids_TGC, grad_TGC))
    outputs = [_lanes((shape.experts,), jnp.float32, shape), _lanes((1,), jnp.float32, shape)]
    grad_ET, outside = _call(functools.partial(_pull_back_kernel, shape=shape), "route_gradient", shape, operands, outputs)
    return _from_lanes(grad_ET, shape.tokens), outside[0, : shape.tokens]


@dataclasses.dataclass(frozen=True)
class _Output:
    shape: tuple[int, ...]
    dtype: Any
    spec: pl.BlockSpec


def _to_lanes(x: jax.Array) -> jax.Array:
    """[tokens, ...] transposed, and padded to whole rows of lanes. The same bytes, where XLA may choose the layout of `x`."""
    return jnp.pad(x.T, ((0, 0),) * (x.ndim - 1) + ((0, -x.shape[0] % CHUNK),))


def _from_lanes(x: jax.Array, tokens: int) -> jax.Array:
    return x[..., :tokens].T


def _lanes(rows: tuple[int, ...], dtype: Any, shape: _Shape) -> _Output:
    """[*rows, tokens], of which a grid step writes a block of tokens."""
    return _Output((*rows, pl.cdiv(shape.tokens, CHUNK) * CHUNK), dtype, _block(rows, shape))


def _block(rows: tuple[int, ...], shape: _Shape) -> pl.BlockSpec:
    return pl.BlockSpec((*rows, shape.block), lambda i: (*(0 for _ in rows), i))


def _call(kernel: Any, name: str, shape: _Shape, operands: tuple[jax.Array, ...], outputs: list[_Output]) -> Any:
    return pl.pallas_call(
        kernel,
        out_shape=[varying_like(output.shape, output.dtype, *operands) for output in outputs],
        grid=shape.grid,
        in_specs=[_block(x.shape[:-1], shape) for x in operands],
        out_specs=[output.spec for output in outputs],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        interpret=shape.interpret,
        name=name,
    )(*operands)


def _choose_kernel(logits, *refs, shape: _Shape) -> None:  # type: ignore[no-untyped-def]
    *replay, ids, probs, ranks, counts = refs
    groups, size = shape.groups, shape.size
    # In float32, which has a minimum on every chip, and holds them exactly.
    expert = jax.lax.broadcasted_iota(jnp.int32, (1, size, CHUNK), 1).astype(jnp.float32)
    token = pl.program_id(0) * shape.block + jax.lax.broadcasted_iota(jnp.int32, (1, 1, CHUNK), 2)
    earlier = jax.lax.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), 0) < jax.lax.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), 1)

    @pl.loop(0, shape.block // CHUNK, unroll=UNROLLED)
    def _(chunk) -> None:  # type: ignore[no-untyped-def]
        lanes = pl.ds(pl.multiple_of(chunk * CHUNK, CHUNK), CHUNK)
        x = logits[:, lanes].reshape(groups, size, CHUNK)
        largest = _largest(x, expert, shape.chosen)
        highest = jnp.max(largest[0][0], 0, keepdims=True)
        total = jnp.sum(jnp.exp(x - highest), (0, 1), keepdims=True)

        winners, hot = [], []
        for choice, (top, winner) in enumerate(largest):
            winner = jnp.where(jnp.isnan(total), float(choice), winner)
            for recorded_ids in replay:
                recorded = recorded_ids[choice, :, lanes][:, None]
                winner = jnp.where((recorded >= 0) & (recorded < size), recorded.astype(jnp.float32), winner)
                top = jnp.sum(jnp.where(expert == winner, x, 0.0), 1, keepdims=True)
            ids[choice, :, lanes] = winner[:, 0].astype(jnp.int32)
            probs[choice, :, lanes] = (jnp.exp(top - highest) / total)[:, 0]
            winners.append(winner)
            hot.append((expert == jnp.where(token + chunk * CHUNK < shape.tokens, winner, -1.0)).astype(jnp.float32))

        slots = functools.reduce(jnp.add, hot).reshape(shape.experts, CHUNK).astype(jnp.bfloat16)
        before = jnp.dot(slots, earlier.astype(jnp.bfloat16), preferred_element_type=jnp.float32).reshape(groups, size, CHUNK)
        for choice, winner in enumerate(winners):
            rank = jnp.sum(hot[choice] * before, 1)
            for other in winners[:choice]:
                rank += (other == winner)[:, 0].astype(jnp.float32)
            ranks[choice, :, lanes] = rank.astype(jnp.int32)
        ones = jnp.ones((_SUBLANES, CHUNK), jnp.bfloat16)
        sums = jax.lax.dot_general(ones, slots, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
        counts[0, pl.ds(chunk, 1)] = sums[:1].astype(jnp.int32)


def _largest(x: jax.Array, expert: jax.Array, chosen: int) -> list[tuple[jax.Array, jax.Array]]:
    """The largest logits of every group and their experts, falling; equal ones in rising order of expert."""
    left, taken, found = x, jnp.zeros((), bool), []
    for choice in range(chosen):
        top = jnp.max(left, 1, keepdims=True)
        # Not smaller rather than equal: a NaN must not lead to no expert at all.
        winner = jnp.min(jnp.where((left < top) | taken, float(expert.shape[1] - 1), expert), 1, keepdims=True)
        found.append((top, winner))
        if choice + 1 < chosen:
            taken |= expert == winner
            left = jnp.where(taken, -jnp.inf, x)
    return found


def _pull_back_kernel(logits, ids, grad, grad_logits, outside, *, shape: _Shape) -> None:  # type: ignore[no-untyped-def]
    groups, size, chosen = shape.groups, shape.size, shape.chosen
    expert = jax.lax.broadcasted_iota(jnp.int32, (1, size, CHUNK), 1)

    @pl.loop(0, shape.block // CHUNK, unroll=UNROLLED)
    def _(chunk) -> None:  # type: ignore[no-untyped-def]
        lanes = pl.ds(pl.multiple_of(chunk * CHUNK, CHUNK), CHUNK)
        x = logits[:, lanes].reshape(groups, size, CHUNK) / shape.temperature
        unscaled = jnp.exp(x - jnp.max(x, (0, 1), keepdims=True))
        scale = 1.0 / jnp.sum(unscaled, (0, 1), keepdims=True)
        upstream, selected = jnp.zeros_like(x), jnp.zeros(x.shape, bool)
        for choice in range(chosen):
            is_chosen = expert == ids[choice, :, lanes][:, None]
            upstream += jnp.where(is_chosen, grad[choice, :, lanes][:, None], 0.0)
            selected |= is_chosen
        mean = jnp.sum(unscaled * upstream, (0, 1), keepdims=True) * scale
        result = unscaled * (upstream - mean) * (scale / shape.temperature)
        grad_logits[:, lanes] = result.reshape(shape.experts, CHUNK)
        outside[:, lanes] = jnp.sum(jnp.where(selected, 0.0, result) ** 2, (0, 1), keepdims=True)[0]
