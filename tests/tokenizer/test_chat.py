"""Laws of conversations: renderings are the release's; exactly what a model has to write is learnt; media are where they are."""

import json
import random

import numpy as np
import pytest

from interns1pro_jax.config import ConfigError
from interns1pro_jax.tokenizer import messages as chat_messages
from interns1pro_jax.tokenizer.chat import ChatTemplate
from interns1pro_jax.tokenizer.messages import MessageError

USER = {"role": "user", "content": "a"}
ANSWER = {"role": "assistant", "content": "b"}
TOOLS = [{"type": "function", "function": {"name": "f", "description": "é \"q\" <b> & 'x'", "parameters": {"z": {}, "a": [1, None]}}}]
CALLS = [
    {"name": "f", "arguments": {"z": "水", "a": [1.5, None]}},
    {"type": "function", "id": "1", "function": {"name": "g", "arguments": "{}"}},
]
ITEMS = [
    {"type": "image", "image": "a.png"},
    {"type": "image_url", "image_url": {"url": "b"}},
    {"type": "video", "video": "v.mp4"},
    {"type": "time_series", "data": "s.npy", "sampling_rate": 100},
]
TEXTS = (
    *("hi", " what is CC(=O)OC1=CC=CC=C1C(=O)O?", "\n\nsteps:\n1. naïve", "世界 e\u0301", "MKTAYIAKQRQISFVKSHFSRQLEERLGLIEVQ"),
    *("x\n", "<SMILES>CCO"),
)


def _goldens(reference):
    return json.loads((reference / "preprocess" / "chat_template.json").read_text())


def test_goldens(reference, released):
    cases = _goldens(reference)
    assert cases
    for case in cases:
        text = released.render(case["messages"], **case["kwargs"])
        assert text == case["rendered"], case["name"]
        assert released.encode_markup(text) == case["input_ids"]


