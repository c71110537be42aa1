"""The report shows what the records and the caller say, and nothing breaks it."""

import numpy as np
import pytest

from interns1pro_jax.train.evaluation import GroupLoss
from interns1pro_jax.train.metrics import JsonLines
from interns1pro_jax.train.report import CaptionLoss, HeldOut, ReportData, Sample, read_samples, save_samples, write_report


def write_records(workdir, evaluations=True):
    writer = JsonLines(workdir)
    writer.start(0)
    for step in range(1, 41):
        record = dict(loss=5 / step, tokens=10.0, grad_norm=1 / step, learning_rate=1e-3, applied=1.0, tokens_seen=10 * step)
        if step > 1:
            record["tokens_per_second"] = 1234.0
        if step == 7:
            record |= dict(loss=float("nan"), grad_norm=float("inf"), applied=0.0)
        if evaluations and step % 20 == 0:
            record |= {"eval/loss": 5.25 - step / 10, "eval/source/prose": 5.0, "eval/kind/image": 4.0}
        writer.write(step, record)
    writer.close()


def is_picture(path):
    return path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 3000


def test_a_full_report(tmp_path):
    write_records(tmp_path)
    data = ReportData(
        title="Demo",
        summary="A small model.",
        facts={"parameters": "1,000"},
        held_out=HeldOut(loss=1.375, unigram_loss=6.5, tokens=12_345),
        captions={"image": CaptionLoss(true=1.0, removed=2.25, swapped=3.5)},
        groups={"all": GroupLoss(1.0, 70), "source/prose": GroupLoss(1.125, 50), "kind/image": GroupLoss(2.0, 20)},
        samples=[Sample("Say", "````\n# not a heading", "this")],
        expert_load=np.random.default_rng(0).random((4, 16)),
        router_groups=8,
        rows_per_device=[64] * 8,
        operative_config="train.steps = 40\n",
    )
    text = write_report(tmp_path, data).read_text()
    for part in (
        "# Demo", "| validation loss, all 12,345 held-out tokens | 1.3750 |", "| loss of a unigram model on the same tokens | 6.5000 |",
        "| validation loss, last during training (a part of the held-out data) | 1.2500 |", "| image | 1.000 | 2.250 | 3.500 |",
        "| bad steps, not applied | 1 |", "| parameters | 1,000 |", "| tokens with a loss | 400 |", "| tokens/s, median | 1,234 |",
        "`````text\n````\n# not a heading\n`````", "train.steps = 40", "| jax |",
        "| source/prose | 1.1250 | 50 |", "| kind/image | 2.0000 | 20 |",
    ):  # fmt: skip
        assert part in text
    for name in ("loss", "loss_by_group", "optimizer", "rows_per_device", "expert_load"):
        assert f"]({name}.png)" in text and is_picture(tmp_path / f"{name}.png")
    assert (tmp_path / "operative_config.gin").read_text() == "train.steps = 40\n"


def test_parts_that_are_not_known_are_left_out(tmp_path):
    write_records(tmp_path, evaluations=False)
    text = write_report(tmp_path, ReportData(title="Demo")).read_text()
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["loss.png", "optimizer.png"]
    for heading in ("Samples", "What the media", "Rows per device", "Load of the experts", "Configuration", "validation"):
        assert heading not in text


def test_samples_of_a_step_come_back(tmp_path):
    samples = [Sample("\u03b1?", "\u03b2", None), Sample("a", "b", "c")]
    save_samples(tmp_path, 20, samples)
    assert read_samples(tmp_path, 20) == samples and read_samples(tmp_path, 10) == []


def test_nothing_to_report(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"metrics\.jsonl has no records"):
        write_report(tmp_path, ReportData(title="Demo"))
