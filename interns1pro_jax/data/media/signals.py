"""Samples of a recording, with the rate and the unit that its file states.

Every format is read to the same thing, `records.SignalPart`: [length, channels], one sampling rate, units in words. Where a file holds
more than that (channels of several rates, segments with gaps), the caller chooses; nothing is resampled, filled or dropped here.
"""

from __future__ import annotations

import io
import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from interns1pro_jax.data.media.limits import MediaError, Reason, SignalLimits, Source, check_size, decoding, named, opened, optional_module
from interns1pro_jax.data.records import SignalPart

_LONGEST_LINE = 1 << 20  # characters of the first line of a csv file, which is read to count its columns


class Channel(NamedTuple):
    """One channel as its file has it. `read` unpacks it, once everything is known to be within the limits."""

    name: str
    length: int
    sampling_rate: float | None
    unit: str
    start: float
    read: Callable[[], np.ndarray]


def read_signal(
    source: Source,
    *,
    format: str | None = None,
    sampling_rate: float | None = None,
    unit: str | None = None,
    channels: Sequence[str] | None = None,
    name: str | None = None,
    limits: SignalLimits | None = None,
) -> SignalPart:
    """Reads a recording. Its samples are float32 where that holds them exactly, else float64; those of csv are float32, as
    the released model reads them.

    Args:
      source: a local file, or the bytes of one (not for WFDB, whose records are several files).
      format: one of `FORMATS`; default the file's suffix.
      sampling_rate: in Hz; goes before the file's own. None or a number that is not positive: the file's, if it has one.
      unit: goes before the file's own.
      channels: names of the channels to read, in this order; default all.
      name: for messages; default the path.
      limits: what the file may cost.

    Raises:
      MediaError: absent, over the limits, damaged, cut short, of an unknown format, empty or not finite; channels that do not exist, or
        that are not of one rate, length and start.
    """
    limits = limits or SignalLimits()
    source, name = named(source, name, "signal")
    if format is None:
        format = source.suffix.lstrip(".").lower() if isinstance(source, Path) else ""
    if format not in FORMATS:
        raise MediaError(Reason.UNSUPPORTED, name, f"is of format {format!r}; known are {', '.join(FORMATS)}: name one with format=.")
    check_size(source, name, limits.max_bytes)
    what = f"a recording ({format})"
    with decoding(name, what):
        found = FORMATS[format](source, name, limits)
    chosen = _choose(found, channels, name)
    values = sum(channel.length for channel in chosen)
    if len(chosen) > limits.max_channels:
        raise MediaError(
            Reason.TOO_LARGE,
            name,
            f"has {len(chosen)} channels of {chosen[0].length} samples, more than max_channels={limits.max_channels}; if its axes are "
            "exchanged, transpose it, else choose channels or raise the limit.",
        )
    if values > limits.max_values:
        raise MediaError(
            Reason.TOO_LARGE, name, f"has {values:,} values, more than max_values={limits.max_values:,}; cut it or raise the limit."
        )
    if values == 0:
        raise MediaError(Reason.EMPTY, name, "has no samples; drop its record.")
    with decoding(name, what):
        samples = np.stack([channel.read() for channel in chosen], axis=1)
    if samples.dtype.kind not in "biuf":
        raise MediaError(Reason.UNSUPPORTED, name, f"has values of type {samples.dtype}; a signal is of real numbers.")
    if samples.dtype not in (np.float32, np.float64):
        samples = samples.astype(np.float32 if np.can_cast(samples.dtype, np.float32) else np.float64)
    _check_finite(samples, chosen, name)
    if sampling_rate is None or sampling_rate <= 0:
        sampling_rate = chosen[0].sampling_rate
    if sampling_rate is not None and not 0 < sampling_rate < math.inf:
        raise MediaError(Reason.UNSUPPORTED, name, f"has a sampling rate of {sampling_rate} Hz; give sampling_rate.")
    units = [channel.unit for channel in chosen]
    return SignalPart(samples, sampling_rate, unit if unit is not None else units[0] if len(set(units)) == 1 else ", ".join(units))


