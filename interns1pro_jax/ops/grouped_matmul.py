"""Products of rows with the matrix of their group: the expert layers.

`grouped_matmul` is the one entry; its cost is that of its FLOPs. Three products make it and its gradients: rows with matrices,
rows with transposed matrices (input gradient), and rows with rows (weight gradient). On TPU they are Pallas kernels, on CPU loops over
blocks of rows, on GPU batches of them (`ops.blocked_matmul`). `grouped_matmul_reference` is the dense oracle.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from interns1pro_jax.ops.blocked_matmul import blocked_product, blocked_weight_gradient
from interns1pro_jax.ops.layout import transposed_copy
from interns1pro_jax.ops.varying import as_varying, match_varying, varying_axes
from pallas_kernels import grouped_matmul as tpu
from pallas_kernels.chips import current_chip
from pallas_kernels.grouped_matmul import grouped_matmul_reference as grouped_matmul_reference

Carry = TypeVar("Carry")
Dtype = jnp.dtype


def grouped_matmul(
    lhs_MK: Float[Array, "M K"],
    rhs: Float[Array, "G rows columns"],
    group_sizes_G: Int[Array, " G_used"],
    *,
    transposed: bool = False,
    group_offset: int | Int[Array, ""] | None = None,
    preferred_element_type: Dtype | None = None,
) -> Float[Array, "M N"]:
    """Each row times the matrix of its group. Differentiable in `lhs_MK` and `rhs`.

    Args:
      lhs_MK: rows, sorted by group; their dtype is that of the products (accumulated in fp32).
      rhs: one matrix [K, N] per group, of any floating dtype.
      group_sizes_G: rows of each group; they must sum to M. Empty groups get a gradient of exactly zero.
      transposed: the matrices are given as [N, K].
      group_offset: matrix of the first group, so that a stack of many layers' experts is read in place.
      preferred_element_type: dtype of the result; default that of `lhs_MK`.
    """
    offset = jnp.asarray(0 if group_offset is None else group_offset, jnp.int32)
    dtype = jnp.dtype(preferred_element_type or lhs_MK.dtype)
    lhs_MK, rhs, group_sizes_G, offset = match_varying(lhs_MK, rhs, group_sizes_G, offset)
    if chip := current_chip():
        # Toy models are narrower than the kernels' lanes; zeros change no product. The released sizes are multiples.
        lhs_MK, columns = pad_to_lanes(lhs_MK, 1), rhs.shape[1 if transposed else 2]
        rhs = pad_to_lanes(pad_to_lanes(rhs.astype(lhs_MK.dtype), 1), 2)
        out_MN = tpu.grouped_matmul(
            lhs_MK, rhs, group_sizes_G, transposed=transposed, group_offset=offset, preferred_element_type=dtype, chip=chip
        )
        return out_MN[:, :columns]
    return _grouped_matmul(dtype, transposed, lhs_MK, rhs, group_sizes_G, offset)


def pad_to_lanes(x: Array, axis: int) -> Array:
    """`x` with zeros behind, so that the axis is a multiple of 128 long."""
    missing = -x.shape[axis] % 128
    return jnp.pad(x, [(0, missing if i == axis else 0) for i in range(x.ndim)]) if missing else x


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _grouped_matmul(dtype: Dtype, transposed: bool, lhs_MK: Array, rhs: Array, sizes_G: Array, offset: Array) -> Array:
    return _product(lhs_MK, rhs, sizes_G, offset, transposed=transposed, dtype=dtype)


def _forward(dtype: Dtype, transposed: bool, *operands: Array):  # type: ignore[no-untyped-def]
    return _grouped_matmul(dtype, transposed, *operands), operands


def _backward(dtype: Dtype, transposed: bool, operands: tuple[Array, ...], grad_MN: Array):  # type: ignore[no-untyped-def]
    lhs_MK, rhs, sizes_G, offset = operands
    grad_MN = grad_MN.astype(lhs_MK.dtype)
    grad_lhs_MK = _product(grad_MN, rhs, sizes_G, offset, transposed=not transposed, dtype=lhs_MK.dtype)
    left, right = (grad_MN, lhs_MK) if transposed else (lhs_MK, grad_MN)
    return grad_lhs_MK, _weight_gradient(left, right, sizes_G, offset, rhs.shape[0], dtype=rhs.dtype), None, None


_grouped_matmul.defvjp(_forward, _backward)


def _product(lhs_MK: Array, rhs: Array, sizes_G: Array, offset: Array, *, transposed: bool, dtype: Dtype) -> Array:
    """Rows times the [K, N] matrix of their group, or times the transpose of its [N, K] matrix."""
    return jax.lax.platform_dependent(
        lhs_MK, rhs, sizes_G, offset,
        cpu=functools.partial(_product_cpu, transposed=transposed, dtype=dtype),
        default=functools.partial(blocked_product, transposed=transposed, dtype=dtype),
    )  # fmt: skip


def _weight_gradient(lhs_MK: Array, grad_MN: Array, sizes_G: Array, offset: Array, num_matrices: int, *, dtype: Dtype) -> Array:
    """For each group the product of its transposed rows with the rows of the gradient, [num_matrices, K, N]."""
    return jax.lax.platform_dependent(
        lhs_MK, grad_MN, sizes_G, offset,
        cpu=functools.partial(_weight_gradient_cpu, num_matrices=num_matrices, dtype=dtype),
        default=functools.partial(blocked_weight_gradient, num_matrices=num_matrices, dtype=dtype),
    )  # fmt: skip


# CPU ------------------------------------------------------------------------------------------------------------------
#
# What makes these loops as fast as XLA's dense products (all of it measured):
#   * A group is one product of nearly its own size. Every size that occurs is a loop of its own over the groups of that size,
#     since shapes are static and trip counts are not.
#   * A block may overhang into the neighbouring groups; those rows are masked rather than laid out with padding.
#   * Rows and results are fp32 inside, cast to the dtype of the product block by block: XLA:CPU slices and updates bf16 arrays
#     by converting them whole to fp32, in every iteration where it cannot hoist it.
#   * XLA:CPU has fast bf16 products only with fp32 results and without transposed left operands.


def _block_sizes(num_rows: int, num_groups: int) -> tuple[int, ...]:
    """Row counts of the blocks, ascending: steps of 32 up to 512 for large groups, powers of two where groups are small."""
    mean = -(-num_rows // num_groups)
    if mean < 32:
        return tuple(size for size in (1, 2, 4, 8, 16, 32, 64) if size <= num_rows)
    largest = min(512, 64 * -(-mean // 32))
    return tuple(size for size in range(32, largest + 1, 32) if size <= num_rows)


Block = Callable[[Carry, Array, Array, Array, int], Carry]


def _for_each_block(sizes_G: Array, num_rows: int, body: Block[Carry], carry: Carry) -> Carry:
    """Runs `body(carry, group, start, end, block size)` over blocks that cover all rows.

    A block holds the rows [start, start + block size) of one group, which has rows up to `end`. Every group has as many blocks
    of the largest size as fit, and one of the smallest size that covers the rest.
    """
    blocks = _block_sizes(num_rows, sizes_G.size)
    largest = blocks[-1]
    end_G = jnp.cumsum(sizes_G)
    start_G = end_G - sizes_G
    full_G = sizes_G // largest
    rest_G = sizes_G - full_G * largest
    full_end_G = jnp.cumsum(full_G)

    def full_block(i: Array, carry: Carry) -> Carry:
        group = jnp.searchsorted(full_end_G, i, side="right")
        within = i - (full_end_G - full_G)[group]
        return body(carry, group, start_G[group] + within * largest, end_G[group], largest)

    def rest_block(i: Array, carry: Carry, block: int) -> Carry:
        group = by_class_G[i]
        return body(carry, group, start_G[group] + full_G[group] * largest, end_G[group], block)

    carry = jax.lax.fori_loop(0, full_end_G[-1], full_block, carry)
    class_G = jnp.searchsorted(jnp.asarray((0, *blocks)), rest_G)  # 0: nothing left, c: blocks[c - 1] rows
    by_class_G = jnp.argsort(class_G)
    class_end = jnp.searchsorted(class_G[by_class_G], jnp.arange(len(blocks) + 1), side="right")
    for c, block in enumerate(blocks, start=1):
        carry = jax.lax.fori_loop(class_end[c - 1], class_end[c], functools.partial(rest_block, block=block), carry)
    return carry


def _rows(x: Array, start: Array, size: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(x, start, size)


def _place(start: Array, end: Array, block: int, num_rows: int) -> tuple[Array, Array]:
    """Where to read and write a block so that it stays inside the array, and which of its rows are meant, [block, 1]."""
    read_at = jnp.minimum(start, num_rows - block)
    row = read_at + jnp.arange(block)
    return read_at, ((start <= row) & (row < end))[:, None]


def _matrices(rhs: Array, dtype: Dtype) -> Callable[[Array], Array]:
    """Reads one matrix of a stack, as `dtype`. A bf16 stack is sliced as integers: see above."""
    if rhs.dtype == jnp.bfloat16:
        bits = jax.lax.bitcast_convert_type(rhs, jnp.uint16)
        return lambda i: jax.lax.bitcast_convert_type(_rows(bits, i, 1)[0], jnp.bfloat16).astype(dtype)
    return lambda i: _rows(rhs, i, 1)[0].astype(dtype)


def _product_cpu(lhs_MK: Array, rhs: Array, sizes_G: Array, offset: Array, *, transposed: bool, dtype: Dtype) -> Array:
    num_rows = lhs_MK.shape[0]
    matrix = _matrices(rhs, lhs_MK.dtype)
    lhs_fp32_MK = lhs_MK.astype(jnp.float32)
    contracted = (((1,), (1 if transposed else 0,)), ((), ()))

    def block_product(out_MN: Array, group: Array, start: Array, end: Array, block: int) -> Array:
        at, meant = _place(start, end, block, num_rows)
        rows = _rows(lhs_fp32_MK, at, block).astype(lhs_MK.dtype)
        product = jax.lax.dot_general(rows, matrix(offset + group), contracted, preferred_element_type=jnp.float32)
        product = jnp.where(meant, product, _rows(out_MN, at, block))
        return jax.lax.dynamic_update_slice_in_dim(out_MN, product, at, axis=0)

    out_MN = jnp.zeros((num_rows, rhs.shape[1 if transposed else 2]), jnp.float32)
    out_MN = as_varying(out_MN, varying_axes(lhs_MK, rhs, sizes_G, offset))
    return _for_each_block(sizes_G, num_rows, block_product, out_MN).astype(dtype)


def _weight_gradient_cpu(lhs_MK: Array, grad_MN: Array, sizes_G: Array, offset: Array, *, num_matrices: int, dtype: Dtype) -> Array:
    num_rows = lhs_MK.shape[0]
    lhs_fp32_MK, grad_fp32_MN = lhs_MK.astype(jnp.float32), grad_MN.astype(jnp.float32)

    def add_block(out_GKN: Array, group: Array, start: Array, end: Array, block: int) -> Array:
        at, meant = _place(start, end, block, num_rows)
        rows = _rows(lhs_fp32_MK, at, block).astype(lhs_MK.dtype)
        grad = jnp.where(meant, _rows(grad_fp32_MN, at, block), 0).astype(lhs_MK.dtype)
        product = jnp.dot(transposed_copy(rows), grad, preferred_element_type=jnp.float32)
        return out_GKN.at[offset + group].add(product, mode="promise_in_bounds")

    out_GKN = jnp.zeros((num_matrices, lhs_MK.shape[1], grad_MN.shape[1]), jnp.float32)
    out_GKN = as_varying(out_GKN, varying_axes(lhs_MK, grad_MN, sizes_G, offset))
    return _for_each_block(sizes_G, num_rows, add_block, out_GKN).astype(dtype)
