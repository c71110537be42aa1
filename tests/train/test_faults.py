"""Bad steps: they change nothing, are told with their batch, passed over as far as the policy allows, and left behind by a rewind."""

import io
import json
import re

import jax
import numpy as np
import pytest

from interns1pro_jax.config import ConfigError
from interns1pro_jax.train.faults import BadStepError, FaultPolicy
from interns1pro_jax.train.journal import read_journal
from tests.train.arithmetic import Numbers, losses, make_state, run, step_fn

pytestmark = pytest.mark.usefixtures("mesh")


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


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
