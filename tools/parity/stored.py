"""Checks of what is stored: configs, weights, dequantised weights, names and frequencies at the released size."""

from __future__ import annotations

import collections
import dataclasses
import functools
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from interns1pro_jax.checkpoint.hf_names import hf_parameters
from interns1pro_jax.checkpoint.safetensors_io import SafetensorsFile
from interns1pro_jax.config import Fp8Config, ModelConfig
from interns1pro_jax.config_checks import load_json
from interns1pro_jax.models.vision import rotary_angles
from interns1pro_jax.ops.fope import inverse_frequencies, rotary_tables, text_frequencies
from tools.parity.decoder import table_tolerance
from tools.parity.golden import Golden, flatten
from tools.parity.subject import Subject

_SUM = 1e-5  # relative to the sum of magnitudes
_NAMES = {"architectures", "model_type", "dtype", "torch_dtype"}  # of classes and storage; not values of the model
_DIVISION = 2.0**-22  # relative: a product in float32, and the division that undoes it; exact for scales that are powers of two


def check_config(golden: Golden, subject: Subject) -> None:
    """The config is read; what is written of it has the same values, and reads as the same again.

    Where the file says null, the value written is the default that null stands for. What is not written has no effect on the
    model: reading rejects keys that it does not know.
    """
    content = subject.config.to_hf()
    if ModelConfig.from_hf(json.loads(json.dumps(content))) != subject.config:
        golden.problem("the config written from this one reads differently")
    written = dict(flatten(content))
    for name, value in flatten(load_json(subject.directory / "config.json")):
        key = name.rpartition("/")[2]
        if value is None or name not in written or key in _NAMES:
            golden.get(name)
            continue
        golden.judged(name)
        value = max(value, 1) if key == "router_n_groups" else value  # one group is none
        if not (math.isclose(value, written[name], rel_tol=1e-9) if isinstance(value, float) else value == written[name]):
            golden.problem(f"{name}: {value!r} is written as {written[name]!r}")


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
    golden.equal("text_phase", positions.astype(np.float32)[:, None] * kept)
    for name, table in zip(("text_cos", "text_sin"), rotary_tables(jnp.asarray(positions)[None], kept, 2 * len(kept)), strict=True):
        golden.compare(name, table[0, :, 0, : len(kept)], table_tolerance(positions)[:, None])
    if released.vision is not None:
        row = jnp.array([[[1, 0]]])  # at row 1 the angles of the rows are the frequencies
        golden.equal("vision_inv_freq", rotary_angles(row, released.vision.head_dim)[0, 0, : released.vision.head_dim // 4])


def check_key_patterns(golden: Golden, released: ModelConfig) -> None:
    """Names, shapes, counts and FP8 scales of the released size against the name table, and the totals that they add up to."""
    series = any(name.startswith("patterns/model.time_series.") for name in golden)
    counts: dict[str, int] = collections.Counter()
    shapes: dict[str, tuple[int, ...]] = {}
    quantized: dict[str, bool] = {}
    for parameter in hf_parameters(released if series else dataclasses.replace(released, time_series=None)):
        shape = parameter.layout.stored_shape
        for _, _, name in parameter.tensors():
            pattern = _pattern(name)
            counts[pattern] += 1
            shapes[pattern] = shape
            if quantized.setdefault(pattern, is_quantized(released, name, shape)) != is_quantized(released, name, shape):
                golden.problem(f"{name}: quantised, but not all of {pattern} are; or the other way round")
    ours: dict[str, Any] = {}
    for name, shape in shapes.items():
        ours |= flatten({"shape": list(shape), "count": counts[name], "params": counts[name] * math.prod(shape)}, f"patterns/{name}/")
        if released.quantization is not None:
            ours[f"patterns/{name}/fp8"] = quantized[name]
            if quantized[name]:
                scales = [-(-size // block) for size, block in zip(shape, released.quantization.weight_block_size, strict=True)]
                ours |= flatten({"scale_key": f"{name}_scale_inv", "scale_shape": scales}, f"patterns/{name}/")
    ours |= flatten(_totals(released, {name: counts[name] * math.prod(shape) for name, shape in shapes.items()}), "totals/")
    golden.get("note")
    for name, value in ours.items():
        if name in golden:
            if (official := golden.judged(name)) != value:
                golden.problem(f"{name}: {official}, ours is {value}")
        elif name.endswith("/shape"):
            golden.problem(f"{name.split('/')[1]}: the release has no such name")


def _pattern(name: str) -> str:
    """A tensor's name with letters for its numbers: {L}ayer, {E}xpert, vision {B}lock."""
    for word, letter in (("layers", "L"), ("experts", "E"), ("blocks", "B")):
        name = re.sub(rf"\.{word}\.\d+\.", f".{word}.{{{letter}}}.", name)
    return name


def is_quantized(config: ModelConfig, name: str, shape: Sequence[int]) -> bool:
    """Whether the FP8 release stores this tensor in FP8: a matrix of a module that its config does not except."""
    if config.quantization is None or len(shape) != 2 or not name.endswith(".weight"):
        return False
    parts = name.split(".")
    return _excepted(config.quantization).isdisjoint(".".join(parts[:n]) for n in range(1, len(parts)))


@functools.cache
def _excepted(quantization: Fp8Config) -> frozenset[str]:
    return frozenset(quantization.modules_to_not_convert)


def _totals(config: ModelConfig, sizes: Mapping[str, int]) -> dict[str, int]:
    """Numbers of parameters, in all and by part. The Fourier coefficients are buffers, and count in no part."""
    buffers = sum(size for name, size in sizes.items() if ".rotary_emb." in name)
    experts = sum(size for name, size in sizes.items() if ".experts." in name)
    text = sum(size for name, size in sizes.items() if name.startswith(("model.language_model.", "lm_head."))) - buffers
    return {
        "all_with_buffers": sum(sizes.values()),
        "fope_buffers": buffers,
        "experts": experts,
        "vision": sum(size for name, size in sizes.items() if name.startswith("model.visual.")),
        "text": text,
        "active_per_text_token": text - experts + experts * config.text.num_experts_per_tok // max(config.text.num_experts, 1),
    }


def open_safetensors(path: Path, file: str) -> Golden:
    """All tensors of a file as float32 arrays."""
    stored = SafetensorsFile(path)
    return Golden(file, {name: np.asarray(stored.read(name)).astype(np.float32) for name in stored})
