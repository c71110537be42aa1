"""Shows what is in a checkpoint, and how two differ.

    python -m tools.inspect_checkpoint Intern-S1-Pro                      # totals, and each kind of tensor with its shape and dtype
    python -m tools.inspect_checkpoint runs/sft/checkpoints --step 500    # also how its arrays were split over devices
    python -m tools.inspect_checkpoint ours --against theirs              # tensors that are missing, misshapen or have other values
    python -m tools.inspect_checkpoint ours --sha256                      # checksums of the files
    python -m tools.inspect_checkpoint ours --verify                      # whether the files are what tools.convert wrote

Reads the released layout and the checkpoints of this project's runs. Exits with 1 if two checkpoints differ or a file is not
what was written, 2 if one cannot be read.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import orbax.checkpoint as ocp
from rich.console import Console
from rich.progress import DownloadColumn, Progress, track
from rich.table import Table

from interns1pro_jax.checkpoint import checksums
from interns1pro_jax.checkpoint.errors import CheckpointError
from interns1pro_jax.checkpoint.manager import failure_reason
from interns1pro_jax.checkpoint.safetensors_io import Checkpoint, open_checkpoint
from interns1pro_jax.checkpoint.sources import steps_in

_SHOWN = 30  # differences
_COMPARED = 1 << 22  # elements


class Entry(NamedTuple):
    """One stored array."""

    dtype: str
    shape: tuple[int, ...]
    split: str

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(prog="inspect_checkpoint", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--step", type=int, help="of a run's checkpoints; default the newest")
    parser.add_argument("--against", type=Path, metavar="DIR", help="compare with this checkpoint in the released layout")
    parser.add_argument("--sha256", action="store_true", help="checksums of the files of weights")
    parser.add_argument("--verify", action="store_true", help="compare the files with the checksums that were written beside them")
    arguments = parser.parse_args(argv)
    console = Console()
    if not console.is_terminal:
        console = Console(width=200)
    try:
        if arguments.against is not None:
            return _compare(open_checkpoint(arguments.directory), open_checkpoint(arguments.against), console)
        if arguments.verify:
            return _verify(arguments.directory, arguments.step, console)
        _show(arguments.directory, arguments.step, console)
        if arguments.sha256:
            for path in sorted(arguments.directory.rglob("*.safetensors")):
                with path.open("rb") as file:
                    console.print(f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {path.relative_to(arguments.directory)}")
    except CheckpointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _verify(directory: Path, step: int | None, console: Console) -> int:
    """Prints the files that are missing or differ; 1 if there are any."""
    if not (directory / "config.json").exists():
        directory = _step_directory(directory, step)
    with Progress(*Progress.get_default_columns(), DownloadColumn(), console=console, transient=True) as bar:
        task = bar.add_task("checksums", total=None)
        problems = checksums.differing(directory, lambda done, total: bar.update(task, completed=done, total=total))
    console.print(f"{directory}: {f'{len(problems):,} files differ' if problems else 'all files are what was written'}")
    for problem in problems[:_SHOWN]:
        console.print(f"  {problem}")
    return int(bool(problems))


def _show(directory: Path, step: int | None, console: Console) -> None:
    entries = _released(open_checkpoint(directory)) if (directory / "config.json").exists() else _run(directory, step, console)
    kinds: dict[tuple[str, Entry], int] = {}
    for name, entry in entries.items():
        key = re.sub(r"\.\d+(?=\.)", ".*", name), entry
        kinds[key] = kinds.get(key, 0) + 1
    table = Table("name", "count", "shape", "dtype", "split", "elements")
    for (name, entry), count in sorted(kinds.items(), key=lambda item: item[0][0]):
        table.add_row(name, f"{count:,}", str(list(entry.shape)), entry.dtype, entry.split, f"{count * entry.elements:,}")
    console.print(table)
    by_dtype: dict[str, int] = {}
    for entry in entries.values():
        by_dtype[entry.dtype] = by_dtype.get(entry.dtype, 0) + entry.elements
    console.print(f"{len(entries):,} arrays; " + ", ".join(f"{count:,} elements in {dtype}" for dtype, count in sorted(by_dtype.items())))


def _released(checkpoint: Checkpoint) -> dict[str, Entry]:
    return {name: Entry(info.dtype, info.shape, "") for name, info in checkpoint.items()}


def _run(directory: Path, step: int | None, console: Console) -> dict[str, Entry]:
    where = _step_directory(directory, step)
    console.print(f"{where} (there are {steps_in(where.parent)})")
    try:
        identity = json.loads((where / "manifest" / "metadata").read_text())["identity"]
        metadata = ocp.PyTreeCheckpointHandler().metadata(ocp.path.step.epath.Path(where / "state"))  # type: ignore[attr-defined]
    except Exception as error:  # Orbax raises bare `Exception` for damaged files
        raise CheckpointError(f"{where} cannot be read ({failure_reason(error)}); choose another with --step.") from error
    console.print(f"of a run with: {json.dumps(identity)[:2000]}")
    found = {}
    for name, x in metadata.tree.items():
        spec = getattr(x.sharding, "partition_spec", None)
        mesh = getattr(x.sharding, "shape", None)
        split = "" if not spec else f"{list(spec)} over {None if mesh is None else np.asarray(mesh).tolist()}"
        found[name] = Entry(str(x.dtype), tuple(x.shape), split)
    return found


def _step_directory(directory: Path, step: int | None) -> Path:
    directory = directory.absolute()
    steps = steps_in(directory)
    step = steps[-1] if step is None and steps else step
    if step not in steps:
        raise CheckpointError(f"{directory} has no checkpoint{'' if step is None else f' of step {step}'}; it has {steps or 'none'}.")
    return directory / f"{step:08d}"


def _compare(ours: Checkpoint, theirs: Checkpoint, console: Console) -> int:
    """Prints the differences; 1 if there are any."""
    problems = [f"{name} is only in {ours.directory}" for name in ours if name not in theirs]
    problems += [f"{name} is only in {theirs.directory}" for name in theirs if name not in ours]
    equal = 0
    for name in track([name for name in ours if name in theirs], "comparing", console=console, transient=True):
        a, b = ours[name], theirs[name]
        if a.shape != b.shape:
            problems.append(f"{name}: shape {list(a.shape)} and {list(b.shape)}")
            continue
        x, y = ours.read(name), theirs.read(name)
        if a.dtype == b.dtype and x.tobytes() == y.tobytes():
            equal += 1
            continue
        difference = _largest_difference(x, y)
        dtypes = f"stored as {a.dtype} and {b.dtype}, " if a.dtype != b.dtype else ""
        problems.append(f"{name}: {dtypes}values differ by up to {difference:.3g}")
    console.print(f"{equal:,} tensors are equal to the byte, {len(problems):,} differences")
    for problem in problems[:_SHOWN]:
        console.print(f"  {problem}")
    if len(problems) > _SHOWN:
        console.print(f"  and {len(problems) - _SHOWN} more")
    return int(bool(problems))


def _largest_difference(x: np.ndarray, y: np.ndarray) -> float:
    """Of two arrays of one shape; NaN if either has one. A part at a time: in float64 the largest matrices would not fit."""
    x, y = x.reshape(-1), y.reshape(-1)
    parts = (slice(start, start + _COMPARED) for start in range(0, x.size, _COMPARED))
    return float(np.max([np.max(np.abs(x[part].astype(np.float64) - y[part].astype(np.float64))) for part in parts], initial=0))


if __name__ == "__main__":
    sys.exit(main())
