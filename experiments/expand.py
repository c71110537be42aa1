"""Grows a model with E experts in one router group into one with k*E experts in G groups (`interns1pro_jax.expansion`)."""

from __future__ import annotations

import resource
from pathlib import Path

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TimeRemainingColumn, TransferSpeedColumn, track

from interns1pro_jax.checkpoint.destination import MAX_FILE_BYTES, is_export
from interns1pro_jax.checkpoint.hf_import import load_model
from interns1pro_jax.checkpoint.safetensors_io import Checkpoint, open_checkpoint
from interns1pro_jax.checkpoint.sources import RunSource
from interns1pro_jax.checkpoint.stream import write_hf
from interns1pro_jax.config import ConfigError, ModelConfig
from interns1pro_jax.data.corpus import Corpus
from interns1pro_jax.expansion.assignment import CALIBRATED, ExpansionConfig, assign, separation
from interns1pro_jax.expansion.checkpoint import expand_checkpoint, fingerprint, moe_layers
from interns1pro_jax.expansion.manifest import Calibration, Manifest
from interns1pro_jax.expansion.routing_counts import RoutingCounts, count_routing
from interns1pro_jax.families import FAMILIES
from interns1pro_jax.ops.fope import text_frequencies
from interns1pro_jax.sharding import MeshConfig
from interns1pro_jax.train.feed import place_batch

COUNTS, GROWN = "calibration.npz", "checkpoint"


def expand(
    workdir: Path,
    *,
    source: str,
    mesh: MeshConfig,
    expansion: ExpansionConfig,
    corpus: Corpus | None = None,
    calibration_batches: int = 64,
    manifest: str | None = None,
    step: int | None = None,
    max_file_bytes: int = MAX_FILE_BYTES,
    compile_only: bool = False,
) -> None:
    """Writes the grown checkpoint, in the released layout, to `workdir/checkpoint`, with its manifest `expansion.json`.

    Args:
      source: a directory in the released layout of this family or an ancestor, or of a run's checkpoints, which is exported to
        `workdir/source_HASH` first, by the hash of its content.
      mesh: for the calibration; all else takes tensor after tensor through the host.
      corpus: of whose training batches the first `calibration_batches` are the calibration set. What was counted stays in
        `workdir/calibration.npz`, and is not counted again.
      manifest: of an earlier expansion of the same source, to repeat it to the byte; `expansion` and `corpus` are not used then.
      step: of a run's checkpoints; None takes the newest.

    Raises:
      ConfigError, CheckpointError, DataError: what the source, the method or the disk lack, by name, before anything is written.
    """
    if compile_only:
        raise ConfigError("an expansion has no step to compile; leave out --compile_only.")
    if jax.process_count() > 1:
        raise ConfigError("an expansion is the work of one process; start it on one host.")
    if calibration_batches < 1:
        raise ConfigError(f"expand.calibration_batches={calibration_batches} must be positive.")
    console = Console()
    given = None if manifest is None else Manifest.load(Path(manifest))
    if given is not None:
        expansion = given.expansion
    elif expansion.method in CALIBRATED and corpus is None and not (workdir / COUNTS).exists():
        raise ConfigError(
            f"method {expansion.method} needs a calibration set: bind expand.corpus, or put an earlier {COUNTS} of this source into "
            f"{workdir}; random and copy need none."
        )
    with jax.set_mesh(mesh.make()):
        checkpoint, config = _open(Path(source), step, workdir, expansion, max_file_bytes)
        if given is None:
            given = _plan(checkpoint, config, expansion, corpus, calibration_batches, workdir, console)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        tasks: dict[str, TaskID] = {}

        def progress(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done)

        grown = expand_checkpoint(
            checkpoint,
            config,
            given,
            workdir / GROWN,
            max_file_bytes=max_file_bytes,
            progress=progress,
        )
    if grown.vision is None and (config.vision is not None or FAMILIES[config.family].untouched):
        console.print(
            "the source's vision tower stays behind, since Intern-S1-Pro has another: this is a text model, and a model with a tower that "
            "begins from it (train.weights) has to train that",
            highlight=False,
            soft_wrap=True,
        )
    text, half = grown.text, grown.text.head_dim // 2
    if config.text.fope is None and text.fope is not None:
        kept = len(text_frequencies(text))
        lost = f"; {half - kept} pairs lose the position (FopeConfig.num_inv_freq = {half} keeps all)" if kept < half else ""
        console.print(f"FoPE keeps {kept} of {half} frequencies of the source's rotary encoding{lost}", highlight=False)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    console.print(
        f"{workdir / GROWN}: {text.num_experts} experts in {text.router_n_groups} groups, {text.num_experts_per_tok} per token; method "
        f"{given.expansion.method}, manifest {given.fingerprint[:12]}; this process held {peak:.2f} GiB at its peak",
        highlight=False,
    )


