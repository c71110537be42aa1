"""Ids back to text: whole, or as they are generated."""

from __future__ import annotations

import codecs
from collections.abc import Collection, Iterable, Mapping, Sequence

SENTENCEPIECE_SPACE = "\u2581"


class ByteDecoder:
    """Text of ids whose tokens are pieces of UTF-8. Bytes that are no UTF-8 become U+FFFD.

    Args:
      contents: the bytes of each token, by id.
      hidden: ids that can be left out.
    """

    def __init__(self, contents: Sequence[bytes], hidden: Collection[int] = ()):
        self._contents = contents
        self._hidden = frozenset(hidden)

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """Raises:
        ValueError: an id that the tokenizer does not have.
        """
        return b"".join(self.content(i, skip_special=skip_special) for i in ids).decode("utf-8", "replace")

    def content(self, token_id: int, *, skip_special: bool = False) -> bytes:
        """The bytes of one token; none of a hidden one if those are left out.

        Raises:
          ValueError: see `decode`.
        """
        token_id = int(token_id)
        if not 0 <= token_id < len(self._contents):
            raise ValueError(f"id {token_id} is not in 0..{len(self._contents) - 1}; sample among the tokenizer's ids only.")
        return b"" if skip_special and token_id in self._hidden else self._contents[token_id]


class StreamDecoder:
    """Text of ids that come one by one. What is given out, joined, is `decode` of all ids; a character is given out once, when its
    last byte is there.

    Args:
      decoder: of the tokenizer.
      skip_special: as in `decode`.
    """

    def __init__(self, decoder: ByteDecoder, *, skip_special: bool = False):
        self._decoder = decoder
        self._skip_special = skip_special
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The text that the next id completes; often none.

        Raises:
          ValueError: see `ByteDecoder.decode`.
        """
        return self._utf8.decode(self._decoder.content(token_id, skip_special=self._skip_special))

    def finish(self) -> str:
        """What is left when no more ids come: U+FFFD for a character without its end. The stream can be used for another text then."""
        return self._utf8.decode(b"", final=True)


def token_bytes(name: str, specials: Mapping[str, int] | Collection[str] = ()) -> bytes:
    """The bytes of a byte-mapped token. In such a name printable characters of Latin-1 stand for the byte of their number, U+0100
    onwards for the other bytes in order, and U+2581 for a space; other characters, and the names of specials, stand for themselves."""
    if name in specials:
        return name.encode()
    return name.translate(_BYTES).encode("latin-1")


class _ByteTable(dict[int, str]):
    """Character to its bytes, each as the character of its number."""

    def __init__(self) -> None:
        printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        others = [byte for byte in range(256) if byte not in printable]
        super().__init__({byte: chr(byte) for byte in printable} | {0x100 + index: chr(byte) for index, byte in enumerate(others)})
        self[ord(SENTENCEPIECE_SPACE)] = " "

    def __missing__(self, code: int) -> str:
        return chr(code).encode().decode("latin-1")


_BYTES = _ByteTable()
