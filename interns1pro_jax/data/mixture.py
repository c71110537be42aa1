"""Which source, epoch and record the n-th draw of a training run is: a pure function of the mixture, the seed and n.

Within a stage of constant weights, the i-th draw of source s is due at time (2i+1)/w_s, and draws come in the order of their times
(Webster's method of apportionment). So after n draws every source is within a few draws of n times its share, for any n, and the
counts after n draws are found without going through them. Blocks of draws are then shuffled, so that no reader of every k-th draw
sees one source only. The i-th draw of a source is record i mod R of its epoch i div R, in a random order of the epoch's own:
nothing comes twice before everything came once.

A curriculum is a list of stages, and a source that reaches its limit of epochs ends a stage. All stages are known beforehand,
so any draw is found in constant time; and a change of weights from some draw on changes nothing before it.
"""

from __future__ import annotations

import dataclasses
import heapq
import math
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int

from interns1pro_jax.config import ConfigError
from interns1pro_jax.data.permutation import counter_hash, key_of, permute

# Draws that are shuffled among one another. Stages begin at multiples of it.
BLOCK = 256


@dataclasses.dataclass(frozen=True)
class Source:
    """A prepared source of a mixture.

    Attributes:
      path: its directory.
      weight: its share of the tokens, relative to the other weights; 0 leaves it out until a later stage.
      modality, domain: tags, for statistics.
      epochs: how often its records may be used at most, not necessarily a whole number; None has no limit.
      system_prompt: put before each of its documents as a system message, so that domains that answer in different manners stay
        apart (training_serving_evaluation.md 1.7). Pre-packed rows have theirs from `tools.prepare_data --system`.
    """

    path: str
    weight: float
    modality: str = "text"
    domain: str = "general"
    epochs: float | None = None
    system_prompt: str | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.weight < float("inf"):
            raise ConfigError(f"Source {self.path}: weight={self.weight} must be finite and not negative.")
        if self.epochs is not None and not self.epochs > 0:
            raise ConfigError(f"Source {self.path}: epochs={self.epochs} must be positive; leave it out for no limit.")


@dataclasses.dataclass(frozen=True)
class CurriculumStage:
    """New weights of some sources, by path, from a number of seen tokens on."""

    tokens: int
    weights: Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class SourceSize:
    """Records of a source, and tokens in all of them."""

    records: int
    tokens: int


