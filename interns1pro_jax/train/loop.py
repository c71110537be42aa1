"""The training loop: feeds batches, records metrics, saves, stops and continues. It knows no model.

Exactness: batch n is a function of n, the step is a pure function, and a checkpoint holds all state and the place in the data.
So a run that is killed at any moment and started again gives the losses of a run that was not, to the bit.

Speed: batches are prepared by a thread, and the metrics of a step are fetched while the next one runs. Only an evaluation and
the start of a save wait for the device.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils
from rich.console import Console

from interns1pro_jax.checkpoint.errors import CheckpointError
from interns1pro_jax.checkpoint.manager import CheckpointManager, check_writable
from interns1pro_jax.config import ConfigError
from interns1pro_jax.train.feed import Batches, DataPlace, Feed, place_batch
from interns1pro_jax.train.metrics import JsonLines, TensorBoard, Writer
from interns1pro_jax.train.progress import Progress
from interns1pro_jax.train.recorder import Metrics, Recorder
from interns1pro_jax.train.state import TrainState, abstract_state, count_tokens

StepFunction = Callable[[TrainState, Any], tuple[TrainState, Metrics]]
Evaluate = Callable[[TrainState], Mapping[str, float]]

INTERRUPTED = 75  # EX_TEMPFAIL of sysexits.h: start the same command again


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """How long to train, and what happens on the way.

    Attributes:
      steps: updates of the whole run, counted from its very beginning.
      log_every: steps between lines on the console (every step is written to the files).
      evaluate_every: steps between evaluations; None evaluates only at the end.
      checkpoint_every: steps between checkpoints; None saves only at the end and when told to stop.
      checkpoint_seconds: also save when so many seconds have passed since the last save; for one process only, since the
        clocks of several differ.
      skip_nonfinite: how many steps in a row with a loss or gradient that is not finite are skipped; one more stops the run.
        0 stops at the first. The update of such a step is never applied.
      prefetch: batches prepared ahead.
    """

    steps: int
    log_every: int = 10
    evaluate_every: int | None = None
    checkpoint_every: int | None = None
    checkpoint_seconds: float | None = None
    skip_nonfinite: int = 0
    prefetch: int = 2

    def __post_init__(self) -> None:
        for name in ("steps", "log_every", "evaluate_every", "checkpoint_every", "checkpoint_seconds", "prefetch"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigError(f"LoopConfig.{name}={value!r} must be positive.")
        if self.skip_nonfinite < 0:
            raise ConfigError(
                f"LoopConfig.skip_nonfinite={self.skip_nonfinite} must not be negative; 0 stops at the first non-finite step."
            )
        if self.checkpoint_seconds is not None and jax.process_count() > 1:
            raise ConfigError("LoopConfig.checkpoint_seconds works with one process only; use checkpoint_every.")


class Interrupted(SystemExit):
    """The run was told to stop and has saved; ends the process with code `INTERRUPTED` unless caught."""

    def __init__(self) -> None:
        super().__init__(INTERRUPTED)


def default_writers(workdir: Path) -> tuple[Writer, ...]:
    """JSON lines and TensorBoard in `workdir`."""
    return JsonLines(workdir), TensorBoard(workdir)


def train(
    state: TrainState,
    step_fn: StepFunction,
    batches: Batches,
    config: LoopConfig,
    *,
    workdir: Path,
    checkpoints: CheckpointManager,
    data: DataPlace | None = None,
    evaluate: Evaluate | None = None,
    place: Callable[[Any], Any] = place_batch,
    writers: Callable[[Path], Sequence[Writer]] = default_writers,
    console: Console | None = None,
) -> TrainState:
    """Trains until `config.steps` updates are done in all, from the latest checkpoint if there is one.

    Args:
      state: the state to begin with; consumed. Where a checkpoint exists, only its shapes and shardings matter.
      step_fn: `(state, batch) -> (state, metrics)`, for instance of `train.step.make_train_step`. Metrics are scalars (written
        at every step) and small arrays (the last ones are kept in `arrays.npz`), with at least `loss`, `tokens`, `grad_norm`,
        `learning_rate` and `finite`.
      batches: batch n as `batches[n]`; a pytree of NumPy arrays.
      data: the place of the batches, where it takes more than the step to find it again.
      evaluate: scalars of the state, recorded as `eval/...`.
      place: puts a host batch on the mesh.
      writers: destinations of scalars; they are used by the first process only.

    Raises:
      Interrupted: after SIGTERM or SIGINT; the state has been saved. A second signal ends the process at once.
      NonFiniteError: see `LoopConfig.skip_nonfinite`. Nothing is saved after the step before.
      CheckpointError: the working directory cannot be written, a save failed, or the checkpoint does not fit.
      ConfigError: the checkpoint is beyond `config.steps`.
    """
    main = jax.process_index() == 0
    if main:
        check_writable(workdir)
    console = console or Console(quiet=not main)
    restored = checkpoints.latest_step is not None
    if restored:
        state, extras = _restore(state, checkpoints)
        if data is not None:
            if "data" not in extras:
                raise CheckpointError(f"the checkpoint in {checkpoints.directory} has no place in the data; choose another workdir.")
            data.restore(extras["data"])
    start = int(state.step)
    if start > config.steps:
        raise ConfigError(
            f"the checkpoint in {checkpoints.directory} is of step {start}, but steps={config.steps}; train for at least {start} steps, or "
            "choose another workdir."
        )
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(_StopSignal())
        progress = stack.enter_context(Progress(config.steps, start, config.log_every, console))
        recorder = Recorder(workdir, writers(workdir) if main else (), progress, config.skip_nonfinite)
        stack.callback(recorder.close)
        recorder.start(start, count_tokens(state))
        if restored:
            progress.say(f"continuing from the checkpoint of step {start} in {checkpoints.directory}")
        saved_at = time.monotonic()
        for index, host_batch, batch in stack.enter_context(Feed(batches, range(start, config.steps), place, config.prefetch)):
            state, metrics = step_fn(state, batch)
            done = index + 1
            recorder.submit(done, metrics, host_batch, data.metrics() if data is not None else {})
            stopping, last = stop.requested(done), done == config.steps
            evaluating = evaluate is not None and (last or _divides(config.evaluate_every, done))
            saving = last or stopping or _divides(config.checkpoint_every, done)
            if config.checkpoint_seconds is not None:
                saving = saving or time.monotonic() - saved_at >= config.checkpoint_seconds
            if evaluating or saving:
                # A record is on disk before the checkpoint of its step, so that a continued run has the records of all steps.
                recorder.finish(functools.partial(evaluate, state) if evaluating and evaluate else None)
            if saving:
                checkpoints.save(done, state, {"data": data.state(done)} if data is not None else None)
                saved_at = time.monotonic()
            if evaluating or saving:
                recorder.restart_clock()
            checkpoints.check()
            if stopping and not last:
                checkpoints.wait()
                progress.say(f"stopped by {stop.name}; step {done} is saved in {checkpoints.directory}: start again to continue")
                raise Interrupted
        checkpoints.wait()
    return state


def _restore(state: TrainState, checkpoints: CheckpointManager) -> tuple[TrainState, Mapping[str, Any]]:
    """The latest checkpoint in the shardings of `state`, and the JSON beside it. The arrays of `state` are given up first: there may
    be no room for both."""
    abstract = abstract_state(state)
    for leaf in jax.tree.leaves(state):
        if isinstance(leaf, jax.Array):
            leaf.delete()
    restored = checkpoints.restore(abstract)
    return restored.state, restored.extras


def _divides(every: int | None, step: int) -> bool:
    return every is not None and step % every == 0


class _StopSignal:
    """Remembers SIGTERM and SIGINT while it is entered, in the main thread; a second one has its usual effect.

    With several processes the signal reaches them at different steps; JAX's preemption service finds the one they all stop at.
    """

    def __init__(self) -> None:
        self.name = "SIGTERM"
        self._requested = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> _StopSignal:
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def requested(self, step: int) -> bool:
        """Whether to stop after `step`; the same for all processes."""
        return self._requested if jax.process_count() == 1 else multihost_utils.reached_preemption_sync_point(step)

    def _handle(self, number: int, _: Any) -> None:
        self.name, self._requested = signal.Signals(number).name, True
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
