"""The released tokenizer (spec 6): byte-level BPE, and segment models for SMILES, protein and DNA/RNA in tags or detected in the text."""

from __future__ import annotations

import importlib.metadata
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from interns1pro_jax.config import ConfigError
from interns1pro_jax.tokenizer import chat, detection
from interns1pro_jax.tokenizer.decoding import SENTENCEPIECE_SPACE, ByteDecoder, StreamDecoder, token_bytes
from interns1pro_jax.tokenizer.detection import Kind
from interns1pro_jax.tokenizer.messages import Message
from interns1pro_jax.tokenizer.released import ReleasedFiles
from interns1pro_jax.tokenizer.segments import SegmentEncoder
from interns1pro_jax.tokenizer.smiles import CheckName, check_named
from interns1pro_jax.tokenizer.words import PlainTextEncoder

_TAG_KINDS = {"SMILES": Kind.SMILES, "protein": Kind.PROTEIN, "dna": Kind.XNA, "rna": Kind.XNA}
_OPENING = {f"<{name}>": kind for name, kind in _TAG_KINDS.items()}
_CLOSING = frozenset(f"</{name}>" for name in _TAG_KINDS)
# These have no ids. They only keep detection away from a formula.
_PROTECTING, _UNPROTECTING = "<MOLFORMULA>", "</MOLFORMULA>"
_BATCH_CHARACTERS = 1 << 22  # detection holds some 40 bytes for each character that it looks at together
_DETECTED_NAMES = {Kind.SMILES: "SMILES", Kind.PROTEIN: "PROT", Kind.XNA: "XNA"}


class _Part(NamedTuple):
    """A stretch of one text that is encoded in one way.

    Attributes:
      text: its characters.
      added: its id, if it is an added token.
      kind: the segment model in force, if any.
      plain: whether it is plain text even so.
      scanned: whether detection looks at it; detected: whether that found it.
    """

    text: str
    added: int | None = None
    kind: Kind | None = None
    plain: bool = False
    scanned: bool = False
    detected: bool = False


