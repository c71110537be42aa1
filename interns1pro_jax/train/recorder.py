"""From the metrics of a step on the device to its record in the files, without making the device wait."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import numpy as np

from interns1pro_jax.checkpoint.errors import CheckpointError
from interns1pro_jax.flops import Work
from interns1pro_jax.train.faults import BadStepError, Guard, Rewind, describe
from interns1pro_jax.train.journal import Journal
from interns1pro_jax.train.metrics import ARRAYS, Writer, write_npz
from interns1pro_jax.train.progress import Progress

Metrics = Mapping[str, Any]
WorkOf = Callable[[Any], Work]  # of the step that a host batch is for: their sizes may differ

DUMPS = "dumps"
_KEPT = 8  # bad steps of a process whose batches are kept


class Recorder:
    """Fetches the metrics of a step while the next one runs, and writes them."""

    def __init__(self, workdir: Path, writers: Sequence[Writer], progress: Progress, guard: Guard, journal: Journal, work: WorkOf | None):
        self._workdir, self._writers, self._progress, self._guard, self._journal = workdir, writers, progress, guard, journal
        self._work = work
        self._pending: tuple[int, Metrics, Any] | None = None
        self._arrays: dict[str, np.ndarray] = {}
        self._tokens_seen = self._dumped = 0
        self._clock: float | None = None

    def start(self, step: int, tokens_seen: int) -> None:
        """Forgets what has been recorded after `step`, be it by an earlier process."""
        self._tokens_seen, self._pending, self._clock = tokens_seen, None, None
        with self._disk():
            for writer in self._writers:
                writer.start(step)

    def close(self) -> None:
        with self._disk():
            for writer in self._writers:
                writer.close()

    def restart_clock(self) -> None:
        """Leaves out of tokens/s the time that passed since the last record."""
        self._clock = time.monotonic()

    def submit(self, step: int, metrics: Metrics, batch: Any) -> None:
        """Takes over the metrics of a step that has just begun, and writes those of the step before."""
        for value in metrics.values():
            value.copy_to_host_async()
        earlier, self._pending = self._pending, (step, metrics, batch)
        if earlier is not None:
            self._record(*earlier)

    def finish(self, evaluate: Callable[[], Mapping[str, float]] | None, host: Mapping[str, float]) -> None:
        """Waits for the last step and writes it, with the evaluation after it and numbers of the host, so that nothing is lost any more."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            self._record(*pending, evaluate, host)
        with self._disk():
            for writer in self._writers:
                writer.flush()
            if self._writers and self._arrays:
                write_npz(self._workdir / ARRAYS, self._arrays)

    def _record(
        self,
        step: int,
        metrics: Metrics,
        batch: Any,
        evaluate: Callable[[], Mapping[str, float]] | None = None,
        host: Mapping[str, float] = MappingProxyType({}),
    ) -> None:
        values = {name: np.asarray(value) for name, value in jax.device_get(dict(metrics)).items()}
        now = time.monotonic()
        self._tokens_seen += int(values["tokens"])
        record = {name: float(value) for name, value in values.items() if value.ndim == 0} | {"tokens_seen": self._tokens_seen, **host}
        if self._clock is not None:
            record["tokens_per_second"] = float(values["tokens"]) / (now - self._clock)
            record |= {} if self._work is None else self._work(batch).metrics(now - self._clock)
        self._clock = now
        self._arrays = {name: value for name, value in values.items() if value.ndim > 0}
        verdict = self._judge(step, values, batch)
        if verdict is None and evaluate is not None:
            record |= {f"eval/{name}": float(value) for name, value in evaluate().items()}
        with self._disk():
            for writer in self._writers:
                writer.write(step, record)
        self._progress.update(step, record)
        if verdict is not None:
            raise verdict

    def _judge(self, step: int, values: Mapping[str, np.ndarray], batch: Any) -> BadStepError | Rewind | None:
        """Keeps the batch of a bad step, and asks the guard what follows; None goes on."""
        if values["applied"]:
            self._guard.good()
            return None
        what = describe(step, values)
        if self._writers and self._dumped < _KEPT:
            self._dumped += 1
            with self._disk():
                what += f", its batch and metrics are in {dump(self._workdir / DUMPS / f'step_{step:08d}', batch, values)}"
        self._journal.write("bad step", step, what=what)
        try:
            self._guard.bad(step, what)
        except (BadStepError, Rewind) as verdict:
            return verdict
        self._progress.say(what)
        return None

    @contextlib.contextmanager
    def _disk(self) -> Iterator[None]:
        """What a failed write means for the user."""
        try:
            yield
        except OSError as error:
            raise CheckpointError(
                f"the records of the run cannot be written in {self._workdir} ({error.strerror}); free some space or make it writable, "
                "then start again to continue from the last checkpoint."
            ) from error


def dump(directory: Path, batch: Any, metrics: Mapping[str, np.ndarray]) -> Path:
    """Writes the arrays of a host batch, and metrics, as `batch.npz` and `metrics.npz`; returns the directory."""
    directory.mkdir(parents=True, exist_ok=True)
    leaves, _ = jax.tree_util.tree_flatten_with_path(batch)
    arrays = {jax.tree_util.keystr(path, simple=True, separator="/") or "batch": np.asarray(x) for path, x in leaves}
    for name, content in (("batch.npz", arrays), ("metrics.npz", dict(metrics))):
        write_npz(directory / name, content)
    return directory
