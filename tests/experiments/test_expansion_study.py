"""Several processes share a study: each run is done once, after the one that it begins from; the report is of what there is."""

import json
import threading

import numpy as np

from experiments import expansion_report, expansion_study
from experiments.expansion_report import BASE, INITIAL, UNEXPANDED
from experiments.expansion_study import Run, share


def test_each_run_is_done_once_and_after_its_base(tmp_path, monkeypatch):
    monkeypatch.setattr(expansion_study, "_PAUSE", 0.01)
    done, both, reports = [], threading.Barrier(2, timeout=20), []

    def do(name):
        if name in ("base 0", "base 1"):
            both.wait()  # only passes where the two are done at the same time
        done.append(name)

    def runs():
        bases = {seed: Run(tmp_path / f"seed_{seed}" / BASE, lambda seed=seed: do(f"base {seed}")) for seed in (0, 1)}
        arms = [Run(tmp_path / f"seed_{s}" / arm, lambda s=s, arm=arm: do(f"{arm} {s}"), bases[s]) for arm in "abc" for s in (0, 1)]
        return [*bases.values(), *arms]

    workers = [threading.Thread(target=share, args=(runs(), lambda: reports.append(len(done)))) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(20)
    assert sorted(done) == sorted([f"{name} {seed}" for name in ("base", *"abc") for seed in (0, 1)])
    assert len(reports) == len(done)
    for seed in (0, 1):
        assert done.index(f"base {seed}") < min(done.index(f"{arm} {seed}") for arm in "abc")
    share(runs(), lambda: reports.append(0))  # all is done
    assert len(reports) == len(done)


def test_the_report_compares_arms_of_one_base_as_far_as_all_are(tmp_path):
    losses = {0: {UNEXPANDED: [2.0, 1.9, 1.8], "pairs": [2.5, 2.1, 1.9]}, 1: {UNEXPANDED: [3.0, 2.8, 2.7], "pairs": [3.7, 3.0]}}
    for seed, arms in losses.items():
        for arm, values in (arms | {BASE: [4.0, 3.0, 2.0, 1.5, 1.4, 1.3]}).items():
            home = tmp_path / f"seed_{seed}" / arm
            home.mkdir(parents=True)
            if arm != BASE:
                (home / INITIAL).write_text(json.dumps({"loss": values[0], "separation": float("nan"), "device_load_max": 1.0}))
            records = [{"step": 10 * n, "eval/loss": x, "eval/device_load_max": 1.0} for n, x in enumerate(values) if n or arm == BASE]
            (home / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    expansion_report.write(tmp_path)
    study = json.loads((tmp_path / "study.json").read_text())
    assert study["arms"]["pairs"]["1"]["step"] == study["arms"][UNEXPANDED]["0"]["step"] == [0, 10]
    np.testing.assert_allclose([*study["last_fifth_of_base_gains"].values()], 0.1)
    head, *lines = (tmp_path / "study.csv").read_text().splitlines()
    assert head.endswith("less unexpanded right after,less unexpanded at the end")
    assert lines[1].startswith("pairs,") and lines[1].endswith("0.6000 ± 0.1414,0.2000 ± 0.0000")
    assert (tmp_path / "study.png").stat().st_size > 10_000
