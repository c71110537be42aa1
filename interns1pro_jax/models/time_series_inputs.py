"""Host side of the time-series tower: normalisation, the adaptive patch plan, and packing into static shapes (spec 4.1, 5.3).

Stride and patch count are computed once, here, in fp32 as the released encoder does, and reach the device as row indices. So
the number of placeholder tokens and the number of embeddings cannot disagree, and one compiled shape serves every rate.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from interns1pro_jax.config import TimeSeriesConfig
from interns1pro_jax.models.inputs import TimeSeriesInputs

MAX_SAMPLES = 240_000  # per channel; the released pre-processor keeps no more (spec 5.3)
_EPSILON = 1e-8


@dataclasses.dataclass(frozen=True)
class PatchPlan:
    """How one signal is cut (spec 4.1).

    Attributes:
      stride: samples between the starts of two patches.
      patch: samples of a patch, twice the stride.
      patches: patches of the signal; an odd last one is not encoded (spec 4.3).
      tokens: embeddings that the signal becomes.
    """

    stride: int
    patch: int
    patches: int
    tokens: int

    @property
    def pairs(self) -> int:
        """Pairs of neighbouring patches."""
        return self.patches // 2

    @property
    def samples(self) -> int:
        """Samples per channel that the encoded patches cover; the signal is cut or zero-padded to them."""
        return (2 * self.pairs - 1) * self.stride + self.patch


def stride_of(sampling_rate: float) -> int:
    """Samples between patches at this rate in Hz: `floor(160 / (1 + exp(-rate/100))^6)` in fp32 (spec 4.1), from 2 to 160.

    In fp64 the last step, from 159 to 160, would come at about 3674 Hz instead of 1664 Hz (spec 9.5).
    """
    rate = np.float32(sampling_rate)
    sigmoid_inverse = np.float32(1) + np.exp(-rate / np.float32(100))
    return int(np.floor(np.float32(160) / sigmoid_inverse ** np.float32(6)))


def patch_plan(length: int, sampling_rate: float) -> PatchPlan:
    """The plan of a signal of `length` samples per channel at `sampling_rate` Hz.

    A signal that fits into one patch counts as `patch + 1` samples, its end zero-padded: one token instead of none (spec 4.1).

    Raises:
      ValueError: `length` or `sampling_rate` is not positive, or the rate is not finite.
    """
    if length < 1:
        raise ValueError(f"a signal of {length} samples cannot be encoded; give at least one.")
    if not 0 < sampling_rate < np.finfo(np.float32).max:
        raise ValueError(f"sampling rate {sampling_rate} Hz must be positive and finite; leave it out where it is unknown.")
    stride = stride_of(sampling_rate)
    patch = 2 * stride
    patches = -(-(max(length, patch + 1) - patch) // stride) + 1
    return PatchPlan(stride, patch, patches, (patches // 2 + 1) // 2)


def tokens_of(length: int, sampling_rate: float) -> int:
    """Embeddings, and placeholder tokens, of a signal; see `patch_plan`."""
    return patch_plan(length, sampling_rate).tokens


def _as_samples(values: Any) -> np.ndarray:
    """`values` as a [length, channels] array, checked."""
    array = np.asarray(values)
    if array.dtype.kind not in "biuf":
        raise ValueError(f"a signal of dtype {array.dtype} cannot be encoded; give real numbers.")
    if array.ndim not in (1, 2):
        raise ValueError(
            f"a signal has shape [length] or [length, channels], not {list(array.shape)}; reshape it, or give one signal per entry."
        )
    array = array[:, None] if array.ndim == 1 else array
    if 0 in array.shape:
        raise ValueError(f"a signal of {array.shape[0]} samples in {array.shape[1]} channels is empty; leave it out.")
    bad = np.argwhere(~np.isfinite(array))
    if len(bad):
        step, channel = bad[0]
        raise ValueError(
            f"a signal has {len(bad)} non-finite values, the first ({array[step, channel]}) at sample {step} of channel {channel}; "
            "fill or cut the gaps."
        )
    return array


@dataclasses.dataclass(frozen=True, eq=False)
class Signal:
    """One signal as the tower reads it.

    Attributes:
      values: samples, [length] or [length, channels]; held as contiguous fp32 [length, channels]. The tower expects them
        normalised: `prepare_signal` makes a `Signal` of a recording.
      sampling_rate: in Hz; where it is None or not positive, `max(length / 4, 1)` (spec 5.3).
      samples_cut: samples per channel that were removed from the recording's end.

    Raises:
      ValueError: empty, wrong rank, not numeric, or not finite.
    """

    values: np.ndarray
    sampling_rate: float | None = None
    samples_cut: int = 0

    def __post_init__(self) -> None:
        values = np.ascontiguousarray(_as_samples(self.values), np.float32)
        _as_samples(values)  # a number beyond the range of fp32 is an infinity by now
        rate = self.sampling_rate
        rate = max(len(values) / 4, 1.0) if rate is None or rate <= 0 else float(rate)
        patch_plan(len(values), rate)  # rejects a rate that is not a finite number
        object.__setattr__(self, "values", values)
        object.__setattr__(self, "sampling_rate", rate)

    @property
    def plan(self) -> PatchPlan:
        assert self.sampling_rate is not None
        return patch_plan(len(self.values), self.sampling_rate)

    @property
    def tokens(self) -> int:
        """Placeholder tokens of the signal."""
        return self.plan.tokens


def normalize(values: Any, ddof: int = 0) -> np.ndarray:
    """Scales each channel to mean 0 and standard deviation 1 over time (spec 5.3); a constant channel becomes zeros.

    Args:
      values: [length] or [length, channels].
      ddof: 0 for the population's standard deviation (serving), 1 for the sample's (the authors' trainer, spec 9.6).

    Returns:
      fp32 [length, channels].

    Raises:
      ValueError: as `Signal`; or fewer than ddof + 1 samples.
    """
    samples = _as_samples(values).astype(np.float64)
    if len(samples) <= ddof:
        raise ValueError(f"a signal of {len(samples)} samples has no standard deviation with ddof={ddof}; use ddof=0 or a longer signal.")
    # Relative to the first sample a constant channel is exactly zero, and a large offset costs no precision.
    samples -= samples[0].copy()
    return ((samples - samples.mean(0)) / (samples.std(0, ddof=ddof) + _EPSILON)).astype(np.float32)


def prepare_signal(values: Any, sampling_rate: float | None = None, *, ddof: int = 0, max_samples: int = MAX_SAMPLES) -> Signal:
    """Makes the `Signal` of a recording: normalised over its whole length, then cut to `max_samples` per channel (spec 5.3).

    What is cut is told by a warning and by `Signal.samples_cut`.

    Raises:
      ValueError: as `normalize`.
    """
    normalized = normalize(values, ddof)
    cut = max(len(normalized) - max_samples, 0)
    if cut:
        warnings.warn(
            f"a signal of {len(normalized)} samples was cut to its first {max_samples}; split or resample it to use all of it.",
            stacklevel=2,
        )
    return Signal(normalized[:max_samples], sampling_rate, cut)


@dataclasses.dataclass(frozen=True)
class TimeSeriesSizes:
    """Static sizes of one pack of `TimeSeriesInputs`: X, R, pairs, and the bound of a row's length."""

    values: int
    rows: int
    pairs: int
    patch_width: int

    def bucketed(self) -> TimeSeriesSizes:
        """The next powers of two (the patch width no larger than the longest patch), so that few shapes are compiled."""
        sizes = {name: 1 << max(size - 1, 1).bit_length() for name, size in dataclasses.asdict(self).items()}
        return TimeSeriesSizes(**{**sizes, "patch_width": min(sizes["patch_width"], TimeSeriesConfig.MAX_PATCH)})


def required_sizes(packs: Sequence[Sequence[Signal]]) -> TimeSeriesSizes:
    """The smallest sizes that hold every one of these packs."""
    plans = [[(signal.plan, signal.values.shape[1]) for signal in pack] for pack in packs]
    return TimeSeriesSizes(
        values=max((sum(plan.samples * channels for plan, channels in pack) for pack in plans), default=0),
        rows=max((sum(2 * plan.pairs * channels for plan, channels in pack) for pack in plans), default=0),
        pairs=max((sum(2 * plan.tokens for plan, _ in pack) for pack in plans), default=0),
        patch_width=max((plan.patch for pack in plans for plan, _ in pack), default=0),
    )


def pack_time_series(
    packs: Sequence[Sequence[Signal]], config: TimeSeriesConfig, *, sizes: TimeSeriesSizes | None = None
) -> TimeSeriesInputs:
    """Packs signals of any length, rate and channel count into arrays of static shape.

    Args:
      packs: the signals of each pack, in reading order (see `models.inputs`); a pack may be empty.
      config: of the tower that reads them.
      sizes: fixed sizes, for one compiled shape throughout a run; by default the packs' own, rounded up to powers of two.

    Returns:
      NumPy arrays. The tokens of a pack's signals follow one another without gaps, from token 0.

    Raises:
      ValueError: no pack; an odd `sizes.pairs`; or the signals do not fit into `sizes`.
    """
    if not packs:
        raise ValueError("no pack to make; give at least one (it may be empty).")
    needed = required_sizes(packs)
    sizes = needed.bucketed() if sizes is None else sizes
    if sizes.pairs % 2 or not 0 < sizes.patch_width <= config.MAX_PATCH:
        raise ValueError(
            f"pairs={sizes.pairs} must be even (two make a token) and patch_width={sizes.patch_width} in 1..{config.MAX_PATCH}."
        )
    wants, has = dataclasses.asdict(needed), dataclasses.asdict(sizes)
    if short := [f"{name}: {wants[name]} > {has[name]}" for name in wants if wants[name] > has[name]]:
        raise ValueError(
            f"the signals do not fit into the fixed sizes ({', '.join(short)}); raise the sizes or put fewer signals into a pack."
        )
    arrays = [_pack(pack, sizes) for pack in packs]
    stacked: dict[str, Any] = {name: np.stack([a[name] for a in arrays]) for name in arrays[0]}
    return TimeSeriesInputs(**stacked, patch_width=sizes.patch_width)


def _pack(signals: Sequence[Signal], sizes: TimeSeriesSizes) -> dict[str, np.ndarray]:
    """The arrays of one pack, without the leading axis."""
    out = {
        "values": np.zeros(sizes.values, np.float32),
        "row_start": np.zeros(sizes.rows, np.int32),
        "row_length": np.zeros(sizes.rows, np.int32),
        "row_patch": np.zeros(sizes.rows, np.int32),
        "row_weight": np.zeros(sizes.rows, np.float32),
        "pair_ids": np.zeros(sizes.pairs, np.int32),
        "pair_position": np.zeros(sizes.pairs, np.int32),
    }
    value = row = pair = 0
    for number, signal in enumerate(signals, start=1):
        plan, channels = signal.plan, signal.values.shape[1]
        kept = signal.values[: plan.samples].reshape(-1)
        out["values"][value : value + kept.size] = kept
        # Patch n is the run of patch * channels values from n * stride * channels; its C rows cut the run into equal parts.
        patch_index = np.repeat(np.arange(2 * plan.pairs), channels)
        part = np.tile(np.arange(channels), 2 * plan.pairs)
        rows = slice(row, row + patch_index.size)
        out["row_start"][rows] = value + patch_index * (plan.stride * channels) + part * plan.patch
        out["row_length"][rows] = plan.patch
        out["row_patch"][rows] = 2 * pair + patch_index
        out["row_weight"][rows] = 1 / channels
        out["pair_ids"][pair : pair + plan.pairs] = number
        out["pair_position"][pair : pair + plan.pairs] = np.arange(plan.pairs)
        value += plan.samples * channels
        row += patch_index.size
        pair += 2 * plan.tokens
    # Longest first: the tower encodes neighbouring rows together, at the width of the longest of them.
    order = np.argsort(-out["row_length"], kind="stable")
    return {name: array[order] if name.startswith("row_") else array for name, array in out.items()}
