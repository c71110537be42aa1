"""Laws of the loop, on a step that is only arithmetic: order, resumption, interruption, and what the files say."""

import dataclasses
import errno
import io
import json
import os
import re
import signal
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from rich.console import Console

from interns1pro_jax.checkpoint.manager import CheckpointError, CheckpointManager
from interns1pro_jax.config import ConfigError
from interns1pro_jax.sharding import make_mesh
from interns1pro_jax.train.faults import BadStepError, FaultPolicy, empty_history, remember
from interns1pro_jax.train.feed import Feed, local_rows, place_batch
from interns1pro_jax.train.journal import read_journal
from interns1pro_jax.train.loop import INTERRUPTED, Interrupted, LoopConfig, train
from interns1pro_jax.train.metrics import JsonLines, read_arrays, read_records
from interns1pro_jax.train.state import TrainState, add_tokens, count_tokens
from interns1pro_jax.train.watchdog import Watchdog


def make_state() -> TrainState:
    return TrainState(
        step=jnp.int32(0),
        params=nnx.State({"w": nnx.Param(jnp.ones(4))}),
        buffers=nnx.State({}),
        opt_state=(),
        tokens_seen=jnp.zeros(2, jnp.uint32),
        skipped=jnp.int32(0),
        history=empty_history(WINDOW),
    )


WINDOW = 4
POLICY = FaultPolicy(max_grad_norm=500, spike_deviations=100, window=WINDOW)


@jax.jit
def step_fn(state, batch):
    """A chaotic map, so that one wrong bit or batch shows in all later losses. Its judgement of bad steps is that of the real one."""
    x = batch["x"].mean()
    w = 3.9 * (state.params["w"][...] % 1) * (1 - state.params["w"][...] % 1) + x % 10 * 1e-3
    loss = jnp.where(x < 1000, w.sum(), x - 1000)
    limits = POLICY.limits(state.history)
    good = jnp.isfinite(loss) & (loss <= limits).all()
    w = jnp.where(good, w, state.params["w"][...])
    tokens = jnp.float32(10)
    metrics = dict(loss=loss, tokens=tokens, grad_norm=loss, learning_rate=jnp.float32(0.1), applied=good, load=w.reshape(2, 2))
    after = dataclasses.replace(
        state,
        step=state.step + 1,
        params=nnx.State({"w": state.params["w"].replace(w)}),
        tokens_seen=add_tokens(state.tokens_seen, tokens),
        skipped=state.skipped + jnp.where(good, 0, 1),
        history=remember(state.history, state.step - state.skipped, loss, loss, good),
    )
    return after, metrics | {"limits": limits}


class Numbers:
    """Batch n is n everywhere; chosen batches are poisoned, or do something while they are made."""

    def __init__(self, poisoned=(), on=None, poison=np.nan):
        self.asked, self.poisoned, self.on, self.poison = [], poisoned, on or {}, poison

    def __getitem__(self, step):
        self.asked.append(step)
        self.on.get(step, lambda: None)()
        return {"x": np.full((8, 2), self.poison if step in self.poisoned else step, np.float32)}


def run(workdir, steps=10, batches=None, identity=None, step=step_fn, output=None, evaluate=None, data=None, **config):
    console = Console(file=output or io.StringIO(), force_terminal=False)
    with CheckpointManager(workdir / "checkpoints", identity or {}) as checkpoints:
        config = LoopConfig(steps=steps, **{"checkpoint_every": 4, "log_every": 5, **config})
        return train(
            make_state(),
            step,
            batches or Numbers(),
            config,
            workdir=workdir,
            checkpoints=checkpoints,
            data=data,
            evaluate=evaluate,
            console=console,
        )


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


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def losses(workdir):
    return [(record["step"], record["loss"], record["tokens_seen"]) for record in read_records(workdir)]


@pytest.fixture(autouse=True)
def _mesh(mesh):
    yield


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


@pytest.mark.parametrize("devices", [1, 8])
def test_a_part_of_a_batch_is_placed_as_the_whole_would_be(devices):
    with jax.set_mesh(make_mesh(fsdp=devices)):
        assert local_rows(16).tolist() == list(range(16))
        batch = {"x": np.arange(32).reshape(16, 2), "y": np.float32(3)}
        rows = np.arange(16)
        whole, part = place_batch(batch), place_batch(batch, rows, 16)
        assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all() and a.sharding == b.sharding, whole, part))
        with pytest.raises(ConfigError if devices == 8 else IndexError):
            place_batch({"x": batch["x"][:4]}, rows[:4], 12 if devices == 8 else 16)


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


