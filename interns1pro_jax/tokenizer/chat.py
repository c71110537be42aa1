"""Conversations by the released chat template (spec 5.4), and its inverse: which tokens a model is trained to produce."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn, Protocol

import jinja2
import jinja2.sandbox
import numpy as np
from jaxtyping import Bool, Int

from interns1pro_jax.config import ConfigError
from interns1pro_jax.tokenizer.base import IMAGE, SIGNAL, TURN_END, TURN_START, VIDEO
from interns1pro_jax.tokenizer.messages import (
    WRAPPERS,
    MediumKind,
    MediumReference,
    Message,
    MessageError,
    check,
    check_for_training,
    check_spelling,
    is_trained,
    media,
    with_signals,
)

_PLACEHOLDERS: dict[MediumKind, str] = {"image": IMAGE, "video": VIDEO, "time_series": SIGNAL}
_WRAPPER = re.compile("|".join(map(re.escape, WRAPPERS.values())))
# An assistant's turn: what a generation prompt gives (with thoughts, or without), and what follows it.
_ANSWER = re.compile(rf"{re.escape(TURN_START)}assistant\n(?:<think></think>\n\n|<think>)?(?P<answer>.*?{re.escape(TURN_END)})", re.DOTALL)


class MarkupTokenizer(Protocol):
    """What encoding a conversation takes: a tokenizer to which every added token in a text counts as such."""

    def encode_markup(self, text: str) -> list[int]: ...

    def cleaned(self, text: str) -> str: ...

    def byte_ends(self, ids: Sequence[int] | Int[np.ndarray, " tokens"]) -> Int[np.ndarray, " tokens"]: ...

    def special(self, token: str) -> int: ...


class ChatTemplate:
    """A template of the release, in Jinja, run where it can change and reach nothing.

    Args:
      source: the template.

    Raises:
      ConfigError: it is no template.
    """

    def __init__(self, source: str):
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _json
        environment.globals["raise_exception"] = _refuse
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ConfigError(f"the chat template is broken in line {error.lineno} ({error.message}); fetch it again.") from error

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        add_generation_prompt: bool = False,
        enable_thinking: bool = True,
    ) -> str:
        """The text of a conversation, as the release renders it.

        Thoughts are kept after the last question only; content items that are neither text, image nor video are dropped.

        Raises:
          MessageError: no messages, or one that the template has no form for.
        """
        check(messages)
        rendered = [{key: value for key, value in message.items() if value is not None} for message in messages]
        try:
            return self._template.render(
                messages=rendered,
                tools=list(tools),
                add_generation_prompt=add_generation_prompt,
                enable_thinking=enable_thinking,
            )
        except (jinja2.TemplateError, TypeError) as error:
            raise MessageError("messages", f"the chat template refuses them ({error}).") from error


class Medium(NamedTuple):
    """An image, a video or a time series of a conversation.

    Attributes:
      reference: its kind, and which message and item it is.
      start, stop: its placeholders are among these tokens; in a video, others stand between them.
    """

    reference: MediumReference
    start: int
    stop: int


@dataclasses.dataclass(frozen=True, eq=False)
class Conversation:
    """A conversation as token ids.

    Attributes:
      text: what was encoded.
      ids: of the whole text.
      loss_mask: the tokens to be learnt, as labels: the loss of predicting them counts.
      media: in reading order.
    """

    text: str
    ids: Int[np.ndarray, " tokens"]
    loss_mask: Bool[np.ndarray, " tokens"]
    media: tuple[Medium, ...]


def encode(
    tokenizer: MarkupTokenizer,
    template: ChatTemplate,
    messages: Sequence[Message],
    *,
    tools: Sequence[Mapping[str, Any]] = (),
    system: str | None = None,
    expansions: Sequence[str] | None = None,
    add_generation_prompt: bool = False,
    enable_thinking: bool = True,
) -> Conversation:
    """A conversation to train on, or to be continued.

    Learnt is what the model has to write: of each assistant message without `"loss": false`, everything from where a generation
    prompt would end (after `<think>`, or after the empty thought of an answer without) to the closing `<|im_end|>`. A token that
    also holds characters from before it (a line break that merges with the header's) is not learnt.

    Args:
      system: a system message to put before the others.
      expansions: for each of `media(messages)`, what replaces its wrapper: as many placeholders as it has embeddings, and the times
        of a video's frames. By default each has one placeholder.

    Raises:
      MessageError: see `messages.check_for_training`; or expansions that do not fit the media.
    """
    check_for_training(messages, tools)
    references = media(messages)
    if expansions is None:
        expansions = [WRAPPERS[reference.kind] for reference in references]
    if len(expansions) != len(references):
        raise MessageError("expansions", f"{len(expansions)} do not fit the {len(references)} media of the messages; give one for each.")
    rendered = with_signals(messages)
    if system is not None:
        if messages[0]["role"] == "system":
            raise MessageError("message 0", "it is a system message, and system= is given as well; drop one.")
        rendered.insert(0, {"role": "system", "content": system})
        check_spelling("system", system)
    text = template.render(rendered, tools=tools, add_generation_prompt=add_generation_prompt, enable_thinking=enable_thinking)
    text = _expanded(tokenizer.cleaned(text), references, expansions)
    ids = np.array(tokenizer.encode_markup(text), np.int32)
    return Conversation(text, ids, _loss_mask(tokenizer, text, ids, messages), tuple(_located(tokenizer, ids, references, expansions)))


def _expanded(text: str, references: Sequence[MediumReference], expansions: Sequence[str]) -> str:
    found = _WRAPPER.findall(text)
    if found != [WRAPPERS[reference.kind] for reference in references]:
        raise MessageError("messages", f"the chat template shows {len(found)} of {len(references)} media; a thought can have none.")
    replacements = iter(expansions)
    return _WRAPPER.sub(lambda _: next(replacements), text)


def _loss_mask(
    tokenizer: MarkupTokenizer, text: str, ids: Int[np.ndarray, " tokens"], messages: Sequence[Message]
) -> Bool[np.ndarray, " tokens"]:
    answers = list(_ANSWER.finditer(text))
    assistants = [message for message in messages if message["role"] == "assistant"]
    if len(answers) != len(assistants):
        raise MessageError("messages", f"the rendering has {len(answers)} assistant turns for {len(assistants)} assistant messages.")
    ends = tokenizer.byte_ends(ids)
    starts = np.append(0, ends[:-1])
    mask = np.zeros(len(ids), bool)
    bytes_before = characters_before = 0
    for message, match in zip(assistants, answers, strict=True):
        start, stop = match.span("answer")
        start_byte = bytes_before + len(text[characters_before:start].encode())
        stop_byte = start_byte + len(text[start:stop].encode())
        bytes_before, characters_before = stop_byte, stop
        mask[np.searchsorted(starts, start_byte) : np.searchsorted(ends, stop_byte, "right")] = is_trained(message)
    return mask


def _located(
    tokenizer: MarkupTokenizer, ids: Int[np.ndarray, " tokens"], references: Sequence[MediumReference], expansions: Sequence[str]
) -> Iterator[Medium]:
    places = np.flatnonzero(np.isin(ids, [tokenizer.special(token) for token in _PLACEHOLDERS.values()])).tolist()
    counts = []
    for number, (reference, expansion) in enumerate(zip(references, expansions, strict=True)):
        counts.append(expansion.count(_PLACEHOLDERS[reference.kind]))
        if other := next((token for kind, token in _PLACEHOLDERS.items() if kind != reference.kind and token in expansion), None):
            raise MessageError(f"expansions[{number}]", f"it has {other}, but the medium is of kind {reference.kind}; give them in order.")
    if not all(counts) or sum(counts) != len(places):
        raise MessageError("expansions", f"their {counts} placeholders give {len(places)} in the tokens; each medium needs one or more.")
    for reference, count in zip(references, counts, strict=True):
        own, places = places[:count], places[count:]
        yield Medium(reference, own[0], own[-1] + 1)


def _json(value: Any, ensure_ascii: bool = False, indent: int | None = None, sort_keys: bool = False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, sort_keys=sort_keys)


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
