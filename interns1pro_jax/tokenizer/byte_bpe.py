"""Byte-level byte-pair encoding: any text in, the same text out, with the pre-tokenisation of the released base vocabulary."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from interns1pro_jax.config import ConfigError
from interns1pro_jax.tokenizer.base import SPECIAL_TOKENS
from interns1pro_jax.tokenizer.decoding import ByteDecoder, StreamDecoder, token_bytes
from interns1pro_jax.tokenizer.words import byte_level_words

_BYTES = 256


class ByteBpeTokenizer:
    """A `Tokenizer` over bytes. NFC-normalised text survives `decode(encode(text))` unchanged."""

    def __init__(self, core: tokenizers.Tokenizer, where: str = "tokenizer"):
        self._specials = {token: token_id for token in SPECIAL_TOKENS if (token_id := core.token_to_id(token)) is not None}
        if missing := [token for token in SPECIAL_TOKENS if token not in self._specials]:
            raise ConfigError(f"{where} lacks the special tokens {missing}; train it with ByteBpeTokenizer.train, or add them.")
        core.encode_special_tokens = True
        self._core = core
        self._where = where
        names: list[str] = []
        for index in range(core.get_vocab_size()):
            if (name := core.id_to_token(index)) is None:
                raise ConfigError(f"{where}: no token has id {index}; its ids must be 0, 1, ... without gaps.")
            names.append(name)
        self._decoder = ByteDecoder([token_bytes(name, self._specials) for name in names])

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> ByteBpeTokenizer:
        """Learns merges from `texts`. The special tokens get ids 0, 1, ... in the order of `SPECIAL_TOKENS`, the bytes follow.

        Raises:
          ConfigError: `vocab_size` does not even hold the special tokens and the 256 bytes.
        """
        smallest = len(SPECIAL_TOKENS) + _BYTES
        if vocab_size < smallest:
            raise ConfigError(f"vocab_size={vocab_size} must be at least {smallest}: the special tokens and the 256 bytes.")
        core = tokenizers.Tokenizer(models.BPE())
        core.normalizer = normalizers.NFC()
        core.pre_tokenizer = byte_level_words()
        core.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(SPECIAL_TOKENS),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        core.train_from_iterator(texts, trainer)
        return cls(core)

    @classmethod
    def load(cls, path: str | Path) -> ByteBpeTokenizer:
        """Reads what `save` wrote (the `tokenizer.json` format).

        Raises:
          ConfigError: the file is missing, broken, or lacks special tokens.
        """
        if not Path(path).is_file():
            raise ConfigError(f"{path} does not exist; give the tokenizer.json of the prepared data or of a checkpoint.")
        try:
            core = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception for broken content
            raise ConfigError(f"{path} is not a readable tokenizer ({error}); prepare or fetch it again.") from error
        return cls(core, str(path))

    def save(self, path: str | Path) -> None:
        """Writes one JSON file; it is complete or absent."""
        partial = Path(f"{path}.partial")
        partial.write_text(self._core.to_str(pretty=True), encoding="utf-8")
        os.replace(partial, path)

    @property
    def vocab_size(self) -> int:
        return self._core.get_vocab_size()

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(self._core.to_str().encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        return self._core.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._core.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        return self._decoder.decode(ids)

    def stream(self) -> StreamDecoder:
        return StreamDecoder(self._decoder)

    def special(self, token: str) -> int:
        if token not in self._specials:
            raise ConfigError(f"{token!r} is not a special token of {self._where}; those are {', '.join(SPECIAL_TOKENS)}.")
        return self._specials[token]
