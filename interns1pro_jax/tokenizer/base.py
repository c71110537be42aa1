"""The protocol of a tokenizer, and the special tokens of the family (names as in the released `added_tokens.json`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from interns1pro_jax.tokenizer.decoding import StreamDecoder

END_OF_TEXT = "<|endoftext|>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
VISION_START = "<|vision_start|>"
VISION_END = "<|vision_end|>"
IMAGE = "<|image_pad|>"
VIDEO = "<|video_pad|>"
SIGNAL_START = "<|ts|>"
SIGNAL_END = "<|/ts|>"
SIGNAL = "<TS_CONTEXT>"

SPECIAL_TOKENS = (
    END_OF_TEXT, TURN_START, TURN_END, VISION_START, VISION_END, IMAGE, VIDEO, SIGNAL_START, SIGNAL_END, SIGNAL,
)  # fmt: skip


class Tokenizer(Protocol):
    """Encodes text. Text never yields special tokens: whoever builds a sequence puts them in by id, so a document that spells
    out `<|image_pad|>` cannot claim an image."""

    @property
    def vocab_size(self) -> int:
        """Number of ids; every id is in 0..vocab_size-1."""
        ...

    @property
    def fingerprint(self) -> str:
        """Equal for tokenizers that give the same ids, in hexadecimal digits: to be stored beside what was encoded."""
        ...

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, specials spelled out in it included as ordinary characters."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of several texts, in parallel where that is faster."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; special tokens appear under their names."""
        ...

    def stream(self) -> StreamDecoder:
        """Decodes ids that come one by one."""
        ...

    def special(self, token: str) -> int:
        """The id of a special token.

        Raises:
          ConfigError: the tokenizer has no such token.
        """
        ...


def model_token_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """The placeholder ids as keyword arguments of `ModelConfig`."""
    names = {
        "image_token_id": IMAGE,
        "video_token_id": VIDEO,
        "vision_start_token_id": VISION_START,
        "vision_end_token_id": VISION_END,
        "ts_token_id": SIGNAL,
        "ts_start_token_id": SIGNAL_START,
        "ts_end_token_id": SIGNAL_END,
    }
    return {name: tokenizer.special(token) for name, token in names.items()}
