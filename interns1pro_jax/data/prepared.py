"""The directory of prepared data: record files of each split, the tokenizer, and a manifest that names them all.

The manifest is written last, so a directory that has one is complete.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from interns1pro_jax.data.records import DataError, RecordFile, sha256_of
from interns1pro_jax.data.sources import RecordSource
from interns1pro_jax.tokenizer.byte_bpe import ByteBpeTokenizer

MANIFEST, TOKENIZER = "manifest.json", "tokenizer.json"
SPLITS = ("train", "validation")
_FORMAT = 1


@dataclasses.dataclass(frozen=True)
class PreparedData:
    """Attributes:
    directory: where everything is.
    fingerprint: of all that decides the contents; equal fingerprints mean equal data.
    files: the record files of each split.
    counts: documents of each source in each split.
    tokenizer_sha256: of the tokenizer's file.
    packages: where the data comes from, and under which licence.
    """

    directory: Path
    fingerprint: str
    files: Mapping[str, Sequence[RecordFile]]
    counts: Mapping[str, Mapping[str, int]]
    tokenizer_sha256: str
    packages: Sequence[Mapping[str, Any]]

    @classmethod
    def open(cls, directory: str | Path) -> PreparedData:
        """Reads the manifest of a directory.

        Raises:
          DataError: there is none, or it is not one of ours.
        """
        path = Path(directory) / MANIFEST
        if not path.is_file():
            raise DataError(
                f"{directory} holds no prepared data ({MANIFEST} is absent); run: python -m tools.fetch_data --output {directory}"
            )
        try:
            content = json.loads(path.read_text())
            if content.pop("format") != _FORMAT:
                raise DataError(f"{path} has another format; delete it and prepare the data again.")
            files = {split: [RecordFile(**file) for file in written] for split, written in content.pop("files").items()}
            return cls(Path(directory), files=files, **content)
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path} is broken ({type(error).__name__}: {error}); delete it and prepare the data again.") from error

    def save(self) -> None:
        """Writes the manifest; it is complete or absent."""
        content = dataclasses.asdict(self)
        del content["directory"]
        partial = self.directory / f"{MANIFEST}.partial"
        partial.write_text(json.dumps({"format": _FORMAT, **content}, indent=1))
        os.replace(partial, self.directory / MANIFEST)

    def damaged(self) -> list[str]:
        """Files whose bytes are not those that were written; reads everything."""
        expected = {file.name: file.sha256 for files in self.files.values() for file in files} | {TOKENIZER: self.tokenizer_sha256}
        paths = {name: self.directory / name for name in expected}
        return [name for name, path in paths.items() if not path.is_file() or sha256_of(path) != expected[name]]

    def source(self, split: str) -> RecordSource:
        """The documents of a split.

        Raises:
          DataError: no such split, or a file that is absent or cut short.
        """
        if split not in self.files:
            raise DataError(f"there is no split {split!r} in {self.directory}; it has {', '.join(self.files)}.")
        return RecordSource(self.directory, self.files[split])

    def tokenizer(self) -> ByteBpeTokenizer:
        """The tokenizer that was trained on the training split."""
        return ByteBpeTokenizer.load(self.directory / TOKENIZER)
