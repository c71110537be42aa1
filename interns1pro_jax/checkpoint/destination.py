"""The directory that an export goes to: checked before, complete or absent, and with the files beside the weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from interns1pro_jax.checkpoint.errors import CheckpointError
from interns1pro_jax.checkpoint.manager import check_writable
from interns1pro_jax.checkpoint.safetensors_io import INDEX, Checkpoint
from interns1pro_jax.checkpoint.safetensors_writer import PARTIAL, OutputFile, check_space, write_index, write_json
from interns1pro_jax.config import ModelConfig
from interns1pro_jax.config_checks import load_json
from interns1pro_jax.families import FAMILIES

MAX_FILE_BYTES = 5 * 10**9
_UNFINISHED = "export.json" + PARTIAL  # what an export is of, as long as it goes on
# Files of a released directory that are no weights: tokenizer, chat template, processors, generation defaults.
CARRIED = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "LICENSE*", "README*")


def start_export(directory: Path, files: Sequence[OutputFile], identity: str) -> None:
    """Checks the directory (see `check_destination`), and makes room for what is not there yet."""
    check_destination(directory, files, identity)
    for path in directory.glob(f"*.safetensors{PARTIAL}"):
        path.unlink()
    write_json(directory / _UNFINISHED, _plan(files, identity))
    for file in files:
        if not file.is_complete():
            file.create()


def _plan(files: Sequence[OutputFile], identity: str) -> dict[str, Any]:
    return {"of": identity, "files": {file.path.name: file.size for file in files}}


def check_destination(directory: Path, files: Sequence[OutputFile], identity: str) -> None:
    """Checks that the directory is empty or holds the beginning of this export, and that there is room for the rest.

    Raises:
      CheckpointError: it holds something else, or there is too little space. Nothing has been written then.
    """
    check_writable(directory)
    marker = directory / _UNFINISHED
    if marker.exists():
        if json.loads(marker.read_text()) != _plan(files, identity):
            raise CheckpointError(f"{directory} holds an unfinished export of something else; finish that, or empty the directory.")
    elif there := [path.name for pattern in ("*.safetensors", "config.json", INDEX) for path in directory.glob(pattern)]:
        raise CheckpointError(f"{directory} holds {', '.join(sorted(there)[:4])} already; choose an empty directory.")
    check_space(directory, files)


def is_export(directory: Path) -> bool:
    """Whether the directory holds an export that is complete."""
    return (directory / "config.json").exists() and not (directory / _UNFINISHED).exists()


def finish_export(
    directory: Path,
    files: Sequence[OutputFile],
    config: ModelConfig,
    carry: Path | None,
    like: Checkpoint | None = None,
    own: Collection[str] = (),
) -> None:
    """Writes what stands beside the files of weights, once these are complete, the index last.

    Args:
      own: files of the export's own, which none of `carry` replaces.
    """
    if carry is not None:
        _carry_along(carry, directory, {"config.json", INDEX, *own})
    write_json(directory / "config.json", _config_json(config, like))
    write_index(directory, files)
    (directory / _UNFINISHED).unlink()


def _config_json(config: ModelConfig, like: Checkpoint | None) -> dict[str, Any]:
    """The content of `config.json`; of what is no model here, `like` has the keys."""
    content = config.to_hf()
    if (kept := FAMILIES[config.family].kept) and like is not None:
        original = load_json(like.directory / "config.json")
        for key in kept:
            part, _, name = key.rpartition(".")
            source, target = (original.get(part, {}), content[part]) if part else (original, content)
            if name in source:
                target[name] = source[name]
    return content


def _carry_along(source: Path, directory: Path, without: Collection[str]) -> None:
    """Copies what belongs to a released model besides its weights: tokenizer, chat template, processors, generation config."""
    for pattern in CARRIED:
        for path in source.glob(pattern):
            if path.is_file() and path.name not in without:
                shutil.copyfile(path, directory / path.name)
