"""RMS norm of each head and rotary encoding of queries and keys on TPU: one pass over both, and one for their gradients.

Heads come before tokens, as attention's kernel takes them and a projection can write them. A step of the grid holds a block of tokens
of one key head and of the query heads that share its row of the tables, so that tables are read once.

Letters: T tokens, Q query heads, K key heads, H head width.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.shapes import full_precision, varying_like

LANES = 128  # of a register, and of a head: half a turn of the lanes swaps the halves of a head
CHUNK = 128  # tokens, of all heads, of one pass of a kernel's loop: with fewer the latencies of the matrix units show
_SUBLANES = 8
_VMEM = 5 << 20  # bytes of a block of all operands and results; there are two of each
_GROUP = 16  # query heads of a key head, of which a chunk still fits

Interpret = bool | pltpu.InterpretParams
_Static = tuple[float, Interpret]


def takes(tokens: int, group: int, width: int) -> bool:
    """Whether the kernels hold rows of so many tokens, and heads of this width of which `group` share a key head."""
    return width == LANES and tokens > 0 and tokens % CHUNK == 0 and group <= _GROUP


def norm_and_rotary(
    q_BQTH: jax.Array,
    k_BKTH: jax.Array,
    q_norm_H: jax.Array,
    k_norm_H: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    *,
    eps: float,
    interpret: Interpret = False,
) -> tuple[jax.Array, jax.Array]:
    """`y * cos + quarter_turn(y) * sin` of queries and keys, where `y = x / rms(x) * norm` and a quarter turn takes `[first, second]` to
    `[-second, first]`. Computed in float32 and rounded to their dtype once, where plain `jax.numpy` rounds after every step: that would
    be another third of the kernel's work, and XLA too leaves it out within a fusion. Differentiable in all but the tables.

    Args:
      q_BQTH, k_BKTH: bfloat16 or float32, of a size that `takes` knows: H = 128, T a multiple of 128, Q at most 16 K.
      q_norm_H, k_norm_H: weights of the norms.
      cos, sin: [B, heads, T, H], where heads divides K; key head i, and its query heads, use row `i // (K / heads)`.
      eps: added to the mean square.
    """
    cos, sin = (table.astype(q_BQTH.dtype) for table in (cos, sin))
    return _norm_and_rotary((float(eps), interpret), q_BQTH, k_BKTH, q_norm_H, k_norm_H, cos, sin)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _norm_and_rotary(static: _Static, *operands: jax.Array) -> tuple[jax.Array, jax.Array]:
    q, k = _call(_forward_kernel, "norm_and_rotary", static, operands, ())
    return q, k


def _forward(static: _Static, *operands: jax.Array) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, ...]]:
    return _norm_and_rotary(static, *operands), operands


def _backward(static: _Static, operands: tuple[jax.Array, ...], grads: tuple[jax.Array, jax.Array]) -> tuple[jax.Array | None, ...]:
    grad_q, grad_k, *sums = _call(_backward_kernel, "norm_and_rotary_gradient", static, operands, grads)
    grad_norms = (x.sum((0, 1, 2)).astype(norm.dtype) for x, norm in zip(sums, operands[2:4], strict=True))
    return grad_q, grad_k, *grad_norms, None, None


_norm_and_rotary.defvjp(_forward, _backward)


def _call(kernel: Any, name: str, static: _Static, operands: tuple[jax.Array, ...], grads: tuple[jax.Array, ...]) -> Any:
    """Runs a kernel on blocks of queries, keys, weights, tables and `grads`. Results are like queries and keys, and with `grads` sums
    of each block for the weights' gradients, [blocks of tokens, K, sublanes, H]."""
    eps, interpret = static
    q_BQTH, k_BKTH, q_norm_H, k_norm_H, cos, sin = operands
    B, K, T, H = k_BKTH.shape
    group, shared = q_BQTH.shape[1] // K, K // cos.shape[1]
    copies, itemsize = 2 + len(grads) // 2, q_BQTH.dtype.itemsize
    tokens = block_tokens(T, (copies * (group + 1) + 2) * H * itemsize)
    count = T // tokens  # blocks of a row
    moved = copies * (q_BQTH.size + k_BKTH.size) + cos.size + sin.size

    def block(heads: int, shared: int = 1) -> pl.BlockSpec:
        return pl.BlockSpec((1, heads, tokens, H), lambda i, head: (i // count, head // shared, i % count, 0))

    pair, weight, table = [block(group), block(1)], pl.BlockSpec((1, H), lambda i, head: (0, 0)), block(1, shared)
    sums = pl.BlockSpec((1, 1, _SUBLANES, H), lambda i, head: (i, head, 0, 0))
    norms = (norm.astype(q_BQTH.dtype).astype(jnp.float32)[None] for norm in (q_norm_H, k_norm_H))
    arrays = (q_BQTH, k_BKTH, *norms, cos, sin, *grads)
    results = [(x.shape, x.dtype, spec) for x, spec in zip((q_BQTH, k_BKTH), pair, strict=True)]
    results += [((B * count, K, _SUBLANES, H), jnp.float32, sums) for _ in grads]
    return pl.pallas_call(
        functools.partial(kernel, eps=eps),
        out_shape=[varying_like(shape, dtype, *arrays) for shape, dtype, _ in results],
        grid=(B * count, K),
        in_specs=[*pair, weight, weight, table, table, *(pair if grads else ())],
        out_specs=[spec for _, _, spec in results],
        # The cores of a chip share the blocks of tokens.
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(flops=0, transcendentals=B * T * (q_BQTH.shape[1] + K), bytes_accessed=moved * itemsize),
        interpret=interpret,
        name=name,
    )(*arrays)


def block_tokens(length: int, token_bytes: int) -> int:
    """Tokens of a block: as many as fit, a part of the row."""
    most = max(_VMEM // token_bytes, CHUNK)
    return max(size for size in range(CHUNK, min(length, most) + 1, CHUNK) if length % size == 0)


def _by_chunks(tokens: int) -> Any:
    """Decorates the body of a loop over chunks of a block's tokens."""

    def loop(body: Any) -> None:
        @pl.loop(0, tokens // CHUNK)
        def _(chunk) -> None:  # type: ignore[no-untyped-def]
            body(pl.ds(pl.multiple_of(chunk * CHUNK, CHUNK), CHUNK))

    return loop


def _tables(cos, sin, tokens) -> tuple[jax.Array, jax.Array]:  # type: ignore[no-untyped-def]
    """Of a chunk, in float32; the sine with the sign of the quarter turn."""
    cosine, sine = (table[0, 0, tokens].astype(jnp.float32) for table in (cos, sin))
    first = jax.lax.broadcasted_iota(jnp.int32, sine.shape, 1) < LANES // 2
    return cosine, jnp.where(first, -sine, sine)


def _swapped(x: jax.Array) -> jax.Array:
    """[..., H] with the halves in the other order. Two bfloat16 numbers that share a word move together."""
    words = pltpu.bitcast(x.reshape(-1, LANES), jnp.int32)
    return pltpu.bitcast(pltpu.roll(words, LANES // 2, 1), x.dtype).reshape(x.shape)


def _mean(x: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """The mean of float32 [..., H] over the lanes, in every lane. The matrix units add faster than lanes are moved; beside operands in
    bfloat16 it is enough that a number is the sum of two: the square of such an operand is, exactly."""
    rows, weights = x.reshape(-1, LANES), jnp.full((LANES, LANES), 1 / LANES, dtype)
    if dtype == jnp.float32:
        return jnp.dot(rows, weights, precision=full_precision(dtype)).reshape(x.shape)
    high = rows.astype(dtype)
    parts = jnp.concatenate([high, (rows - high.astype(jnp.float32)).astype(dtype)], 1)
    return jnp.dot(parts, jnp.concatenate([weights, weights]), preferred_element_type=jnp.float32).reshape(x.shape)


def _scale(x: jax.Array, eps: float, dtype: jax.typing.DTypeLike) -> jax.Array:
    return jax.lax.rsqrt(_mean(jnp.square(x), dtype) + eps)


def _forward_kernel(q, k, q_norm, k_norm, cos, sin, q_out, k_out, *, eps: float) -> None:  # type: ignore[no-untyped-def]
    @_by_chunks(q.shape[2])
    def _(tokens) -> None:  # type: ignore[no-untyped-def]
        cosine, sine = _tables(cos, sin, tokens)
        for x, norm, out in ((q, q_norm, q_out), (k, k_norm, k_out)):
            # Both halves of a head get the weight that is theirs, so that only the operand itself is turned.
            weight = jnp.broadcast_to(norm[...], (_SUBLANES, LANES))
            straight, crossed = cosine * weight[:1], sine * _swapped(weight)[:1]
            heads = x[0, :, tokens]
            heads_fp32 = heads.astype(jnp.float32)
            turned = heads_fp32 * straight + _swapped(heads).astype(jnp.float32) * crossed
            out[0, :, tokens] = (turned * _scale(heads_fp32, eps, x.dtype)).astype(out.dtype)


def _backward_kernel(q, k, q_norm, k_norm, cos, sin, q_grad, k_grad, q_out, k_out, q_sums, k_sums, *, eps: float) -> None:  # type: ignore[no-untyped-def]
    for sums in (q_sums, k_sums):
        sums[...] = jnp.zeros_like(sums)

    @_by_chunks(q.shape[2])
    def _(tokens) -> None:  # type: ignore[no-untyped-def]
        cosine, sine = _tables(cos, sin, tokens)
        sine = _swapped(sine)
        for x, norm, grad, out, sums in ((q, q_norm, q_grad, q_out, q_sums), (k, k_norm, k_grad, k_out, k_sums)):
            heads, given = x[0, :, tokens].astype(jnp.float32), grad[0, :, tokens]
            scale = _scale(heads, eps, x.dtype)
            normal = heads * scale
            turned = given.astype(jnp.float32) * cosine + _swapped(given).astype(jnp.float32) * sine  # back
            sums[0, 0] += (turned * normal).reshape(-1, _SUBLANES, LANES).sum(0)
            weighted = turned * norm[...]
            out[0, :, tokens] = (scale * (weighted - normal * _mean(weighted * normal, x.dtype))).astype(out.dtype)
