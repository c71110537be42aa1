"""Makes prepared sources of the downloaded packages: documents, split, tokenizer, and a source for each collection and split.

tokenizer.json          trained on the training split
train/SOURCE/           prepared sources (`data.sources`), and the same of the validation split in validation/
samples.json            what all this was made of; written last
SOURCES.md              where each part comes from, and under which licence
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import inspect
import itertools
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from interns1pro_jax.config import ModelConfig
from interns1pro_jax.data import encoding, examples, image_processing, paths, preparation, records, sources
from interns1pro_jax.data.encoding import DocumentEncoder
from interns1pro_jax.data.image_processing import PixelBounds
from interns1pro_jax.data.preparation import PreparationConfig, write_documents
from interns1pro_jax.data.records import DataError, Document, TextPart
from interns1pro_jax.data.samples import molecules, packages, pictures, prose, signals
from interns1pro_jax.data.samples.packages import PACKAGES, Archives, Sample
from interns1pro_jax.tokenizer import base, byte_bpe
from interns1pro_jax.tokenizer.byte_bpe import ByteBpeTokenizer

SPLITS = ("train", "validation")
MANIFEST, TOKENIZER = "samples.json", "tokenizer.json"
_MODULES = (prose, molecules, pictures, signals, packages, records, encoding, examples, preparation, byte_bpe, image_processing)
# The demo's model is small: its images are, too.
_BOUNDS = PixelBounds(1024, 9216)


@dataclasses.dataclass(frozen=True)
class Expectation:
    """What a source must yield, and how it is split.

    Attributes:
      reader: what yields its documents, perhaps among those of other sources.
      documents: how many; fixed by the bytes of the packages.
      validation_share: of the groups.
      tolerance: share by which `documents` may be missed: RDKit's releases differ a little in the molecules they accept.
    """

    reader: Callable[[Archives], Iterator[Sample]]
    documents: int
    validation_share: float
    tolerance: float = 0.0


EXPECTED = {
    prose.SOURCE: Expectation(prose.samples, 971, 0.05),
    molecules.SOURCE_VALUES: Expectation(molecules.samples, 1750, 0.08, 0.01),
    molecules.SOURCE_DRAWINGS: Expectation(molecules.samples, 4224, 0.08, 0.01),
    pictures.SOURCE_PICTURES: Expectation(pictures.samples, 219, 0.15),
    pictures.SOURCE_DIGITS: Expectation(pictures.samples, 3594, 0.1),
    signals.SOURCE_RECORDINGS: Expectation(signals.samples, 861, 0.12),
    signals.SOURCE_SERIES: Expectation(signals.samples, 2969, 0.1),
    prose.SOURCE_ALL: Expectation(prose.documentation, 11995, 0.05, 0.01),
}
DEMO = tuple(source for source in EXPECTED if source != prose.SOURCE_ALL)


@dataclasses.dataclass(frozen=True)
class SampleData:
    """Attributes:
    directory: where everything is.
    fingerprint: of all that decides the contents; equal fingerprints mean equal data.
    counts: documents of each source in each split.
    packages: where the data comes from, and under which licence.
    """

    directory: Path
    fingerprint: str
    counts: Mapping[str, Mapping[str, int]]
    packages: Sequence[Mapping[str, Any]]

    @classmethod
    def open(cls, directory: Path) -> SampleData:
        """Reads what `prepare` wrote.

        Raises:
          DataError: there is nothing, or it is not ours.
        """
        path = directory / MANIFEST
        if not path.is_file():
            raise DataError(f"{directory} holds no sample data; run: python -m tools.fetch_data --output {directory}")
        try:
            return cls(directory, **json.loads(path.read_text()))
        except (ValueError, TypeError) as error:
            raise DataError(f"{path} is broken ({type(error).__name__}: {error}); delete it and prepare the data again.") from error

    def save(self) -> None:
        """Writes it; it is complete or absent."""
        content = {"fingerprint": self.fingerprint, "counts": self.counts, "packages": self.packages}
        paths.write_bytes(str(self.directory / MANIFEST), json.dumps(content, indent=1).encode())

    def is_whole(self) -> bool:
        """Whether all files are there as they were written; reads everything."""
        if not (self.directory / TOKENIZER).is_file():
            return False
        try:
            found = [sources.PreparedSource(str(self.directory / split / source)) for split in SPLITS for source in self.counts[split]]
        except DataError:
            return False
        tokenizer = ByteBpeTokenizer.load(self.directory / TOKENIZER).fingerprint
        return not any(source.damaged() or source.manifest.tokenizer != tokenizer for source in found)


def split_of(group: str, validation_share: float) -> str:
    """The split of a group: a function of its name alone, so it never changes when documents come or go."""
    number = int.from_bytes(hashlib.sha256(group.encode()).digest()[:8], "big")
    return SPLITS[number < validation_share * 2**64]


def fingerprint(vocab_size: int, chosen: Sequence[str]) -> str:
    """Changes whenever the packages, the code that reads and encodes them, or the libraries that it uses do."""
    code = [inspect.getsource(part) for part in (*_MODULES, split_of, prepare, collect)]
    libraries = [importlib.metadata.version(name) for name in ("rdkit", "pymseed", "pillow", "tokenizers")]
    expected = {source: (e.documents, e.validation_share, e.tolerance) for source, e in EXPECTED.items() if source in chosen}
    return hashlib.sha256(json.dumps([code, libraries, expected, vocab_size]).encode()).hexdigest()


def prepare(
    downloads: Path, output: Path, vocab_size: int, progress: Callable[[str, int], None], chosen: Sequence[str] = DEMO
) -> SampleData:
    """Writes the prepared sources of the packages in `downloads` to `output`; does nothing where they are there already.

    Args:
      vocab_size: ids of the tokenizer, at most.
      progress: called with a source and the documents read from it so far.
      chosen: the sources, of `EXPECTED`; the tokenizer is trained on their text alone.

    Raises:
      DataError: a source yields another number of documents than it must.
      ConfigError: a library for reading is missing.
    """
    wanted = fingerprint(vocab_size, chosen)
    if (found := existing(output)) and found.fingerprint == wanted and found.is_whole():
        return found
    (output / MANIFEST).unlink(missing_ok=True)
    for split in SPLITS:
        shutil.rmtree(output / split, ignore_errors=True)

    documents = collect(downloads, progress, chosen)
    texts = (part.text for splits in documents.values() for d in splits["train"] for part in d.parts if isinstance(part, TextPart))
    tokenizer = ByteBpeTokenizer.train(texts, vocab_size)
    tokenizer.save(output / TOKENIZER)
    ids: dict[str, Any] = {**base.model_token_ids(tokenizer)}
    encoder = DocumentEncoder(tokenizer, ModelConfig(**ids), _BOUNDS)
    config = PreparationConfig(sources.DOCUMENTS, row=None)
    for split in SPLITS:
        for source, splits in documents.items():
            write_documents(str(output / split / source), splits[split], config, encoder, wanted)
    data = SampleData(
        output,
        fingerprint=wanted,
        counts={split: {source: len(splits[split]) for source, splits in documents.items()} for split in SPLITS},
        packages=[dataclasses.asdict(package) for package in PACKAGES],
    )
    (output / "SOURCES.md").write_text(describe(data))
    data.save()
    return data


def existing(output: Path) -> SampleData | None:
    """The prepared data in a directory, if there is any that can be read."""
    try:
        return SampleData.open(output)
    except DataError:
        return None


def collect(downloads: Path, progress: Callable[[str, int], None], chosen: Sequence[str]) -> dict[str, dict[str, list[Document]]]:
    """All documents by source and split."""
    documents: dict[str, dict[str, list[Document]]] = {source: {split: [] for split in SPLITS} for source in chosen}
    readers = dict.fromkeys(EXPECTED[source].reader for source in chosen)
    with Archives(downloads) as archives:
        samples: Iterator[Sample] = itertools.chain.from_iterable(reader(archives) for reader in readers)
        for group, document in samples:
            if document.source not in documents:
                continue
            splits = documents[document.source]
            splits[split_of(group, EXPECTED[document.source].validation_share)].append(document)
            progress(document.source, sum(map(len, splits.values())))
    for source, splits in documents.items():
        expectation, found = EXPECTED[source], sum(map(len, splits.values()))
        if abs(found - expectation.documents) > expectation.tolerance * expectation.documents:
            raise DataError(
                f"{source}: {found} documents were found, {expectation.documents} expected; delete {downloads} and fetch again."
            )
        if not all(splits.values()):
            raise DataError(
                f"{source}: a split is empty ({', '.join(f'{split} {len(d)}' for split, d in splits.items())}); change its share."
            )
    return documents


def describe(data: SampleData) -> str:
    """`SOURCES.md`: what the data is, where each part comes from, and under which licence."""
    lines = ["# Sources", "", "Prepared sample data. Each document also carries its source and licence in its record.", ""]
    lines += ["| source | training documents | validation documents |", "| --- | ---: | ---: |"]
    lines += [f"| {source} | {data.counts['train'][source]} | {data.counts['validation'][source]} |" for source in data.counts["train"]]
    lines += [
        "",
        "Training and validation share no module of documentation, no molecule (by skeleton), no picture, no digit, no series. Recordings "
        "are split by time: an hour of a station, or twenty seconds of a heart recording, is in one split.",
        "",
        "| package | version | licence of what is used | origin | SHA-256 of the archive |",
        "| --- | --- | --- | --- | --- |",
    ]
    lines += [f"| {p['name']} | {p['version']} | {p['licence']} | {p['origin']} | `{p['sha256']}` |" for p in data.packages]
    return "\n".join(lines) + "\n"
