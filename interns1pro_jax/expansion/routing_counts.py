"""How the tokens of a calibration set choose experts: at which rank, and together with which others."""

from __future__ import annotations

import dataclasses
import hashlib
import zipfile
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int

from interns1pro_jax.checkpoint.errors import CheckpointError
from interns1pro_jax.config import ConfigError


@dataclasses.dataclass(frozen=True, eq=False)
class RoutingCounts:
    """Counts over the tokens of a calibration set, for the MoE layers of a model with one group. Counts of disjoint sets add up.

    Attributes:
      ranks_LEK: tokens for which an expert was the r-th best (r from 0).
      pairs_LEE: tokens whose best `depth` experts held both; symmetric, with a diagonal of zeros. With a depth of 2 it is the Top-1/Top-2
        co-occurrence.
      depth: see there.
    """

    ranks_LEK: Int[np.ndarray, "L E K"]
    pairs_LEE: Int[np.ndarray, "L E E"]
    depth: int

    @property
    def tokens(self) -> int:
        """Tokens counted."""
        return int(self.ranks_LEK[0, :, 0].sum())

    @property
    def fingerprint(self) -> str:
        """Of the counts: what they were taken from decides it, in whatever order and batches."""
        content = hashlib.sha256(str((self.ranks_LEK.shape, self.depth)).encode())
        for counts in (self.ranks_LEK, self.pairs_LEE):
            content.update(np.ascontiguousarray(counts, "<i8").tobytes())
        return content.hexdigest()

    def __add__(self, other: RoutingCounts) -> RoutingCounts:
        if self.depth != other.depth:
            raise ValueError(f"counts of depths {self.depth} and {other.depth} do not add up.")
        return RoutingCounts(self.ranks_LEK + other.ranks_LEK, self.pairs_LEE + other.pairs_LEE, self.depth)

    def save(self, path: Path, source: str) -> None:
        """Writes an npz file, complete or absent; `source` is the fingerprint of the checkpoint whose routers chose."""
        partial = path.with_name(path.name + ".partial")
        with partial.open("wb") as file:
            np.savez_compressed(
                file, ranks_LEK=self.ranks_LEK, pairs_LEE=self.pairs_LEE, depth=np.int64(self.depth), source=np.array(source)
            )
        partial.replace(path)

    @classmethod
    def load(cls, path: Path, source: str, depth: int) -> RoutingCounts:
        """Reads what `save` wrote.

        Raises:
          CheckpointError: the file is absent, damaged, of the routers of another checkpoint, or of pairs among another number of experts.
        """
        try:
            with np.load(path, allow_pickle=False) as content:
                counts = cls(content["ranks_LEK"], content["pairs_LEE"], int(content["depth"]))
                measured = str(content["source"])
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise CheckpointError(f"{path} holds no routing counts ({error}); measure them again.") from error
        if measured != source:
            raise CheckpointError(
                f"{path} was measured with another checkpoint ({measured[:12]}, not {source[:12]}); remove it to measure again."
            )
        if counts.depth != depth:
            raise CheckpointError(
                f"{path} has the pairs among the best {counts.depth} experts of a token, but this growth and these groups need those among "
                f"{depth}; remove it to measure again."
            )
        return counts


def count_routing(ids_LNK: Int[np.ndarray, "L N K"], valid_N: Bool[np.ndarray, " N"], experts: int, depth: int) -> RoutingCounts:
    """Counts the routing of a batch.

    Args:
      ids_LNK: each token's experts, best first: `TextOutput.routing_LBTGC` of a model with one group, tokens flattened.
      valid_N: tokens that count (not padding).
      depth: how many of a token's best experts make its pairs.

    Raises:
      ConfigError: `depth` is more than the ranks there are.
    """
    layers, _, ranks = ids_LNK.shape
    if not 1 <= depth <= ranks:
        raise ConfigError(
            f"the grown model shares {depth} distinct experts of the source among a token's groups, but the source activates only {ranks}; "
            "choose a larger growth or fewer experts per token."
        )
    chosen_LNK = ids_LNK[:, valid_N].astype(np.int64)
    layer_L11 = np.arange(layers)[:, None, None]
    ranks_LEK = _bincount((layer_L11 * experts + chosen_LNK) * ranks + np.arange(ranks), (layers, experts, ranks))
    best_LNd = chosen_LNK[:, :, :depth]
    first_LNdd, second_LNdd = np.broadcast_arrays(best_LNd[..., :, None], best_LNd[..., None, :])
    pairs_LEE = _bincount((layer_L11[..., None] * experts + first_LNdd) * experts + second_LNdd, (layers, experts, experts))
    pairs_LEE[:, np.arange(experts), np.arange(experts)] = 0
    return RoutingCounts(ranks_LEK, pairs_LEE, depth)


def _bincount(places: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return np.bincount(places.ravel(), minlength=int(np.prod(shape))).reshape(shape)