class ScientificTokenizer:
    """A `Tokenizer`, id for id the official one.

    `encode` takes text: in it, tags of notations (`<SMILES>` ... `</SMILES>`, protein, dna, rna) are tags, and control tokens are
    ordinary characters. `encode_markup` takes what a chat template has rendered, and is the official encoding: all added tokens count.
    `encode_chat` takes a conversation.

    Args:
      files: of a release.
      smiles_check: what decides whether a run of characters is a SMILES string, "rules" or "rdkit".

    Raises:
      ConfigError: unusable files, or RDKit was asked for and is not installed.
    """

    def __init__(self, files: ReleasedFiles, smiles_check: CheckName = "rules"):
        self._files, self._smiles_check = files, smiles_check
        self._is_smiles = check_named(smiles_check)
        self._template = chat.ChatTemplate(files.chat_template)
        self._added = dict(files.added)
        self._plain = PlainTextEncoder(files.vocab, files.merges)
        names = sorted(files.vocab, key=files.vocab.__getitem__)
        self._segments = {kind: SegmentEncoder(path, offset, self._plain, names) for kind, (path, offset) in files.models.items()}
        by_id: dict[int, str] = dict(enumerate(names)) | {index: token for token, index in self._added.items()}
        for segment in self._segments.values():
            by_id |= {segment.offset + index: piece for index, piece in enumerate(segment.pieces)}
        if sorted(by_id) != list(range(len(by_id))):
            raise ConfigError(f"the ids of the vocabulary, added tokens and segment models overlap or leave gaps in 0..{max(by_id)}.")
        self._names = [by_id[index] for index in range(len(by_id))]
        contents = [token_bytes(name, self._added) for name in self._names]
        self._byte_counts = np.array([len(content) for content in contents])
        self._decoder = ByteDecoder(contents, [self._added[token] for token in files.hidden])
        tags = {*_OPENING, *_CLOSING}
        if missing := tags - set(self._added):
            raise ConfigError(f"the added tokens lack the tags {', '.join(sorted(missing))}; use the files of one release together.")
        self._split_tags = _splitter({*tags, _PROTECTING, _UNPROTECTING})
        self._split_added = _splitter({*self._added, _PROTECTING, _UNPROTECTING})

    @classmethod
    def load(cls, directory: str | Path, smiles_check: CheckName = "rules") -> ScientificTokenizer:
        """Reads a released directory.

        Raises:
          ConfigError: see the class.
        """
        return cls(ReleasedFiles.read(directory), smiles_check)

    def __reduce__(self) -> tuple[Any, ...]:
        """Workers of a data pipeline read the files themselves."""
        return type(self).load, (self._files.directory, self._smiles_check)

    @property
    def vocab_size(self) -> int:
        return len(self._names)

    @property
    def fingerprint(self) -> str:
        """RDKit's verdicts may change with its version, which counts where it is asked."""
        version = f"-rdkit{importlib.metadata.version('rdkit')}" if self._smiles_check == "rdkit" else ""
        return self._files.digest + version

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return self._encode(texts, self._split_tags)

    def encode_markup(self, text: str) -> list[int]:
        """Ids of text in which every added token counts as such, as the official class has it."""
        return self.encode_markup_batch([text])[0]

    def encode_markup_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return self._encode(texts, self._split_added)

    def tokens(self, text: str) -> list[str]:
        """What `encode_markup` makes of a text, for reading: byte-mapped tokens, with marks (without ids) around what was detected."""
        (parts,) = self._parts([text], self._split_added)
        found: list[str] = []
        for part, ids in zip(parts, self._encode_parts(parts), strict=True):
            tokens = [self._names[i] for i in ids]
            if part.detected and part.kind is not None:
                mark = f"{_DETECTED_NAMES[part.kind]}_AUTO_DETECT>"
                tokens = [f"<{mark}", *tokens, f"</{mark}"]
            found.extend(tokens)
        return found

    def decode(self, ids: Sequence[int], *, skip_special: bool = False) -> str:
        """The text of `ids`; bytes that are no UTF-8 become U+FFFD.

        Args:
          skip_special: leave out the tokens of turns and vision (spec 6: ids 151643 to 151656), as the official argument does.

        Raises:
          ValueError: an id that the tokenizer does not have.
        """
        return self._decoder.decode(ids, skip_special=skip_special)

    def stream(self, *, skip_special: bool = False) -> StreamDecoder:
        return StreamDecoder(self._decoder, skip_special=skip_special)

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        add_generation_prompt: bool = False,
        enable_thinking: bool = True,
    ) -> str:
        """The text of a conversation, as the release's template renders it: see `chat.ChatTemplate.render`."""
        return self._template.render(messages, tools=tools, add_generation_prompt=add_generation_prompt, enable_thinking=enable_thinking)

    def encode_chat(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        system: str | None = None,
        expansions: Sequence[str] | None = None,
        add_generation_prompt: bool = False,
        enable_thinking: bool = True,
    ) -> chat.Conversation:
        """The ids of a conversation, which of them are learnt, and where its media are: see `chat.encode`."""
        return chat.encode(
            self,
            self._template,
            messages,
            tools=tools,
            system=system,
            expansions=expansions,
            add_generation_prompt=add_generation_prompt,
            enable_thinking=enable_thinking,
        )

    def special(self, token: str) -> int:
        if token not in self._added:
            raise ConfigError(f"{token!r} is not a special token of the release; those are {', '.join(self._added)}.")
        return self._added[token]

    def byte_ends(self, ids: Sequence[int] | Int[np.ndarray, " tokens"]) -> Int[np.ndarray, " tokens"]:
        """Where each token ends in the UTF-8 bytes of `cleaned` text: tokens lose nothing of it."""
        return np.cumsum(self._byte_counts[np.asarray(ids, np.int64)])

    @staticmethod
    def cleaned(text: str) -> str:
        """The characters that encoding keeps: NFC, and spaces for U+2581.

        Raises:
          ValueError: the text is no Unicode: half of a surrogate pair.
        """
        return text if text.isascii() else _normalised(text).replace(SENTENCEPIECE_SPACE, " ")

    def _encode(self, texts: Sequence[str], splitter: re.Pattern[str]) -> list[list[int]]:
        ids: list[list[int]] = []
        for group in _groups(texts):
            parts = self._parts(group, splitter)
            encoded = iter(self._encode_parts(list(chain.from_iterable(parts))))
            ids.extend(list(chain.from_iterable(next(encoded) for _ in own)) for own in parts)
        return ids

    def _parts(self, texts: Sequence[str], splitter: re.Pattern[str]) -> list[list[_Part]]:
        """The parts of every text. Detection runs once for all."""
        tagged = [list(self._tagged(_normalised(text), splitter)) for text in texts]
        scanned = [part for own in tagged for part in own if part.scanned]
        spans: list[list[detection.Span]] = [[] for _ in scanned]
        for span in detection.find([part.text for part in scanned], self._is_smiles):
            spans[span.text].append(span)
        in_order = iter(spans)
        return [list(chain.from_iterable(_cut(part, next(in_order)) if part.scanned else [part] for part in own)) for own in tagged]

    def _tagged(self, text: str, splitter: re.Pattern[str]) -> Iterator[_Part]:
        """Splits at added tokens. A closing tag closes the innermost open one, whichever that is."""
        open_kinds: list[Kind] = []
        depth = 0  # of tags and protecting marks: not the length of `open_kinds`, for marks have no kind, and pairs may be crossed
        for index, piece in enumerate(splitter.split(text)):
            kind = open_kinds[-1] if open_kinds else None
            if index % 2 == 0:
                if piece:
                    yield _Part(piece, kind=kind, scanned=depth == 0)
                continue
            if piece in _OPENING:
                open_kinds.append(_OPENING[piece])
            elif piece in _CLOSING and open_kinds:
                open_kinds.pop()
            if piece in _OPENING or piece == _PROTECTING:
                depth += 1
            elif piece in _CLOSING or piece == _UNPROTECTING:
                depth = max(0, depth - 1)
            yield _Part(piece, self._added.get(piece), kind, plain=True)

    def _encode_parts(self, parts: Sequence[_Part]) -> list[list[int]]:
        """The ids of each part; the segment models take theirs all at once."""
        encoded: list[list[int]] = [[]] * len(parts)
        waiting: dict[Kind, list[int]] = {kind: [] for kind in Kind}
        for index, part in enumerate(parts):
            if part.added is not None:
                encoded[index] = [part.added]
            elif part.kind is None:
                encoded[index] = self._plain.encode(part.text)
            elif part.plain:
                encoded[index] = self._segments[part.kind].encode_plain(part.text)
            else:
                waiting[part.kind].append(index)
        for kind, indices in waiting.items():
            if indices:
                for index, ids in zip(indices, self._segments[kind].encode_batch([parts[i].text for i in indices]), strict=True):
                    encoded[index] = ids
        return encoded


