"""The fit finds a law again from runs that obey it, and predicts a schedule that it has not seen."""

import json

import numpy as np
import pytest

from interns1pro_jax.config import ConfigError
from interns1pro_jax.optim.annealing_law import AnnealingLaw, areas, best_schedule, fit
from interns1pro_jax.train.metrics import JsonLines
from tools import fit_learning_rate

LAW = AnnealingLaw(floor=2.0, scale=0.5, power=0.6, gain=0.005)


def wsd(peak, steps, decay):
    step = np.arange(1, steps + 1)
    return peak * np.minimum(step / 10, np.clip((steps - step) / decay, 0, 1)).clip(max=1)


def run(rates, seed):
    return rates, LAW.losses(rates) * np.exp(np.random.default_rng(seed).normal(size=len(rates)) * 1e-3)


def test_areas_by_definition():
    rates, decay = np.array([1.0, 0.5, 0.25]), 0.9
    s1, s2 = areas(rates, decay)
    np.testing.assert_allclose(s1, [1, 1.5, 1.75])
    np.testing.assert_allclose(s2, [0, 0.5, 0.5 + (0.9 * 0.5 + 0.25)])


def test_a_law_is_found_again_and_predicts_another_schedule():
    pilots = [run(wsd(1.0, 300, 1e9), 0), run(wsd(1.0, 300, 100), 1), run(wsd(0.5, 200, 40), 2)]
    law = fit(pilots, warmup=10, decay=LAW.decay)
    unseen = wsd(0.8, 1000, 300)
    assert law.losses(unseen)[-1] == pytest.approx(LAW.losses(unseen)[-1], rel=5e-3)
    plan = best_schedule(law, 200, 1.0, 10)
    assert plan.bound <= plan.loss <= law.losses(wsd(1.0, 200, 20))[-1] + 1e-9
    with pytest.raises(ConfigError, match="at least two schedules"):
        fit(pilots[:1], warmup=10)


def test_the_tool_reads_runs_and_draws(tmp_path, capsys):
    for name, rates in (("a", wsd(1.0, 120, 1e9)), ("b", wsd(1.0, 120, 40)), ("c", wsd(0.7, 150, 60))):
        writer = JsonLines(tmp_path / name)
        (tmp_path / name).mkdir()
        writer.start(0)
        for step, (rate, loss) in enumerate(zip(*run(rates, 3), strict=True), 1):
            writer.write(step, {"learning_rate": rate, "loss": loss})
        writer.close()
    arguments = [str(tmp_path / "a"), str(tmp_path / "b"), "--steps", "150", "--output", str(tmp_path), "--warmup", "10"]
    assert fit_learning_rate.main([*arguments, "--check", str(tmp_path / "c")]) == 0
    found = json.loads((tmp_path / "fit.json").read_text())
    assert found["check"]["predicted"] == pytest.approx(found["check"]["found"], rel=0.02)
    assert "warmup_stable_decay.peak" in capsys.readouterr().out and (tmp_path / "fit.png").exists()
    assert fit_learning_rate.main([str(tmp_path / "none"), "--steps", "5", "--output", str(tmp_path)]) == 1
