"""What a person sees of a run: a bar with loss, tokens/s and time left, or plain lines where the output is no terminal."""

from __future__ import annotations

import datetime
import time
from collections.abc import Mapping

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar


class Progress:
    """Shows how far a run of `total` steps is; use as a context manager.

    Args:
      start: steps that an earlier process did.
      every: a line is printed every so many steps, and whenever a record holds an evaluation.
    """

    def __init__(self, total: int, start: int, every: int, console: Console):
        self._total, self._every, self._console = total, every, console
        self._first: tuple[int, float] | None = None
        self._bar = Bar(
            TextColumn("step"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.description}"),
            console=console, disable=not console.is_terminal,
        )  # fmt: skip
        self._task = self._bar.add_task("compiling", total=total, completed=start)

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def update(self, step: int, record: Mapping[str, float]) -> None:
        """Shows the record of `step`."""
        shown = [f"loss {record['loss']:.4f}", f"{record.get('tokens_per_second', 0):,.0f} tokens/s", f"{self._left(step)} left"]
        self._bar.update(self._task, completed=step, description="  ".join(shown))
        evaluation = [f"{name} {value:.4f}" for name, value in record.items() if name.startswith("eval/")]
        if evaluation or step % self._every == 0 or step == self._total:
            shown[1:1] = [f"grad norm {record['grad_norm']:.3g}", f"lr {record['learning_rate']:.2e}"]
            self.say("  ".join([f"step {step}/{self._total}", *shown, *evaluation]))

    def restart(self, step: int) -> None:
        """The run is at `step` again."""
        self._first = None
        self._bar.update(self._task, completed=step)

    def say(self, text: str) -> None:
        """Prints a line above the bar."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _left(self, step: int) -> str:
        """Time left at the mean pace since the first step that this process finished (the first one compiles)."""
        now = time.monotonic()
        if self._first is None:
            self._first = (step, now)
            return "?"
        first, then = self._first
        return str(datetime.timedelta(seconds=round((now - then) / (step - first) * (self._total - step))))