def _choose(found: list[Channel], names: Sequence[str] | None, name: str) -> list[Channel]:
    known = ", ".join(repr(channel.name) for channel in found[:20]) + (", ..." if len(found) > 20 else "")
    if not found:
        raise MediaError(Reason.EMPTY, name, "has no channels; drop its record.")
    chosen = found
    if names is not None:
        if isinstance(names, str) or not all(isinstance(wanted, str) for wanted in names):
            raise MediaError(Reason.AMBIGUOUS, name, f"is asked for channels={names!r}, which must be a list of names.")
        counts = Counter(channel.name for channel in found)
        if not names or not all(counts[wanted] for wanted in names):
            absent = ", ".join(repr(wanted) for wanted in names if not counts[wanted]) or "(none named)"
            raise MediaError(Reason.AMBIGUOUS, name, f"has no channel {absent}; it has {known}.")
        if repeated := next((wanted for wanted in names if counts[wanted] > 1), None):
            raise MediaError(Reason.AMBIGUOUS, name, f"has {counts[repeated]} channels {repeated!r}; rename them, or read all.")
        chosen = [next(channel for channel in found if channel.name == wanted) for wanted in names]
    for what, values in (
        ("sampling rates", {channel.sampling_rate for channel in chosen}),
        ("lengths", {channel.length for channel in chosen}),
    ):
        if len(values) > 1:
            listed = "; ".join(f"{c.name!r}: {c.length} samples at {c.sampling_rate} Hz" for c in chosen[:20])
            raise MediaError(Reason.AMBIGUOUS, name, f"has channels of several {what} ({listed}); choose some of one kind with channels=.")
    starts = {channel.start for channel in chosen}
    if max(starts) - min(starts) > 0.5 / (chosen[0].sampling_rate or 1):
        listed = "; ".join(f"{c.name!r} starts at {c.start:.6f} s" for c in chosen[:20])
        raise MediaError(Reason.AMBIGUOUS, name, f"has channels that do not start together ({listed}); choose some with channels=.")
    return chosen


def _check_finite(samples: np.ndarray, chosen: list[Channel], name: str) -> None:
    finite = np.isfinite(samples)
    if not finite.all():
        step, channel = np.argwhere(~finite)[0]
        raise MediaError(
            Reason.NOT_FINITE,
            name,
            f"has {np.count_nonzero(~finite)} of {samples.size} values that are NaN or infinite, the first at sample {step} of channel "
            f"{chosen[channel].name!r}; fill or cut the gaps.",
        )


def _columns(samples: np.ndarray, rate: float | None, unit: str, names: Sequence[str] | None = None) -> list[Channel]:
    """Channels of an array that is in memory already."""
    names = names or [str(number) for number in range(samples.shape[1])]
    return [Channel(name, len(samples), rate, unit, 0.0, lambda i=i: samples[:, i]) for i, name in enumerate(names)]  # type: ignore[misc]


def _check_values(shape: Sequence[int], name: str, limits: SignalLimits) -> None:
    """For formats whose channels cannot be unpacked one by one."""
    if math.prod(shape) > limits.max_values:
        raise MediaError(
            Reason.TOO_LARGE,
            name,
            f"has {' x '.join(f'{n:,}' for n in shape)} values, more than max_values={limits.max_values:,}; cut it or raise the limit.",
        )


# Formats: each gives the channels of a file, having unpacked as little as its library allows -----------------------------------