def _groups(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    """The texts in groups of bounded size, or of one text."""
    start = size = 0
    for index, text in enumerate(texts):
        if index > start and size + len(text) > _BATCH_CHARACTERS:
            yield texts[start:index]
            start, size = index, 0
        size += len(text)
    if start < len(texts):
        yield texts[start:]


def _cut(part: _Part, spans: Sequence[detection.Span]) -> Iterator[_Part]:
    """A scanned part, with what was detected as parts of their own."""
    start = 0
    for span in spans:
        if start < span.start:
            yield _Part(part.text[start : span.start], kind=part.kind)
        yield _Part(part.text[span.start : span.end], kind=span.kind, detected=True)
        start = span.end
    if start < len(part.text):
        yield _Part(part.text[start:], kind=part.kind)


def _splitter(tokens: set[str]) -> re.Pattern[str]:
    """Splits a text so that the odd pieces are tokens, the longest that match."""
    return re.compile(f"({'|'.join(map(re.escape, sorted(tokens, key=len, reverse=True)))})")


def _normalised(text: str) -> str:
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError as error:
        wrong = f"U+{ord(text[error.start]):04X} at character {error.start}"
        raise ValueError(f"the text has half of a surrogate pair ({wrong}); decode it with errors='replace'.") from error
    return unicodedata.normalize("NFC", text)
