"""The forms of a user's record, in JSON lines or Parquet, and how each becomes a document.

    {"messages": [{"role": "user", "content": ...}, ...]}     a conversation (`tokenizer.messages`); contents are strings or lists of items
    {"content": [item, ...]}                                  text, images, videos and signals in reading order
    {"text": "..."}                                           a plain document
    {"fields": {"name": value, ...}}                          a structured record, for `transforms` to put into words

Items are OpenAI's: {"type": "text", "text": ...}, {"type": "image_url", "image_url": {"url": ...}}, {"type": "video_url", ...}, and
{"type": "time_series_url", "time_series_url": {"url": ..., "sampling_rate": ...}}. A URL is a path, relative to the directory of the
file or absolute, or data:...;base64,.... Any record may have "id", "tags" and "licence", and beside messages "tools". Everything else
is an error with a reason, so that no misspelt key drops an image.
"""

from __future__ import annotations

import base64
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any

from interns1pro_jax.data import paths
from interns1pro_jax.data.media.images import read_image
from interns1pro_jax.data.media.limits import ImageLimits, SignalLimits, VideoLimits
from interns1pro_jax.data.media.signals import read_signal
from interns1pro_jax.data.media.videos import read_video
from interns1pro_jax.data.records import Document, ImagePart, Part, RejectedRecord, TextPart, VideoPart
from interns1pro_jax.tower_config import AnyVision

FORMS = ("messages", "content", "text", "fields")
_COMMON = {"id", "tags", "licence"}
_BAD_FORM = "not a known form"
# What may stand beside the url of an item.
_DETAILS: dict[str, dict[str, type | UnionType]] = {
    "image_url": {"detail": str},
    "video_url": {},
    "time_series_url": {"sampling_rate": int | float, "unit": str, "channels": list, "format": str},
}
# Checked before anything is read; what the readers of media allow.
_MAX_BYTES = {
    "image_url": ImageLimits().max_bytes,
    "video_url": VideoLimits().max_bytes,
    "time_series_url": SignalLimits().max_bytes,
}


