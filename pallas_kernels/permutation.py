"""Permutations of single numbers on TPU, by the scalar unit.

Vector units move rows: where indices say for every number where it goes, XLA's scatter stores a masked vector for each number, and its
gather loads and turns one. The scalar unit loads the index and the number and stores it, in half the cycles, as long as the result
fits into its memory; of larger ones it makes a window at a time.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.shapes import varying_like

WINDOW = 1 << 17  # numbers of the result in scalar memory at a time: half of it
BLOCK = 1 << 12  # numbers read at a time
_TILE = 1 << 10  # of one-dimensional arrays in HBM
TOGETHER = 4  # loads that hide each other's latencies; with more the scalar registers spill

Interpret = bool | pltpu.InterpretParams


def permute_reference(x_M: jax.Array, dest_M: jax.Array) -> jax.Array:
    """As `permute`, in plain `jax.numpy`."""
    return jnp.zeros_like(x_M).at[dest_M].set(x_M, mode="promise_in_bounds", unique_indices=True, wrap_negative_indices=False)


def permute(x_M: jax.Array, dest_M: jax.Array, *, window: int = WINDOW, block: int = BLOCK, interpret: Interpret = False) -> jax.Array:
    """`y_M[dest_M[m]] = x_M[m]`.

    Args:
      x_M: numbers of 32 bits.
      dest_M: int32, a permutation of 0..M-1; anything else is undefined behaviour.
      window, block: numbers of the result in scalar memory at a time, and those read at a time; multiples of 1024 on a chip.
      interpret: emulates the kernel on any platform.

    Raises:
      ValueError: shapes do not fit together.
      TypeError: dtypes that the kernel does not take.
    """
    if x_M.ndim != 1 or x_M.shape != dest_M.shape:
        raise ValueError(f"x_M and dest_M must be of the same length, got shapes {x_M.shape} and {dest_M.shape}.")
    if x_M.dtype.itemsize != 4:
        raise TypeError(f"x_M must be of 32 bits, got {x_M.dtype}; convert it.")
    return _place(dest_M, x_M, window, block, interpret)


def invert(dest_M: jax.Array, *, window: int = WINDOW, block: int = BLOCK, interpret: Interpret = False) -> jax.Array:
    """The inverse permutation: `permute` of 0..M-1, which need not be read."""
    return _place(dest_M, None, window, block, interpret)


def _place(dest_M: jax.Array, x_M: jax.Array | None, window: int, block: int, interpret: Interpret) -> jax.Array:
    if dest_M.dtype != jnp.int32:
        raise TypeError(f"dest_M must be int32, got {dest_M.dtype}.")
    (size,) = dest_M.shape
    block = min(block, pl.cdiv(size, _TILE) * _TILE)
    padded = pl.cdiv(size, block) * block
    window = min(window, padded)
    windows = pl.cdiv(padded, window)
    operands = [jnp.concatenate([dest_M, jnp.arange(size, padded, dtype=jnp.int32)])]  # padding goes where padding is
    operands += [] if x_M is None else [jnp.pad(x_M, (0, padded - size))]
    dtype = jnp.int32 if x_M is None else x_M.dtype
    return pl.pallas_call(
        functools.partial(_kernel, block=block, window=window, windows=windows),
        out_shape=varying_like((windows * window,), dtype, *operands),
        grid=(windows, padded // block),
        in_specs=[pl.BlockSpec((block,), lambda _, i: (i,), memory_space=pltpu.SMEM) for _ in operands],
        out_specs=pl.BlockSpec(memory_space=pl.ANY),
        scratch_shapes=[pltpu.SMEM((window + _TILE,), dtype)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret,
        name="invert" if x_M is None else "permute",
    )(*operands)[:size]


def _kernel(dest, *refs, block: int, window: int, windows: int) -> None:  # type: ignore[no-untyped-def]
    *numbers, out, result = refs
    part, step = pl.program_id(0), pl.program_id(1)

    @pl.loop(0, block // TOGETHER)
    def _(batch) -> None:  # type: ignore[no-untyped-def]
        sources = [batch * TOGETHER + i for i in range(TOGETHER)]
        places = [dest[source] for source in sources]
        values = [x[source] for x in numbers for source in sources] or [step * block + source for source in sources]
        if windows > 1:  # what belongs to other windows goes behind the end
            places = [place - part * window for place in places]
            places = [jnp.where((place >= 0) & (place < window), place, window) for place in places]
        for place, value in zip(places, values, strict=True):
            result[place] = value

    @pl.when(step == pl.num_programs(1) - 1)
    def _() -> None:
        whole = pl.ds(pl.multiple_of(part * window, window), window)
        pltpu.sync_copy(result.at[pl.ds(0, window)], out.at[whole])
