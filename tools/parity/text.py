"""Checks of the tokenizer and the chat template."""

from __future__ import annotations

import functools
import importlib.util
import re
from pathlib import Path

from tokenizers import decoders

from interns1pro_jax.tokenizer.detection import Kind
from interns1pro_jax.tokenizer.released import ReleasedFiles
from interns1pro_jax.tokenizer.scientific import ScientificTokenizer
from tools.parity.golden import Golden

_SEGMENTS = {"SMILES": (Kind.SMILES, "SMILES"), "PROT": (Kind.PROTEIN, "protein"), "XNA": (Kind.XNA, "dna")}


class Text:
    """The tokenizer of a released directory, with either check of SMILES strings."""

    def __init__(self, directory: Path):
        self._directory = directory

    @functools.cached_property
    def files(self) -> ReleasedFiles:
        return ReleasedFiles.read(self._directory)

    @functools.cached_property
    def rules(self) -> ScientificTokenizer:
        return ScientificTokenizer(self.files, "rules")

    @functools.cached_property
    def rdkit(self) -> ScientificTokenizer | None:
        """None if it is not installed."""
        return ScientificTokenizer(self.files, "rdkit") if importlib.util.find_spec("rdkit") else None


def check_tokenizer(golden: Golden, text: Text) -> None:
    """Tokens and ids of every case, with the rule check and, if it is installed, with RDKit; and the texts of the ids."""
    golden.get("note")
    if text.rdkit is None:
        golden.note("rdkit is not installed: what it decides was not compared")
    for prefix in _prefixes(golden, "text"):
        content, ids = golden.input(f"{prefix}text"), golden.input(f"{prefix}input_ids")
        suffix = "_rule_based" if f"{prefix}input_ids_rule_based" in golden else ""
        for tokenizer, end in ((text.rules, suffix), (text.rdkit, "")):
            if tokenizer is not None:
                golden.same(f"{prefix}tokens{end}", tokenizer.tokens(content))
                golden.same(f"{prefix}input_ids{end}", tokenizer.encode_markup(content))
            else:
                golden.get(f"{prefix}tokens")
        golden.same(f"{prefix}decoded", text.rules.decode(ids))
        golden.same(f"{prefix}decoded_skip_special", text.rules.decode(ids, skip_special=True))


def check_segments(golden: Golden, text: Text) -> None:
    """Pieces of each segment model, and their ids in it: the ids of tagged text, less the first of the model's."""
    for prefix in _prefixes(golden, "model"):
        kind, tag = _SEGMENTS[golden.input(f"{prefix}model")]
        _, first = text.files.models[kind]
        ids = text.rules.encode_markup(f"<{tag}>{golden.input(f'{prefix}text')}</{tag}>")[1:-1]
        golden.same(f"{prefix}pieces", [text.rules.decode([i]) for i in ids])
        golden.same(f"{prefix}piece_ids", [i - first for i in ids])


def check_chat(golden: Golden, text: Text) -> None:
    """Renderings and their ids."""
    for index, case in enumerate(golden.document):
        for name in golden:
            if name.startswith((f"{index}/name", f"{index}/messages/", f"{index}/kwargs/")):
                golden.input(name)
        rendered = text.rules.render(case["messages"], **case["kwargs"])
        golden.same(f"{index}/rendered", rendered)
        golden.same(f"{index}/input_ids", text.rules.encode_markup(rendered))


def check_added_tokens(golden: Golden, text: Text) -> None:
    for token in golden:
        golden.same(token, text.rules.special(token))


def check_tokenizer_config(golden: Golden, text: Text) -> None:
    """Names of the added tokens, by id; first ids of the segment models. The rest says how the official class goes about it."""
    offsets = {f"offset_{name}": text.files.models[kind][1] for name, (kind, _) in _SEGMENTS.items()}
    for name in golden:
        if match := re.fullmatch(r"added_tokens_decoder/(\d+)/content", name):
            golden.same(name, text.rules.decode([int(match[1])]))
        elif name in offsets:
            golden.same(name, offsets[name])
        else:
            golden.input(name)


def check_special_tokens(golden: Golden, text: Text) -> None:
    """Each is a token, which decoding can leave out."""
    for name in golden:
        leaf = golden.judged(name)
        for token in leaf if isinstance(leaf, list) else [leaf] if isinstance(leaf, str) else ():
            if shown := text.rules.decode([text.rules.special(token)], skip_special=True):
                golden.problem(f"{name}: {shown} is not left out of decoded text")


def check_vocabulary(golden: Golden, text: Text) -> None:
    """Each id of plain text stands for the bytes of its name. The other names are never produced."""
    byte_level = decoders.ByteLevel()
    first = min(text.files.added.values())
    for name in golden:
        index = golden.judged(name)
        if index < first and text.rules.decode([index]) != byte_level.decode([name]):
            golden.problem(f"{name}: id {index} is {text.rules.decode([index])!r}, official {byte_level.decode([name])!r}")


def _prefixes(golden: Golden, leaf: str) -> list[str]:
    """Of the cases: what stands before the last part of their names."""
    return [name.removesuffix(leaf) for name in golden if name == leaf or name.endswith(f"/{leaf}")]
