"""Kills a run again and again and compares it with one that nobody kills: `python -m tools.soak [--kills 30] [--output docs/soak.png]`.

A tiny model (`tools.tiny_run`) trains twice with the same data: once in peace, once with SIGKILL at random moments, among them every
moment of a save. Every step's record but its speed must be the same to the bit. Ends with 1 if it is not, or if the killed run does
not end. Prints what was seen and draws both loss curves, the kills, and where the time went.
"""

from __future__ import annotations

import datetime
import itertools
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import numpy as np
from absl import app, flags
from matplotlib.figure import Figure
from rich.console import Console

from interns1pro_jax.train.journal import LOST, Goodput, goodput, read_journal
from interns1pro_jax.train.metrics import read_arrays, read_records

_KILLS = flags.DEFINE_integer("kills", 30, "How often the run is killed.", lower_bound=1)
_STEPS = flags.DEFINE_integer("steps", 300, "Steps of the run.", lower_bound=10)
_EVERY = flags.DEFINE_integer("every", 5, "Steps between checkpoints.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "Of the moments.")
_OUTPUT = flags.DEFINE_string("output", "soak.png", "The picture.")

# Moments of a save (`tools.tiny_run --kill`): its beginning, its end, the removal of the checkpoint before it.
_IN_SAVES = (("os.mkdir", ".orbax-checkpoint-tmp"), ("os.rename", "checkpoints/{:08d}"), ("os.rename", "deleted/{:08d}"))


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}.")
    console = Console(highlight=False)
    with tempfile.TemporaryDirectory() as directory:
        whole, killed, cache = (Path(directory) / name for name in ("whole", "killed", "compiled"))
        _start(whole, cache).communicate()
        console.print(f"a run of {_STEPS.value} steps in peace is done")
        kills = _kill_again_and_again(killed, cache, console)
        expected, found = _records(whole), _records(killed)
        differing = [a["step"] for a, b in zip(expected, found, strict=False) if a != b]
        same_arrays = all(np.array_equal(x, read_arrays(killed)[name]) for name, x in read_arrays(whole).items())
        equal = len(found) == len(expected) == _STEPS.value and not differing and same_arrays
        account = goodput(read_journal(killed))
        console.print(
            f"{len(kills)} kills, {sum(in_save for _, in_save in kills)} of them in saves; {account.starts} starts have come to train; "
            + (f"all {len(expected)} records are equal to the bit" if equal else f"NOT equal, at steps {differing[:10]} or in number")
        )
        _draw(Path(_OUTPUT.value), expected, found, kills, account)
        console.print(f"picture: {_OUTPUT.value}")
    if not equal:
        sys.exit(1)


def _start(workdir: Path, cache: Path, *arguments: str) -> subprocess.Popen:
    program = [sys.executable, "-m", "tools.tiny_run", str(workdir), "--steps", str(_STEPS.value), "--every", str(_EVERY.value)]
    log = (workdir.parent / f"{workdir.name}.log").open("ab")
    return subprocess.Popen([*program, "--cache", str(cache), *arguments], stdout=log, stderr=log)


def _kill_again_and_again(workdir: Path, cache: Path, console: Console) -> list[tuple[int, bool]]:
    """Runs to the end; the step that was recorded last at each kill, and whether it was in a save."""
    rng = np.random.default_rng(_SEED.value)
    kills: list[tuple[int, bool]] = []
    in_saves = itertools.cycle(_IN_SAVES)
    pace = _STEPS.value / _KILLS.value  # steps between kills, so that they spread over the run
    while len(kills) < _KILLS.value:
        at = _saved(workdir)
        arguments: Sequence[str] = ()
        in_save = len(kills) % 3 == 2
        if in_save:
            event, where = next(in_saves)
            # The save that opens is the next one; one is completed, or removes its predecessor, a few saves later.
            after = at + _EVERY.value * int(rng.integers(1, 3))
            arguments = ("--kill", event, where.format(after - (_EVERY.value if "deleted" in where else 0)))
        process = _start(workdir, cache, *arguments)
        if not in_save:
            goal = min(at + rng.uniform(0, 2 * pace), _STEPS.value - 2)
            deadline = time.monotonic() + 120
            while process.poll() is None and _recorded(workdir) < goal and time.monotonic() < deadline:
                time.sleep(0.01)
            time.sleep(rng.uniform(0, 0.05))
            process.send_signal(signal.SIGKILL)
        code = process.wait()
        if code not in (0, -signal.SIGKILL):
            log = workdir.with_suffix(".log").read_text()
            sys.exit(f"error: the run ended with code {code} by itself, after step {_recorded(workdir)}:\n{log[-2000:]}")
        if code == 0:
            console.print(f"the run ended before it was killed {_KILLS.value} times; give it more --steps")
            return kills
        kills.append((_recorded(workdir), in_save))
        console.print(f"kill {len(kills)}/{_KILLS.value} after step {kills[-1][0]}{', in a save' if in_save else ''}")
    _start(workdir, cache).communicate()
    return kills


def _records(workdir: Path) -> list[dict]:
    return [{name: value for name, value in record.items() if name != "tokens_per_second"} for record in read_records(workdir)]


def _recorded(workdir: Path) -> int:
    records = read_records(workdir)
    return records[-1]["step"] if records else 0


def _saved(workdir: Path) -> int:
    return max((int(path.name) for path in (workdir / "checkpoints").glob("*") if path.name.isdecimal()), default=0)


def _draw(path: Path, whole: Sequence[dict], killed: Sequence[dict], kills: Sequence[tuple[int, bool]], account: Goodput) -> None:
    figure = Figure(figsize=(9, 5), layout="constrained")
    curve, bar = figure.subplots(2, 1, height_ratios=(5, 1))
    curve.plot([r["step"] for r in whole], [r["loss"] for r in whole], color="C0", linewidth=3, alpha=0.4, label="never killed")
    curve.plot([r["step"] for r in killed], [r["loss"] for r in killed], color="C3", linewidth=0.8, label=f"killed {len(kills)} times")
    for in_save, colour, label in ((False, "0.6", "kill"), (True, "C1", "kill in a save")):
        for number, step in enumerate(step for step, kind in kills if kind == in_save):
            curve.axvline(step, color=colour, linewidth=0.7, linestyle=":", label=label if number == 0 else None)
    curve.set(xlabel="step", ylabel="loss (nats per token)")
    packages = ", ".join(f"{name} {metadata.version(name)}" for name in ("jax", "orbax-checkpoint"))
    curve.set_title(f"{datetime.date.today()}, {packages}", fontsize=9)
    curve.legend(edgecolor="none", fontsize=8)
    left = 0.0
    for phase, seconds in sorted(account.seconds.items(), key=lambda item: item[0] == LOST):
        if seconds > 0.005 * account.total:
            bar.barh(0, seconds, left=left, label=f"{phase} {seconds:.0f} s")
        left += seconds
    bar.set(yticks=[], xlabel="time of the killed run (s)")
    bar.legend(ncols=8, fontsize=7, edgecolor="none", loc="upper center", bbox_to_anchor=(0.5, 1.6))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    app.run(main)
