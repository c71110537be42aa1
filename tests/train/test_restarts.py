"""A run that fails, is told to stop or finds a full disk goes on as if nothing had happened."""

import errno
import io
import os
import signal
from types import SimpleNamespace

import pytest

from interns1pro_jax.checkpoint.manager import CheckpointError
from interns1pro_jax.config import ConfigError
from interns1pro_jax.train.loop import INTERRUPTED, Interrupted
from interns1pro_jax.train.metrics import JsonLines, read_records
from tests.train.arithmetic import Numbers, losses, run, step_fn

pytestmark = pytest.mark.usefixtures("mesh")


class Cursor:
    """Data whose place is not its step."""

    def __init__(self):
        self.restored = None

    def state(self, step):
        return {"place": 7 * step}

    def restore(self, state):
        self.restored = state

    def metrics(self, step):
        return {"data/quarantined": 2.0 * step}


def test_the_place_in_the_data_is_saved_and_restored_and_its_counts_are_recorded(tmp_path):
    first, second = Cursor(), Cursor()
    run(tmp_path, steps=6, data=first)
    run(tmp_path, steps=8, data=second)
    assert first.restored is None and second.restored == {"place": 42}
    assert {r["step"]: r["data/quarantined"] for r in read_records(tmp_path) if "data/quarantined" in r} == {4: 8, 6: 12, 8: 16}
    run(tmp_path / "other", steps=2)
    with pytest.raises(CheckpointError, match="has no place in the data"):
        run(tmp_path / "other", steps=4, data=Cursor())


@pytest.mark.parametrize("fails_at", [1, 4, 5, 7, 8, 9])
def test_a_failed_run_continues_as_if_nothing_had_happened(tmp_path, fails_at):
    def fail():
        raise OSError("the disk with the data is gone")

    run(tmp_path / "whole")
    with pytest.raises(OSError, match="the disk with the data is gone") as error:
        run(tmp_path / "broken", batches=Numbers(on={fails_at: fail}))
    assert error.value.__notes__ == [f"while preparing batch {fails_at}"]
    output = io.StringIO()
    run(tmp_path / "broken", output=output)
    assert ("continuing from the checkpoint of step" in output.getvalue()) == (fails_at >= 4)
    assert losses(tmp_path / "broken") == losses(tmp_path / "whole")


def test_a_line_cut_short_and_records_without_checkpoint_are_forgotten(tmp_path):
    run(tmp_path, steps=5)
    expected = losses(tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "loss": 1.0, "tokens_seen": 60}\n{"step": 7, "lo')
    run(tmp_path, steps=5)
    assert losses(tmp_path) == expected
    run(tmp_path, steps=6)
    assert [step for step, *_ in losses(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_records_are_kept_where_only_damaged_checkpoints_are(tmp_path):
    run(tmp_path, steps=5)
    expected = losses(tmp_path)
    (tmp_path / "checkpoints" / "damaged").mkdir()
    for step in (4, 5):
        (tmp_path / "checkpoints" / f"{step:08d}").rename(tmp_path / "checkpoints" / "damaged" / f"{step:08d}")
    with pytest.raises(CheckpointError, match=r"has no checkpoint, but damaged ones in .*/damaged \(00000004; 00000005\)"):
        run(tmp_path, steps=5)
    assert losses(tmp_path) == expected


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_ends_with_its_own_code(tmp_path, number):
    run(tmp_path / "whole")
    output, handlers = io.StringIO(), [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]

    def step(state, batch):
        if int(state.step) == 5:
            os.kill(os.getpid(), number)
        return step_fn(state, batch)

    with pytest.raises(Interrupted) as error:
        run(tmp_path / "broken", step=step, output=output)
    assert error.value.code == INTERRUPTED
    assert f"stopped by {number.name}; step 6 is saved in" in output.getvalue() and "start again to continue" in output.getvalue()
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == handlers
    assert len(losses(tmp_path / "broken")) == 6
    run(tmp_path / "broken")
    assert losses(tmp_path / "broken") == losses(tmp_path / "whole")


def test_a_signal_in_the_last_step_changes_nothing(tmp_path):
    def step(state, batch):
        if int(state.step) == 9:
            os.kill(os.getpid(), signal.SIGTERM)
        return step_fn(state, batch)

    assert int(run(tmp_path, step=step).step) == 10


def test_a_finished_run_stays_as_it_is(tmp_path):
    run(tmp_path)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    assert int(run(tmp_path, batches=(batches := Numbers())).step) == 10
    assert batches.asked == [] and (tmp_path / "metrics.jsonl").read_bytes() == before
    with pytest.raises(ConfigError, match=r"is of step 10, but LoopConfig\.steps=7"):
        run(tmp_path, steps=7)


def test_a_failed_save_ends_the_run_with_its_error(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=3))
    with pytest.raises(CheckpointError, match=r"step 4 .* and 3 are free"):
        run(tmp_path)


def test_a_disk_that_fills_up_under_the_records_loses_nothing(tmp_path, monkeypatch):
    run(tmp_path / "whole")
    write = JsonLines.write

    def full(self, step, scalars):
        if step == 6:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, step, scalars)

    with monkeypatch.context() as patch, pytest.raises(CheckpointError) as error:
        patch.setattr(JsonLines, "write", full)
        run(tmp_path / "broken")
    for part in ("records", str(tmp_path / "broken"), "No space left on device", "free some space", "from the last checkpoint"):
        assert part in str(error.value)
    run(tmp_path / "broken")
    assert losses(tmp_path / "broken") == losses(tmp_path / "whole")
