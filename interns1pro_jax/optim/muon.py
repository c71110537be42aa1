"""Muon: momentum whose matrices are orthogonalised, on weights that are split over devices (arXiv:2502.16982).

Every expert's gate, up and down projection, every layer's attention projections and the towers' are matrices of their own. Newton-Schulz
needs all of a matrix, and a device holds a part of many. So devices exchange parts for whole matrices, each orthogonalises its share of
them, and the results go back: two all-to-alls, each of a device's own share of the weights in bfloat16. Experts do not leave the devices
of their group, and nothing is gathered. Devices that hold the same part of a parameter (all along `data`, and along `expert` for what is
no expert) compute the same.

`optax.contrib.muon` computes on whole arrays: with explicit shardings its products are ambiguous, with automatic ones the weights are
gathered on every device.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from interns1pro_jax import sharding
from interns1pro_jax.config import ConfigError
from interns1pro_jax.optim.groups import path_name

# Rows and columns of the matrices in a parameter, by the letters that its name ends with; what is left are several of them.
_MATRICES = {
    "DQH": ("D", "QH"), "DKH": ("D", "KH"), "QHD": ("QH", "D"), "DCQH": ("D", "QH"),
    "EDF": ("D", "F"), "EFD": ("F", "D"), "DF": ("D", "F"), "FD": ("F", "D"), "EF": ("E", "F"), "ED": ("E", "D"), "DE": ("D", "E"),
}  # fmt: skip
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # steepest at 0: singular values end between 0.7 and 1.2 (Jordan et al., Muon, 2024)
_ROUND = 2**24  # elements that a device orthogonalises at a time, unless one matrix has more


@dataclasses.dataclass(frozen=True)
class MuonConfig:
    """Muon for the matrices between layers; all else is left to AdamW: embeddings of tokens, patches and positions, head, routers,
    convolutions, vectors.

    Attributes:
      momentum: decay of the average of gradients, which is used with Nesterov's look ahead.
      iterations: of Newton-Schulz, in bfloat16.
      rms: root mean square of an update before the learning rate. 0.2 is that of AdamW, so that both take the same rate and decay
        (arXiv:2502.16982, section 2.2).
    """

    momentum: float = 0.95
    iterations: int = 5
    rms: float = 0.2

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1:
            raise ConfigError(f"MuonConfig.momentum={self.momentum} must lie in 0..1, 1 excluded.")
        for name in ("iterations", "rms"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"MuonConfig.{name}={getattr(self, name)} must be positive.")


class MuonState(NamedTuple):
    """Average of the gradients."""

    momentum: Any


def letters_of(name: str) -> str | None:
    """The letters of a parameter of matrices, by its path or last name; None where AdamW takes it."""
    letters = name.rpartition("_")[2]
    return letters if letters in _MATRICES and "/router/" not in name else None


def scale_by_muon(config: MuonConfig) -> optax.GradientTransformation:
    """Orthogonalised momentum; every leaf must be a parameter of matrices (`letters_of`).

    Raises:
      ConfigError: in `init`, there is none.
    """

    def init(params: Any) -> MuonState:
        if not jax.tree.leaves(params):
            raise ConfigError(
                "OptimizerConfig.muon is for matrices, and none of what is trained is one: adapters (TextConfig.lora) are trained by "
                "AdamW, and OptimizerConfig.freeze may leave vectors only. Drop OptimizerConfig.muon, or train matrices."
            )
        return MuonState(jax.tree.map(jnp.zeros_like, params))

    def update(updates: Any, state: MuonState, params: Any = None) -> tuple[Any, MuonState]:
        def average(gradient: Array, momentum: Array) -> Array:
            return config.momentum * momentum + (1 - config.momentum) * gradient

        momentum = jax.tree.map(average, updates, state.momentum)
        ahead = jax.tree.map(average, updates, momentum)
        directions = jax.tree_util.tree_map_with_path(
            lambda path, x: orthogonalize(x, path_name(path), iterations=config.iterations, rms=config.rms), ahead
        )
        return directions, MuonState(momentum)

    return optax.GradientTransformation(init, update)


def orthogonalize(x: Float[Array, "*shape"], name: str, *, iterations: int, rms: float) -> Float[Array, "*shape"]:
    """The nearest orthogonal matrix to each of a parameter's, nearly, times a factor that makes its root mean square `rms`.

    Args:
      x: split over devices as the parameter is.
      name: the parameter's.
    """
    letters = letters_of(name)
    assert letters is not None, name
    row_letters, column_letters = _MATRICES[letters]
    spec = tuple(jax.typeof(x).sharding.spec)
    first = x.ndim - len(letters)
    rows, columns = ([first + letters.index(letter) for letter in group] for group in (row_letters, column_letters))
    batch = [axis for axis in range(x.ndim) if axis not in (*rows, *columns)]
    halves = 2 if name.rpartition("/")[2].startswith("wi_") else 1  # gate and up projection stand side by side

    def local(x: Array) -> Array:
        moved = x.astype(jnp.bfloat16).transpose(*batch, *rows, *columns)
        m, n = math.prod(x.shape[axis] for axis in rows), math.prod(x.shape[axis] for axis in columns) // halves
        matrices = moved.reshape(-1, m, halves, n).swapaxes(1, 2).reshape(-1, m, n)
        split = [(dim, _axes(spec[axes[0]])) for dim, axes in ((1, rows), (2, columns)) if spec[axes[0]]]
        (dim, across), *more = split or [(1, ())]
        assert not more, f"{name}: both sides of its matrices are split, {spec}"
        matrices = _exchanged(matrices, dim, across, iterations).astype(jnp.float32)
        whole = [size * (sharding.axis_size(*across) if i == dim else 1) for i, size in ((1, m), (2, n))]
        matrices *= rms * math.sqrt(max(whole))
        back = matrices.reshape(-1, halves, m, n).swapaxes(1, 2).reshape(moved.shape)
        return back.transpose(*(sorted(range(x.ndim), key=(*batch, *rows, *columns).__getitem__)))

    return jax.shard_map(local, in_specs=PartitionSpec(*spec), out_specs=PartitionSpec(*spec))(x)


def _axes(axes: str | tuple[str, ...]) -> tuple[str, ...]:
    return (axes,) if isinstance(axes, str) else tuple(axes)


def _exchanged(matrices_SMN: Array, dim: int, axes: tuple[str, ...], iterations: int) -> Array:
    """Orthogonalised matrices, of which each device holds a part along `dim`, split over mesh `axes`."""
    devices = sharding.axis_size(*axes) if axes else 1
    count, size = matrices_SMN.shape[0], devices * math.prod(matrices_SMN.shape[1:])
    each = min(-(-count // devices), max(1, _ROUND // size))  # matrices of a device in a round
    rounds = -(-count // (each * devices))
    padded = jnp.pad(matrices_SMN, ((0, rounds * each * devices - count), (0, 0), (0, 0)))

    def one_round(parts: Array) -> Array:
        if devices > 1:
            with jax.named_scope("muon_all_to_all"):
                parts = jax.lax.all_to_all(parts, axes, split_axis=0, concat_axis=dim, tiled=True)
        whole = jax.vmap(lambda x: _orthogonal(x, iterations))(parts)
        if devices > 1:
            with jax.named_scope("muon_all_to_all"):
                whole = jax.lax.all_to_all(whole, axes, split_axis=dim, concat_axis=0, tiled=True)
        return whole

    result = jax.lax.map(one_round, padded.reshape(rounds, each * devices, *padded.shape[1:]))
    return result.reshape(padded.shape)[:count]


def _orthogonal(x_MN: Array, iterations: int) -> Array:
    """Newton-Schulz: the polynomial that brings every singular value of a matrix of norm 1 near 1, so many times."""
    norm = jnp.linalg.norm(x_MN.astype(jnp.float32))
    x = (x_MN.astype(jnp.float32) / jnp.maximum(norm, jnp.finfo(jnp.float32).tiny)).astype(jnp.bfloat16)
    wide = x.shape[0] <= x.shape[1]
    x = x if wide else x.T  # the smaller square
    a, b, c = _COEFFICIENTS
    for _ in range(iterations):
        square = x @ x.T
        x = a * x + (b * square + c * (square @ square)) @ x
    return x if wide else x.T