def _npy(source: Path | bytes, name: str, limits: SignalLimits) -> list[Channel]:
    """NumPy's format, [length] or [length, channels]; pickled objects are refused."""
    with opened(source) as file:
        version = np.lib.format.read_magic(file)
        reader = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
        if reader is None:
            raise MediaError(Reason.UNSUPPORTED, name, f"is of version {version} of the npy format; save it as version 1 or 2.")
        shape, fortran, dtype = reader(file)
        if dtype.kind not in "biuf":
            raise MediaError(Reason.UNSUPPORTED, name, f"has values of type {dtype}; a signal is of real numbers.")
        if len(shape) not in (1, 2):
            raise MediaError(Reason.UNSUPPORTED, name, f"has shape {list(shape)}; a signal is [length] or [length, channels].")
        _check_values(shape, name, limits)
        content = file.read()
    if len(content) != math.prod(shape) * dtype.itemsize:
        raise MediaError(
            Reason.UNREADABLE, name, f"holds {len(content)} bytes of samples where its header promises {math.prod(shape) * dtype.itemsize}."
        )
    samples = np.frombuffer(content, dtype).reshape(shape, order="F" if fortran else "C")
    return _columns(samples[:, None] if samples.ndim == 1 else samples, None, "")


def _csv(source: Path | bytes, name: str, limits: SignalLimits) -> list[Channel]:
    """Comma-separated numbers, a line per sample, without a header; float32, as the released pre-processor reads them."""
    with opened(source) as file:
        text = io.TextIOWrapper(file, "utf-8-sig")
        first = text.readline(_LONGEST_LINE)
        if len(first) == _LONGEST_LINE:
            raise MediaError(
                Reason.TOO_LARGE,
                name,
                f"has a first line of {_LONGEST_LINE:,} characters or more; write a line for each sample of all channels.",
            )
        try:
            columns = len([float(field) for field in first.split(",")])
        except ValueError:
            raise MediaError(
                Reason.UNSUPPORTED, name, f"begins with {first.strip()[:80]!r}, which is not numbers; remove the header line."
            ) from None
        text.seek(0)
        most = limits.max_values // columns
        samples = np.loadtxt(text, np.float32, delimiter=",", ndmin=2, max_rows=most + 1)
    _check_values(samples.shape, name, limits)
    return _columns(samples, None, "")


def _audio(source: Path | bytes, name: str, limits: SignalLimits) -> list[Channel]:
    """Sound files; samples are in [-1, 1]."""
    soundfile = optional_module("soundfile", name, "sound files")
    with opened(source) as file:
        _check_riff(file, name)
        with soundfile.SoundFile(file) as sound:
            _check_values((sound.frames, sound.channels), name, limits)
            exact = sound.subtype in ("PCM_S8", "PCM_U8", "PCM_16", "PCM_24", "FLOAT", "ULAW", "ALAW")
            samples = sound.read(dtype="float32" if exact else "float64", always_2d=True)
            if len(samples) != sound.frames:
                raise MediaError(
                    Reason.UNREADABLE,
                    name,
                    f"holds {len(samples)} of the {sound.frames} samples that its header promises; it was cut short.",
                )
            return _columns(samples, float(sound.samplerate), "full scale")


def _check_riff(file: Any, name: str) -> None:
    """A wav file that was cut short reads as a shorter one; its header tells."""
    head = file.read(8)
    file.seek(0, io.SEEK_END)
    size, promised = file.tell(), int.from_bytes(head[4:], "little") + 8
    file.seek(0)
    if head[:4] == b"RIFF" and size < promised < 2**32:
        raise MediaError(Reason.UNREADABLE, name, f"has {size} of the {promised} bytes that its header promises; it was cut short.")


