"""One way to local files and object stores: paths may be local, gs://..., s3://..., or of any file system that fsspec knows.

gs:// needs the extra [gcs] and s3:// the extra [s3].
"""

from __future__ import annotations

import os
import posixpath
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import fsspec
from fsspec.implementations.local import LocalFileSystem

from interns1pro_jax.config import ConfigError


def file_system(path: str) -> tuple[Any, str]:
    """The file system of a path, and the path within it.

    Raises:
      ConfigError: a scheme that is not known, or whose library is not installed.
    """
    try:
        return fsspec.core.url_to_fs(path)
    except (ImportError, ValueError) as error:
        raise ConfigError(f"{path} cannot be reached ({error}); gs:// needs interns1pro_jax[gcs], s3:// interns1pro_jax[s3].") from error


def is_local(path: str) -> bool:
    return isinstance(file_system(path)[0], LocalFileSystem)


def join(base: str, name: str) -> str:
    """`name` within `base`, unless it is a whole path of its own."""
    return name if "://" in name or os.path.isabs(name) else posixpath.join(base, name)


def exists(path: str) -> bool:
    system, inner = file_system(path)
    return system.exists(inner)


def size(path: str) -> int | None:
    """Bytes of a file; None where there is none."""
    system, inner = file_system(path)
    try:
        return system.info(inner)["size"]
    except FileNotFoundError:
        return None


def glob(pattern: str) -> list[str]:
    """Files that match, in order; a path without wildcards is itself."""
    system, inner = file_system(pattern)
    if not any(sign in inner for sign in "*?["):
        return [pattern]
    return sorted(system.unstrip_protocol(found) if "://" in pattern else found for found in system.glob(inner))


def open_read(path: str) -> BinaryIO:
    system, inner = file_system(path)
    return system.open(inner, "rb")


def read_bytes(path: str) -> bytes:
    with open_read(path) as file:
        return file.read()


def write_bytes(path: str, content: bytes) -> None:
    """Writes a file that is complete or absent: object stores show it when it is closed, other systems when it is renamed."""
    with replacing(path) as temporary:
        Path(temporary).write_bytes(content)


def remove_tree(path: str) -> None:
    system, inner = file_system(path)
    if system.exists(inner):
        system.rm(inner, recursive=True)


@contextmanager
def replacing(path: str) -> Iterator[str]:
    """A local path to write to; what is there at the end becomes the file `path`, at one stroke."""
    system, inner = file_system(path)
    system.makedirs(posixpath.dirname(inner), exist_ok=True)
    if isinstance(system, LocalFileSystem):
        partial = f"{inner}.partial"
        try:
            yield partial
            os.replace(partial, inner)
        finally:
            Path(partial).unlink(missing_ok=True)
        return
    with tempfile.TemporaryDirectory() as folder:
        temporary = str(Path(folder) / posixpath.basename(inner))
        yield temporary
        system.put_file(temporary, inner)


@contextmanager
def local_copy(path: str) -> Iterator[str]:
    """A local path of a file: the file itself where it is local, else a copy that is removed at the end."""
    system, inner = file_system(path)
    if isinstance(system, LocalFileSystem):
        yield inner
        return
    folder = tempfile.mkdtemp(prefix="shard-")
    try:
        copy = str(Path(folder) / posixpath.basename(inner))
        system.get_file(inner, copy)
        yield copy
    finally:
        shutil.rmtree(folder, ignore_errors=True)