def test_a_nonfinite_step_stops_the_run_and_keeps_its_batch(tmp_path):
    output = io.StringIO()
    with pytest.raises(BadStepError) as error:
        run(tmp_path, batches=Numbers(poisoned=[6]), output=output)
    dumped = tmp_path / "dumps" / "step_00000007"
    for part in ("step 7 is bad: loss nan", "not applied", str(dumped), "FaultPolicy.skip", "from the last checkpoint"):
        assert part in str(error.value)
    with np.load(dumped / "batch.npz") as batch, np.load(dumped / "metrics.npz") as metrics:
        assert np.isnan(batch["x"]).all() and batch["x"].shape == (8, 2)
        assert np.isnan(metrics["loss"]) and metrics["load"].shape == (2, 2)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["00000004"]
    assert [json.loads(line)["loss"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()][-1] is None


def test_nonfinite_steps_are_skipped_where_that_is_allowed(tmp_path):
    output = io.StringIO()
    state = run(tmp_path, batches=Numbers(poisoned=[2, 3, 6]), faults=FaultPolicy(skip=2), output=output)
    assert int(state.skipped) == 3 and int(state.step) == 10 and np.isfinite(losses(tmp_path)[-1][1])
    assert output.getvalue().count("its update was not applied") == 3
    with pytest.raises(BadStepError, match="3 bad steps in a row, 2 are passed over"):
        run(tmp_path / "more", batches=Numbers(poisoned=[2, 3, 4]), faults=FaultPolicy(skip=2))


@pytest.mark.parametrize(
    ("poison", "said"), [(1400, r"loss 400 \(limit \d+\.?\d*\)"), (3000, r"gradient norm 2000 \(limit"), (np.inf, "loss inf")]
)
def test_spikes_large_gradients_and_infinities_are_skipped_and_do_not_count_as_normal(tmp_path, poison, said):
    output = io.StringIO()
    state = run(tmp_path, batches=Numbers(poisoned=[6], poison=poison), faults=FaultPolicy(skip=1), output=output)
    assert int(state.skipped) == 1 and re.search(f"step 7 is bad: .*{said}", output.getvalue())
    assert np.asarray(state.history).max() < 4
    with pytest.raises(BadStepError, match="1 bad steps in a row, 0 are passed over"):
        run(tmp_path / "stops", batches=Numbers(poisoned=[6], poison=poison))


REWIND = FaultPolicy(skip=1, then="rewind", max_rewinds=2)


def test_rewinds_leave_out_the_batches_since_the_checkpoint(tmp_path):
    """Batches 6 and 7 are bad: from the checkpoint of step 4 the run goes on with batch 8; then 12 and 13: from 8 on with 14."""
    batches, output = Numbers(poisoned=[6, 7, 12, 13]), io.StringIO()
    state = run(tmp_path, batches=batches, faults=REWIND, output=output)
    expected = make_state()
    for batch in (0, 1, 2, 3, 8, 9, 10, 11, 14, 15):
        expected, _ = step_fn(expected, Numbers()[batch])
    assert_equal(state, expected)
    assert [step for step, *_ in losses(tmp_path)] == list(range(1, 11))
    said = re.findall(r"back to the checkpoint of step (\d+), and on .* after that of step (\d+); (\d+) batches", output.getvalue())
    assert said == [("4", "8", "4"), ("8", "10", "6")]
    rewinds = [(line["step"], line["after"]) for line in read_journal(tmp_path) if line["event"] == "rewind"]
    assert rewinds == [(4, 8), (8, 10)]


def test_a_run_that_is_killed_after_a_rewind_goes_on_as_if_it_had_not_been(tmp_path):
    def fail():
        raise OSError("gone")

    run(tmp_path / "whole", batches=Numbers(poisoned=[6, 7, 10]), faults=REWIND)
    for at in (7, 9, 13):
        with pytest.raises(OSError, match="gone"):
            run(tmp_path / "broken", batches=Numbers(poisoned=[6, 7, 10], on={at: fail}), faults=REWIND)
    run(tmp_path / "broken", batches=Numbers(poisoned=[6, 7, 10]), faults=REWIND)
    assert losses(tmp_path / "broken") == losses(tmp_path / "whole")


@pytest.mark.parametrize(
    ("poisoned", "message"),
    [
        ([1, 2], "no checkpoint of step 1 or earlier .* save more often"),
        (range(6, 30), r"after 2 rewinds of 2 \(FaultPolicy.max_rewinds\)"),
    ],
)
def test_a_rewind_that_cannot_help_stops_the_run(tmp_path, poisoned, message):
    with pytest.raises(BadStepError, match=message):
        run(tmp_path, batches=Numbers(poisoned=poisoned), faults=REWIND)


@pytest.mark.parametrize("wrong", [dict(max_grad_norm=0), dict(window=1), dict(skip=-1), dict(then="hope"), dict(spike_deviations=-6.0)])
def test_impossible_policies_are_named(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(ConfigError, match=f"FaultPolicy.{name}={value!r}"):
        FaultPolicy(**wrong)


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


def test_the_feed_is_never_far_ahead_and_ends_with_its_loop():
    batches = Numbers()
    with Feed(batches, range(100), depth=2) as feed:
        for step, host, device in feed:
            assert host["x"][0, 0] == device["x"][0, 0] == step
            time.sleep(0.02)
            assert batches.asked[-1] <= step + 4
            if step == 5:
                break
    assert batches.asked[-1] < 12


def test_batches_are_split_over_the_mesh():
    batch = {"tokens": np.arange(32, dtype=np.int32).reshape(16, 2), "scale": np.float32(2)}
    with jax.set_mesh(make_mesh(fsdp=2, expert=4)):
        placed = place_batch(batch)
        assert {s.data.shape for s in placed["tokens"].addressable_shards} == {(2, 2)}
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(placed), batch)
        with pytest.raises(ConfigError, match="size 12"):
            place_batch({"x": np.zeros((12, 2))})


def test_tokens_are_counted_beyond_32_bits():
    state = make_state()
    for _ in range(3):
        state = dataclasses.replace(state, tokens_seen=add_tokens(state.tokens_seen, jnp.uint32(2**32 - 3)))
    assert count_tokens(state) == 3 * (2**32 - 3)
