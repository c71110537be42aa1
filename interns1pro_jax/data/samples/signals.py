"""Time series with what is known about them: seismograms, an electrocardiogram, pulse waves, labelled series."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import NamedTuple

import numpy as np

from interns1pro_jax.config import ConfigError
from interns1pro_jax.data.records import Document, SignalPart, TextPart
from interns1pro_jax.data.samples.packages import Archives, Sample
from interns1pro_jax.models.time_series_inputs import normalize, stride_of

SOURCE_RECORDINGS, SOURCE_SERIES = "recordings", "labelled_series"
# Windows of a recording become the same number of tokens at any rate, so their length tells nothing.
_WINDOW_TOKENS = 8
_MOST_WINDOWS = 64
_HIGHEST_RATE = 48.0  # Hz; faster recordings are averaged down, which keeps the tower's patches within 16 samples
_STRETCH_SECONDS = 20.0
_HOUR = 3600.0


class Recording(NamedTuple):
    """One channel of a continuous recording.

    Attributes:
      package: that carries it.
      what: the kind of recording, where and how it was made.
      place: whatever must not be split between training and validation at one time.
      start: in seconds; absolute where recordings of a place can overlap.
      stretch: seconds that stay together.
    """

    package: str
    what: str
    place: str
    start: float
    stretch: float
    samples: np.ndarray
    rate: float
    unit: str


def samples(archives: Archives) -> Iterator[Sample]:
    """Windows of the recordings, then the labelled series (each is its own group)."""
    seen: set[str] = set()
    for recording in (*_seismograms(archives), *_heart_recordings(archives)):
        for sample in _windows(recording, archives):
            if sample.document.identifier not in seen:
                seen.add(sample.document.identifier)
                yield sample
    yield from _labelled_series(archives)


# ---------------------------------------------------------------------------------------------------------- recordings


def _windows(recording: Recording, archives: Archives) -> Iterator[Sample]:
    """Windows of one recording that do not overlap, spread over it. Neighbours in time stay in one group."""
    factor = int(np.ceil(recording.rate / _HIGHEST_RATE))
    rate = recording.rate / factor
    values = _average(recording.samples, factor)
    length = 4 * _WINDOW_TOKENS * stride_of(rate)
    count = len(values) // length
    chosen = np.unique(np.linspace(0, count - 1, min(count, _MOST_WINDOWS)).round().astype(int)) if count else ()
    for number in chosen:
        window = values[number * length : (number + 1) * length]
        if np.ptp(window) == 0:
            continue
        start = recording.start + number * length / rate
        group = f"{recording.place} {int(start // recording.stretch)}"
        averaged = f" (averaged from {recording.rate:g} Hz)" if factor > 1 else ""
        caption = f" {recording.what}, {rate:g} Hz{averaged}. {_shape(window[:, None], rate)}"
        identifier = f"{recording.what}, {rate:g} Hz, {start:.3f} s"
        yield Sample(
            group,
            _document(window[:, None], rate, recording.unit, caption, SOURCE_RECORDINGS, identifier, archives.licence(recording.package)),
        )


def _average(values: np.ndarray, factor: int) -> np.ndarray:
    """Means of `factor` neighbours."""
    whole = len(values) // factor * factor
    return values[:whole].reshape(-1, factor).mean(-1)


# MiniSEED files that name their station; the others of the package are made up to test the format.
_SEISMOGRAMS = (
    "clients/fdsn/tests/data/dataselect_example.mseed",
    "clients/fdsn/tests/data/dataselect_example_wildcards.mseed",
    "clients/filesystem/tests/data/tsindex_data/CU/2018/001/CU.TGUH.00.BHZ.2018.001_first_minute.mseed",
    "clients/filesystem/tests/data/tsindex_data/IU/2018/001/IU.ANMO.10.BHZ.2018.001_first_minute.mseed",
    "clients/filesystem/tests/data/tsindex_data/IU/2018/001/IU.COLA.10.BHZ.2018.001_first_minute.mseed",
    "core/tests/data/IU_ULN_00_LH1_2015-07-18T02.mseed",
    "io/mseed/tests/data/1T_MONN_00_EDH.mseed",
    "io/mseed/tests/data/CH.BALST..LH_two_channels",
    "io/mseed/tests/data/SRO_encoding.mseed",
    "io/mseed/tests/data/WUQ.XJ.HHN.D.2008.285.first_record",
    "io/mseed/tests/data/dataquality-m.mseed",
    "io/mseed/tests/data/gaps.mseed",
    "io/mseed/tests/data/record_with_invalid_word_order.mseed",
    "io/mseed/tests/data/test.mseed",
    "io/mseed/tests/data/wrong_blockette_numbers_specified.mseed",
    "io/seisan/tests/data/2005-07-23-1452-04S.CER___030.mseed",
    "io/xseed/tests/data/II_COCO_three_channel_borehole.mseed",
    "signal/tests/data/IM.I59H1..BDF_2020_10_31.mseed",
    "signal/tests/data/tiny_quality_file.mseed",
)
_INSTRUMENTS = {"H": "Seismogram", "D": "Pressure recording"}  # second letter of the SEED channel code


def _seismograms(archives: Archives) -> Iterator[Recording]:
    """Every gapless segment of the MiniSEED files. An hour of a station stays together, whatever its sensors."""
    try:
        from pymseed import MS3TraceList
    except ImportError as error:
        raise ConfigError(f"reading MiniSEED needs pymseed ({error}); install interns1pro_jax[demo].") from error
    for file in _SEISMOGRAMS:
        for trace in MS3TraceList.from_buffer(archives.read("obspy", f"obspy/{file}"), unpack_data=True):
            network, station, _, band, instrument, orientation = trace.sourceid.removeprefix("FDSN:").split("_")
            name = f"{network}.{station}".lstrip(".")
            what = f"{_INSTRUMENTS[instrument]}: station {name}, channel {band}{instrument}{orientation}"
            for segment in trace:
                values = np.array(segment.np_datasamples, np.float64)
                yield Recording("obspy", what, name, segment.starttime_seconds, _HOUR, values, segment.samprate, "counts")


def _heart_recordings(archives: Archives) -> Iterator[Recording]:
    """The electrocardiogram in SciPy and the pulse waves in HeartPy. Twenty seconds stay together."""
    with np.load(io.BytesIO(archives.read("scipy", "scipy/misc/ecg.dat"))) as content:
        millivolt = (content["ecg"].astype(np.float64) - 1024) / 200  # zero and gain of the converter, as SciPy documents them
    yield Recording("scipy", "Electrocardiogram: MIT-BIH record 208, lead MLII", "ecg 208", 0, _STRETCH_SECONDS, millivolt, 360.0, "mV")
    for file, header, elapsed in _PULSE_WAVES:
        text = archives.read("heartpy", f"heartpy/data/{file}").decode()
        rows = list(csv.DictReader(io.StringIO(header + text)))
        values = np.array([float(row["hr"]) for row in rows])
        rate = round((len(rows) - 1) / elapsed(rows[0], rows[-1]), 1) if elapsed else _RATE_WITHOUT_TIMES
        yield Recording("heartpy", "Pulse wave: heart-rate sensor", f"pulse {file}", 0, _STRETCH_SECONDS, values, rate, "sensor units")


_RATE_WITHOUT_TIMES = 100.0  # Hz, from HeartPy's documentation


def _timer_seconds(first: Mapping[str, str], last: Mapping[str, str]) -> float:
    return (float(last["timer"]) - float(first["timer"])) / 1000


def _clock_seconds(first: Mapping[str, str], last: Mapping[str, str]) -> float:
    return (datetime.fromisoformat(last["datetime"]) - datetime.fromisoformat(first["datetime"])).total_seconds()


# (file, header line that it lacks, seconds between two rows)
_PULSE_WAVES = (("data.csv", "hr\n", None), ("data2.csv", "", _timer_seconds), ("data3.csv", "", _clock_seconds))


# ------------------------------------------------------------------------------------------------------ labelled series


class SeriesSet(NamedTuple):
    """One data set of the UCR or UEA archive.

    Attributes:
      what: the kind of series.
      labels: what each class label means, from the archive's description; where that does not say, the label itself is used.
      rate: in Hz; None where the archive gives none.
      every: neighbours that are averaged, for long series.
      channels: how many of the first channels are used.
      unit: of the values.
    """

    what: str
    labels: Mapping[str, str]
    rate: float | None = None
    every: int = 1
    channels: int = 12
    unit: str = "standardised"


_SETS = {
    "ACSF1": SeriesSet("Power consumption of a home appliance: class", {}, 0.1, 8),
    "ArrowHead": SeriesSet("Outline of an arrowhead:", {"0": "Avonlea", "1": "Clovis", "2": "mixed"}, every=2),
    "BasicMotions": SeriesSet(
        "Motion of a smart watch:",
        {"standing": "standing", "running": "running", "walking": "walking", "badminton": "playing badminton"},
        10.0,
        channels=3,
        unit="acceleration along three axes",
    ),
    "GunPoint": SeriesSet("Motion of a hand:", {"1": "drawing a gun", "2": "pointing"}),
    "ItalyPowerDemand": SeriesSet("Power demand of Italy over a day:", {"1": "October to March", "2": "April to September"}, 1 / _HOUR),
    "JapaneseVowels": SeriesSet("Japanese vowel: speaker", {}, channels=8, unit="linear prediction coefficients"),
    "OSULeaf": SeriesSet("Outline of a leaf: species", {}, every=3),
    "PickupGestureWiimoteZ": SeriesSet(
        "Gesture with a remote control:",
        {
            "1": "pick up", "2": "shake", "3": "to the right", "4": "to the left", "5": "up", "6": "down",
            "7": "circle to the left", "8": "circle to the right", "9": "toward the screen", "10": "away from the screen",
        },
        every=3,
    ),
}  # fmt: skip


def _labelled_series(archives: Archives) -> Iterator[Sample]:
    licence = archives.licence("aeon")
    for name, series_set in _SETS.items():
        for part in ("TRAIN", "TEST"):
            content = archives.read("aeon", f"aeon/datasets/data/{name}/{name}_{part}.ts").decode()
            for number, (values, label) in enumerate(read_ts(content)):
                values = np.stack([_average(channel, series_set.every) for channel in values.T[: series_set.channels]], axis=1)
                rate = None if series_set.rate is None else series_set.rate / series_set.every
                meaning = series_set.labels.get(label.lower(), label)
                caption = f" {series_set.what} {meaning}. {_shape(values, None)}"
                identifier = f"{name} {part} {number}"
                yield Sample(identifier, _document(values, rate, series_set.unit, caption, SOURCE_SERIES, identifier, licence))


def read_ts(content: str) -> Iterator[tuple[np.ndarray, str]]:
    """(values [length, channels], class label) of each series in the archive's text format.

    A line is `c1:c2:...:label`, each channel a list of numbers; missing values at the end of a channel pad it to the others.
    """
    _, _, body = content.partition("@data")
    for line in body.split():
        *channels, label = line.split(":")
        values = np.array([[np.nan if number == "?" else float(number) for number in channel.split(",")] for channel in channels])
        yield values[:, ~np.isnan(values).any(0)].T, label


# -------------------------------------------------------------------------------------------------------------- captions


def _document(values: np.ndarray, rate: float | None, unit: str, caption: str, source: str, identifier: str, licence: str) -> Document:
    signal = SignalPart(values.astype(np.float32), rate, unit)
    return Document((TextPart("Signal: "), signal, TextPart(caption)), source, licence, identifier, ("signal",))


def _shape(values: np.ndarray, rate: float | None) -> str:
    """What can be seen in a signal: where and which way it deviates most and, where time has a scale, its main frequency."""
    first = normalize(values)[:, 0].astype(np.float64)
    peak = int(np.abs(first).argmax())
    quarter = ("first", "second", "third", "last")[4 * peak // len(first)]
    words = f"Largest deviation: {'upward' if first[peak] > 0 else 'downward'}, {quarter} quarter."
    if rate is not None:
        power = np.abs(np.fft.rfft(first)) ** 2
        words += f" Main frequency: {(1 + int(power[1:].argmax())) * rate / len(first):.2g} Hz"
    return words
