"""A segment model: SentencePiece pieces of one notation, for what lies in tags or was detected (spec 6, steps 4 and 5)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import sentencepiece

from interns1pro_jax.config import ConfigError
from interns1pro_jax.tokenizer.words import PlainTextEncoder

_UNKNOWN = 0


class SegmentEncoder:
    """Encodes text with one model; what the model has no piece for is plain text.

    Args:
      path: the model.
      offset: id of its first piece.
      plain: encodes what has no piece.
      names: byte-mapped tokens of plain text, by id.

    Raises:
      ConfigError: no such file, or it is no such model.
    """

    def __init__(self, path: Path, offset: int, plain: PlainTextEncoder, names: Sequence[str]):
        if not path.is_file():
            raise ConfigError(f"{path} does not exist; a released directory holds it.")
        self._model = sentencepiece.SentencePieceProcessor()
        try:
            self._model.LoadFromSerializedProto(path.read_bytes())
        except RuntimeError as error:
            raise ConfigError(f"{path} is not a SentencePiece model ({error}); fetch it again.") from error
        if self._model.unk_id() != _UNKNOWN:
            raise ConfigError(f"{path}: the unknown piece has id {self._model.unk_id()}, but must have {_UNKNOWN}.")
        self.offset = offset
        self.pieces: list[str] = self._model.id_to_piece(list(range(self._model.get_piece_size())))
        self._plain = plain
        known = {piece: index + offset for index, piece in enumerate(self.pieces) if index != _UNKNOWN}
        # Tokens of plain text under this model: the piece of the same spelling, if there is one.
        self._own_id = [known.get(name, index) for index, name in enumerate(names)]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        encoded: list[list[int]] = self._model.encode(list(texts), out_type=int)
        return [
            self._with_plain_parts(text) if _UNKNOWN in ids else [i + self.offset for i in ids]
            for text, ids in zip(texts, encoded, strict=True)
        ]

    def encode_plain(self, text: str) -> list[int]:
        """Plain text inside this model's tag: its tokens, where the model has none of the same spelling."""
        return [self._own_id[i] for i in self._plain.encode(text)]

    def _with_plain_parts(self, text: str) -> list[int]:
        ids: list[int] = []
        model = self._model
        for piece, index in zip(model.encode(text, out_type=str), model.encode(text, out_type=int), strict=True):
            if index == _UNKNOWN:
                ids.extend(self.encode_plain(piece))
            else:
                ids.append(index + self.offset)
        return ids
