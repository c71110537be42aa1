"""Checks of what is stored: configs, weights, dequantised weights, names and frequencies at the released size."""

from __future__ import annotations

import collections
import json
import math
import re
from pathlib import Path

import numpy as np

from interns1pro_jax.checkpoint.hf_names import hf_parameters
from interns1pro_jax.checkpoint.safetensors_io import SafetensorsFile
from interns1pro_jax.config import ModelConfig
from interns1pro_jax.ops.fope import inverse_frequencies, text_frequencies
from tools.parity.decoder import table_tolerance
from tools.parity.golden import Golden
from tools.parity.subject import Subject

_SUM = 1e-5  # relative to the sum of magnitudes
_DIVISION = 2.0**-22  # relative: a product in float32, and the division that undoes it; exact for scales that are powers of two


def check_config(golden: Golden, subject: Subject) -> None:
    """The config is read, and what is written of it reads as the same again."""
    for name in golden:
        golden.judged(name)
    again = ModelConfig.from_hf(json.loads(json.dumps(subject.config.to_hf())))
    if again != subject.config:
        golden.problem("the config written from this one reads differently")


def check_weights(golden: Golden, subject: Subject) -> None:
    """Every tensor comes back from the loaded model bit for bit; a quantised one after division by its scales."""
    ours = subject.tensors
    for name, info in subject.stored.items():
        if name not in golden:
            continue
        if name not in ours:
            golden.judged(name)  # scales, and what the model knows anyway: loading has checked them
        elif info.dtype == "F8_E4M3":
            golden.compare(name, ours[name] / _scales(subject, name, info.shape), _DIVISION, relative=True)
        else:
            golden.equal(name, ours[name])


def _scales(subject: Subject, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The scale of every element of a quantised matrix [out, in]."""
    assert subject.config.quantization is not None
    scales = np.asarray(subject.stored.read(name + "_scale_inv")).astype(np.float32)
    for axis, block in enumerate(subject.config.quantization.weight_block_size):
        scales = np.repeat(scales, block, axis)
    return scales[: shape[0], : shape[1]]


def check_dequantized(golden: Golden, subject: Subject) -> None:
    for name in golden:
        golden.equal(name, subject.tensors[name])


def check_dequantized_sums(golden: Golden, subject: Subject) -> None:
    for tensor in sorted({name.rpartition("/")[0] for name in golden}):
        weights = subject.tensors[tensor].astype(np.float64)
        limit = _SUM * np.abs(weights).sum()
        golden.equal(f"{tensor}/shape", weights.shape)
        golden.compare(f"{tensor}/sum", weights.sum(), limit)
        golden.compare(f"{tensor}/abs_sum", np.abs(weights).sum(), limit)
        scales = subject.stored.get(tensor + "_scale_inv")
        if scales is not None:
            golden.equal(f"{tensor}/scale_shape", scales.shape)


def check_frequencies(golden: Golden, released: ModelConfig) -> None:
    """Frequencies of the released size, bit for bit, and their phases at large positions."""
    text, positions = released.text, golden.input("positions")
    kept = text_frequencies(text)
    golden.equal("text_inv_freq_all", inverse_frequencies(text.rope_theta, text.head_dim))
    golden.equal("text_inv_freq_kept", kept)
    phase = positions.astype(np.float32)[:, None] * kept
    golden.equal("text_phase", phase)
    for name, table in (("text_cos", np.cos(phase)), ("text_sin", np.sin(phase))):
        golden.compare(name, table, table_tolerance(positions)[:, None])
    if released.vision is not None:
        golden.equal("vision_inv_freq", inverse_frequencies(10000.0, released.vision.head_dim // 2))


def check_key_patterns(path: Path, file: str, released: ModelConfig) -> Golden:
    """Names, shapes and counts of the released size against the name table."""
    content = json.loads(path.read_text())
    counts: dict[str, int] = collections.Counter()
    shapes: dict[str, tuple[int, ...]] = {}
    for parameter in hf_parameters(released):
        for _, _, name in parameter.tensors():
            pattern = re.sub(
                r"experts\.\d+\.", "experts.{E}.", re.sub(r"layers\.\d+\.", "layers.{L}.", re.sub(r"blocks\.\d+\.", "blocks.{B}.", name))
            )
            counts[pattern] += 1
            shapes[pattern] = parameter.layout.stored_shape
    golden = Golden(file, content["patterns"])
    for name, entry in content["patterns"].items():
        golden.judged(name)
        if shapes.get(name) != tuple(entry["shape"]) or counts[name] != entry["count"]:
            golden.problem(f"{name}: {entry['count']} x {entry['shape']}, ours are {counts[name]} x {list(shapes.get(name, ()))}")
    if surplus := sorted(set(counts) - set(content["patterns"])):
        golden.problem(f"names that the release does not have: {', '.join(surplus)}")
    if "totals" not in content:
        return golden
    total = sum(math.prod(shapes[name]) * count for name, count in counts.items())
    if total != content["totals"]["all_with_buffers"]:
        golden.problem(f"{content['totals']['all_with_buffers']} parameters in all, ours are {total}")
    return golden


def open_safetensors(path: Path, file: str) -> Golden:
    """All tensors of a file as float32 arrays."""
    stored = SafetensorsFile(path)
    return Golden(file, {name: np.asarray(stored.read(name)).astype(np.float32) for name in stored})