def _miniseed(source: Path | bytes, name: str, limits: SignalLimits) -> list[Channel]:
    """Seismograms: a channel per trace, in counts."""
    pymseed = optional_module("pymseed", name, "MiniSEED")
    with opened(source) as file:
        content = file.read()
    # Headers first: samples are compressed, they may be many times the file; and an incomplete record is an error only here.
    _check_values((sum(record.samplecnt for record in pymseed.MS3Record.from_buffer(content)),), name, limits)
    channels = []
    for trace in pymseed.MS3TraceList.from_buffer(content, unpack_data=True):
        identity, segments = trace.sourceid.removeprefix("FDSN:"), list(trace)
        times = [(segment.starttime_seconds, segment.endtime_seconds) for segment in segments]
        samples = np.concatenate([np.array(segment.np_datasamples) for segment in segments])

        def read(identity: str = identity, times: list[tuple[float, float]] = times, samples: np.ndarray = samples) -> np.ndarray:
            if len(times) > 1:
                raise MediaError(
                    Reason.AMBIGUOUS,
                    name,
                    f"has {len(times)} segments of channel {identity!r}, the second {times[1][0] - times[0][1]:.3f} s behind the first; "
                    "cut the file at its gaps.",
                )
            return samples

        channels.append(Channel(identity, len(samples), float(segments[0].samprate), "counts", times[0][0], read))
    return channels


def _edf(source: Path | bytes, name: str, limits: SignalLimits) -> list[Channel]:
    """European Data Format and its 24-bit form BDF: physical values in each channel's own unit."""
    edfio = optional_module("edfio", name, "EDF and BDF")
    with opened(source) as file:
        head = file.read(256)
        signals = int(head[252:256])
        lengths = [int(field) for field in np.frombuffer(file.read(256 * signals), "S8")[27 * signals : 28 * signals]]
        size = file.seek(0, io.SEEK_END)
    is_bdf, records = head[:1] == b"\xff", int(head[236:244])
    if records < 0:
        raise MediaError(Reason.UNREADABLE, name, "is of a recording that was never closed (-1 data records); repair its header.")
    promised = 256 * (signals + 1) + records * sum(lengths) * (3 if is_bdf else 2)
    if size < promised:
        raise MediaError(Reason.UNREADABLE, name, f"has {size} of the {promised} bytes that its header promises; it was cut short.")
    _check_values((records, sum(lengths)), name, limits)
    recording = (edfio.read_bdf if is_bdf else edfio.read_edf)(source)
    if not recording.is_continuous:
        raise MediaError(Reason.AMBIGUOUS, name, "is a discontinuous recording (EDF+D); cut it at its gaps.")
    return [
        Channel(
            signal.label,
            signal.samples_per_data_record * recording.num_data_records,
            float(signal.sampling_frequency),
            signal.physical_dimension,
            0.0,
            lambda signal=signal: signal.data,  # type: ignore[misc]
        )
        for signal in recording.signals
    ]


def _wfdb(source: Path | bytes, name: str, limits: SignalLimits) -> list[Channel]:
    """PhysioNet's records: the header `.hea` names the files of samples beside it."""
    if isinstance(source, bytes):
        raise MediaError(Reason.UNSUPPORTED, name, "a WFDB record is several files; give the path of its header.")
    wfdb = optional_module("wfdb", name, "WFDB")
    stem = str(source.with_suffix(""))
    header = wfdb.rdheader(stem)
    if not header.n_sig:
        return []
    frames = header.samps_per_frame or [1] * header.n_sig
    _check_values((header.sig_len or 0, sum(frames)), name, limits)
    record = wfdb.rdrecord(stem, smooth_frames=False)
    return [
        Channel(label, len(samples), float(header.fs) * per_frame, physical or "", 0.0, lambda samples=samples: samples)  # type: ignore[misc]
        for label, samples, per_frame, physical in zip(
            record.sig_name, record.e_p_signal, record.samps_per_frame, record.units, strict=True
        )
    ]


FORMATS: dict[str, Callable[[Path | bytes, str, SignalLimits], list[Channel]]] = {
    "npy": _npy,
    "csv": _csv,
    **dict.fromkeys(("wav", "flac", "mp3", "ogg"), _audio),
    **dict.fromkeys(("mseed", "miniseed"), _miniseed),
    **dict.fromkeys(("edf", "bdf"), _edf),
    **dict.fromkeys(("hea", "dat"), _wfdb),
}
