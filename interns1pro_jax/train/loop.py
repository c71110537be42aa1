"""The training loop: feeds batches, records metrics, saves, stops and continues. It knows no model.

Exactness: batch n is a function of n, the step is a pure function, and a checkpoint holds all state, the place in the data and what is
remembered of bad steps. So a run that is killed at any moment and started again gives the losses of a run that was not, to the bit.

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
import numpy as np
from jax.experimental import multihost_utils
from rich.console import Console

from interns1pro_jax.checkpoint.errors import CheckpointError
from interns1pro_jax.checkpoint.manager import CheckpointManager, check_writable
from interns1pro_jax.config import ConfigError
from interns1pro_jax.train.faults import STOP_IF_NOT_FINITE, BadStepError, FaultPolicy, Guard, Rewind
from interns1pro_jax.train.feed import Batches, DataPlace, Feed, place_batch
from interns1pro_jax.train.journal import SAVE, Journal
from interns1pro_jax.train.metrics import JsonLines, TensorBoard, Writer
from interns1pro_jax.train.profile import Profiler
from interns1pro_jax.train.progress import Progress
from interns1pro_jax.train.recorder import DUMPS, Metrics, Recorder, WorkOf
from interns1pro_jax.train.state import TrainState, abstract_state, count_tokens
from interns1pro_jax.train.watchdog import INTERRUPTED, Watchdog

StepFunction = Callable[[TrainState, Any], tuple[TrainState, Metrics]]
Evaluate = Callable[[TrainState], Mapping[str, float]]

PROFILE = "profile"


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
      faults: what becomes of steps that go wrong; that of the step.
      hang_seconds: a step, evaluation or save that takes longer ends the process, to be started again; None waits for ever. The first
        step and the first with a batch of another size, which compile, may take any time; evaluations and saves must fit.
      profile_steps: the first and last step, counted from 1, of a profiler's trace in `WORKDIR/profile`.
      prefetch: batches prepared ahead.
    """

    steps: int
    log_every: int = 10
    evaluate_every: int | None = None
    checkpoint_every: int | None = None
    checkpoint_seconds: float | None = None
    faults: FaultPolicy = STOP_IF_NOT_FINITE
    hang_seconds: float | None = None
    profile_steps: tuple[int, int] | None = None
    prefetch: int = 2

    def __post_init__(self) -> None:
        names = ("steps", "log_every", "evaluate_every", "checkpoint_every", "checkpoint_seconds", "hang_seconds", "prefetch")
        for name in names:
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigError(f"LoopConfig.{name}={value!r} must be positive.")
        if self.profile_steps is not None and not 1 <= self.profile_steps[0] <= self.profile_steps[1] <= self.steps:
            raise ConfigError(
                f"LoopConfig.profile_steps={tuple(self.profile_steps)} must be a first and a last step within 1..{self.steps}; None traces "
                "nothing."
            )
        if self.checkpoint_seconds is not None and jax.process_count() > 1:
            raise ConfigError(
                f"LoopConfig.checkpoint_seconds={self.checkpoint_seconds!r} works with one process only, since the clocks of "
                f"{jax.process_count()} differ; use checkpoint_every."
            )


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
    journal: Journal | None = None,
    work: WorkOf | None = None,
) -> TrainState:
    """Trains until `config.steps` updates are done in all, from the latest checkpoint if there is one.

    Args:
      state: the state to begin with; consumed. Where a checkpoint exists, only its shapes and shardings matter.
      step_fn: `(state, batch) -> (state, metrics)`, for instance of `train.step.make_train_step`. Metrics are scalars (written
        at every step) and small arrays (the last ones are kept in `arrays.npz`), with at least `loss`, `tokens`, `grad_norm`,
        `learning_rate` and `applied`.
      batches: batch n as `batches[n]`; a pytree of NumPy arrays.
      data: the place of the batches, where it takes more than the step to find it again.
      evaluate: scalars of the state, recorded as `eval/...`.
      place: puts a host batch on the mesh.
      writers: destinations of scalars; they are used by the first process only.
      journal: of `workdir`, begun when the process began.
      work: of the step of a host batch, for its FLOP/s and MFU in the records.

    Raises:
      Interrupted: after SIGTERM or SIGINT; the state has been saved. A second signal ends the process at once.
      BadStepError: see `FaultPolicy`. Nothing is saved after the step before the bad ones.
      CheckpointError: the working directory cannot be written, a save failed, the checkpoint does not fit or
        cannot be read, or there are only damaged ones.
      ConfigError: the checkpoint is beyond `config.steps`.
    """
    main = jax.process_index() == 0
    if main:
        check_writable(workdir)
    journal = journal or Journal(workdir, main)
    console = console or Console(quiet=not main)
    guard = Guard(config.faults)
    abstract = abstract_state(state)
    restored = checkpoints.latest_step is not None
    if restored:
        with journal.clock("initialise"):
            state, damaged = _restore(state, abstract, checkpoints, None, data, guard)
    else:
        checkpoints.check_beginning()
        damaged = {}
    start = int(state.step)
    if start > config.steps:
        raise ConfigError(
            f"the checkpoint in {checkpoints.directory} is of step {start}, but LoopConfig.steps={config.steps}; train for at "
            f"least {start} steps, or choose another workdir."
        )
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(_StopSignal())
        watchdog = stack.enter_context(Watchdog(config.hang_seconds, workdir / DUMPS, jax.process_index()))
        progress = stack.enter_context(Progress(config.steps, start, config.log_every, console))
        recorder = Recorder(workdir, writers(workdir) if main else (), progress, guard, journal, work)
        stack.callback(recorder.close)
        recorder.start(start, count_tokens(state))
        journal.start(start)
        for what in damaged.values():
            journal.write("damaged checkpoint", start, what=what)
            progress.say(f"WARNING: {what}")
        if restored:
            progress.say(f"continuing from the checkpoint of step {start} in {checkpoints.directory}")
        profiler = stack.enter_context(Profiler(config.profile_steps, workdir / PROFILE))
        run = _Run(
            step_fn, batches, config, checkpoints, data, evaluate, place, guard, journal, recorder, progress, watchdog, profiler, stop
        )
        while True:
            try:
                return run.go(state)
            except Rewind as rewind:
                state = run.rewind(rewind, abstract)


