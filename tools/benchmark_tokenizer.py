"""Speed of encoding, beside slow classes and the library that does our merging.

    python -m tools.benchmark_tokenizer --tokenizer DIR --protein proteins.fasta.gz --dna genome.fasta.gz

ours        `ScientificTokenizer.encode_markup_batch`, one thread
rules       the released rules in plain Python, by the structure of the official class (`tools.tokenizers.slow`), which is not on PyPI
qwen2       the slow `Qwen2Tokenizer` of transformers, which the official class extends: no tags, no detection; where it is installed
library     `encode_batch_fast` of tokenizers with the same merges: no tags, no detection, all cores

Each encodes the first part of a sample, which is not timed, and then the other parts one after another, so that their words are known
as they are in the middle of a large text. Printed is the median over the parts, and ours over the other's by CPU time, which does not
count the waiting for a core; ids of `rules` must be ours.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import models

from interns1pro_jax.tokenizer.released import ReleasedFiles
from interns1pro_jax.tokenizer.scientific import ScientificTokenizer
from interns1pro_jax.tokenizer.words import byte_level_words
from tools.tokenizers import samples
from tools.tokenizers.slow import SlowTokenizer

Encode = Callable[[list[str]], list[list[int]]]


@dataclasses.dataclass(frozen=True)
class Speed:
    """Of one encoder on one sample: medians over the parts."""

    kind: str
    encoder: str
    characters_per_second: float
    tokens_per_second: float
    characters_per_cpu_second: float


def encoders(directory: Path) -> dict[str, Encode]:
    files = ReleasedFiles.read(directory)
    slow = SlowTokenizer(directory)
    core = tokenizers.Tokenizer(models.BPE(vocab=dict(files.vocab), merges=list(files.merges)))
    core.pre_tokenizer = byte_level_words()
    found: dict[str, Encode] = {
        "ours": ScientificTokenizer(files).encode_markup_batch,
        "rules": lambda texts: [slow.encode(text) for text in texts],
        "library": lambda texts: [encoding.ids for encoding in core.encode_batch_fast(texts, add_special_tokens=False)],
    }
    if importlib.util.find_spec("transformers"):
        try:
            from transformers.models.qwen2.tokenization_qwen2 import Qwen2Tokenizer

            qwen2: Any = Qwen2Tokenizer(str(directory / "vocab.json"), str(directory / "merges.txt"))
            found["qwen2"] = lambda texts: [qwen2.encode(text) for text in texts]
        except (ImportError, TypeError) as error:
            print(f"no qwen2: this transformers has no slow Qwen2Tokenizer ({error}); before version 5 it had.")
    else:
        print("no qwen2: transformers is not installed.")
    return found


def measure(sample: samples.Sample, named: dict[str, Encode], parts: int, characters: int) -> list[Speed]:
    """Times every encoder on every part, one after the other, so that what else the machine does meets all alike."""
    chunks = _parts(sample.texts, parts + 1, characters)
    for encode in named.values():
        encode(chunks[0])
    timings: dict[str, list[tuple[float, float, float]]] = {name: [] for name in named}
    for chunk in chunks[1:]:
        size = sum(map(len, chunk))
        ids: dict[str, list[list[int]]] = {}
        for name, encode in named.items():
            wall, cpu = time.perf_counter(), time.process_time()
            ids[name] = encode(chunk)
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            timings[name].append((size / wall, sum(map(len, ids[name])) / wall, size / cpu))
        if ids["ours"] != ids["rules"]:
            text = next(text for text, ours, rules in zip(chunk, ids["ours"], ids["rules"], strict=True) if ours != rules)
            raise SystemExit(f"error: the ids of {text!r} are not those of the plain rules.")
    medians = {name: [statistics.median(column) for column in zip(*rows, strict=True)] for name, rows in timings.items()}
    return [Speed(sample.kind, name, *values) for name, values in medians.items()]


def _parts(texts: list[str], count: int, characters: int) -> list[list[str]]:
    """The first texts, dealt out to parts of so many characters together."""
    kept, size = [], 0
    for text in texts:
        if size >= characters:
            break
        kept.append(text)
        size += len(text)
    return [kept[part::count] for part in range(count)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True, metavar="DIR", help="of the released layout")
    parser.add_argument("--parts", type=int, default=5, help="timed parts of each sample")
    parser.add_argument("--characters", type=int, default=1_200_000, help="of each sample, at most")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write what is printed to this file")
    samples.add_arguments(parser)
    arguments = parser.parse_args()
    given, named = samples.read(arguments), encoders(arguments.tokenizer)
    smiles = next((sample.texts for sample in given if sample.kind == "SMILES"), [])
    sentences = [f"The molecule {text} was measured at {index} K." for index, text in enumerate(smiles)]
    given = [sample for sample in given if sample.texts] + (
        [samples.Sample("SMILES in text", "the molecules", sentences)] if smiles else []
    )
    rows: list[Speed] = []
    print(f"\n{'':14}  {'':8}  {'chars/s':>10}  {'tokens/s':>10}  {'chars/CPU s':>11}  ours is faster by")
    for sample in given:
        speeds = measure(sample, named, arguments.parts, arguments.characters)
        ours = next(speed for speed in speeds if speed.encoder == "ours")
        for speed in speeds:
            ratio = "" if speed is ours else f"{ours.characters_per_cpu_second / speed.characters_per_cpu_second:10.1f}"
            print(
                f"{speed.kind:14}  {speed.encoder:8}  {speed.characters_per_second:10,.0f}  {speed.tokens_per_second:10,.0f}  "
                f"{speed.characters_per_cpu_second:11,.0f}  {ratio}"
            )
        rows.extend(speeds)
    packages = [name for name in ("tokenizers", "sentencepiece", "regex", "transformers") if importlib.util.find_spec(name)]
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    print(f"Python {platform.python_version()}, {versions}; {os.cpu_count()} cores, {platform.machine()}")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps([dataclasses.asdict(row) for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
