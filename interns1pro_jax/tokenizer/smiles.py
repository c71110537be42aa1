"""Is a run of characters a SMILES string? By rules alone (spec 6.1), or by RDKit's parser.

The two disagree on strings that are well formed and chemically impossible. Which one is asked decides token ids, so it is chosen,
never taken from what happens to be installed.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Literal

from interns1pro_jax.config import ConfigError

Check = Callable[[str], bool]
CheckName = Literal["rules", "rdkit"]

TWO_LETTER_ELEMENTS = re.findall(
    "..",
    "HeLiBeNeNaMgAlSiClArCaScTiCrMnFeCoNiCuZnGaGeAsSeBrKrRbSrZrNbMoTcRuRhPdAgCdInSnSbTeXeCsBaLaCePrNdPmSmEuGd"
    "TbDyHoErTmYbLuHfTaReOsIrPtAuHgTlPbBiPoAtRnFrRaAcThPaNpPuAmCmBkCfEsFmMdNoLrRfDbSgBhHsMtDsRgCnNhFlMcLvTsOg",
)
ONE_LETTER_ELEMENTS = "BCFHIKNOPSUVWY"
AROMATIC = "bcnosp"

_FIVE_LETTERS = re.compile(r"(?:[^A-Za-z]*+[A-Za-z]){5}")
_BONDS = "-=#:/\\.$"
_BOND = f"[{re.escape(_BONDS)}](?![{re.escape(_BONDS)}])"  # none follows another, in brackets neither
# Outside brackets: ring labels, organic and aromatic symbols, bonds. Brackets neither nest nor stay open.
_WELL_FORMED = re.compile(rf"(?>[NOPSFIbcnosp();\d]++|Cl?+|Br?+|{_BOND}|%\d\d|\[(?>[^\[\]{re.escape(_BONDS)}]|{_BOND})*+\])*+")
_CAPITAL = re.compile(r"[A-Z]")
_PARENTHESIS = re.compile(r"[()]")
_BRACKET = re.compile(r"\[([^\[\]]*)\]")
_LETTERS_OR_DIGITS_IN_A_ROW = re.compile(r"[A-GI-Za-z]{3}|\d{4}")
_NUMBER = re.compile(r"\d+")
# Brackets, and ring labels outside. A digit right after `%]` labels nothing (a quirk of the official check, which looks for `%` two
# characters back).
_BRACKET_OR_LABEL = re.compile(r"\[[^\]]*\](?:(?<=%\])\d)?|%\d\d|\d")
_DIGIT_WITHOUT_LABEL = re.compile(r"%\]\d")
_STARTS_WITH_ELEMENT = re.compile(rf"[{ONE_LETTER_ELEMENTS}{AROMATIC}]|{'|'.join(TWO_LETTER_ELEMENTS)}")


def by_rules(text: str) -> bool:
    """Spec 6.1 on a run of units, as detection finds them, in time linear in it."""
    if not _FIVE_LETTERS.match(text) or text[0] in _BONDS or text[-1] in _BONDS or not _WELL_FORMED.fullmatch(text):
        return False
    return _parentheses_close(text) and _rings_close(text) and ("[" not in text or _brackets_are_plausible(text))


def _parentheses_close(text: str) -> bool:
    """None closes that was not opened; open ones may remain, as in the official check."""
    depth = 0
    for mark in _PARENTHESIS.findall(text):
        depth += 1 if mark == "(" else -1
        if depth < 0:
            return False
    return True


def _rings_close(text: str) -> bool:
    """Every ring label occurs in pairs; a string without capitals has two digits or more."""
    labels = _BRACKET_OR_LABEL.findall(text)
    if "[" in text:
        labels = [label for label in labels if label[0] != "["]
    for label in set(labels):  # few are different
        if labels.count(label) % 2:
            return False
    return len(labels) >= 2 or _CAPITAL.search(text) is not None or len(labels) + len(_DIGIT_WITHOUT_LABEL.findall(text)) >= 2


def _brackets_are_plausible(text: str) -> bool:
    """The first bracket holds no long runs; none before the first with an element symbol is empty or has parentheses."""
    contents = _BRACKET.findall(text)
    if contents and (_LETTERS_OR_DIGITS_IN_A_ROW.search(contents[0]) or len(_NUMBER.findall(contents[0])) > 2):
        return False
    for content in contents:
        if not content or "(" in content or ")" in content:
            return False
        if _STARTS_WITH_ELEMENT.match(content):
            return True
    return True


def by_rdkit() -> Check:
    """The check of RDKit's parser.

    Raises:
      ConfigError: RDKit is not installed.
    """
    try:
        from rdkit import Chem, rdBase
    except ImportError as error:
        raise ConfigError(f"smiles_check='rdkit' needs rdkit ({error}); install it, or use smiles_check='rules'.") from error
    parse: Callable[[str], Any] = Chem.MolFromSmiles

    def check(text: str) -> bool:
        if not _FIVE_LETTERS.match(text):
            return False
        with rdBase.BlockLogs():
            return parse(text) is not None

    return check


def check_named(name: CheckName) -> Check:
    """Raises:
    ConfigError: the name is neither "rules" nor "rdkit", or RDKit is not installed.
    """
    if name not in ("rules", "rdkit"):
        raise ConfigError(f"smiles_check={name!r} must be 'rules' (by default, needs nothing) or 'rdkit' (RDKit's parser).")
    return by_rules if name == "rules" else by_rdkit()
