"""Which expert of the source each slot of the grown model copies: the methods (spec 1.3).

pairs    Each of the k copies is cut into G/k parts, one group each, so that experts which tokens choose together fall into different
         parts: in the released case Top-1 and Top-2 into two halves. A group then picks a token's Top-1 or Top-2 (the paper's choice).
         Every copy has its own cut, so that the copies of an expert are picked by different tokens and grow apart.
ranked   Group r holds the experts that are Top-r most often, all k copies of each (the paper's rejected choice).
random   As pairs, with random cuts; needs no calibration.
copy     The experts k times over, in order; needs no calibration. Copies of an expert in like groups are picked by the same tokens.
"""

from __future__ import annotations

import dataclasses
import zlib

import numpy as np
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment

from interns1pro_jax.config import FopeConfig, ModelConfig
from interns1pro_jax.config_checks import check_divides, check_fields, check_positive, require
from interns1pro_jax.expansion.cuts import distinct_cuts, random_cuts
from interns1pro_jax.expansion.routing_counts import RoutingCounts
from interns1pro_jax.families import RELEASED
from interns1pro_jax.tower_config import VisionConfig

METHODS = ("pairs", "ranked", "random", "copy")
CALIBRATED = ("pairs", "ranked")
# Weight of the co-occurrence that independent choices would have, beside the counted one. It puts equal Top-1 mass into the parts of a cut,
# and decides where a calibration set has not seen a pair.
_PRIOR = 0.1
IDENTITY = FopeConfig(init_factor=0.0)


