"""Makes a prepared source of JSON lines or Parquet, for the model, row size, image bounds and tokenizer of a recipe:

    python -m tools.prepare_data --gin_file configs/recipes/X.gin --input 'corpus/*.jsonl' --output prepared_data/text

The forms of records are in `interns1pro_jax.data.formats`; `--check` validates without writing. Inputs and outputs may be local, gs://
or s3://. The command can be stopped and repeated: it goes on with the slices of the input that are not done.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import multiprocessing
import posixpath
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from interns1pro_jax.config import ConfigError
from interns1pro_jax.data import paths, preparation
from interns1pro_jax.data.encoding import DocumentEncoder
from interns1pro_jax.data.formats import RecordReader
from interns1pro_jax.data.preparation import Part, PreparationConfig, Slice
from interns1pro_jax.data.records import DataError
from interns1pro_jax.data.sources import DOCUMENTS, MANIFEST, ROWS, Manifest
from interns1pro_jax.data.transforms import Transform
from tools.recipe import add_recipe_arguments, read_recipe

_SHOWN = 3  # examples of each reason


@dataclasses.dataclass(frozen=True)
class Job:
    """All that a worker needs for any slice."""

    config: PreparationConfig
    encoder: DocumentEncoder
    reader: RecordReader
    transform: Transform | None
    directory: str | None
    content: str

    def __call__(self, piece: Slice) -> Part:
        """Does a slice, or finds that it is done."""
        content = f"{self.content} {piece}"
        if self.directory is not None and (done := preparation.load_part(self.directory, piece.number, content)) is not None:
            return done
        reader = dataclasses.replace(self.reader, base=posixpath.dirname(piece.path))
        part = preparation.prepare_slice(piece, self.config, self.encoder, reader, self.transform, self.directory)
        if self.directory is not None:
            preparation.save_part(self.directory, piece.number, part, content)
        return part


def run(job: Job, inputs: Sequence[str], workers: int, console: Console) -> None:
    """Does all slices, reports, and completes the source.

    Raises:
      DataError: nothing usable, or too many rejected records.
    """
    slices = preparation.slices_of(inputs, job.config.slice_bytes)
    content = _whole(job, slices)
    if job.directory is not None and paths.exists(paths.join(job.directory, MANIFEST)):
        if Manifest.read(job.directory).content == content:
            console.print(f"{job.directory} is complete, of this input and configuration; nothing to do.", highlight=False)
            return
        raise DataError(f"{job.directory} holds a source of another input or configuration; delete it, or choose another --output.")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    parts: list[Part] = []
    documents = faults = 0
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("slices", total=len(slices))
        for part in _in_order(job, slices, workers):
            parts.append(part)
            documents, faults = documents + part.documents, faults + len(part.faults)
            progress.update(task, advance=1, description=f"{documents:,} documents, {faults:,} rejected")
    report(parts, console)
    if job.directory is not None:
        preparation.write_rejected(job.directory, parts)
        manifest = preparation.complete(job.directory, parts, job.config, job.encoder, content)
        console.print(f"{job.directory}: {manifest.records:,} records in {len(manifest.shards):,} shards.", highlight=False)


def _whole(job: Job, slices: Sequence[Slice]) -> str:
    sizes = {piece.path: paths.size(piece.path) for piece in slices}
    return preparation.digest(job.config, job.encoder, job.reader, [job.content, sizes])


def _in_order(job: Job, slices: Sequence[Slice], workers: int) -> Iterator[Part]:
    if workers == 1:
        yield from map(job, slices)
        return
    context = multiprocessing.get_context("spawn")  # the libraries below run threads, which a fork would not survive
    with concurrent.futures.ProcessPoolExecutor(workers, context) as pool:
        yield from pool.map(job, slices)


def report(parts: Sequence[Part], console: Console) -> None:
    """What became of the records, with examples of every reason for a rejection."""
    faults = [fault for part in parts for fault in part.faults]
    documents, tokens = (sum(getattr(part, name) for part in parts) for name in ("documents", "tokens"))
    trained = sum(part.trained_tokens for part in parts)
    console.print(f"{documents:,} documents, {tokens:,} tokens, {trained:,} of them learnt; {len(faults):,} records rejected.")
    if not faults:
        return
    table = Table("reason", "records", "for example")
    for reason, count in Counter(fault.reason for fault in faults).most_common():
        shown = [f"{fault.name}: {fault.detail}" for fault in faults if fault.reason == reason][:_SHOWN]
        table.add_row(reason, f"{count:,}", "\n".join(shown))
    console.print(table)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_recipe_arguments(parser)
    parser.add_argument("--input", action="append", required=True, help="file or pattern, .jsonl or .parquet; may be repeated")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--output", help="directory of the prepared source")
    where.add_argument("--check", action="store_true", help="validate and report, write nothing")
    parser.add_argument("--kind", choices=(DOCUMENTS, ROWS), default=DOCUMENTS, help="packed while training, or now")
    parser.add_argument("--chunk_tokens", type=int, default=0, help="documents share a record until they have so many tokens; 0: one each")
    parser.add_argument("--system", help="system message for conversations that have none")
    parser.add_argument("--transform", type=Path, help="JSON file of templates for structured records; see data/transforms.py")
    parser.add_argument("--licence", default="", help="of records that do not name theirs")
    parser.add_argument("--max_rejected", type=float, default=0.05, help="share of rejected records above which nothing is completed")
    parser.add_argument("--workers", type=int, default=1, help="processes")
    arguments = parser.parse_args(argv)
    console, start = Console(), time.monotonic()
    try:
        recipe = read_recipe(arguments.gin_file, arguments.gin_param)
        row = recipe.corpus.pipeline.row
        config = PreparationConfig(arguments.kind, row, arguments.chunk_tokens, max_rejected=arguments.max_rejected)
        transform = arguments.transform.read_bytes() if arguments.transform else None
        encoder = DocumentEncoder(recipe.tokenizer, recipe.model, recipe.corpus.bounds)
        name = posixpath.basename((arguments.output or "check").rstrip("/"))
        reader = RecordReader(name, "", recipe.model.vision, arguments.system, arguments.licence)
        content = preparation.digest(config, encoder, reader, transform and transform.decode())
        job = Job(config, encoder, reader, Transform(transform) if transform is not None else None, arguments.output, content)
        run(job, arguments.input, arguments.workers, console)
    except (ConfigError, DataError, OSError) as error:
        sys.exit(f"error: {error}")
    console.print(f"Done in {time.monotonic() - start:.0f} s.", highlight=False)


if __name__ == "__main__":
    main()
