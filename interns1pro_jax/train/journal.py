"""What happened in a run, across all its starts: `journal.jsonl`, and what became of the time.

Every start adds a line with what it ran (configuration, versions, code, data), and then a line for what happens: saves, evaluations,
bad steps, rewinds, the end. Lines are only ever added. Each holds the seconds that this start has spent in every phase, so that the
journal of a run that was killed still tells what its time went into, up to its last line.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from interns1pro_jax.checkpoint.errors import CheckpointError

JOURNAL = "journal.jsonl"
START, SAVE = "start", "save"
PHASES = ("initialise", "compile", "data", "step", "save", "evaluate", "rewound")
LOST = "lost to restarts"

_Item = TypeVar("_Item")


class Clock:
    """Divides the time of the loop's thread among phases: each second belongs to exactly one.

    `compile` is the first call of the step; `data` is waiting for a batch, `step` for the devices, `save` for a checkpoint to begin or
    an earlier one to end. Programs that an evaluation compiles count as its own.
    """

    def __init__(self) -> None:
        self._seconds: dict[str, float] = collections.defaultdict(float)
        self._phase, self._since = PHASES[0], time.monotonic()

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """The time inside belongs to `phase`; afterwards it is as it was."""
        earlier = self.switch(phase)
        try:
            yield
        finally:
            self.switch(earlier)

    def switch(self, phase: str) -> str:
        """From now on the time belongs to `phase`; returns the phase until now."""
        now = time.monotonic()
        self._seconds[self._phase] += now - self._since
        earlier, self._phase, self._since = self._phase, phase, now
        return earlier

    def waiting(self, phase: str, items: Iterable[_Item]) -> Iterator[_Item]:
        """The items; the time of waiting for the next one belongs to `phase`."""
        iterator, end = iter(items), object()
        while True:
            with self(phase):
                item: Any = next(iterator, end)
            if item is end:
                return
            yield item

    def move(self, phases: Sequence[str], to: str, since: Mapping[str, float]) -> None:
        """Counts what `phases` have had since `since` (an earlier `seconds`) as `to`."""
        now = self.seconds
        for phase in phases:
            spent = now.get(phase, 0.0) - since.get(phase, 0.0)
            self._seconds[phase] -= spent
            self._seconds[to] += spent

    @property
    def seconds(self) -> dict[str, float]:
        """By phase, until now."""
        self.switch(self._phase)
        return dict(self._seconds)


class Journal:
    """Adds lines to `journal.jsonl` of a working directory. All processes have one; the first writes.

    Make it as early as possible: its clock begins then.

    Attributes:
      clock: of this start.
      manifest: JSON of what is run; part of the line of the start.
    """

    def __init__(self, workdir: Path, main: bool = True):
        self._path = workdir / JOURNAL if main else None
        self._began = time.time()
        self.clock = Clock()
        self.manifest: Mapping[str, Any] = {}

    def start(self, step: int) -> None:
        """The run begins, or goes on from the checkpoint of `step`."""
        self.write(START, step, began=self._began, **self.manifest)

    def write(self, event: str, step: int, **details: Any) -> None:
        """Adds a line.

        Raises:
          CheckpointError: it cannot be written.
        """
        if self._path is None:
            return
        seconds = {phase: round(value, 4) for phase, value in self.clock.seconds.items()}
        line = json.dumps({"event": event, "time": time.time(), "step": step, "seconds": seconds, **details})
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("ab+") as file:
                if file.tell() and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n":
                    line = "\n" + line  # the last process was killed while it wrote one
                file.write(line.encode() + b"\n")
        except OSError as error:
            raise CheckpointError(
                f"{self._path} cannot be written ({error.strerror}); free some space or make it writable, then start again to continue."
            ) from error


def read_journal(workdir: Path) -> list[dict[str, Any]]:
    """All lines in order, without any that a kill cut short; empty if there is no journal."""
    path = workdir / JOURNAL
    lines = []
    for line in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            lines.append(json.loads(line))
    return lines


@dataclasses.dataclass(frozen=True)
class Goodput:
    """Where the time between the first start and the last line went.

    Attributes:
      seconds: by phase, of work that the last state came from, and `LOST`: what was done after the checkpoint that a later start
        went on from, and the time between starts.
      total: their sum.
      starts: how many there were.
    """

    seconds: Mapping[str, float]
    total: float
    starts: int

    @property
    def share(self) -> float:
        """Of the total in steps that count."""
        return self.seconds.get("step", 0.0) / max(self.total, 1e-9)


def goodput(journal: Sequence[Mapping[str, Any]]) -> Goodput:
    """The account of a run from its journal.

    Raises:
      ValueError: it has no start.
    """
    starts = [[line for line in lines] for lines in _starts(journal)]
    if not starts:
        raise ValueError(f"the journal has no start; give the working directory of a run, which has a {JOURNAL}.")
    ends = [lines[0]["began"] for lines in starts[1:]] + [starts[-1][-1]["time"]]
    kept: dict[str, float] = collections.defaultdict(float)
    wanted: int | None = None  # the step at which the work of the start that is looked at has been taken over by a later one
    for lines in reversed(starts):
        line = lines[-1] if wanted is None else next((x for x in reversed(lines) if x["event"] == SAVE and x["step"] == wanted), None)
        if line is not None:
            for phase, seconds in line["seconds"].items():
                kept[phase] += seconds
            wanted = lines[0]["step"]
    total = ends[-1] - starts[0][0]["began"]
    return Goodput({**kept, LOST: max(total - sum(kept.values()), 0.0)}, total, len(starts))


def _starts(journal: Iterable[Mapping[str, Any]]) -> Iterator[list[Mapping[str, Any]]]:
    """The lines of each start, its own line first."""
    lines: list[Mapping[str, Any]] = []
    for line in journal:
        if line["event"] == START:
            if lines:
                yield lines
            lines = [line]
        elif lines:
            lines.append(line)
    if lines:
        yield lines
