"""Checks of greedy decoding."""

from __future__ import annotations

import re

import numpy as np

from interns1pro_jax.infer.generate import generate
from interns1pro_jax.models.inputs import ModelInputs
from tools.parity.golden import ACTIVATION, Golden
from tools.parity.media import NO_MEDIA, Media, model_inputs, read_media
from tools.parity.subject import Subject, padding_positions, true_positions

_POSITIONS = {"": padding_positions, "_default_positions": padding_positions, "_explicit_positions": true_positions}


def check_generation(golden: Golden, subject: Subject) -> None:
    """Greedy continuations `<case>_tokens` and their logits, of `<case>_prompt`: right-padded by `<case>_lengths`, or padded by
    `<case>_mask`, or neither. Rows of a batch do not see one another, so a right-padded batch must equal each row alone."""
    for name in list(golden):
        if match := re.fullmatch(r"(\w+?)_tokens(_default_positions|_explicit_positions|)", name):
            case, suffix = match.groups()
            prompt = golden.input(case + "_prompt")
            valid = np.ones(prompt.shape, bool)
            if case + "_lengths" in golden:
                valid = np.arange(prompt.shape[1]) < golden.input(case + "_lengths")[:, None]
            elif case + "_mask" in golden:
                valid = golden.input(case + "_mask") > 0
            media = read_media(golden, case + "_")
            inputs = model_inputs(subject.config, prompt, valid, _POSITIONS[suffix](valid), media)
            _compare(golden, subject, inputs, name, f"{case}_logits{suffix}")


def check_generated(golden: Golden, subject: Subject, tokens: np.ndarray, valid: np.ndarray, media: Media = NO_MEDIA) -> None:
    """`generated`, if the file has it: the greedy continuation of the first row or rows, each alone and unpadded."""
    if "generated" in golden:
        rows = golden.judged("generated").shape[0]
        width = int(valid[:rows].sum(-1).max())
        positions = padding_positions(valid)
        inputs = model_inputs(subject.config, tokens[:, :width], valid[:, :width], positions[:, :width], media, rows=rows)
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
