"""A profiler's trace of chosen steps, for TensorBoard or Perfetto."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax


class Profiler:
    """Traces the steps `first` to `last`, counted from 1, to `directory`; use as a context manager.

    Args:
      steps: first and last, counted from 1; None traces nothing. A run that begins after the first of them traces what is left.
    """

    def __init__(self, steps: tuple[int, int] | None, directory: Path):
        self._steps, self._directory, self._tracing = steps, directory, False

    def __enter__(self) -> Profiler:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def before(self, step: int) -> None:
        """A step is about to be given to the devices."""
        if self._steps is not None and not self._tracing and self._steps[0] <= step <= self._steps[1]:
            jax.profiler.start_trace(self._directory)
            self._tracing = True

    def after(self, step: int, state: Any) -> None:
        """It has been; `state` is what it makes."""
        if self._tracing and self._steps is not None and step >= self._steps[1]:
            jax.block_until_ready(state)
            self._stop()

    def _stop(self) -> None:
        if self._tracing:
            self._tracing = False
            jax.profiler.stop_trace()
