"""Laws of the loop, on a step that is only arithmetic: order, evaluation, saving, and what the files say."""

import dataclasses
import io
import re

import jax.numpy as jnp
import numpy as np
import pytest

from interns1pro_jax.checkpoint.manager import CheckpointError, CheckpointManager
from interns1pro_jax.config import ConfigError
from interns1pro_jax.train.loop import LoopConfig, train
from interns1pro_jax.train.metrics import read_arrays, read_records
from interns1pro_jax.train.state import add_tokens, count_tokens
from interns1pro_jax.train.watchdog import Watchdog
from tests.train.arithmetic import Numbers, losses, make_state, run, step_fn

pytestmark = pytest.mark.usefixtures("mesh")


class Growing(Numbers):
    def __getitem__(self, step):
        batch = super().__getitem__(step)
        return {"x": np.tile(batch["x"], (1 if step < 4 else 2, 1))}


def test_a_batch_of_another_size_may_compile_as_long_as_it_takes(tmp_path, monkeypatch):
    events = []

    class Recording(Watchdog):
        def beat(self, doing):
            events.append(doing)

        def pause(self):
            events.append("pause")

    monkeypatch.setattr("interns1pro_jax.train.loop.Watchdog", Recording)
    run(tmp_path, steps=7, step=lambda state, batch: (events.append("call"), step_fn(state, batch))[1], batches=Growing())
    assert [event for event in events if event in ("pause", "call")] == ["pause", *["call"] * 4, "pause", *["call"] * 3]
    after = events[events.index("pause", 1) :]
    assert after[:4] == ["pause", "call", "call", "step 7"]  # not watched until the grown step is known to be done


def test_scalars_are_recorded_at_every_step_and_arrays_kept(tmp_path):
    def with_router(state, batch):
        state, metrics = step_fn(state, batch)
        scalars = {"router/entropy_mean": jnp.float32(0.5), "router/load_max": metrics["load"].max()}
        return state, metrics | scalars | {"router/load": metrics["load"]}

    run(tmp_path, step=with_router)
    for record in read_records(tmp_path):
        assert record["router/entropy_mean"] == 0.5 and 0 <= record["router/load_max"] <= 1
        assert "router/load" not in record and "load" not in record
    assert read_arrays(tmp_path)["router/load"].max() == read_records(tmp_path)[-1]["router/load_max"]
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert events.read_bytes().count(b"router/load_max") == events.read_bytes().count(b"router/load") == 10


def test_every_step_is_done_once_in_order(tmp_path):
    batches = Numbers()
    state = run(tmp_path, batches=batches)
    assert batches.asked == list(range(10))
    assert int(state.step) == 10 and count_tokens(state) == 100
    assert [(step, seen) for step, _, seen in losses(tmp_path)] == [(n, 10 * n) for n in range(1, 11)]
    expected = make_state()
    for n in range(10):
        expected, metrics = step_fn(expected, Numbers()[n])
    np.testing.assert_array_equal(read_arrays(tmp_path)["load"], metrics["load"])
    np.testing.assert_array_equal(state.params["w"][...], expected.params["w"][...])


def test_a_record_is_on_disk_before_the_checkpoint_of_its_step(tmp_path, monkeypatch):
    save, recorded = CheckpointManager.save, []

    def spy(self, step, state, extras=None):
        recorded.append((step, [step for step, *_ in losses(tmp_path)]))
        save(self, step, state)

    monkeypatch.setattr(CheckpointManager, "save", spy)
    run(tmp_path)
    assert recorded == [(step, list(range(1, step + 1))) for step in (4, 8, 10)]


def test_evaluations_stand_in_the_record_of_their_step(tmp_path):
    seen = []

    def evaluate(state):
        seen.append(int(state.step))
        return {"loss": seen[-1] / 2}

    output = io.StringIO()
    run(tmp_path, steps=7, evaluate=evaluate, evaluate_every=3, output=output)
    assert seen == [3, 6, 7]
    assert {r["step"]: r["eval/loss"] for r in read_records(tmp_path) if "eval/loss" in r} == {3: 1.5, 6: 3.0, 7: 3.5}
    lines = output.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["3/7", "5/7", "6/7", "7/7"]
    assert lines[0].endswith("eval/loss 1.5000") and "tokens/s" in lines[1] and "left" in lines[1] and "\x1b" not in output.getvalue()


@pytest.mark.parametrize("seconds, expected", [(1e-9, [1, 2, 3]), (1e9, [3])])
def test_saves_by_the_clock(tmp_path, monkeypatch, seconds, expected):
    saved = []
    save = CheckpointManager.save
    monkeypatch.setattr(CheckpointManager, "save", lambda self, step, state, extras=None: saved.append(step) or save(self, step, state))
    run(tmp_path, steps=3, checkpoint_every=None, checkpoint_seconds=seconds)
    assert saved == expected


def test_an_unwritable_workdir_is_named_before_anything_runs(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        CheckpointManager(tmp_path / "checkpoints", {}) as checkpoints,
        pytest.raises(CheckpointError, match=r"file/run cannot be written \(Not a directory\)"),
    ):
        train(make_state(), step_fn, (b := Numbers()), LoopConfig(steps=1), workdir=tmp_path / "file" / "run", checkpoints=checkpoints)
    assert b.asked == []


@pytest.mark.parametrize(
    "wrong",
    [
        *(dict(steps=0), dict(log_every=-1), dict(checkpoint_every=0), dict(hang_seconds=0), dict(prefetch=0)),
        *(dict(profile_steps=(0, 1)), dict(profile_steps=(1, 2))),
    ],
)
def test_impossible_values_are_named(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(ConfigError, match=re.escape(f"LoopConfig.{name}={value}")):
        LoopConfig(**{"steps": 1, **wrong})


def test_tokens_are_counted_beyond_32_bits():
    state = make_state()
    for _ in range(3):
        state = dataclasses.replace(state, tokens_seen=add_tokens(state.tokens_seen, jnp.uint32(2**32 - 3)))
    assert count_tokens(state) == 3 * (2**32 - 3)