def _open(source: Path, step: int | None, workdir: Path, expansion: ExpansionConfig, max_file_bytes: int) -> tuple[Checkpoint, ModelConfig]:
    """The source in the released layout; a run's checkpoint is exported."""
    if (source / "config.json").exists():
        if step is not None:
            raise ConfigError(f"expand.step={step} has no effect, because {source} is in the released layout; drop it.")
        config = ModelConfig.from_hf(source)
        expansion.target(config)
        return open_checkpoint(source), config
    run = RunSource(source, step)
    exported = workdir / f"source_{run.content_hash[:12]}"
    expansion.target(run.config)
    if not is_export(exported):
        write_hf(run, run.config, exported, dtype=run.config.text.param_dtype, max_file_bytes=max_file_bytes)
    return open_checkpoint(exported), ModelConfig.from_hf(exported)


def _plan(
    checkpoint: Checkpoint,
    config: ModelConfig,
    expansion: ExpansionConfig,
    corpus: Corpus | None,
    batches: int,
    workdir: Path,
    console: Console,
) -> Manifest:
    identity, counts = fingerprint(checkpoint, config), None
    if expansion.method in CALIBRATED:
        if (workdir / COUNTS).exists():
            counts = RoutingCounts.load(workdir / COUNTS, identity, expansion.depth(config))
            console.print(f"the calibration of {workdir / COUNTS} is used; remove it to count again", highlight=False)
        else:
            assert corpus is not None
            counts = measure(checkpoint.directory, config, corpus, batches, expansion.depth(config), console)
            counts.save(workdir / COUNTS, identity)
    slots_LGS = assign(expansion, config.text.num_moe_layers, config.text.num_experts, counts)
    calibration = None
    if counts is not None:
        calibration = Calibration(counts.fingerprint, counts.tokens)
        apart_L = separation(counts, slots_LGS)
        console.print(
            f"{counts.tokens:,} tokens of calibration: experts chosen together are apart in {apart_L.mean():.1%} of the cases (worst layer "
            f"{apart_L.min():.1%}; random halves: 50 %)",
            highlight=False,
        )
    return Manifest(identity, expansion, calibration, moe_layers(config), slots_LGS)


def measure(directory: Path, config: ModelConfig, corpus: Corpus, batches: int, depth: int, console: Console) -> RoutingCounts:
    """Routing counts of the source in `directory` over the corpus's first batches, on the mesh in force."""
    tokenizer = corpus.load_tokenizer()
    data = corpus.batches(config, tokenizer, corpus.open_sources())
    model = load_model(directory, config)
    routing = jax.jit(lambda model, inputs: model(inputs).routing_LBTGC)
    total: RoutingCounts | None = None
    for number in track(range(batches), "calibrating", console=console):
        inputs = data[number].inputs
        ids_LBTGC = np.asarray(routing(model, place_batch(inputs)))
        ids_LNK = ids_LBTGC.reshape(ids_LBTGC.shape[0], -1, ids_LBTGC.shape[-1])
        counts = count_routing(ids_LNK, np.asarray(inputs.segment_ids).ravel() > 0, config.text.num_experts, depth)
        total = counts if total is None else total + counts
    assert total is not None
    return total
