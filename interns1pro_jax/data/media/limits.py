"""What is wrong with a file, and how much of the machine it may take."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import importlib
import io
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import BinaryIO

from interns1pro_jax.data.records import DataError

MIB = 1 << 20


class Reason(enum.StrEnum):
    """Kinds of faults, for counting."""

    MISSING = "missing file"
    UNREADABLE = "unreadable file"
    UNSUPPORTED = "unsupported content"
    TOO_LARGE = "over the limits"
    EMPTY = "empty"
    NOT_FINITE = "not finite"
    AMBIGUOUS = "needs a choice"


class MediaError(DataError):
    """A file that cannot be used. `reason` is its kind; the message names the file, the value and the remedy."""

    def __init__(self, reason: Reason, name: str, problem: str):
        super().__init__(f"{name}: {problem}")
        self.reason = reason


@dataclasses.dataclass(frozen=True)
class ImageLimits:
    """`max_bytes` of the file, `max_pixels` of what it unpacks to (three bytes each)."""

    max_bytes: int = 256 * MIB
    max_pixels: int = 1 << 27


@dataclasses.dataclass(frozen=True)
class VideoLimits:
    """`max_bytes` of the file, `max_pixels` of a frame, `max_frames` that may have to be decoded to reach the sampled ones."""

    max_bytes: int = 4096 * MIB
    max_pixels: int = 1 << 26
    max_frames: int = 1_000_000


@dataclasses.dataclass(frozen=True)
class SignalLimits:
    """`max_bytes` of the file, `max_values` of all its channels together (up to eight bytes each), `max_channels`."""

    max_bytes: int = 1024 * MIB
    max_values: int = 1 << 26
    max_channels: int = 512


Source = str | Path | bytes
"""A local file, or the bytes of one."""


def named(source: Source, name: str | None, medium: str) -> tuple[Path | bytes, str]:
    """Where the bytes come from, and what messages call it."""
    if isinstance(source, bytes):
        return source, name or medium
    return Path(source), name or str(source)


def check_size(source: Path | bytes, name: str, max_bytes: int) -> int:
    """Bytes of a file.

    Raises:
      MediaError: it is absent, empty or too large.
    """
    try:
        size = len(source) if isinstance(source, bytes) else source.stat().st_size
    except OSError as error:
        raise MediaError(Reason.MISSING, name, f"cannot be opened ({error.strerror}); check the path that the record names.") from error
    if isinstance(source, Path) and not source.is_file():
        raise MediaError(Reason.MISSING, name, "is not a file; check the path that the record names.")
    if size == 0:
        raise MediaError(Reason.EMPTY, name, "has no bytes; fetch it again or drop its record.")
    if size > max_bytes:
        raise MediaError(Reason.TOO_LARGE, name, f"has {size:,} bytes, more than max_bytes={max_bytes:,}; cut it or raise the limit.")
    return size


@contextlib.contextmanager
def opened(source: Path | bytes) -> Iterator[BinaryIO]:
    if isinstance(source, bytes):
        yield io.BytesIO(source)
    else:
        with source.open("rb") as file:
            yield file


@contextlib.contextmanager
def decoding(name: str, what: str) -> Iterator[None]:
    """Turns whatever a decoder raises at broken bytes into a MediaError."""
    try:
        yield
    except MediaError:
        raise
    except FileNotFoundError as error:  # one that the file refers to
        raise MediaError(Reason.MISSING, name, f"needs the file {error.filename}, which is absent.") from error
    except Exception as error:
        raise MediaError(
            Reason.UNREADABLE, name, f"cannot be read as {what} ({type(error).__name__}: {error}); it is damaged or of another format."
        ) from error


def optional_module(module: str, name: str, what: str) -> ModuleType:
    """A library that only some formats need.

    Raises:
      MediaError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MediaError(
            Reason.UNSUPPORTED, name, f"reading {what} needs the library {module} ({error}); install interns1pro_jax[media]."
        ) from error
