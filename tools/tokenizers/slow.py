"""The rules of the released tokenizer (spec 6 and 6.1), written out plainly: the oracle of the tests, and what the benchmark compares with.

It shares nothing with `interns1pro_jax.tokenizer` and goes about its work as the official class does: a search for added tokens at
every character, three searches with regular expressions, a loop over the characters of every candidate, merges in Python with a memory
of words, and a lookup for every token.
"""

from __future__ import annotations

import itertools
import json
import unicodedata
from collections.abc import Callable
from pathlib import Path

import regex
import sentencepiece

TWO_LETTERS = (
    "Ac|Ag|Al|Am|Ar|As|At|Au|Ba|Be|Bh|Bi|Bk|Br|Ca|Cd|Ce|Cf|Cl|Cm|Cn|Co|Cr|Cs|Cu|Db|Ds|Dy|Er|Es|Eu|Fe|Fl|Fm|Fr|Ga|Gd|Ge|He|Hf|Hg|Ho|Hs|"
    "In|Ir|Kr|La|Li|Lr|Lu|Lv|Mc|Md|Mg|Mn|Mo|Mt|Na|Nb|Nd|Ne|Nh|Ni|No|Np|Og|Os|Pa|Pb|Pd|Pm|Po|Pr|Pt|Pu|Ra|Rb|Re|Rf|Rg|Rh|Rn|Ru|Sb|Sc|Se|"
    "Sg|Si|Sm|Sn|Sr|Ta|Tb|Tc|Te|Th|Ti|Tl|Tm|Ts|Xe|Yb|Zn|Zr"
)
ONE_LETTER, AROMATIC = "BCFHIKNOPSUVWY", "bcnops"
UNIT = rf"\[[^\]]+\]|{TWO_LETTERS}|[{ONE_LETTER}{AROMATIC}]|[().=\-#@\d$%*:+/\\]"
SMILES = regex.compile(rf"(?![:.=])(?>{UNIT}){{10,}}(?<![:.=])")
PROTEIN, XNA = regex.compile("[A-Z]{27,}"), regex.compile("[ACGTU]{27,}")
WORDS = regex.compile(r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
OPENING = {"<SMILES>": "SMILES", "<protein>": "PROT", "<dna>": "XNA", "<rna>": "XNA"}
CLOSING = ("</SMILES>", "</protein>", "</dna>", "</rna>")
BONDS = "-=#:/\\.$"
SYMBOLS = {"B", "C", "N", "O", "P", "S", "F", "Cl", "Br", "I", *AROMATIC, *BONDS, *"[]();"}

Stretch = tuple[str, str]  # text, and what to do with it: an added token, a marker, or the name of a model ("" for plain text)


class SlowTokenizer:
    """Encodes with every added token in force.

    Args:
      directory: of the released layout.
      is_smiles: judges a candidate; the rule check by default.
    """

    def __init__(self, directory: Path, is_smiles: Callable[[str], bool] | None = None):
        config = json.loads((directory / "tokenizer_config.json").read_text())
        self.vocab: dict[str, int] = json.loads((directory / "vocab.json").read_text())
        lines = (directory / "merges.txt").read_text().split("\n")
        self.ranks = {tuple(line.split()): rank for rank, line in enumerate(lines) if line and not line.startswith("#version")}
        self.added = {token["content"]: int(index) for index, token in config["added_tokens_decoder"].items()}
        names = ("SMILES", "PROT", "XNA")
        self.models = {name: sentencepiece.SentencePieceProcessor(str(directory / f"tokenizer_{name}.model")) for name in names}
        self.offsets = {name: config[f"offset_{name}"] for name in self.models}
        self.is_smiles = is_smiles or passes_rules
        self.markers = ("<MOLFORMULA>", "</MOLFORMULA>")
        self.splitting = sorted([*self.added, *self.markers], key=len, reverse=True)
        self.bytes = {byte: chr(byte) for byte in [*range(33, 127), *range(161, 173), *range(174, 256)]}
        for byte in range(256):
            self.bytes.setdefault(byte, chr(256 + len([b for b in range(byte) if ord(self.bytes[b]) > 255])))
        self.remembered: dict[str, list[str]] = {}

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        models: list[str] = []  # of the open tags
        for piece, what in self.detected(self.split(unicodedata.normalize("NFC", text))):
            if what == "added":
                ids.append(self.added[piece])
                if piece in OPENING:
                    models.append(OPENING[piece])
                elif piece in CLOSING and models:
                    models.pop()
            elif what == "marker":
                ids.extend(self.look_up(token, models[-1] if models else "") for token in self.plain_tokens(piece))
            else:
                model = what or (models[-1] if models else "")
                ids.extend(self.look_up(token, model) for token in self.tokens(piece, model))
        return ids

    def split(self, text: str) -> list[Stretch]:
        stretches: list[Stretch] = []
        start = at = 0
        while at < len(text):
            token = next((token for token in self.splitting if text.startswith(token, at)), None)
            if token is None:
                at += 1
                continue
            if start < at:
                stretches.append((text[start:at], ""))
            stretches.append((token, "added" if token in self.added else "marker"))
            start = at = at + len(token)
        if start < len(text):
            stretches.append((text[start:], ""))
        return stretches

    def detected(self, stretches: list[Stretch]) -> list[Stretch]:
        depth = 0
        result: list[Stretch] = []
        for piece, what in stretches:
            if what:
                if piece in OPENING or piece == self.markers[0]:
                    depth += 1
                elif piece in CLOSING or piece == self.markers[1]:
                    depth = max(0, depth - 1)
                result.append((piece, what))
            elif depth:
                result.append((piece, ""))
            else:
                found = cut([(piece, "")], SMILES, "SMILES", lambda run, before, after: not before and not after and self.accepts(run))
                found = cut(found, PROTEIN, "PROT", lambda run, before, after: not set(run) <= set("ACGTU"))
                result.extend(cut(found, XNA, "XNA", lambda run, before, after: True))
        return result

    def accepts(self, run: str) -> bool:
        return sum(is_letter(c) for c in run) >= 5 and self.is_smiles(run)

    def tokens(self, text: str, model: str) -> list[str]:
        if not model:
            return self.plain_tokens(text)
        processor = self.models[model]
        tokens: list[str] = []
        for piece, index in zip(processor.encode(text, out_type=str), processor.encode(text, out_type=int), strict=True):
            tokens.extend(self.plain_tokens(piece) if index == 0 else [piece])
        return tokens

    def plain_tokens(self, text: str) -> list[str]:
        tokens: list[str] = []
        for word in WORDS.findall(text.replace("\u2581", " ")):
            tokens.extend(self.merge("".join(self.bytes[byte] for byte in word.encode())))
        return tokens

    def merge(self, word: str) -> list[str]:
        if word in self.remembered:
            return self.remembered[word]
        parts = list(word)
        while len(parts) > 1:
            best = min(itertools.pairwise(parts), key=lambda pair: self.ranks.get(pair, len(self.ranks)))
            if best not in self.ranks:
                break
            merged: list[str] = []
            while parts:
                length = 2 if tuple(parts[:2]) == best else 1
                merged.append("".join(parts[:length]))
                parts = parts[length:]
            parts = merged
        self.remembered[word] = parts
        return parts

    def look_up(self, token: str, model: str) -> int:
        if model and (index := self.models[model].piece_to_id(token)) != 0:
            return index + self.offsets[model]
        return self.vocab[token]


def is_letter(character: str) -> bool:
    return character.isascii() and character.isalpha()


def cut(stretches: list[Stretch], pattern: regex.Pattern, model: str, accepts: Callable[[str, bool, bool], bool]) -> list[Stretch]:
    """Takes what a pattern finds out of the stretches that are still plain.

    Args:
      accepts: gets a run, and whether a letter stands before it and after it.
    """
    result: list[Stretch] = []
    for text, what in stretches:
        if what:
            result.append((text, what))
            continue
        done = 0
        for match in pattern.finditer(text):
            start, end = match.span()
            if accepts(match[0], start > 0 and is_letter(text[start - 1]), end < len(text) and is_letter(text[end])):
                if done < start:
                    result.append((text[done:start], ""))
                result.append((match[0], model))
                done = end
        if done < len(text):
            result.append((text[done:], ""))
    return result


def passes_rules(text: str) -> bool:
    """Spec 6.1, in its order."""
    lower, digits = True, 0
    opened = closed = depth = 0
    rings: dict[str, bool] = {}  # whether open
    at = 0
    while at < len(text):
        c, advance = text[at], 0
        lower = lower and not "A" <= c <= "Z"
        if c in BONDS and (at in (0, len(text) - 1) or text[at - 1] in BONDS):
            return False
        if c == "[":
            opened, advance = opened + 1, 1
            if opened > closed + 1 or "]" not in text[at + 1 :]:
                return False
            span = text[at + 1 : text.index("]")]
            if regex.search(r"[A-GI-Za-z]{3}|\d{4}", span) or len(regex.findall(r"\d+", span)) > 2:
                return False
        elif c == "]":
            closed, advance = closed + 1, 1
            if closed > opened:
                return False
        elif c in "()":
            depth, advance = depth + (1 if c == "(" else -1), 1
            if depth < 0:
                return False
        if opened == closed:
            if c.isdigit():
                digits, advance = digits + 1, 1
                if "%" not in text[max(0, at - 2) : at]:
                    rings[c] = not rings.get(c, False)
            elif c == "%":
                number = text[at + 1 : at + 3]
                if len(number) < 2 or not number.isdigit():
                    return False
                digits, advance = digits + 1, 3
                rings[number] = not rings.get(number, False)
            elif not advance:
                if text[at : at + 2] in SYMBOLS:
                    advance = len(text[at : at + 2])
                elif c in SYMBOLS:
                    advance = 1
                else:
                    return False
        at += advance or 1
    if opened != closed or any(rings.values()) or (lower and digits < 2):
        return False
    for content in regex.findall(r"\[([^\[\]]*)\]", text):
        if not content or "(" in content or ")" in content:
            return False
        if content[0] in ONE_LETTER + AROMATIC or content[:2] in TWO_LETTERS.split("|"):
            return True
    return True