@dataclasses.dataclass(frozen=True)
class RecordReader:
    """Makes documents of records.

    Attributes:
      source: name of the collection.
      base: directory that relative URLs start from.
      vision: tower that videos are sampled for; None refuses them.
      system: a system message for conversations that have none.
      licence: of records that do not name theirs.
    """

    source: str
    base: str
    vision: AnyVision | None
    system: str | None = None
    licence: str = ""

    def document(self, record: Mapping[str, Any], identifier: str) -> Document:
        """The document of a record.

        Raises:
          RejectedRecord, MediaError: it cannot be used; `reason` is why.
        """
        if not isinstance(record, Mapping):
            raise RejectedRecord(_BAD_FORM, f"a record is an object, not {type(record).__name__}.")
        messages = None
        forms = [form for form in FORMS if form in record]
        if len(forms) != 1:
            raise RejectedRecord(_BAD_FORM, f"a record has one of {', '.join(FORMS)}, not {forms or sorted(record)}.")
        if unknown := sorted(set(record) - _COMMON - {forms[0]} - ({"tools"} if forms[0] == "messages" else set())):
            raise RejectedRecord(_BAD_FORM, f"unknown keys {unknown}; a record with {forms[0]!r} may have {', '.join(sorted(_COMMON))}.")
        tags = record.get("tags", ())
        if isinstance(tags, str) or not isinstance(tags, Sequence) or not all(isinstance(tag, str) for tag in tags):
            raise RejectedRecord(_BAD_FORM, f"tags={tags!r} must be a list of strings.")
        match forms[0]:
            case "messages":
                messages, parts = self._conversation(record["messages"])
            case "content":
                parts = tuple(part for _, part in self._items(record["content"]))
            case "text":
                parts = (TextPart(_text(record["text"], "text")),)
            case _:
                raise RejectedRecord("not a known form", "structured fields need a template that puts them into words; give --transform.")
        tools = record.get("tools", ())
        if not isinstance(tools, list | tuple) or (tools and messages is None):
            raise RejectedRecord("not a known form", "tools is a list, beside messages.")
        licence, name = str(record.get("licence", self.licence)), str(record.get("id", identifier))
        return Document(parts, self.source, licence, name, tuple(tags), messages, tuple(tools))

    def _conversation(self, messages: Any) -> tuple[tuple[Mapping[str, Any], ...], tuple[Part, ...]]:
        """Messages in the tokenizer's form, and their media. What the tokenizer checks is left to it."""
        if not isinstance(messages, list) or not messages or not all(isinstance(message, Mapping) for message in messages):
            raise RejectedRecord(_BAD_FORM, "messages must be a list of at least one message, each an object.")
        if not any(message.get("role") == "assistant" for message in messages):
            raise RejectedRecord("nothing to learn", "no message is an assistant's.")
        rewritten, media = [], []
        if self.system is not None and messages[0].get("role") != "system":
            rewritten.append({"role": "system", "content": self.system})
        for message in messages:
            content = message.get("content")
            if isinstance(content, list):
                items = self._items(content)
                media += [part for _, part in items if not isinstance(part, TextPart)]
                message = {**message, "content": [item for item, _ in items]}
            rewritten.append(message)
        return tuple(rewritten), tuple(media)

    def _items(self, items: Any) -> list[tuple[dict[str, Any], Part]]:
        """Items in the tokenizer's form, and as parts."""
        if not isinstance(items, list) or not items:
            raise RejectedRecord(_BAD_FORM, "a content must be a string or a list of at least one item.")
        return [self._item(number, item) for number, item in enumerate(items)]

    def _item(self, number: int, item: Any) -> tuple[dict[str, Any], Part]:
        kind = item.get("type") if isinstance(item, Mapping) else None
        if kind == "text" and set(item) == {"type", "text"}:
            return dict(item), TextPart(_text(item["text"], f"item {number}"))
        if kind not in ("image_url", "video_url", "time_series_url") or set(item) != {"type", kind} or not isinstance(item[kind], Mapping):
            raise RejectedRecord(_BAD_FORM, f"item {number} is no text, image_url, video_url or time_series_url of the documented form.")
        details = dict(item[kind])
        url = _text(details.pop("url", None), f"item {number}, url")
        content, suffix = self._fetch(url, _MAX_BYTES[kind])
        if unknown := sorted(set(details) - set(_DETAILS[kind])):
            raise RejectedRecord(_BAD_FORM, f"item {number}: unknown keys {unknown} beside url.")
        for key, value in details.items():
            if value is not None and (isinstance(value, bool) or not isinstance(value, _DETAILS[kind][key])):
                raise RejectedRecord(
                    _BAD_FORM, f"item {number}: {key}={value!r} is of type {type(value).__name__}; correct it or leave it out."
                )
        shown = url if not url.startswith("data:") else f"item {number}"
        match kind:
            case "image_url":
                return {"type": "image"}, ImagePart(read_image(content, name=shown), content)
            case "video_url":
                if self.vision is None:
                    raise RejectedRecord("no tower", "the model has no vision tower for a video; drop the record.")
                video = read_video(content, self.vision, name=shown)
                return {"type": "video"}, VideoPart(video.frames, tuple(video.seconds))
            case _:
                path = paths.join(self.base, url)
                # A WFDB record is a header and the files beside it.
                source = Path(path) if suffix in ("hea", "dat") and paths.is_local(path) else content
                signal = read_signal(source, name=shown, **{"format": suffix, **details})
                return {"type": "time_series"}, signal

    def _fetch(self, url: str, max_bytes: int) -> tuple[bytes, str]:
        """The bytes behind a URL, and the suffix that names their format."""
        if url.startswith("data:"):
            header, _, encoded = url.partition(",")
            if not header.endswith(";base64"):
                raise RejectedRecord(_BAD_FORM, "a data: URL must be base64.")
            try:
                return base64.b64decode(encoded, validate=True), header.removesuffix(";base64").rpartition("/")[2]
            except ValueError as error:
                raise RejectedRecord("unreadable file", f"a data: URL is not base64 ({error}).") from error
        if url.startswith(("http://", "https://")):
            raise RejectedRecord("missing file", f"{url} is not fetched; download it and name the file.")
        path = paths.join(self.base, url)
        try:
            if (size := paths.size(path) or 0) > max_bytes:
                raise RejectedRecord("over the limits", f"{path!r} has {size:,} bytes, more than {max_bytes:,}; cut it.")
            return paths.read_bytes(path), path.rpartition(".")[2].lower()
        except (OSError, ValueError) as error:  # ValueError: a path with a null character
            why = getattr(error, "strerror", None) or error
            raise RejectedRecord("missing file", f"{path!r} cannot be read ({why}); check the path in the record.") from error


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise RejectedRecord(_BAD_FORM, f"{where} must be a string, not {type(value).__name__}.")
    if not value.strip():
        raise RejectedRecord("empty", f"{where} has no characters.")
    return value


def parse_line(line: bytes) -> Any:
    """A line of a JSON lines file.

    Raises:
      RejectedRecord: it is no JSON.
    """
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise RejectedRecord("not JSON", f"{error}") from error
