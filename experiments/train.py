"""Trains the model on prepared data, from the recipe to the report."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import gin
import jax
import numpy as np
import optax
from flax import nnx
from jax.experimental import multihost_utils
from rich.console import Console

from experiments.compile_only import compile_step, write
from experiments.manifest import run_manifest
from interns1pro_jax import sharding
from interns1pro_jax.checkpoint.hf_import import load_model
from interns1pro_jax.checkpoint.manager import CheckpointManager
from interns1pro_jax.checkpoint.weights import read_config, read_weights
from interns1pro_jax.config import ConfigError, ModelConfig
from interns1pro_jax.data.corpus import Corpus
from interns1pro_jax.data.examples import Example
from interns1pro_jax.data.unigram import unigram_loss
from interns1pro_jax.data.validation import MEDIA, PackedExamples, Prompts, ablation, prompts
from interns1pro_jax.flops import Work
from interns1pro_jax.infer.generate import generate
from interns1pro_jax.infer.sampling import GREEDY, Sampling
from interns1pro_jax.layers.lora import trained_kind
from interns1pro_jax.models.inputs import Batch
from interns1pro_jax.models.interns1pro import InternS1Pro, create_model
from interns1pro_jax.optim.batch_warmup import CONSTANT_BATCH, BatchWarmup, GrowingBatches
from interns1pro_jax.optim.optimizer import OptimizerConfig, make_optimizer
from interns1pro_jax.sharding import MeshConfig
from interns1pro_jax.tokenizer import base
from interns1pro_jax.tokenizer.base import Tokenizer
from interns1pro_jax.train.evaluation import HeldOutLoss
from interns1pro_jax.train.feed import local_rows, place_batch
from interns1pro_jax.train.journal import Journal
from interns1pro_jax.train.loop import LoopConfig, default_writers
from interns1pro_jax.train.loop import train as train_loop
from interns1pro_jax.train.metrics import Writer, replace
from interns1pro_jax.train.objective import MEAN_OVER_TOKENS, Metrics, Objective
from interns1pro_jax.train.report import (
    OPERATIVE_CONFIG,
    CaptionLoss,
    HeldOut,
    ReportData,
    Sample,
    read_samples,
    save_samples,
    write_report,
)
from interns1pro_jax.train.state import TrainState, init_state
from interns1pro_jax.train.step import StepConfig, make_train_step


def train(
    workdir: Path,
    *,
    model: ModelConfig,
    mesh: MeshConfig,
    corpus: Corpus,
    optimizer: OptimizerConfig,
    schedule: optax.Schedule,
    loop: LoopConfig,
    step: StepConfig,
    objective: Objective = MEAN_OVER_TOKENS,
    batch_warmup: BatchWarmup = CONSTANT_BATCH,
    compiler_options: Mapping[str, str] = MappingProxyType({}),
    weights: str | None = None,
    seed: int = 0,
    keep_checkpoints: int = 2,
    sampling: Sampling = GREEDY,
    sample_tokens: int = 40,
    title: str = "Training run",
    compile_only: bool = False,
) -> None:
    """Trains `model` on `corpus`, evaluates it on held-out documents and writes `report.md` to `workdir`.

    The model's vocabulary and placeholder ids are those of the corpus's tokenizer. A run that was stopped or killed goes on from
    its last checkpoint when it is started again with the same workdir. It begins with random weights, or with those of `weights`: a
    directory in the released layout, or of another run's checkpoints. All that the report needs of the data is made before training
    begins. With `compile_only` it compiles the step for the mesh's topology instead, for which it needs neither data nor TPU, and writes
    what it needs (`experiments.compile_only`); a program that the workdir holds already is not compiled again.

    Raises:
      ConfigError: the model does not fit the data (vocabulary, or no tower for a medium of the data) or the weights.
      DataError: the data is absent or damaged.
      CheckpointError: the workdir holds the checkpoints of another run, or cannot be written.
      BadStepError: see `FaultPolicy`.
    """
    if compile_only:
        needs, text = compile_step(
            model=model,
            mesh=mesh,
            pipeline=corpus.pipeline,
            optimizer=optimizer,
            schedule=schedule,
            step=step,
            objective=objective,
            compiler_options=compiler_options,
            title=title,
            keep=workdir / "step.json.gz",
        )
        write(needs, text, workdir, Console())
        return
    journal = Journal(workdir, jax.process_index() == 0)
    devices = mesh.make()
    console = Console(quiet=jax.process_index() != 0)
    tokenizer = corpus.load_tokenizer()
    token_ids: dict[str, Any] = {**base.model_token_ids(tokenizer)}
    model = dataclasses.replace(model, **token_ids)
    sources = corpus.open_sources()
    with jax.set_mesh(devices):
        rows = local_rows(corpus.pipeline.batch_size)
        plan = batch_warmup.plan(corpus.pipeline.batch_size * corpus.pipeline.row.tokens)
        pipeline = corpus.batches(model, tokenizer, sources, sharding.shards("batch"), rows)
        training = GrowingBatches(pipeline, plan, corpus.pipeline.batch_size // sharding.shards("batch"))
    documents = corpus.held_out_examples()
    examples = [example for examples in documents.values() for example in examples]
    held_out = PackedExamples(examples, model, corpus.pipeline)
    label_counts = np.zeros(model.text.vocab_size, np.int64)
    for source in sources:
        label_counts[: len(source.label_counts)] += source.label_counts
    unigram = unigram_loss(label_counts, held_out.label_counts)
    for source in sources:
        manifest = source.manifest
        console.print(f"{source.directory}: {manifest.documents:,} {manifest.kind}, {manifest.tokens:,} tokens", highlight=False)
    console.print(f"held out: {len(held_out.examples):,} documents in {len(held_out.plan):,} rows; {len(held_out.left_out)} too large")
    ablations = {medium: found for medium in MEDIA if (found := ablation(held_out.examples, model, corpus.pipeline, medium))}

    with jax.set_mesh(devices):
        optim = make_optimizer(optimizer, schedule, trained_kind(model))
        network = create_model(model, seed)
        graphdef, state = init_state(network, optim, loop.faults)
        parameters = sum(x.size for x in jax.tree.leaves(state.params))
        console.print(f"{parameters:,} parameters on the mesh {dict(devices.shape)}; unigram loss of the held-out text {unigram:.3f}")
        options = compiler_options if jax.default_backend() == "tpu" else None
        evaluation = HeldOutLoss(graphdef, documents, model, corpus.pipeline, corpus.evaluation_batches)

        def writers(workdir: Path) -> Sequence[Writer]:
            # Asked for once the checkpoint, if there is one, has been found to be of this run: a killed run has its configuration,
            # and one that is refused leaves that of its predecessor.
            replace(workdir / OPERATIVE_CONFIG, gin.operative_config_str().encode())
            return default_writers(workdir)

        steps = {
            factor: make_train_step(
                graphdef,
                model.text,
                optim,
                dataclasses.replace(step, microbatches=step.microbatches * factor),
                loop.faults,
                objective,
                compiler_options=options,
            )
            for factor in plan.factors
        }

        def factor_of(batch: Batch) -> int:
            return len(batch.labels) // len(rows)

        def place(batch: Batch) -> Batch:
            factor = factor_of(batch)
            return place_batch(batch, training.rows(rows, factor), factor * corpus.pipeline.batch_size)

        def work(batch: Batch) -> Work:
            size = factor_of(batch) * corpus.pipeline.batch_size
            return Work.of_step(model.text, corpus.pipeline.row.tokens, size, jax.devices()[0].device_kind, devices.size)

        def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
            return steps[batch.labels.shape[0] // corpus.pipeline.batch_size](state, batch)

        beginnings = _beginnings(held_out, tokenizer, model, corpus)

        def evaluate(state: TrainState) -> dict[str, float]:
            if beginnings is not None:
                written = _samples(nnx.merge(graphdef, state.params, state.buffers), beginnings, tokenizer, sampling, sample_tokens)
                save_samples(workdir, int(state.step), written)
            return evaluation(state)

        identity = run_identity(model, corpus, tokenizer.fingerprint, optimizer, objective, batch_warmup, seed)
        data = {source.directory: source.manifest.fingerprint for source in sources}
        journal.manifest = run_manifest(gin.operative_config_str(), identity, data)
        with CheckpointManager(workdir / "checkpoints", identity, keep_last=keep_checkpoints) as checkpoints:
            if weights is not None and checkpoints.latest_step is None:
                state = _start_from(state, Path(weights), model)
            state = train_loop(
                state,
                train_step,
                training,
                loop,
                workdir=workdir,
                checkpoints=checkpoints,
                data=training,
                place=place,
                evaluate=evaluate,
                writers=writers,
                console=console,
                journal=journal,
                work=work,
            )

        console.print("evaluating all held-out documents, and captions with their media, without them, and with others'")
        losses = evaluation.losses(state, evaluation.data.in_order())
        on_held_out = HeldOut(losses["all"].loss, unigram, losses["all"].tokens)
        captions = {
            medium: CaptionLoss(
                *(evaluation.losses(state, data.in_order())["all"].loss for data in (parts.intact, parts.removed, parts.swapped))
            )
            for medium, parts in ablations.items()
        }
        network = nnx.merge(graphdef, state.params, state.buffers)
        load = rows_per_device = None
        if model.text.num_moe_layers:
            load, rows_per_device = _routing_of(network, evaluation.some[0][0])
        if jax.process_index() == 0:
            report = write_report(
                workdir,
                ReportData(
                    title=title,
                    facts={
                        "parameters": f"{parameters:,}",
                        "mesh": json.dumps(dict(devices.shape)),
                        "data": ", ".join(s.path for s in corpus.sources),
                    },
                    held_out=on_held_out,
                    captions=captions,
                    groups=losses,
                    samples=read_samples(workdir, loop.steps),
                    expert_load=load,
                    router_groups=model.text.router_n_groups,
                    rows_per_device=rows_per_device,
                    operative_config=gin.operative_config_str(),
                ),
            )
            console.print(f"report: {report}")


def _start_from(state: TrainState, directory: Path, model: ModelConfig) -> TrainState:
    """The state with the weights of a directory in place of the random ones, which go first: there may be no room for both. What they
    lack stays random: a tower, and adapters."""
    released = (directory / "config.json").exists()
    stored, at = (ModelConfig.from_hf(directory), None) if released else read_config(directory)
    _check_same(model, stored, directory)
    absent = {name: None for name in ("vision", "time_series") if getattr(stored, name) is None}
    plain = dataclasses.replace(model, text=dataclasses.replace(model.text, lora=None), **absent)  # type: ignore[arg-type]
    wanted = nnx.state(nnx.eval_shape(lambda: InternS1Pro(plain, rngs=nnx.Rngs(0))))
    replaced = {path for path, _ in nnx.to_flat_state(wanted)}
    parts = [dict(nnx.to_flat_state(part)) for part in (state.params, state.buffers)]
    for leaf in jax.tree.leaves([[x for path, x in part.items() if path in replaced] for part in parts]):
        leaf.delete()
    if released:
        network = load_model(directory, plain)
    else:
        network, _ = read_weights(directory, at, dtype=model.text.dtype, param_dtype=model.text.param_dtype)
    found = dict(nnx.to_flat_state(nnx.state(network)))
    params, buffers = (nnx.from_flat_state([(path, found.get(path, x)) for path, x in part.items()]) for part in parts)
    return dataclasses.replace(state, params=params, buffers=buffers)


# What may differ between a recipe's model and the weights that it starts from: the run's own choices, and what changes no function.
_OF_THE_RUN = ("dtype", "param_dtype", "expert_products", "lora", "router", "initializer_range", "bos_token_id", "eos_token_id")


def _check_same(model: ModelConfig, stored: ModelConfig, directory: str | Path) -> None:
    differing = []
    towers = [name for name in ("vision", "time_series") if getattr(stored, name) is not None]  # one that is absent begins at random
    for part in ("text", *towers):
        ours, theirs = ({} if x is None else dataclasses.asdict(x) for x in (getattr(model, part), getattr(stored, part)))
        keys = sorted((ours.keys() | theirs.keys()) - set(_OF_THE_RUN))
        differing += [
            f"{part}.{k}: {theirs.get(k, 'absent')} there, {ours.get(k, 'absent')} here" for k in keys if ours.get(k) != theirs.get(k)
        ]
    if differing:
        raise ConfigError(f"the weights in {directory} are of another model ({'; '.join(differing[:6])}); bind the model to their sizes.")


def run_identity(
    model: ModelConfig,
    corpus: Corpus,
    tokenizer: str,
    optimizer: OptimizerConfig,
    objective: Objective,
    batch_warmup: BatchWarmup,
    seed: int,
) -> dict[str, Any]:
    """What a run must have in common with the one whose checkpoint it continues: all that decides its batches and its state.

    The schedule may change: a run can be made longer, or its decay begun, from a checkpoint. The mixture may change from where it is on
    (`BatchPlan.restore` sees to that). The mesh and how a step is computed change nothing but rounding.
    """
    return {
        "model": dataclasses.asdict(model),
        "tokenizer": tokenizer,
        "pipeline": dataclasses.asdict(corpus.pipeline),
        "optimizer": dataclasses.asdict(optimizer),
        "objective": dataclasses.asdict(objective),
        "batch_warmup": dataclasses.asdict(batch_warmup),
        "seed": seed,
    }


def _beginnings(held_out: PackedExamples, tokenizer: Tokenizer, model: ModelConfig, corpus: Corpus) -> Prompts | None:
    """Beginnings of held-out documents of every kind in turn, as many as divide over the mesh; None where there are none to continue."""
    if sharding.axis_size("context") > 1:
        return None
    kinds: list[list[Example]] = [[], [], []]
    for index in np.random.default_rng(0).permutation(len(held_out.examples)).tolist():
        example = held_out.examples[index]
        kinds[0 if example.size.patches else 1 if example.size.samples else 2].append(example)
    in_turn = [example for turn in itertools.zip_longest(*kinds) for example in turn if example is not None]
    shards = sharding.shards("batch")
    count = min(-(-corpus.samples // shards), len(in_turn) // shards) * shards
    return prompts(in_turn[:count], tokenizer, model, corpus.pipeline.row) if count else None


def _samples(model: InternS1Pro, beginnings: Prompts, tokenizer: Tokenizer, sampling: Sampling, new_tokens: int) -> list[Sample]:
    """What the model makes of the beginnings of documents."""
    stop = tokenizer.special(base.END_OF_TEXT)
    result = generate(model, beginnings.inputs, new_tokens, sampling=sampling, stop_tokens=(stop,))
    return [
        Sample(shown, tokenizer.decode(result.tokens[row, : result.lengths[row]].tolist()), reference)
        for row, (shown, reference) in enumerate(zip(beginnings.shown, beginnings.references, strict=True))
    ]


def _routing_of(model: InternS1Pro, batch: Batch) -> tuple[np.ndarray, list[int]]:
    """Assignments of every expert [MoE layers, experts] in one batch, and the rows of expert products that each device of the
    mesh had in the first MoE layer, counted from the routing that the model chose."""
    text = model.config.text
    routing_LBTGC = jax.jit(lambda m, i: m(i).routing_LBTGC)(model, place_batch(batch.inputs))
    routing_LBTGC = multihost_utils.process_allgather(routing_LBTGC, tiled=True)
    experts = routing_LBTGC + text.experts_per_group * np.arange(text.router_n_groups)[:, None]
    load = np.stack([np.bincount(layer.ravel(), minlength=text.num_experts) for layer in experts])
    parts, ranks = sharding.axis_size("data", "fsdp"), sharding.axis_size("expert")
    owner = experts[0].reshape(parts, -1) // (text.num_experts // ranks)
    return load, [int((owner[part] == rank).sum()) for part in range(parts) for rank in range(ranks)]
