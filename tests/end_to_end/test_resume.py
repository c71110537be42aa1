"""A run that is killed again and again gives the losses of a run that is not, to the bit, whatever moment the kill hits."""

import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from interns1pro_jax.train.loop import INTERRUPTED
from interns1pro_jax.train.metrics import read_arrays, read_records

PROGRAM = [sys.executable, "-m", "tools.tiny_run"]
ROOT = Path(__file__).resolve().parents[2]

# Several programs of several processes, minutes of computing.
long = pytest.mark.skipif("INTERNS1PRO_LONG_TESTS" not in os.environ, reason="takes minutes; INTERNS1PRO_LONG_TESTS=1 runs it")


def start(workdir: Path, *arguments: str) -> subprocess.Popen:
    return subprocess.Popen([*PROGRAM, workdir, *arguments], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen, code: int) -> str:
    output, _ = process.communicate()
    assert process.returncode == code, output
    return output


def records(workdir: Path) -> list[dict]:
    """All that is recorded of each step but its speed."""
    return [{name: value for name, value in record.items() if name != "tokens_per_second"} for record in read_records(workdir)]


@pytest.fixture
def whole(tmp_path):
    """A run that nobody interrupts, with a compilation of its own."""
    process = start(tmp_path / "whole")
    yield process, tmp_path / "whole"
    process.kill()


def test_killed_and_continued_equals_uninterrupted(tmp_path, whole):
    workdir, cache = tmp_path / "killed", str(tmp_path / "compiled")
    checkpoints = workdir / "checkpoints"

    def steps() -> list[str]:
        return sorted(path.name.lstrip("0") for path in checkpoints.glob("[0-9]*"))

    def run(code: int, *arguments: str) -> str:
        return finish(start(workdir, "--cache", cache, *arguments), code)

    # In a step, before anything is saved.
    run(-signal.SIGKILL, "--kill", "step", "/2")
    assert steps() == []
    # When all of the first checkpoint is written but its name: it is not taken for one.
    run(-signal.SIGKILL, "--kill", "os.rename", "checkpoints/00000003")
    assert steps() == ["3.orbax-checkpoint-tmp"]
    # When the second checkpoint is complete and the first one, no longer needed, is about to be removed.
    assert "continuing" not in run(-signal.SIGKILL, "--kill", "os.rename", "deleted/00000003")
    assert steps() == ["3", "6"]
    # At the beginning of a save.
    assert "continuing from the checkpoint of step 6" in run(-signal.SIGKILL, "--kill", "os.mkdir", "/00000009.orbax-checkpoint-tmp")
    assert "6" in steps() and "9" not in steps()
    # In a step after a checkpoint.
    assert "continuing from the checkpoint of step 6" in run(-signal.SIGKILL, "--kill", "step", "/8")
    # Told to stop, it saves the step it is in.
    output = run(INTERRUPTED, "--term", "7")
    assert "continuing from the checkpoint of step 6" in output and "stopped by SIGTERM; step 8 is saved in" in output
    assert steps() == ["8"]
    assert "continuing from the checkpoint of step 8" in run(0)

    process, expected = whole
    finish(process, 0)
    assert [record["step"] for record in records(workdir)] == list(range(1, 13))
    assert records(workdir) == records(expected)
    np.testing.assert_equal(read_arrays(workdir), read_arrays(expected))


def start_two(workdir: Path, arguments: dict[int, tuple[str, ...]]) -> list[subprocess.Popen]:
    """Without kept programs: only the first process keeps them, and one that compiles is not waited for as long as that may take."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    return [start(workdir, "--process", str(i), "2", address, *arguments.get(i, ())) for i in range(2)]


def finish_two(workdir: Path, arguments: dict[int, tuple[str, ...]]) -> tuple[list[int], list[str]]:
    """Codes and outputs of two processes."""
    processes = start_two(workdir, arguments)
    try:
        outputs = [process.communicate(timeout=600)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], outputs


@long
def test_two_processes_die_stop_and_go_on_with_equal_bits_and_one_goes_on_with_their_state(tmp_path):
    """A process that dies takes the other along, which would wait for it for ever; a signal to one stops both after the same step."""
    two, one, whole = tmp_path / "two", tmp_path / "one", tmp_path / "whole"
    same = ("--dtype", "float32")
    for killed, event in ((1, ("step", "/4")), (0, ("os.rename", "checkpoints/00000006"))):
        codes, outputs = finish_two(two, {killed: (*same, "--kill", *event), 1 - killed: same})
        assert codes[killed] == -signal.SIGKILL and codes[1 - killed] != 0, outputs
    assert [path.name for path in (two / "checkpoints").glob("[0-9]*") if path.name.isdecimal()] == ["00000003"]
    shutil.copytree(two, one)
    codes, outputs = finish_two(two, {0: same, 1: (*same, "--term", "7")})
    assert codes == [INTERRUPTED, INTERRUPTED], outputs
    assert "continuing from the checkpoint of step 3" in outputs[0] and "stopped by SIGTERM; step" in outputs[0], outputs
    (saved,) = [int(path.name) for path in (two / "checkpoints").glob("[0-9]*") if path.name.isdecimal()]
    assert len(records(two)) == saved >= 8
    for workdir in (two, whole):
        codes, outputs = finish_two(workdir, dict.fromkeys(range(2), same))
        assert codes == [0, 0], outputs
    assert "continuing from the checkpoint of step 3" in finish(start(one, *same), 0)

    assert [record["step"] for record in records(two)] == list(range(1, 13))
    assert records(two) == records(whole)
    np.testing.assert_equal(read_arrays(two), read_arrays(whole))
    losses = [[record["loss"] for record in records(workdir)] for workdir in (two, one)]
    assert losses[0][:4] == losses[1][:4]  # the first step of one process alone is computed from the state of two
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)  # gloo adds up what processes have in an order of its own


@long
def test_another_mesh_and_accumulation_go_on_with_the_same_losses_up_to_rounding(tmp_path):
    same, other, cache = tmp_path / "same", tmp_path / "other", ("--cache", str(tmp_path / "compiled"), "--dtype", "float32")
    finish(start(same, *cache, "--kill", "step", "/7"), -signal.SIGKILL)
    shutil.copytree(same, other)
    finish(start(same, *cache), 0)
    finish(start(other, *cache, "--mesh", "4", "1", "--microbatches", "2"), 0)
    losses = [[record["loss"] for record in records(workdir)] for workdir in (same, other)]
    assert losses[0][:3] == losses[1][:3] and losses[0] != losses[1]  # the save of step 6 may not have been complete
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