@dataclasses.dataclass
class _Run:
    """What a run works with from step to step."""

    step_fn: StepFunction
    batches: Batches
    config: LoopConfig
    checkpoints: CheckpointManager
    data: DataPlace | None
    evaluate: Evaluate | None
    place: Callable[[Any], Any]
    guard: Guard
    journal: Journal
    recorder: Recorder
    progress: Progress
    watchdog: Watchdog
    profiler: Profiler
    stop: _StopSignal

    def __post_init__(self) -> None:
        self._compiled: set[Any] = set()  # kinds of batches for which there is a program
        self._saved_at = time.monotonic()
        self._seconds_at: dict[int, dict[str, float]] = {}  # of the clock at each save
        self._state: TrainState | None = None  # the newest one, given up by a rewind

    def go(self, state: TrainState) -> TrainState:
        """Trains from `state` to the end."""
        config, clock, start = self.config, self.journal.clock, int(state.step)
        skipped = self.guard.skipped_batches
        with Feed(self.batches, range(start + skipped, config.steps + skipped), self.place, config.prefetch) as feed:
            for index, host_batch, batch in clock.waiting("data", feed):
                done = index - skipped + 1
                self.profiler.before(done)
                if compiles := (kind := _kind(host_batch)) not in self._compiled:
                    self.watchdog.pause()
                with clock("compile" if compiles else "step"):
                    state, metrics = self.step_fn(state, batch)
                self._state = state
                self.profiler.after(done, metrics)
                with clock("step"):
                    self.recorder.submit(done, metrics, host_batch)
                if not compiles:
                    self.watchdog.beat(f"step {done + 1}")
                self._compiled.add(kind)
                self._after(done, state)
        with clock("save"):
            self.checkpoints.wait()
        self.journal.write("end", config.steps)
        return state

    def _after(self, done: int, state: TrainState) -> None:
        """Evaluates, saves and stops where it is time to."""
        config, clock = self.config, self.journal.clock
        stopping, last = self.stop.requested(done), done == config.steps
        evaluating = self.evaluate is not None and (last or _divides(config.evaluate_every, done))
        saving = last or stopping or _divides(config.checkpoint_every, done)
        if config.checkpoint_seconds is not None:
            saving = saving or time.monotonic() - self._saved_at >= config.checkpoint_seconds
        if evaluating or saving:
            # A record is on disk before the checkpoint of its step, so that a continued run has the records of all steps.
            with clock("step"):
                counts = {} if self.data is None else self.data.metrics(done + self.guard.skipped_batches)
                self.recorder.finish(functools.partial(self._evaluate, state) if evaluating else None, counts)
        if saving:
            self._save(done, state)
        if evaluating or saving:
            self.recorder.restart_clock()
            self.watchdog.beat(f"step {done + 1}")
        self.checkpoints.check()
        if stopping and not last:
            with clock("save"):
                self.checkpoints.wait()
            self.journal.write("stopped", done, by=self.stop.name)
            self.progress.say(f"stopped by {self.stop.name}; step {done} is saved in {self.checkpoints.directory}: start again to continue")
            raise Interrupted

    def _evaluate(self, state: TrainState) -> Mapping[str, float]:
        assert self.evaluate is not None
        self.watchdog.beat("an evaluation")
        with self.journal.clock("evaluate"):
            return self.evaluate(state)

    def _save(self, done: int, state: TrainState) -> None:
        self.watchdog.beat(f"the save of step {done}")
        extras: dict[str, Any] = {"faults": self.guard.state()}
        if self.data is not None:
            extras["data"] = self.data.state(done + self.guard.skipped_batches)
        with self.journal.clock("save"):
            self.checkpoints.save(done, state, extras)
        self._saved_at = time.monotonic()
        self._seconds_at[done] = self.journal.clock.seconds
        self.journal.write(SAVE, done)

    def rewind(self, rewind: Rewind, abstract: TrainState) -> TrainState:
        """The state of the newest checkpoint from before the bad steps; the batches after it up to the last bad one will not be used.

        Raises:
          BadStepError: there is no such checkpoint.
        """
        clock = self.journal.clock
        self.watchdog.beat("going back to a checkpoint")
        with clock("rewound"):
            self.checkpoints.wait()
            steps = [step for step in self.checkpoints.steps if step <= rewind.before]
            if not steps:
                raise BadStepError(
                    f"{rewind}. There is no checkpoint of step {rewind.before} or earlier in {self.checkpoints.directory} to go back to "
                    f"(there are {self.checkpoints.steps or 'none'}); save more often, keep more checkpoints, or leave out that data."
                ) from rewind
            offset, rewinds = self.guard.skipped_batches, self.guard.rewinds
            state, _ = _restore(self._state, abstract, self.checkpoints, steps[-1], self.data, self.guard)
            self.guard.rewound(steps[-1], rewind.after, offset, rewinds)
            self.checkpoints.discard_after(steps[-1])
            self.recorder.start(steps[-1], count_tokens(state))
            self.progress.restart(steps[-1])
        clock.move(("data", "step", "save", "evaluate"), "rewound", self._seconds_at.get(steps[-1], {}))
        self.journal.write("rewind", steps[-1], after=rewind.after, why=str(rewind))
        self.progress.say(
            f"{rewind}: back to the checkpoint of step {steps[-1]}, and on with the batches after that of step {rewind.after}; "
            f"{self.guard.skipped_batches} batches have been left out in all"
        )
        return state


def _restore(
    state: TrainState | None, abstract: TrainState, checkpoints: CheckpointManager, step: int | None, data: DataPlace | None, guard: Guard
) -> tuple[TrainState, Mapping[int, str]]:
    """A checkpoint in the shardings of `abstract`, and newer ones that are damaged. The arrays of `state` are given up first: there may
    be no room for both."""
    for leaf in jax.tree.leaves(state):
        if isinstance(leaf, jax.Array) and not leaf.is_deleted():
            leaf.delete()
    restored = checkpoints.restore(abstract, step)
    guard.restore(restored.extras["faults"])
    if data is not None:
        if "data" not in restored.extras:
            raise CheckpointError(
                f"the checkpoint of step {restored.step} in {checkpoints.directory} has no place in the data, so a run without one saved "
                "it; choose another workdir."
            )
        data.restore(restored.extras["data"])
    return restored.state, restored.damaged


def _kind(batch: Any) -> Any:
    """What a compiled step can be used for: structure, shapes and dtypes."""
    leaves, structure = jax.tree.flatten(batch)
    return structure, *((np.shape(x), np.result_type(x)) for x in leaves)


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