@dataclasses.dataclass(frozen=True)
class ExpansionConfig:
    """How a model grows.

    Attributes:
      growth: k, copies of every expert.
      groups: G, router groups of the grown model.
      experts_per_token: K of the grown model; None keeps the source's.
      method: one of `METHODS`.
      noise: standard deviation of Gaussian noise on the copied router rows, as a share of that of the row's entries.
      seed: of cuts, noise and Fourier coefficients.
      fope: Fourier encoding of the grown model where the source has plain rotary encoding; None keeps that. With `init_factor` 0 the
        coefficients are the identity, which is the rotary encoding on all frequencies that are kept (`ops.fope`).
    """

    growth: int = 4
    groups: int = 8
    experts_per_token: int | None = None
    method: str = "pairs"
    noise: float = 0.0
    seed: int = 0
    fope: FopeConfig | None = IDENTITY

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("growth", "groups"):
            check_positive(f"ExpansionConfig.{name}", getattr(self, name))
        require(self.method in METHODS, f"ExpansionConfig.method={self.method!r} is unknown; use one of {', '.join(METHODS)}.")
        require(0 <= self.noise < float("inf"), f"ExpansionConfig.noise={self.noise} must be zero or a positive share; 0.01 is a little.")
        require(self.seed >= 0, f"ExpansionConfig.seed={self.seed} must not be negative.")

    def target(self, source: ModelConfig) -> ModelConfig:
        """The configuration of the grown model: of Intern-S1-Pro's family whatever the source's is, with an output head of its own, and
        with those towers of the source that the family has.

        Raises:
          ConfigError: the source has no experts or groups already; sizes that do not divide.
        """
        text = source.text
        require(text.num_moe_layers > 0, "the source has no MoE layers; only experts can be expanded.")
        require(
            text.router_n_groups == 1,
            f"the source's router has {text.router_n_groups} groups already; only a model with one group can be expanded.",
        )
        experts, chosen = self.growth * text.num_experts, self.experts_per_token or text.num_experts_per_tok
        check_divides(f"growth * experts = {self.growth} * {text.num_experts}", experts, "ExpansionConfig.groups", self.groups)
        require(
            self.method not in ("pairs", "random") or self.groups % self.growth == 0,
            f"method {self.method} gives each copy groups of its own, so groups={self.groups} must be divisible by growth={self.growth}.",
        )
        if self.method == "ranked":
            check_divides("experts of the source", text.num_experts, "groups (method ranked gives each a class of its own)", self.groups)
            require(
                self.groups <= text.num_experts_per_tok,
                f"method ranked needs a rank for each of {self.groups} groups; the source activates {text.num_experts_per_tok} experts.",
            )
        grown = dataclasses.replace(
            text,
            num_experts=experts,
            num_experts_per_tok=chosen,
            router_n_groups=self.groups,
            fope=self.fope if text.fope is None else text.fope,
            tie_word_embeddings=False,
        )
        vision = source.vision if isinstance(source.vision, VisionConfig) else None
        return dataclasses.replace(source, text=grown, vision=vision, family=RELEASED)

    def depth(self, source: ModelConfig) -> int:
        """n, how many distinct experts of the source a token's picks should be: K / k, at least one (see the package)."""
        return max((self.experts_per_token or source.text.num_experts_per_tok) // self.growth, 1)


def assign(config: ExpansionConfig, layers: int, experts: int, counts: RoutingCounts | None = None) -> Int[np.ndarray, "L G S"]:
    """The source expert of every slot, for each MoE layer, group and place in the group.

    Args:
      layers, experts: of the source.
      counts: of the source's routers; needed by the methods in `CALIBRATED`.

    Raises:
      ConfigError: no counts for a method that needs them, or counts of another model; sizes that do not divide.
    """
    if config.method in CALIBRATED:
        require(
            counts is not None,
            f"method {config.method} needs routing counts of a calibration set; give data to calibrate with, or choose random or copy.",
        )
        assert counts is not None
        require(
            counts.ranks_LEK.shape[:2] == (layers, experts),
            f"the routing counts are of {counts.ranks_LEK.shape[0]} MoE layers with {counts.ranks_LEK.shape[1]} experts, the source has "
            f"{layers} with {experts}; measure them with this source.",
        )
        require(counts.tokens > 0, "the calibration set has no tokens; give it some.")
    return np.stack([_assign_layer(config, layer, experts, counts) for layer in range(layers)])


def _assign_layer(config: ExpansionConfig, layer: int, experts: int, counts: RoutingCounts | None) -> np.ndarray:
    seed = zlib.crc32(f"cuts {config.seed} {layer}".encode())
    parts = config.groups // config.growth
    match config.method:
        case "pairs":
            assert counts is not None
            cuts = distinct_cuts(pair_weights(counts, layer), parts, config.growth, seed)
            return _groups_of(cuts, parts)
        case "random":
            return _groups_of(random_cuts(experts, parts, config.growth, seed), parts)
        case "ranked":
            assert counts is not None
            return np.tile(_rank_classes(counts.ranks_LEK[layer], config.groups), (1, config.growth))
        case _:
            return np.tile(np.arange(experts), config.growth).reshape(config.groups, -1)


def pair_weights(counts: RoutingCounts, layer: int) -> Float[np.ndarray, "E E"]:
    """What a cut of a layer should separate, [E, E]: counted co-occurrence, and a little of that of independent choices."""
    first_E = counts.ranks_LEK[layer, :, 0].astype(np.float64)
    weights_EE = counts.pairs_LEE[layer] + _PRIOR * np.outer(first_E, first_E) / first_E.sum()
    np.fill_diagonal(weights_EE, 0)
    return weights_EE


def _groups_of(cuts_kE: np.ndarray, parts: int) -> np.ndarray:
    """Copy j's part p becomes group j * parts + p, its experts in ascending order."""
    return np.stack([np.flatnonzero(cut == part) for cut in cuts_kE for part in range(parts)])


def _rank_classes(ranks_EK: np.ndarray, groups: int) -> np.ndarray:
    """Equal classes, [G, E/G], such that as many choices as possible are of an expert of class r at rank r."""
    size = len(ranks_EK) // groups
    expert, place = linear_sum_assignment(np.repeat(ranks_EK[:, :groups], size, axis=1), maximize=True)
    classes = place[np.argsort(expert)] // size
    return np.stack([np.flatnonzero(classes == group) for group in range(groups)])


def separation(counts: RoutingCounts, slots_LGS: Int[np.ndarray, "L G S"]) -> Float[np.ndarray, " L"]:
    """How often two experts that a token chose together are in different groups: of the groups with a copy of the one, the share that has
    none of the other, over the counted pairs of each layer. 1 where every cut separates all of them; 1/2 is what random halves give."""
    experts = counts.pairs_LEE.shape[1]
    shares = []
    for pairs_EE, slots_GS in zip(counts.pairs_LEE, slots_LGS, strict=True):
        held_GE = (slots_GS[:, :, None] == np.arange(experts)).any(1).astype(np.float64)
        both_EE = held_GE.T @ held_GE
        apart_EE = 1 - both_EE / np.diag(both_EE)[:, None]
        shares.append((pairs_EE * apart_EE).sum() / max(pairs_EE.sum(), 1))
    return np.array(shares)