@dataclasses.dataclass(frozen=True)
class Stage:
    """Constant weights: draws from `start` on, when each source had been drawn `counts` times, are due at `rates`."""

    start: int
    rates: tuple[float, ...]
    counts: tuple[int, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Draws:
    """Consecutive draws: for each its source, epoch, and record within the source."""

    source: Int[np.ndarray, " N"]
    epoch: Int[np.ndarray, " N"]
    record: Int[np.ndarray, " N"]

    def __len__(self) -> int:
        return len(self.source)


class Mixture:
    """The order of draws.

    Args:
      sources: what is mixed, in any order: a source is known by its path.
      sizes: of each.
      curriculum: changes of weights, by tokens seen.
      seed: of all orders.
      align: draws that are planned together; stages begin at multiples of it, so that plans before a change stay what they were.

    Attributes:
      stages: of constant weights, in order.
      length: how many draws there are until every source has reached its limit; None if there is no end.

    Raises:
      ConfigError: no source, one twice, an empty one, a curriculum that names others or goes backwards, or weights that are all 0.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        sizes: Sequence[SourceSize],
        curriculum: Sequence[CurriculumStage] = (),
        seed: int = 0,
        align: int = BLOCK,
    ):
        self.sources = tuple(sorted(sources, key=lambda source: source.path))
        by_path = dict(zip((source.path for source in sources), sizes, strict=True))
        if not sources or len(by_path) != len(sources):
            raise ConfigError("a mixture needs sources, each once; to use one more often, raise its weight.")
        self.sizes = tuple(by_path[source.path] for source in self.sources)
        for source, size in zip(self.sources, self.sizes, strict=True):
            if size.records < 1 or size.tokens < 1:
                raise ConfigError(f"{source.path} has no records; leave it out or prepare it again.")
        self._align = math.lcm(align, BLOCK)
        self._seed = seed
        self._records = np.array([size.records for size in self.sizes], np.int64)
        self._keys = np.array([key_of(seed, source.path) for source in self.sources], np.uint64)
        self._limits = [
            None if s.epochs is None else max(round(s.epochs * z.records), 1) for s, z in zip(self.sources, self.sizes, strict=True)
        ]
        self.stages, self.length = self._compile(curriculum)

    def draws(self, start: int, stop: int) -> Draws:
        """Draws start..stop-1.

        Raises:
          ConfigError: the sources have all reached their limits before `stop`.
        """
        if self.length is not None and stop > self.length:
            raise ConfigError(
                f"the mixture ends after {self.length:,} draws, but draw {stop - 1:,} is wanted: every source has reached its epochs. "
                "Raise them, or train for fewer steps."
            )
        parts, position = [], start
        while position < stop:
            number = self._stage_at(position)
            end = min(stop, self.stages[number + 1].start) if number + 1 < len(self.stages) else stop
            parts.append(self._in_stage(number, position, end))
            position = end
        source = np.concatenate([part[0] for part in parts]) if parts else np.zeros(0, np.int64)
        drawn = np.concatenate([part[1] for part in parts]) if parts else np.zeros(0, np.int64)
        records = self._records[source]
        epoch = drawn // records
        keys = self._keys[source] ^ counter_hash(self._seed, epoch)
        return Draws(source, epoch, permute(drawn % records, records, keys))

    def counts(self, n: int) -> tuple[int, ...]:
        """How often each of `sources` is among the first n draws; for n a multiple of `BLOCK`, since blocks are shuffled."""
        stage = self.stages[self._stage_at(n)]
        inside = _counts_after(np.array(stage.rates), n - stage.start)
        return tuple(before + int(new) for before, new in zip(stage.counts, inside, strict=True))

    def _stage_at(self, n: int) -> int:
        low, high = 0, len(self.stages)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.stages[middle].start <= n else (low, middle)
        return low

    def _in_stage(self, number: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Source, and count within the source, of draws start..stop-1 of one stage."""
        stage = self.stages[number]
        end = self.stages[number + 1].start if number + 1 < len(self.stages) else self.length
        # Blocks are counted from the beginning of the run; a stage that ends or begins inside of one cuts it in two.
        first, last = max(start // BLOCK * BLOCK, stage.start), -(-stop // BLOCK) * BLOCK
        last = last if end is None else min(last, end)
        rates = np.array(stage.rates)
        low, high = _counts_after(rates, first - stage.start), _counts_after(rates, last - stage.start)
        source = np.repeat(np.arange(len(rates)), high - low)
        drawn = np.concatenate([np.arange(a, b) for a, b in zip(low, high, strict=True)])
        by_time = np.lexsort((source, _due(drawn, rates[source])))
        n = np.arange(first, last)
        shuffled = by_time[np.lexsort((counter_hash(key_of(self._seed, "blocks"), n), n // BLOCK))][start - first : stop - first]
        return source[shuffled], drawn[shuffled] + np.array(stage.counts, np.int64)[source[shuffled]]

    def _compile(self, curriculum: Sequence[CurriculumStage]) -> tuple[tuple[Stage, ...], int | None]:
        paths = {source.path for source in self.sources}
        changes = list(curriculum)
        if [c.tokens for c in changes] != sorted({c.tokens for c in changes}) or (changes and changes[0].tokens <= 0):
            raise ConfigError(f"stages of a curriculum begin at growing numbers of tokens above 0, not at {[c.tokens for c in changes]}.")
        for change in changes:
            if unknown := sorted(set(change.weights) - paths):
                raise ConfigError(f"the curriculum's stage at {change.tokens} tokens names {unknown}, which are no sources of the mixture.")
        weights = {source.path: source.weight for source in self.sources}
        stages: list[Stage] = []
        start, tokens = 0, 0.0
        counts = tuple(0 for _ in self.sources)
        while True:
            rates = self._rates(weights, counts)
            if rates is None:
                if not stages:
                    raise ConfigError("all weights of the mixture are 0 in its first stage; give a source a positive weight.")
                return tuple(stages), start
            stages.append(Stage(start, tuple(rates.tolist()), counts))
            per_draw = self._tokens_per_draw(rates)
            exhausted = self._exhausted(rates, counts)
            changed = None
            if changes:
                changed = (
                    max(round((start + (changes[0].tokens - tokens) / per_draw) / self._align), start // self._align + 1) * self._align
                )
            ends = [end for end in (None if exhausted is None else start + exhausted, changed) if end is not None]
            if not ends:
                return tuple(stages), None
            inside = _counts_after(rates, min(ends) - start)
            tokens += (min(ends) - start) * per_draw
            start, counts = min(ends), tuple(a + int(b) for a, b in zip(counts, inside, strict=True))
            if start == changed:
                weights |= dict(changes.pop(0).weights)

    def _rates(self, weights: Mapping[str, float], counts: Sequence[int]) -> Float[np.ndarray, " sources"] | None:
        """Draws of each source, as shares: weights are shares of tokens. A source at its limit has none."""
        rates = np.array([weights[s.path] * z.records / z.tokens for s, z in zip(self.sources, self.sizes, strict=True)])
        for number, limit in enumerate(self._limits):
            if limit is not None and counts[number] >= limit:
                rates[number] = 0
        return rates / math.fsum(rates) if rates.any() else None  # `fsum`: sources of weight 0 do not even change its rounding

    def _tokens_per_draw(self, rates: np.ndarray) -> float:
        return float(sum(rate * size.tokens / size.records for rate, size in zip(rates, self.sizes, strict=True)))

    def _exhausted(self, rates: np.ndarray, counts: Sequence[int]) -> int | None:
        """Draws after which the first source reaches its limit."""
        limited = [(limit - count - 1, rate) for limit, count, rate in zip(self._limits, counts, rates, strict=True) if limit and rate > 0]
        if not limited:
            return None
        time = min(float(_due(last, rate)) for last, rate in limited)
        return int(_due_until(rates, time).sum())


def _due(drawn: np.ndarray | int, rates: np.ndarray | float) -> np.ndarray:
    """When the draws of a source are due. Equal times compare equal and later ones never less, so sorting by (time, source) is one order
    of all draws, whichever of them are looked at."""
    return (2 * np.asarray(drawn) + 1) / np.asarray(rates)


def _due_until(rates: np.ndarray, time: float) -> np.ndarray:
    """Draws of each source that are due at `time` or before."""
    counts = np.maximum(np.floor((time * rates + 1) / 2), 0).astype(np.int64)
    active = rates > 0
    safe = np.where(active, rates, 1.0)
    counts += active & (_due(counts, safe) <= time)  # one off by rounding, at most
    counts -= active & (counts > 0) & (_due(counts - 1, safe) > time)
    return np.where(active, counts, 0)


def _counts_after(rates: np.ndarray, n: int) -> Int[np.ndarray, " sources"]:
    """How many of the first n draws of a stage each source has."""
    total = float(rates.sum())
    back = len(rates) + 1
    counts = _due_until(rates, 2 * max(n - back, 0) / total)
    while counts.sum() > n:
        back *= 2
        counts = _due_until(rates, 2 * max(n - back, 0) / total) if n > back else np.zeros(len(rates), np.int64)
    waiting = [(float(_due(counts[s], rates[s])), s) for s in range(len(rates)) if rates[s] > 0]
    heapq.heapify(waiting)
    for _ in range(n - int(counts.sum())):
        _, s = waiting[0]
        counts[s] += 1
        heapq.heapreplace(waiting, (float(_due(counts[s], rates[s])), s))
    return counts
