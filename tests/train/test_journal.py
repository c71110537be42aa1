"""The account of a run's time over its starts, from a journal that tells what must come out."""

import io
from types import SimpleNamespace

import pytest
from rich.console import Console

from interns1pro_jax.train.journal import JOURNAL, LOST, Clock, Journal, goodput, read_journal
from interns1pro_jax.train.progress import Progress


def line(event, number, at, began=None, **seconds):
    return {"event": event, "step": number, "time": at, "seconds": seconds} | ({} if began is None else {"began": began})


def test_only_work_that_the_end_came_from_counts_and_the_rest_is_lost():
    """The first start is continued from its save of step 10, the second is killed before it saves, the third finishes."""
    account = goodput(
        [
            line("start", 0, 2.0, began=0.0, initialise=2),
            line("save", 10, 13.0, initialise=2, step=10, save=1),
            line("save", 20, 24.0, initialise=2, step=20, save=2),
            line("start", 10, 51.0, began=50.0, initialise=1),
            line("bad step", 15, 60.0, initialise=1, step=9),
            line("start", 10, 103.0, began=100.0, initialise=3),
            line("end", 30, 125.0, initialise=3, step=20, save=2),
        ]
    )
    assert account.starts == 3 and account.total == 125
    assert account.seconds == {"initialise": 5, "step": 30, "save": 3, LOST: 125 - 38}
    assert account.share == 30 / 125
    with pytest.raises(ValueError, match="no start"):
        goodput([])


def test_a_start_whose_checkpoint_was_damaged_counts_as_lost():
    account = goodput(
        [
            line("start", 0, 0.0, began=0.0),
            line("save", 10, 10.0, step=10),
            line("start", 10, 20.0, began=20.0),
            line("save", 20, 30.0, step=10),
            line("start", 10, 40.0, began=40.0),
            line("end", 12, 42.0, step=2),
        ]
    )
    assert account.seconds == {"step": 12, LOST: 30}


def test_every_second_belongs_to_one_phase(monkeypatch):
    now = 100.0
    monkeypatch.setattr("interns1pro_jax.train.journal.time", SimpleNamespace(monotonic=lambda: now))

    def items():
        nonlocal now
        for _ in range(2):
            now += 1
            yield now

    clock = Clock()
    now += 2
    with clock("step"):
        now += 3
        with clock("save"):
            now += 5
    for _ in clock.waiting("data", items()):
        now += 7
    before = clock.seconds
    with clock("step"):
        now += 11
    clock.move(("step",), "rewound", before)
    assert clock.seconds == {"initialise": 16, "step": 3, "save": 5, "data": 2, "rewound": 11}


def test_a_line_cut_short_costs_only_itself(tmp_path):
    journal = Journal(tmp_path)
    journal.start(0)
    with (tmp_path / JOURNAL).open("a") as file:
        file.write('{"event": "sa')
    Journal(tmp_path).start(4)
    Journal(tmp_path, main=False).start(9)
    assert [(x["event"], x["step"]) for x in read_journal(tmp_path)] == [("start", 0), ("start", 4)]


def test_the_time_left_is_counted_anew_after_a_rewind():
    with Progress(9, 0, 1, Console(file=(output := io.StringIO()))) as progress:
        for step in (5, 6):
            progress.update(step, dict(loss=1, grad_norm=1, learning_rate=1))
        progress.restart(4)
        progress.update(5, dict(loss=1, grad_norm=1, learning_rate=1))
    assert output.getvalue().rstrip().endswith("? left")
