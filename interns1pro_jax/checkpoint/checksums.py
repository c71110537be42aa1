"""SHA-256 of the files of a checkpoint, in the form of the command `sha256sum`, which can check it too."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from interns1pro_jax.checkpoint.errors import CheckpointError

FILE = "SHA256SUMS"
_WORKERS = 4


def write(directory: Path, files: Sequence[Path], progress: Callable[[int, int], None] = lambda done, total: None) -> None:
    """Writes the checksums of these files of a directory into `SHA256SUMS`."""
    sums = _sums(files, progress)
    (directory / FILE).write_text("".join(f"{value}  {path.relative_to(directory)}\n" for path, value in sums.items()))


def differing(directory: Path, progress: Callable[[int, int], None] = lambda done, total: None) -> list[str]:
    """The files that are missing, or not what `SHA256SUMS` says, each with the reason.

    Raises:
      CheckpointError: there is no such file, or it is damaged.
    """
    path = directory / FILE
    try:
        expected = {directory / name: value for value, _, name in (line.partition("  ") for line in path.read_text().splitlines())}
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); only what tools.convert wrote has checksums.") from error
    if not expected or any(len(value) != 64 for value in expected.values()):
        raise CheckpointError(f"{path} is damaged; it needs lines of a SHA-256 and a file.")
    there = [file for file in expected if file.is_file()]
    found = _sums(there, progress)
    problems = [f"{file.relative_to(directory)} is missing" for file in expected if file not in found]
    return problems + [f"{file.relative_to(directory)} has other contents" for file in there if found[file] != expected[file]]


def _sums(files: Sequence[Path], progress: Callable[[int, int], None]) -> dict[Path, str]:
    total, done = sum(path.stat().st_size for path in files), 0
    sums = {}
    with ThreadPoolExecutor(_WORKERS) as pool:
        for path, value in zip(files, pool.map(_sum, files), strict=True):
            sums[path] = value
            done += path.stat().st_size
            progress(done, total)
    return sums


def _sum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
