"""The messages of a conversation: OpenAI's form, its checks, and the media in it.

A message has a `role` (system, user, assistant, tool) and a `content`: a string, or a list of items `{"type": "text", "text": ...}`,
`{"type": "image", ...}`, `{"type": "video", ...}` and `{"type": "time_series", ...}`. An assistant's may have `reasoning_content`,
`tool_calls`, and `"loss": false` where it is to be read and not learnt.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from interns1pro_jax.tokenizer.base import (
    END_OF_TEXT,
    IMAGE,
    SIGNAL,
    SIGNAL_END,
    SIGNAL_START,
    TURN_END,
    TURN_START,
    VIDEO,
    VISION_END,
    VISION_START,
)

Message = Mapping[str, Any]
MediumKind = Literal["image", "video", "time_series"]

ROLES = ("system", "user", "assistant", "tool")
# What stands for a medium in a rendering: in its middle, the placeholder.
WRAPPERS: dict[MediumKind, str] = {
    "image": f"{VISION_START}{IMAGE}{VISION_END}",
    "video": f"{VISION_START}{VIDEO}{VISION_END}",
    "time_series": f"{SIGNAL_START}{SIGNAL}{SIGNAL_END}",
}
_CONTROL = (
    TURN_START, TURN_END, END_OF_TEXT, VISION_START, VISION_END, IMAGE, VIDEO, SIGNAL_START, SIGNAL_END, SIGNAL,
)  # fmt: skip
_KEYS = ("role", "content", "reasoning_content", "tool_calls", "tool_call_id", "name", "id", "loss")


class MessageError(ValueError):
    """A conversation that cannot be used. The text names the message, the key, the value and the remedy."""

    def __init__(self, where: str, problem: str):
        super().__init__(f"{where}: {problem}")


class MediumReference(NamedTuple):
    """Item number `item` of the content of message number `message`."""

    kind: MediumKind
    message: int
    item: int


def check(messages: Sequence[Message]) -> None:
    """Whether the template has a form for each message.

    Raises:
      MessageError: there is none, or it has a role, content or tool call of the wrong form.
    """
    if isinstance(messages, str | Mapping) or not messages:
        raise MessageError("messages", f"{_shown(messages)} must be a list of at least one message.")
    for index, message in enumerate(messages):
        where = f"message {index}"
        if not isinstance(message, Mapping):
            raise MessageError(where, f"{_shown(message)} must be a mapping with role and content.")
        if message.get("role") not in ROLES:
            raise MessageError(where, f"role={_shown(message.get('role'))} must be one of {', '.join(ROLES)}.")
        content = message.get("content")
        if isinstance(content, list):
            for number, item in enumerate(content):
                _check_item(f"{where}, content[{number}]", item)
        elif not (content is None or isinstance(content, str)):
            raise MessageError(where, f"content={_shown(content)} must be a string or a list of items.")
        reasoning = message.get("reasoning_content")
        if not (reasoning is None or isinstance(reasoning, str)):
            raise MessageError(where, f"reasoning_content={_shown(reasoning)} must be a string; leave it out where there is none.")
        calls = message.get("tool_calls")
        if not (calls is None or isinstance(calls, list)):
            raise MessageError(where, f"tool_calls={_shown(calls)} must be a list of calls.")
        for number, call in enumerate(calls or ()):
            _check_call(f"{where}, tool_calls[{number}]", call)


def check_for_training(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> None:
    """`check`, and whether each part of the conversation is rendered and nothing in it passes for something else.

    Raises:
      MessageError: see `check`; or a key, an item or a `loss` that would have no effect, or a text that spells a control token.
    """
    check(messages)
    for index, message in enumerate(messages):
        where = f"message {index}"
        if unknown := sorted(map(str, set(message) - set(_KEYS))):
            raise MessageError(where, f"key {unknown[0]!r} has no effect; rename or drop it ({', '.join(_KEYS)} are known).")
        if message["role"] != "assistant" and (message.get("reasoning_content") or message.get("tool_calls")):
            raise MessageError(where, f"a {message['role']} message has neither reasoning_content nor tool_calls; drop them.")
        loss = message.get("loss")
        if not (loss is None or isinstance(loss, bool)):
            raise MessageError(where, f"loss={_shown(loss)} must be true or false.")
        if loss and message["role"] != "assistant":
            raise MessageError(where, f"loss=true on a {message['role']} message: only assistant messages are trained; drop it.")
        content = message.get("content")
        for number, item in enumerate(content if isinstance(content, list) else ()):
            place, medium = f"{where}, content[{number}]", medium_kind(item)
            if medium is None and "text" not in item:
                raise MessageError(place, f"type={_shown(item.get('type'))} must be text, image, video or time_series.")
            if medium is not None and is_trained(message):
                raise MessageError(place, f"{medium} in an answer that is learnt; move it to a user message, or set loss to false.")
        check_spelling(where, message)
    for index, tool in enumerate(tools):
        check_spelling(f"tool {index}", tool)


def is_trained(message: Message) -> bool:
    return message["role"] == "assistant" and message.get("loss") is not False


def media(messages: Sequence[Message]) -> list[MediumReference]:
    """The images, videos and time series of a conversation, in reading order."""
    return [
        MediumReference(kind, index, number)
        for index, message in enumerate(messages)
        for number, item in enumerate(message["content"] if isinstance(message.get("content"), list) else ())
        if (kind := medium_kind(item)) is not None
    ]


def medium_kind(item: Mapping[str, Any]) -> MediumKind | None:
    """What an item of a content holds, by the template's rules; None for text, and for what the template drops."""
    kind = item.get("type")
    if kind in ("time_series", "time_series_url"):
        return "time_series"
    if "image" in item or "image_url" in item or kind == "image":
        return "image"
    if "video" in item or kind == "video":
        return "video"
    return None


def with_signals(messages: Sequence[Message]) -> list[Message]:
    """The messages with a wrapper in place of each time-series item, which the released template drops: directly before what
    follows it, without a label (spec 5.3)."""
    placed = {"type": "text", "text": WRAPPERS["time_series"]}
    return [
        {**message, "content": [placed if medium_kind(item) == "time_series" else item for item in content]}
        if isinstance(content := message.get("content"), list)
        else message
        for message in messages
    ]


def _check_item(where: str, item: Any) -> None:
    if not isinstance(item, Mapping):
        raise MessageError(where, f'{_shown(item)} must be a mapping such as {{"type": "text", "text": ...}}.')
    if medium_kind(item) is None and "text" in item and not isinstance(item["text"], str):
        raise MessageError(where, f"text={_shown(item['text'])} must be a string.")


def _check_call(where: str, call: Any) -> None:
    function = (call.get("function") or call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise MessageError(where, f"{_shown(call)} must be a mapping with name and arguments, or with them under function.")
    if not isinstance(function.get("arguments"), str | Mapping):
        raise MessageError(where, f"arguments={_shown(function.get('arguments'))} must be a mapping, or JSON as a string.")


def check_spelling(where: str, value: Any) -> None:
    """Raises:
    MessageError: a string in a JSON value spells a control token.
    """
    for path, text in _strings(value):
        if token := next((token for token in _CONTROL if token in text), None):
            raise MessageError(where, f"{path or 'the text'} spells the control token {token}, which would be read as one; take it out.")


def _strings(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Every string in a JSON value, keys of mappings included, with its place."""
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield f"a key of {path or 'it'}", str(key)
            yield from _strings(part, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list | tuple):
        for index, part in enumerate(value):
            yield from _strings(part, f"{path}[{index}]")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
