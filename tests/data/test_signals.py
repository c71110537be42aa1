"""Recordings from files: the official pre-processor's values, what headers say, and hostile files named within bounds."""

import io
import json
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from interns1pro_jax.data.media.limits import MediaError, Reason, SignalLimits
from interns1pro_jax.data.media.signals import read_signal
from interns1pro_jax.models.time_series_inputs import prepare_signal

X = np.random.default_rng(0).normal(size=(600, 2))


def test_golden_files_are_read_as_by_the_official_processor(reference):
    golden = np.load(reference / "preprocess" / "time_series.npz")
    for case in json.loads((reference / "preprocess" / "time_series.json").read_text()):
        key = Path(case["file"]).name
        signal = read_signal(reference / "preprocess" / case["file"], sampling_rate=case["sampling_rate_given"])
        np.testing.assert_array_equal(signal.samples, golden[f"{key}.raw"].reshape(len(signal.samples), -1))
        prepared = prepare_signal(signal.samples, signal.sampling_rate)
        np.testing.assert_allclose(prepared.values, golden[f"{key}.normalized"], atol=1e-5)
        assert prepared.sampling_rate == case["sampling_rate_used"] and prepared.tokens == case["num_tokens"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A recording in every format, and EDF files whose channels differ."""
    edfio, pymseed, soundfile, wfdb = (pytest.importorskip(name) for name in ("edfio", "pymseed", "soundfile", "wfdb"))
    directory = tmp_path_factory.mktemp("signals")
    np.save(directory / "x.npy", X)
    np.savetxt(directory / "x.csv", X, delimiter=",")
    for suffix in ("wav", "flac", "ogg"):
        soundfile.write(directory / f"x.{suffix}", X / 10, 8000)
    left = edfio.EdfSignal(X[:, 0], sampling_frequency=100, label="EEG Fp1", physical_dimension="uV")
    right = edfio.EdfSignal(X[:, 1], sampling_frequency=100, label="Resp", physical_dimension="mV")
    slow = edfio.EdfSignal(X[:300, 1], sampling_frequency=50, label="Resp", physical_dimension="mV")
    edfio.Edf([left, right], annotations=[edfio.EdfAnnotation(1, 2, "asleep")]).write(directory / "x.edf")
    edfio.Edf([left, slow]).write(directory / "rates.edf")
    edfio.Edf([right, right]).write(directory / "twice.edf")
    edfio.Bdf([edfio.BdfSignal(X[:, 0], sampling_frequency=100, label="A1", physical_dimension="uV")]).write(directory / "x.bdf")
    wfdb.wrsamp("x", fs=360, units=["mV", "mmHg"], sig_name=["II", "BP"], p_signal=X, fmt=["16", "16"], write_dir=str(directory))
    traces = pymseed.MS3TraceList()
    counts = np.round(1000 * X).astype(np.int32)
    for i, orientation in enumerate("12"):
        name = f"FDSN:XX_TEST__H_H_{orientation}"
        traces.add_data(name, counts[:, i].copy(), "i", 40.0, starttime_str="2024-01-01T00:00:00Z")
    traces.to_file(directory / "x.mseed", max_record_length=512)
    traces.add_data("FDSN:XX_TEST__H_H_1", counts[:50, 0].copy(), "i", 40.0, starttime_str="2024-01-01T01:00:00Z")
    traces.to_file(directory / "gap.mseed")
    return directory


@pytest.mark.parametrize(
    ("file", "rate", "unit", "scale", "error"),
    [
        ("x.npy", None, "", 1, 0),
        ("x.csv", None, "", 1, 1e-6),
        ("x.wav", 8000, "full scale", 10, 4e-4),
        ("x.flac", 8000, "full scale", 10, 4e-4),
        ("x.edf", 100, "uV, mV", 1, 1e-3),
        ("x.hea", 360, "mV, mmHg", 1, 1e-3),
        ("x.dat", 360, "mV, mmHg", 1, 1e-3),
        ("x.mseed", 40, "counts", 1e-3, 5.1e-4),
    ],
)
def test_rate_and_unit_are_those_of_the_header(files, file, rate, unit, scale, error):
    signal = read_signal(files / file)
    assert (signal.sampling_rate, signal.unit) == (rate, unit)
    np.testing.assert_allclose(scale * signal.samples, X, atol=error, rtol=0)
    assert read_signal(files / file, sampling_rate=7.0, unit="V").sampling_rate == 7.0
    assert read_signal(files / file, sampling_rate=-1, unit="V").unit == "V"
    if file not in ("x.hea", "x.dat"):
        same = read_signal((files / file).read_bytes(), format=file.split(".")[1])
        np.testing.assert_array_equal(same.samples, signal.samples)


def test_channels_are_chosen_by_name_and_order(files):
    both = read_signal(files / "x.edf").samples
    np.testing.assert_array_equal(read_signal(files / "x.edf", channels=["Resp", "EEG Fp1"]).samples, both[:, ::-1])
    assert read_signal(files / "rates.edf", channels=["Resp"]).sampling_rate == 50
    with pytest.raises(MediaError, match=r"twice\.edf: has 2 channels 'Resp'; rename them, or read all") as found:
        read_signal(files / "twice.edf", channels=["Resp"])
    assert found.value.reason == Reason.AMBIGUOUS
    with pytest.raises(MediaError, match="channels='Resp', which must be a list of names"):
        read_signal(files / "x.edf", channels="Resp")
    assert read_signal(files / "gap.mseed", channels=["XX_TEST__H_H_2"]).samples.shape == (600, 1)
    with pytest.raises(MediaError, match=r"rates\.edf: has channels of several sampling rates .*'Resp': 300 samples at 50\.0 Hz") as found:
        read_signal(files / "rates.edf")
    assert found.value.reason == Reason.AMBIGUOUS
    with pytest.raises(MediaError, match=r"no channel 'ECG'; it has 'EEG Fp1', 'Resp'"):
        read_signal(files / "x.edf", channels=["ECG"])
    with pytest.raises(MediaError, match=r"2 segments of channel 'XX_TEST__H_H_1', the second 35\d\d\.\d+ s behind"):
        read_signal(files / "gap.mseed", channels=["XX_TEST__H_H_1"])


@pytest.mark.parametrize("file", ["x.npy", "x.wav", "x.flac", "x.edf", "x.bdf", "x.mseed"])
def test_a_file_that_was_cut_short_is_an_error_wherever_it_was_cut(files, file):
    content = (files / file).read_bytes()
    for keep in (len(content) - 1, len(content) - 101, 300, 20, 3):
        with pytest.raises(MediaError) as found:
            read_signal(content[:keep], format=file.split(".")[1], name="cut")
        assert found.value.reason == Reason.UNREADABLE and str(found.value).startswith("cut: ")


def test_a_wfdb_record_without_all_of_its_samples_is_an_error(files, tmp_path):
    for name in ("x.hea", "x.dat"):
        (tmp_path / name).write_bytes((files / name).read_bytes())
    (tmp_path / "x.dat").write_bytes((files / "x.dat").read_bytes()[:1000])
    with pytest.raises(MediaError) as found:
        read_signal(tmp_path / "x.hea")
    assert found.value.reason == Reason.UNREADABLE
    header = (tmp_path / "x.hea").read_text()
    (tmp_path / "x.hea").write_text(header.replace("x.dat", "../x.dat"))
    with pytest.raises(MediaError, match="invalid syntax"):  # samples lie beside their header, nowhere else
        read_signal(tmp_path / "x.hea")
    (tmp_path / "x.hea").write_text(header)
    (tmp_path / "x.dat").unlink()
    with pytest.raises(MediaError, match=r"needs the file .*x\.dat, which is absent") as found:
        read_signal(tmp_path / "x.hea")
    assert found.value.reason == Reason.MISSING


def _npy(array):
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "format", "reason", "message"),
    [
        (b"", "npy", Reason.EMPTY, "has no bytes"),
        (_npy(np.zeros((0, 3))), "npy", Reason.EMPTY, "no samples"),
        (_npy(np.zeros(())), "npy", Reason.UNSUPPORTED, r"shape \[\]"),
        (_npy(np.zeros((2, 2, 2))), "npy", Reason.UNSUPPORTED, r"shape \[2, 2, 2\]"),
        (_npy(np.array([{}], object)), "npy", Reason.UNSUPPORTED, "type object"),
        (_npy(np.zeros(3, complex)), "npy", Reason.UNSUPPORTED, "type complex128"),
        (_npy(np.zeros((3, 600))), "npy", Reason.TOO_LARGE, "600 channels of 3 samples.*max_channels=512.*transpose"),
        (_npy(np.array([1.0, np.nan, np.inf])), "npy", Reason.NOT_FINITE, "2 of 3 values.*sample 1 of channel '0'"),
        (_npy(np.zeros(3)) + b"more", "npy", Reason.UNREADABLE, "holds 28 bytes of samples where its header promises 24"),
        (b"time,value\n1,2\n", "csv", Reason.UNSUPPORTED, "begins with 'time,value', .* remove the header"),
        (b"1," * 2**19, "csv", Reason.TOO_LARGE, "first line of 1,048,576 characters or more; write a line for each sample"),
        (b"1,2\n3\n", "csv", Reason.UNREADABLE, "columns changed from 2 to 1"),
        (b"1,2\n3,nan\n", "csv", Reason.NOT_FINITE, "sample 1 of channel '1'"),
        (b"\xff\xfe\x00", "csv", Reason.UNREADABLE, "csv"),
        (b"<html>not found</html>", "wav", Reason.UNREADABLE, "wav"),
        (b"<html>not found</html>" * 30, "edf", Reason.UNREADABLE, "edf"),
        (b"1,2\n", "parquet", Reason.UNSUPPORTED, "format 'parquet'; known are npy, csv"),
        (b"1,2\n", "hea", Reason.UNSUPPORTED, "several files"),
    ],
)
def test_hostile_content_is_named(content, format, reason, message):
    with pytest.raises(MediaError, match=message) as found:
        read_signal(content, format=format, name="upload")
    assert found.value.reason == reason and str(found.value).startswith("upload: ")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(MediaError, match=r"absent\.npy: cannot be opened") as found:
        read_signal(tmp_path / "absent.npy")
    assert found.value.reason == Reason.MISSING


def _giant_files(directory):
    """Headers that promise gigabytes, in files of as many (sparse) bytes."""
    (directory / "giant.npy").write_bytes(_npy(np.zeros(1)).replace(b"(1,)", b"(1000000000,)")[:128])
    riff = struct.pack("<4sI4s4sIHHIIHH4sI", b"RIFF", 2**31 + 36, b"WAVE", b"fmt ", 16, 1, 1, 8000, 16000, 2, 16, b"data", 2**31)
    (directory / "giant.wav").write_bytes(riff)
    fields = [8 * " ", 80 * "x", 80 * "x", "01.01.01", "01.01.01", "512".ljust(8), 44 * " ", "9999999 ", "1".ljust(8), "1".ljust(4)]
    channel = ["EEG".ljust(16), 80 * " ", "uV".ljust(8), "-1".ljust(8), "1".ljust(8), "-32768".ljust(8), "32767".ljust(8), 80 * " "]
    (directory / "giant.edf").write_bytes("".join(["0", *fields[0][1:], *fields[1:], *channel, "100".ljust(8), 32 * " "]).encode())
    (directory / "giant.hea").write_text("giant 1 1000 4000000000\ngiant.dat 16 200 16 0 0 0 0 I\n")
    (directory / "giant.dat").write_bytes(b"")
    for name, size in (("giant.npy", 8 * 10**9 + 128), ("giant.wav", 2**31 + 44), ("giant.edf", 512 + 9999999 * 200)):
        with (directory / name).open("r+b") as file:
            file.truncate(size)


@pytest.mark.parametrize("file", ["giant.npy", "giant.wav", "giant.edf", "giant.hea"])
def test_gigabyte_signals_are_refused_without_being_read(tmp_path, file):
    pytest.importorskip("wfdb")
    _giant_files(tmp_path)
    tracemalloc.start()
    try:
        with pytest.raises(MediaError, match=r"max_(bytes|values)=") as found:
            read_signal(tmp_path / file)
        with pytest.raises(MediaError, match=r"values, more than max_values=") as found:
            read_signal(tmp_path / file, limits=SignalLimits(max_bytes=2**40))
        assert found.value.reason == Reason.TOO_LARGE
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()