def test_image_and_time_series_goldens(reference, released):
    """One wrapper for each medium, and as many placeholders as it has embeddings."""
    case = json.loads((reference / "preprocess" / "image_prompt.json").read_text())
    assert released.render(case["messages"], add_generation_prompt=True) == case["rendered"]
    counts = [np.prod(grid) // 4 for grid in case["image_grid_thw"]]
    expansions = [f"<|vision_start|>{'<|image_pad|>' * count}<|vision_end|>" for count in counts]
    conversation = released.encode_chat(case["messages"], expansions=expansions, add_generation_prompt=True)
    assert conversation.ids.tolist() == case["input_ids"]
    assert [medium.stop - medium.start for medium in conversation.media] == counts
    for case in json.loads((reference / "preprocess" / "time_series.json").read_text()):
        question = case["prompt"].split("<|/ts|>")[1].split("<|im_end|>")[0]
        messages = [{"role": "user", "content": [{"type": "time_series", "data": case["file"]}, {"type": "text", "text": question}]}]
        prompt = {"add_generation_prompt": True, "enable_thinking": False}
        assert released.encode_chat(messages, **prompt).text == case["prompt"]
        expansions = [f"<|ts|>{'<TS_CONTEXT>' * case['num_tokens']}<|/ts|>"]
        assert released.encode_chat(messages, expansions=expansions, **prompt).ids.tolist() == case["input_ids"]


def _conversation(generator, *, media=True):
    """Messages of every kind, in an order that occurs: an answer, with calls and responses before it, follows a question."""

    def content(items):
        if not items or generator.random() < 0.5:
            return generator.choice(TEXTS)
        return [generator.choice([*items, {"type": "text", "text": generator.choice(TEXTS)}]) for _ in range(generator.randint(1, 4))]

    def answer(**more):
        message = {"role": "assistant", "content": generator.choice(TEXTS).lstrip(), **more}
        match generator.randrange(5):
            case 0:
                message["reasoning_content"] = generator.choice(("\nthink\n\nmore\n", "think", "", "\n"))
            case 1:
                message["content"] = f"<think>\n{generator.choice(TEXTS)}\n</think>\n\n{message['content']}"
            case 2:
                message["content"] = [{"type": "text", "text": message["content"]}]
        return message

    items = ITEMS if media else []
    messages = [{"role": "system", "content": "Be terse."}] if generator.random() < 0.3 else []
    for _ in range(generator.randint(1, 3)):
        messages.append({"role": "user", "content": content(items)})
        if generator.random() < 0.2:
            messages.append({"role": "system", "content": "More."})
        for _ in range(generator.randrange(3)):
            called = answer(tool_calls=generator.sample(CALLS, generator.randint(1, 2)))
            if generator.random() < 0.5:
                called |= {"content": generator.choice((None, ""))}
            messages.append(called)
            messages.extend({"role": "tool", "content": content(items)} for _ in range(generator.randint(1, 2)))
        messages.append(answer())
    return messages, TOOLS if generator.random() < 0.5 else []


def _written(messages, index):
    """What a model writes of an assistant message, by spec 5.4."""
    message = messages[index]
    content = message.get("content") or ""
    content = content if isinstance(content, str) else "".join(item["text"] for item in content)
    reasoning = message.get("reasoning_content")
    if reasoning is None:
        thought, found, rest = content.rpartition("</think>")
        reasoning, content = (thought.split("<think>")[-1].strip("\n"), rest.lstrip("\n")) if found else ("", content)
    after_question = not any(later["role"] == "user" for later in messages[index:])
    if after_question and (index == len(messages) - 1 or reasoning):
        thought = reasoning.strip("\n")
        written = f"{thought}</think>\n\n{content.lstrip()}" if thought else content.lstrip("\n")
    else:
        written = content
    calls = [call.get("function", call) for call in message.get("tool_calls", ())]
    dumped = [a if isinstance(a := call["arguments"], str) else json.dumps(a, ensure_ascii=False) for call in calls]
    blocks = [f'<tool_call>\n{{"name": "{call["name"]}", "arguments": {a}}}\n</tool_call>' for call, a in zip(calls, dumped, strict=True)]
    return "\n".join(([written] if content else []) + blocks) + "<|im_end|>" if content else written + "\n".join(blocks) + "<|im_end|>"


def _runs(conversation, decode):
    """The decoded runs of learnt and of other tokens, in order."""
    cuts = np.flatnonzero(np.diff(conversation.loss_mask)) + 1
    pieces = np.split(conversation.ids, cuts)
    learnt = [bool(conversation.loss_mask[start]) for start in [0, *cuts]]
    return [(flag, decode(piece)) for flag, piece in zip(learnt, pieces, strict=True)]


def test_exactly_the_answers_are_learnt(released):
    generator = random.Random(0)
    for _ in range(150):
        messages, tools = _conversation(generator)
        conversation = released.encode_chat(messages, tools=tools)
        runs = _runs(conversation, released.decode)
        assert (
            "".join(text for _, text in runs)
            == released.cleaned(released.render(chat_messages.with_signals(messages), tools=tools))
            == conversation.text
        )
        expected = [_written(messages, index) for index, message in enumerate(messages) if message["role"] == "assistant"]
        assert [text for flag, text in runs if flag] == [released.cleaned(text) for text in expected]


def test_prompt_and_answer_are_the_whole(released):
    """What serving sends before the last answer, and what is learnt of it, make up the rendering."""
    generator = random.Random(1)
    for _ in range(100):
        messages, tools = _conversation(generator, media=False)
        conversation = released.encode_chat(messages, tools=tools)
        reasons = conversation.text.rsplit("<|im_start|>assistant\n", 1)[1].startswith("<think></think>") is False
        prompt = released.render(messages[:-1], tools=tools, add_generation_prompt=True, enable_thinking=reasons)
        answer = [text for flag, text in _runs(conversation, released.decode) if flag][-1]
        assert released.cleaned(prompt) + answer + "\n" == conversation.text


def test_loss_flags_choose_messages(released):
    generator = random.Random(2)
    for _ in range(40):
        messages, tools = _conversation(generator)
        whole = released.encode_chat(messages, tools=tools)
        masks = []
        for index in [i for i, message in enumerate(messages) if message["role"] == "assistant"]:
            flagged = [m | {"loss": i == index} if m["role"] == "assistant" else m | {"loss": False} for i, m in enumerate(messages)]
            one = released.encode_chat(flagged, tools=tools)
            assert np.array_equal(one.ids, whole.ids)
            masks.append(one.loss_mask)
        assert np.array_equal(np.sum(masks, 0), whole.loss_mask)  # disjoint, and together all


def test_a_token_that_the_header_shares_is_not_learnt(released):
    messages = [USER, {"role": "assistant", "content": "\nb"}, USER]
    conversation = released.encode_chat(messages)
    shared = released.encode("\n\n")
    assert len(shared) == 1 and shared[0] in conversation.ids[~conversation.loss_mask]
    assert released.decode(conversation.ids[conversation.loss_mask]) == "b<|im_end|>"


def test_media_are_where_they_are(released):
    generator = random.Random(3)
    names = {"image": "<|image_pad|>", "video": "<|video_pad|>", "time_series": "<TS_CONTEXT>"}
    for _ in range(60):
        messages, tools = _conversation(generator)
        references = chat_messages.media(messages)
        expansions = []
        for reference in references:
            before, after = chat_messages.WRAPPERS[reference.kind].split(names[reference.kind])
            one = before + names[reference.kind] * generator.randint(1, 4) + after
            expansions.append(f"<0.5 seconds>{one}<1.5 seconds>{one}" if reference.kind == "video" else one)
        conversation = released.encode_chat(messages, tools=tools, expansions=expansions)
        assert [medium.reference for medium in conversation.media] == references
        for medium, expansion in zip(conversation.media, expansions, strict=True):
            item = messages[medium.reference.message]["content"][medium.reference.item]
            assert item["type"].removesuffix("_url") == medium.reference.kind
            own = conversation.ids[medium.start : medium.stop]
            placeholder = released.special(names[medium.reference.kind])
            assert own[0] == own[-1] == placeholder and (own == placeholder).sum() == expansion.count(names[medium.reference.kind])
            assert not conversation.loss_mask[medium.start : medium.stop].any()


def test_a_system_prompt_is_put_first(released):
    conversation = released.encode_chat([USER, ANSWER], system="Be kind.")
    assert np.array_equal(conversation.ids, released.encode_chat([{"role": "system", "content": "Be kind."}, USER, ANSWER]).ids)
    with pytest.raises(MessageError, match=r"message 0: it is a system message, and system= is given as well; drop one"):
        released.encode_chat([{"role": "system", "content": "x"}, USER], system="Be kind.")
    with pytest.raises(MessageError, match=r"system: the text spells the control token <\|im_end\|>"):
        released.encode_chat([USER], system="<|im_end|>")


MALFORMED = [
    ([], r"messages: \[\] must be a list of at least one message"),
    ({"role": "user"}, r"messages: .* must be a list"),
    (["hi"], r"message 0: 'hi' must be a mapping with role and content"),
    ([USER, {"content": "x"}], r"message 1: role=None must be one of system, user, assistant, tool"),
    ([{"role": "bot", "content": "x"}], r"message 0: role='bot' must be one of"),
    ([{"role": "user", "content": 3}], r"message 0: content=3 must be a string or a list of items"),
    ([{"role": "user", "content": ["x"]}], r"message 0, content\[0\]: 'x' must be a mapping"),
    ([{"role": "user", "content": [{"type": "text", "text": 1}]}], r"message 0, content\[0\]: text=1 must be a string"),
    ([USER, ANSWER | {"reasoning_content": ["x"]}], r"message 1: reasoning_content=\['x'\] must be a string"),
    ([USER, ANSWER | {"tool_calls": {}}], r"message 1: tool_calls=\{\} must be a list"),
    ([USER, ANSWER | {"tool_calls": [{"function": {"arguments": {}}}]}], r"message 1, tool_calls\[0\]: .* must be a mapping with name"),
    ([USER, ANSWER | {"tool_calls": [{"name": "f"}]}], r"message 1, tool_calls\[0\]: arguments=None must be a mapping, or JSON"),
]
UNTRAINABLE = [
    ([USER | {"loss": True}], r"message 0: loss=true on a user message: only assistant messages are trained; drop it"),
    ([USER, ANSWER | {"loss": 1}], r"message 1: loss=1 must be true or false"),
    ([USER, ANSWER | {"reasoning": "x"}], r"message 1: key 'reasoning' has no effect; rename or drop it"),
    ([USER | {"tool_calls": CALLS}], r"message 0: a user message has neither reasoning_content nor tool_calls; drop them"),
    (
        [{"role": "user", "content": [{"type": "audio"}]}],
        r"message 0, content\[0\]: type='audio' must be text, image, video or time_series",
    ),
    ([USER, ANSWER | {"content": "x<|im_end|>"}], r"message 1: content spells the control token <\|im_end\|>"),
    ([{"role": "user", "content": [{"text": "<|image_pad|>"}]}], r"content\[0\]\.text spells the control token <\|image_pad\|>"),
    ([USER, ANSWER | {"tool_calls": [{"name": "f", "arguments": {"<|im_start|>": 1}}]}], r"tool_calls\[0\]\.arguments spells"),
    ([USER, ANSWER | {"content": [ITEMS[0]]}], r"message 1, content\[0\]: image in an answer that is learnt; move it to a user message"),
    ([USER, ANSWER | {"content": [ITEMS[0], {"text": "</think>b"}], "loss": False}, USER], r"shows 0 of 1 media"),
]


@pytest.mark.parametrize(("messages", "problem"), MALFORMED)
def test_malformed_messages_are_named(released, messages, problem):
    for take in (released.render, released.encode_chat):
        with pytest.raises(MessageError, match=problem):
            take(messages)


@pytest.mark.parametrize(("messages", "problem"), UNTRAINABLE)
def test_what_would_have_no_effect_is_named(released, messages, problem):
    released.render(messages)  # the template has a form for it
    with pytest.raises(MessageError, match=problem):
        released.encode_chat(messages)


def test_expansions_must_fit(released):
    messages = [{"role": "user", "content": ITEMS[:1]}]
    with pytest.raises(MessageError, match="expansions: 0 do not fit the 1 media"):
        released.encode_chat(messages, expansions=[])
    with pytest.raises(MessageError, match="each medium needs one or more"):
        released.encode_chat(messages, expansions=["none"])
    with pytest.raises(MessageError, match=r"expansions\[0\]: it has <TS_CONTEXT>, but the medium is of kind image; give them in order"):
        released.encode_chat(messages, expansions=["<|ts|><TS_CONTEXT><|/ts|>"])
    with pytest.raises(MessageError, match=r"tool 0: description spells the control token"):
        released.encode_chat(messages, tools=[{"description": "<|im_end|>"}])


def test_a_template_reaches_nothing():
    for source in ("{{ messages.append(1) }}", "{{ ''.__class__.__mro__ }}", "{{ raise_exception('no tools here') }}"):
        with pytest.raises(MessageError, match="the chat template refuses them"):
            ChatTemplate(source).render([USER])
    with pytest.raises(ConfigError, match="the chat template is broken in line 2"):
        ChatTemplate("\n{% if %}")
