"""How many characters a token holds, on real texts of each kind, beside the plain byte-level BPE: a table and a picture.

    python -m tools.tokenizer_report --tokenizer DIR --protein proteins.fasta.gz --dna genome.fasta.gz --picture report.png

"detected" is a text of its own, a molecule or a sequence a line, as the tokenizer finds it; "in tags" is the same between tags, which are
counted. The plain BPE has the same vocabulary, and no segment models.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
from pathlib import Path
from typing import NamedTuple

from interns1pro_jax.tokenizer.released import ReleasedFiles
from interns1pro_jax.tokenizer.scientific import ScientificTokenizer
from interns1pro_jax.tokenizer.words import PlainTextEncoder
from tools.tokenizers import samples
from tools.tokenizers.samples import Sample

_TAGS = {"SMILES": "SMILES", "protein": "protein", "DNA": "dna"}


class Row(NamedTuple):
    """One kind of text: its characters, and how many tokens they take."""

    name: str
    texts: int
    characters: int
    plain: int
    ours: int
    found: float | None  # share of the texts in which a notation was found

    @property
    def gain(self) -> float:
        """How many more characters a token holds, in percent."""
        return 100 * (self.plain / self.ours - 1)


def measure(tokenizer: ScientificTokenizer, plain: PlainTextEncoder, sample: Sample) -> list[Row]:
    in_plain = sum(len(plain.encode(text)) for text in sample.texts)
    encoded = tokenizer.encode_batch(sample.texts)
    first = min(i for i in (tokenizer.special(f"</{tag}>") for tag in _TAGS.values()))
    found = sum(any(i > first for i in ids) for ids in encoded) / len(encoded)
    size = len(sample.texts), sample.characters, in_plain
    if sample.kind not in _TAGS:
        return [Row(sample.kind, *size, sum(map(len, encoded)), None)]
    tag = _TAGS[sample.kind]
    tagged = tokenizer.encode_batch([f"<{tag}>{text}</{tag}>" for text in sample.texts])
    return [
        Row(f"{sample.kind}, detected", *size, sum(map(len, encoded)), found),
        Row(f"{sample.kind}, in tags", *size, sum(map(len, tagged)), None),
    ]


def draw(rows: list[Row], path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 0.6 + 0.55 * len(rows)), layout="constrained")
    places = range(len(rows))
    for offset, label, colour, values in (
        (-0.2, "plain byte-level BPE", "#b8bfc8", [row.characters / row.plain for row in rows]),
        (0.2, "with segment models", "#2a6fb0", [row.characters / row.ours for row in rows]),
    ):
        axes.bar_label(
            axes.barh([place + offset for place in places], values, 0.4, label=label, color=colour), fmt="%.2f", padding=3, size=8
        )
    axes.set_yticks(list(places), [row.name for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel("characters per token")
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.1)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True, metavar="DIR", help="of the released layout")
    parser.add_argument("--smiles_check", choices=("rules", "rdkit"), default="rules")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="also draw it (.png, .svg)")
    samples.add_arguments(parser)
    arguments = parser.parse_args()
    files = ReleasedFiles.read(arguments.tokenizer)
    tokenizer, plain = ScientificTokenizer(files, arguments.smiles_check), PlainTextEncoder(files.vocab, files.merges)
    rows: list[Row] = []
    for sample in samples.read(arguments):
        print(f"{sample.kind}: {sample.source}")
        rows.extend(measure(tokenizer, plain, sample))
    print(f"\n{'':18}  {'texts':>7}  {'characters':>10}  {'plain':>6}  {'ours':>6}  {'gain':>6}  found")
    for row in rows:
        found = "" if row.found is None else f"{row.found:.1%}"
        ratios = f"{row.characters / row.plain:6.2f}  {row.characters / row.ours:6.2f}  {row.gain:+5.0f}%"
        print(f"{row.name:18}  {row.texts:7}  {row.characters:10}  {ratios}  {found}")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("tokenizers", "sentencepiece", "regex"))
    print(f"characters per token; SMILES check: {arguments.smiles_check}; Python {platform.python_version()}, {versions}")
    if arguments.picture is not None:
        draw(rows, arguments.picture)


if __name__ == "__main__":
    main()
