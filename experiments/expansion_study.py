"""Does expert expansion work, and which way? A small model is trained, expanded by each method, and trained on."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import functools
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from rich.console import Console

from experiments import expansion_report
from experiments.expand import COUNTS, GROWN, measure
from experiments.expansion_report import BASE, INITIAL, UNEXPANDED
from interns1pro_jax.checkpoint.destination import is_export
from interns1pro_jax.checkpoint.hf_export import export_model
from interns1pro_jax.checkpoint.hf_import import load_model
from interns1pro_jax.checkpoint.manager import CheckpointManager
from interns1pro_jax.checkpoint.safetensors_io import open_checkpoint
from interns1pro_jax.checkpoint.safetensors_writer import write_json
from interns1pro_jax.config import ConfigError, ModelConfig
from interns1pro_jax.data.corpus import Corpus
from interns1pro_jax.data.validation import PackedExamples
from interns1pro_jax.expansion.assignment import CALIBRATED, ExpansionConfig, assign, separation
from interns1pro_jax.expansion.checkpoint import expand_checkpoint, fingerprint, moe_layers
from interns1pro_jax.expansion.differentiation import copies_of, copy_statistics, use_of_experts
from interns1pro_jax.expansion.manifest import Calibration, Manifest
from interns1pro_jax.expansion.routing_counts import RoutingCounts
from interns1pro_jax.models.inputs import Batch
from interns1pro_jax.models.interns1pro import InternS1Pro, create_model
from interns1pro_jax.ops.losses import cross_entropy
from interns1pro_jax.optim.optimizer import OptimizerConfig, make_optimizer
from interns1pro_jax.sharding import MeshConfig
from interns1pro_jax.train.feed import Batches, place_batch
from interns1pro_jax.train.loop import LoopConfig
from interns1pro_jax.train.loop import train as train_loop
from interns1pro_jax.train.metrics import JsonLines
from interns1pro_jax.train.state import TrainState, init_state
from interns1pro_jax.train.step import make_train_step

RELEASED = "released"
_DONE, _LOCK = "done", "lock"
_PAUSE = 1.0  # seconds until a process without work looks again


def expansion_study(
    workdir: Path,
    *,
    model: ModelConfig,
    mesh: MeshConfig,
    corpus: Corpus,
    optimizer: OptimizerConfig,
    base_loop: LoopConfig,
    base_schedule: optax.Schedule,
    loop: LoopConfig,
    schedule: optax.Schedule,
    expansion: ExpansionConfig,
    arms: Mapping[str, Sequence[Any]],
    seeds: Sequence[int] = (0, 1, 2),
    calibration_batches: int = 64,
    compile_only: bool = False,
) -> None:
    """Trains `model`, expands it by each of `arms`, and trains each result and the unexpanded model on with the same data and schedule, for
    each of `seeds`. After each of these runs `workdir` gets what `expansion_report.write` says, of those there are.

    The same command started several times with one `workdir` shares the runs among its processes: each takes one that no other has. A study
    that is interrupted goes on where it was. The expansion is what users run, from one checkpoint in the released layout to another.

    Args:
      expansion: what the arms share.
      arms: name -> (method, noise).
      seeds: of a model's initial weights, its data and their order, cuts and noise.
    """
    if compile_only:
        raise ConfigError("a study has no step to compile; leave out --compile_only.")
    with jax.set_mesh(mesh.make()):
        study = _Study(workdir, model, corpus, optimizer, Console())

        def train_base(seed: int) -> None:
            study.train_base(seed, base_loop, base_schedule)
            study.calibrate(seed, calibration_batches, expansion)

        def train_on(seed: int, name: str) -> None:
            method, noise = arms.get(name, (None, 0.0))
            arm = None if method is None else dataclasses.replace(expansion, method=method, noise=noise, seed=seed)
            batches = _From(study.batches(seed), base_loop.steps)
            study.train_on(study.home(seed, name), arm, study.calibrate(seed, calibration_batches, expansion), batches, loop, schedule)

        bases = {seed: Run(study.home(seed, BASE), functools.partial(train_base, seed)) for seed in seeds}
        after = [
            Run(study.home(seed, name), functools.partial(train_on, seed, name), bases[seed])
            for name in (UNEXPANDED, *arms)
            for seed in seeds
        ]
        share([*bases.values(), *after], lambda: expansion_report.write(workdir))


@dataclasses.dataclass(frozen=True)
class Run:
    """A part of a study: where its files are, what does it, and the run that must be done before."""

    home: Path
    do: Callable[[], None]
    after: Run | None = None

    @property
    def is_done(self) -> bool:
        return (self.home / _DONE).exists()

    @property
    def is_ready(self) -> bool:
        return self.after is None or self.after.is_done


def share(runs: Sequence[Run], report: Callable[[], object]) -> None:
    """Does all runs that no other process does, `report` after each, and returns when all are done, whoever did them."""
    while left := [run for run in runs if not run.is_done]:
        for run in filter(lambda run: run.is_ready, left):
            with _locked(run.home, wait=False) as mine:
                if not mine or run.is_done:
                    continue
                run.do()
                (run.home / _DONE).touch()
            with _locked(run.home.parents[1], wait=True):
                report()
            break
        else:
            time.sleep(_PAUSE)


@contextlib.contextmanager
def _locked(directory: Path, wait: bool) -> Iterator[bool]:
    """Whether this process has the directory for itself; the lock ends with it, however it ends."""
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / _LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True


@dataclasses.dataclass(frozen=True)
class _From:
    """The batches after the first `start`."""

    batches: Batches
    start: int

    def __getitem__(self, step: int) -> Batch:
        return self.batches[self.start + step]


class _Study:
    def __init__(self, workdir: Path, model: ModelConfig, corpus: Corpus, optimizer: OptimizerConfig, console: Console):
        self.workdir, self.model, self.corpus, self.optimizer, self.console = workdir, model, corpus, optimizer, console
        examples = list(itertools.chain.from_iterable(corpus.held_out_examples().values()))
        held_out = PackedExamples(examples, model, corpus.pipeline).in_order()
        self.held_out = [place_batch(batch) for batch, _ in itertools.islice(held_out, corpus.evaluation_batches)]
        self.compiled: dict[Any, Callable[..., Any]] = {}

    def home(self, seed: int, name: str) -> Path:
        return self.workdir / f"seed_{seed}" / name

    def batches(self, seed: int) -> Batches:
        pipeline = dataclasses.replace(self.corpus.pipeline, seed=seed)
        corpus = dataclasses.replace(self.corpus, pipeline=pipeline)
        return corpus.batches(self.model, corpus.load_tokenizer(), corpus.open_sources())

    def once(self, key: Any, make: Callable[[], Callable[..., Any]]) -> Callable[..., Any]:
        """Compiled functions are shared by seeds and arms."""
        if key not in self.compiled:
            self.compiled[key] = make()
        return self.compiled[key]

    def train_base(self, seed: int, loop: LoopConfig, schedule: optax.Schedule) -> None:
        released = self.home(seed, BASE) / RELEASED
        if is_export(released):
            return
        self.console.rule(f"seed {seed}: the model before")
        network = create_model(self.model, seed)
        graphdef = nnx.graphdef(network)
        state = self._train(self.home(seed, BASE), network, self.batches(seed), loop, schedule, None)
        export_model(nnx.merge(graphdef, state.params, state.buffers), self.model, released, identity=str(released))

    def calibrate(self, seed: int, batches: int, expansion: ExpansionConfig) -> RoutingCounts:
        released, path = self.home(seed, BASE) / RELEASED, self.home(seed, BASE) / COUNTS
        identity = fingerprint(open_checkpoint(released), self.model)
        depth = expansion.depth(self.model)
        if not path.exists():
            measure(released, self.model, self.corpus, batches, depth, self.console).save(path, identity)
        return RoutingCounts.load(path, identity, depth)

    def train_on(
        self, home: Path, arm: ExpansionConfig | None, counts: RoutingCounts, batches: Any, loop: LoopConfig, schedule: optax.Schedule
    ) -> None:
        """One arm: the model before the first step is measured into `initial.json`, the others into `metrics.jsonl`."""
        self.console.rule(f"{home.parent.name}: {home.name}")
        copies, apart = None, float("nan")
        directory, config = home.parent / BASE / RELEASED, self.model
        if arm is not None:
            text, checkpoint = self.model.text, open_checkpoint(directory)
            slots_LGS = assign(arm, text.num_moe_layers, text.num_experts, counts)
            apart = float(separation(counts, slots_LGS).mean())
            calibration = Calibration(counts.fingerprint, counts.tokens) if arm.method in CALIBRATED else None
            manifest = Manifest(fingerprint(checkpoint, self.model), arm, calibration, moe_layers(self.model), slots_LGS)
            directory, config = home / GROWN, arm.target(self.model)
            if not is_export(directory):
                expand_checkpoint(checkpoint, self.model, manifest, directory)
            copies = np.stack([copies_of(slots_GS, arm.growth) for slots_GS in slots_LGS])
        network = load_model(directory, config)
        if not (home / INITIAL).exists():
            initial = self._evaluate(network, copies)
            write_json(home / INITIAL, initial | {"separation": apart})
            self.console.print(f"right after: {initial}", highlight=False)
        self._train(home, network, batches, loop, schedule, copies)

    def _train(
        self, home: Path, network: InternS1Pro, batches: Any, loop: LoopConfig, schedule: optax.Schedule, copies: np.ndarray | None
    ) -> TrainState:
        optim = make_optimizer(self.optimizer, schedule)
        graphdef, state = init_state(network, optim, loop.faults)
        text = network.config.text
        step_fn = self.once(("step", text, id(schedule)), lambda: make_train_step(graphdef, text, optim, faults=loop.faults))

        def evaluate(state: TrainState) -> dict[str, float]:
            return self._evaluate(nnx.merge(graphdef, state.params, state.buffers), copies)

        with CheckpointManager(home / "checkpoints", {"model": dataclasses.asdict(network.config)}, keep_last=1) as checkpoints:
            return train_loop(
                state,
                step_fn,
                batches,
                loop,
                workdir=home,
                checkpoints=checkpoints,
                evaluate=evaluate,
                writers=lambda directory: (JsonLines(directory),),
                console=self.console,
            )

    def _evaluate(self, network: InternS1Pro, copies_LEk: np.ndarray | None) -> dict[str, float]:
        """Loss on all held-out text, use of the experts, and how far copies are apart."""
        text = network.config.text
        graphdef, weights = nnx.split(network)

        def sums(weights: Any, batch: Batch) -> tuple[jax.Array, ...]:
            model = nnx.merge(graphdef, weights)
            out = model(batch.inputs)
            assert out.stats is not None
            return *cross_entropy(out.hidden_BTD, model.text.head_DV, batch.labels), out.stats.load_E.sum(1)

        run = self.once(("evaluate", text), lambda: jax.jit(sums))
        total: Any = functools.reduce(lambda a, b: jax.tree.map(jnp.add, a, b), (run(weights, batch) for batch in self.held_out))
        loss, labels, load_LE = (np.asarray(x) for x in total)
        result = {"loss": float(loss / labels)} | use_of_experts(load_LE, text.router_n_groups, devices=8)
        if copies_LEk is not None:
            compare = self.once(("copies", text), lambda: jax.jit(lambda w, i, c: copy_statistics(nnx.merge(graphdef, w), i, c)))
            found = compare(weights, self.held_out[0].inputs, jnp.asarray(copies_LEk))
            result |= {key: float(value) for key, value in found.items()}
        return result
