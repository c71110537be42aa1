"""Checks of greedy decoding."""

from __future__ import annotations

import dataclasses
import re

import numpy as np

from interns1pro_jax.infer.generate import generate
from interns1pro_jax.models.inputs import ModelInputs
from tools.parity.golden import ACTIVATION, Golden
from tools.parity.media import NO_MEDIA, Media, model_inputs, read_media
from tools.parity.subject import Subject, padding_positions, true_positions

_POSITIONS = {"": padding_positions, "_default_positions": padding_positions, "_explicit_positions": true_positions}


def check_generation(golden: Golden, subject: Subject) -> None:
    """Greedy continuations `<case>_tokens` and their logits, of `<case>_prompt` (or `_input_ids`): right-padded by `<case>_lengths`,
    or padded by `<case>_mask` (or `_attention_mask`), or neither. Rows of a batch do not see one another, so a right-padded batch
    must equal each row alone. `<case>_` may be absent."""
    for name in list(golden):
        if match := re.fullmatch(r"((?:\w+?_)?)tokens(_default_positions|_explicit_positions|)", name):
            case, suffix = match.groups()
            prompt = golden.input(case + ("prompt" if case + "prompt" in golden else "input_ids"))
            valid = np.ones(prompt.shape, bool)
            if case + "lengths" in golden:
                valid = np.arange(prompt.shape[1]) < golden.input(case + "lengths")[:, None]
            for mask in (case + "mask", case + "attention_mask"):
                if mask in golden:
                    valid = golden.input(mask) > 0
            media = read_media(golden, case)
            inputs = model_inputs(subject.config, prompt, valid, _POSITIONS[suffix](valid), media)
            _compare(golden, subject, inputs, name, f"{case}logits{suffix}")


def check_generated(golden: Golden, subject: Subject, tokens: np.ndarray, valid: np.ndarray, media: Media = NO_MEDIA) -> None:
    """`generated`, if the file has it: the greedy continuation of the first row or rows, each alone and unpadded."""
    if "generated" in golden:
        rows = golden.judged("generated").shape[0]
        first = np.argsort(~valid, -1, kind="stable")  # tokens first, padding last
        tokens, valid = np.take_along_axis(tokens, first, -1), np.take_along_axis(valid, first, -1)
        inputs = model_inputs(subject.config, tokens, valid, padding_positions(valid), media, rows=rows)
        width = int(valid[:rows].sum(-1).max())
        inputs = dataclasses.replace(inputs, **{name: getattr(inputs, name)[:, :width] for name in ("tokens", "positions", "segment_ids")})
        _compare(golden, subject, inputs, "generated", "generated_logits")


def _compare(golden: Golden, subject: Subject, inputs: ModelInputs, tokens: str, logits: str) -> None:
    official = golden.judged(tokens)
    result = generate(subject.model, inputs, official.shape[1], return_logits=logits in golden)
    if official.shape != result.tokens.shape:
        golden.problem(f"{tokens}: shape {official.shape}, ours is {result.tokens.shape}")
        return
    same = official == result.tokens
    golden.row.generated.add(same)
    if not same.all():
        row, step = np.argwhere(~same)[0]
        golden.problem(f"{tokens}: row {row} differs from step {step} on (official {official[row, step]}, ours {result.tokens[row, step]})")
    golden.compare(logits, result.logits, ACTIVATION)
