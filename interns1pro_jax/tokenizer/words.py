"""Byte-level BPE of plain text with the released vocabulary, word by word.

Merging is done by the `tokenizers` library. Most words of a text have been seen, so their ids are remembered, and the rest is the split
into words: both together run several times as fast as the library's own pass over the text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import chain

import regex
import tokenizers
from tokenizers import models, pre_tokenizers

from interns1pro_jax.tokenizer.decoding import SENTENCEPIECE_SPACE

# The split of the released vocabulary (spec 6, step 4): contractions, words with one leading sign, single digits, signs, white space.
SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# The same on ASCII, for the faster engine. U+001C to U+001F are white space to neither.
_ASCII_SPLIT = (
    r"'(?:[sStTmMdD]|[rR][eE]|[vV][eE]|[lL][lL])|[^\r\nA-Za-z0-9]?[A-Za-z]+|[0-9]"
    r"| ?[^\sA-Za-z0-9]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_split = regex.compile(SPLIT).findall
_split_ascii = re.compile(_ASCII_SPLIT, re.ASCII).findall

_REMEMBERED_WORDS = 1 << 18  # some 100 MB; then all are forgotten
_LONGEST_REMEMBERED = 32  # characters; longer words hardly return


def byte_level_words() -> pre_tokenizers.PreTokenizer:
    """The split as a step of the `tokenizers` library, with bytes mapped to characters after it."""
    split = pre_tokenizers.Split(tokenizers.Regex(SPLIT), behavior="isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


class Words(dict[str, list[int]]):
    """The ids of words, found when first asked for."""

    def __init__(self, core: tokenizers.Tokenizer):
        super().__init__()
        self._core = core

    def __missing__(self, word: str) -> list[int]:
        ids: list[int] = self._core.encode(word, add_special_tokens=False).ids
        if len(word) <= _LONGEST_REMEMBERED:
            if len(self) >= _REMEMBERED_WORDS:
                self.clear()
            self[word] = ids
        return ids


class PlainTextEncoder:
    """Text to ids, nothing in it being special.

    Args:
      vocab: byte-mapped token to id.
      merges: pairs, in the order of their rank.
    """

    def __init__(self, vocab: Mapping[str, int], merges: Sequence[tuple[str, str]]):
        core = tokenizers.Tokenizer(models.BPE(vocab=dict(vocab), merges=list(merges)))
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        self._words = Words(core)

    def encode(self, text: str) -> list[int]:
        """A literal U+2581 becomes a space, as the official class has it."""
        words = _split_ascii(text) if text.isascii() else _split(text.replace(SENTENCEPIECE_SPACE, " "))
        return list(chain.from_iterable(map(self._words.__getitem__, words)))
