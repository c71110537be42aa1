"""Checks of forward passes: text batches, odd positions, prompts with images, videos and signals, FoPE tables."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from interns1pro_jax.config import TextConfig
from interns1pro_jax.models.inputs import ModelInputs
from interns1pro_jax.ops.fope import text_frequencies
from tools.parity.generation import check_generated
from tools.parity.golden import ACTIVATION, ROUTER_WEIGHT, Golden
from tools.parity.media import model_inputs, read_media
from tools.parity.subject import Forward, Subject, forward, moe_layers, padding_positions, true_positions
from tools.parity.w8a8 import emulated_logits

# Arrays of a forward pass, by their axes.
_BT = ("embeddings", "inputs_embeds", "final_norm", "logits")
_LBT = ("hidden_states", "attn_out", "mlp_out")
_TABLES = ("rope_cos", "rope_sin")
_ROUTER = ("router_logits", "router_weights", "router_indices")
_ARRAYS = (*_BT, *_LBT, *_TABLES, *_ROUTER)
_FP32_SUFFIXES = ("", "_fp32_compute", "_weight_only")
_POSITION_SUFFIXES = ("_explicit_positions", "_default_positions")

# FoPE tables: 1e-6 for positions under 10^3, then in proportion to the position up to 2e-2 at 262143 (reference README): a unit
# in the last place of a frequency moves the phase in proportion to the position.
_TABLE_SMALL, _TABLE_LARGE, _SMALL_POSITION, _LARGE_POSITION = 1e-6, 2e-2, 1e3, 262143.0

# bfloat16 keeps 8 bits. Each of the some ten roundings of a layer is off by up to 2^-9 of its value, so that after a few layers
# the typical (root mean square) difference between two orders of the same operations is a few per cent of the spread of the
# values, and the largest of some 10^4..10^5 values is four to five times that, or more where experts of *other* tokens differ
# and attention mixes them in.
_BF16_TYPICAL, _BF16_LARGEST = 0.05, 0.30  # in standard deviations of the golden array
_BF16_EQUAL_TOKENS = 0.5  # near-ties flip, as the official router rounds its logits to bfloat16 and ours does not (spec 9.4)
_BF16_ULP = 2.0**-7  # relative

# Quantising the inputs moves the logits by some 7 % of their spread, in root mean square. Two emulations differ only where a value
# lies so close to the middle between two FP8 numbers that it is rounded the other way: 1 % is one value in fifty.
_W8A8_TYPICAL, _W8A8_LARGEST = 0.01, 0.10


def table_tolerance(positions: np.ndarray) -> np.ndarray:
    share = np.clip((positions - _SMALL_POSITION) / (_LARGE_POSITION - _SMALL_POSITION), 0, None)
    return _TABLE_SMALL + share * (_TABLE_LARGE - _TABLE_SMALL)


def check_text(golden: Golden, subject: Subject) -> None:
    """A batch at its `position_ids`, 0 .. T-1 by default, in any of the precisions that the file has; greedy tokens of its first rows."""
    if any(name.endswith(_POSITION_SUFFIXES) for name in golden):
        _check_left_padded(golden, subject)
        return
    tokens = golden.input("input_ids")
    valid = golden.get("attention_mask", np.ones_like(tokens)) > 0
    positions = golden.get("position_ids", padding_positions(valid))
    golden.equal("lengths", valid.sum(-1))
    golden.equal("moe_layers", moe_layers(subject.config.text))
    compare_precisions(golden, subject, model_inputs(subject.config, tokens, valid, positions), valid)
    check_generated(golden, subject, tokens, valid)


def _check_left_padded(golden: Golden, subject: Subject) -> None:
    """Left padding, with positions from 0 at the first token, and with the official default that counts the padding."""
    tokens = golden.input("input_ids")
    valid = golden.input("attention_mask") > 0
    golden.equal("lengths", valid.sum(-1))
    golden.equal("moe_layers", moe_layers(subject.config.text))
    golden.equal("position_ids", true_positions(valid), valid)
    for suffix, positions in zip(_POSITION_SUFFIXES, (true_positions(valid), padding_positions(valid)), strict=True):
        if any(name + suffix in golden for name in _ARRAYS):
            result = forward(subject.model, model_inputs(subject.config, tokens, valid, positions))
            compare_forward(golden, result, subject.config.text, valid, positions, suffix)
    check_generated(golden, subject, tokens, valid)


def check_multimodal(golden: Golden, subject: Subject) -> None:
    """Prompts with images, videos and signals; `ts_embeds` is the tower's output alone."""
    tokens = golden.input("input_ids")
    valid = golden.get("attention_mask", np.ones_like(tokens)) > 0
    positions = golden.get("position_ids", padding_positions(valid))
    media = read_media(golden)
    inputs = model_inputs(subject.config, tokens, valid, positions, media)
    result = compare_precisions(golden, subject, inputs, valid)
    if result is not None:
        golden.compare("ts_embeds", result.embeddings[tokens == subject.config.ts_token_id])
    check_generated(golden, subject, tokens, valid, media)


def check_fope(golden: Golden, subject: Subject) -> None:
    """The Fourier coefficients and the tables made from them, at positions up to the longest context."""
    text, model = subject.config.text, subject.model.text
    positions = np.atleast_2d(golden.input("position_ids"))
    if "inv_freq" in golden:
        same = np.array_equal(golden.input("inv_freq"), text_frequencies(text))
        golden.note(f"inv_freq {'bit-identical' if same else 'differ in the last place'}")
    golden.compare("inv_freq", text_frequencies(text), 2.0**-23, relative=True)
    for tensor, ours in subject.tensors.items():
        if tensor.endswith((".sin_coef", ".cos_coef")):
            golden.equal(tensor.rpartition(".")[2], ours)
    cos, sin = (np.asarray(table) for table in model.rotary(jnp.asarray(positions)))
    _compare_tables(golden, ("cos", "sin"), (cos, sin), positions)


def compare_precisions(golden: Golden, subject: Subject, inputs: ModelInputs, valid: np.ndarray) -> Forward | None:
    """Compares the forward pass in every precision that the file has arrays of; returns the float32 one, if any."""
    text, positions = subject.config.text, np.asarray(inputs.positions)
    result = None
    for suffix in _FP32_SUFFIXES:
        if any(name + suffix in golden for name in _ARRAYS):
            result = forward(subject.model, inputs) if result is None else result
            compare_forward(golden, result, text, valid, positions, suffix)
    if any(name + "_bf16_compute" in golden for name in _ARRAYS):
        _compare_bf16(golden, forward(subject.bf16_model, inputs), text, valid)
    if "logits_w8a8_emulated" in golden:
        _compare_w8a8(golden, subject, inputs, valid)
    return result


def compare_forward(golden: Golden, result: Forward, text: TextConfig, valid: np.ndarray, positions: np.ndarray, suffix: str = "") -> None:
    """Compares a float32 forward pass with the arrays named `<array><suffix>`, where tokens are valid."""
    for name in _BT:
        ours = result.embeddings if name in ("embeddings", "inputs_embeds") else getattr(result, name)
        golden.compare(name + suffix, ours, ACTIVATION, valid[..., None])
    for name in _LBT:
        golden.compare(name + suffix, getattr(result, name), ACTIVATION, valid[None, ..., None])
    names = tuple(name + suffix for name in _TABLES)
    _compare_tables(golden, names, (result.rope_cos, result.rope_sin), positions, valid)
    if result.router_logits is None or result.router_weights is None or result.router_indices is None:
        for name in _ROUTER:  # no layer has experts
            if name + suffix in golden and 0 in golden.shape(name + suffix):
                golden.judged(name + suffix)
        return
    tokens = valid.reshape(1, -1, 1)
    golden.compare("router_logits" + suffix, result.router_logits, ACTIVATION, tokens)
    weights, indices = result.router_weights, result.router_indices
    if "router_indices" + suffix in golden:
        chosen = golden.judged("router_indices" + suffix)
        if not _compare_experts(golden, chosen, result, text, tokens):
            return
        weights = np.take_along_axis(_by_expert(weights, indices, text.num_experts), chosen.astype(np.int64), -1)
    golden.compare("router_weights" + suffix, weights, ROUTER_WEIGHT, tokens)


def _compare_experts(golden: Golden, chosen: np.ndarray, result: Forward, text: TextConfig, tokens: np.ndarray) -> bool:
    """Compares expert ids [M, N, K]: the same set for each token; group after group, and inside a group by falling logit."""
    assert result.router_indices is not None and result.router_logits is not None
    if chosen.shape != result.router_indices.shape:
        golden.problem(f"router_indices: shape {chosen.shape}, ours is {result.router_indices.shape}")
        return False
    counts = np.broadcast_to(tokens[..., 0], chosen.shape[:-1])
    same = (np.sort(chosen, -1) == np.sort(result.router_indices, -1)).all(-1)
    golden.row.experts.add(same[counts])
    if wrong := int((~same[counts]).sum()):
        golden.problem(f"router_indices: {wrong} of {int(counts.sum())} tokens x layers have other experts")
    per_group = chosen.reshape(*chosen.shape[:-1], text.router_n_groups, -1)
    grouped = (per_group // text.experts_per_group == np.arange(text.router_n_groups)[:, None]).all((-2, -1))
    scores = np.take_along_axis(result.router_logits, chosen.astype(np.int64), -1).reshape(per_group.shape)
    falling = (np.diff(scores, axis=-1) <= ACTIVATION).all((-2, -1))
    if (~(grouped & falling) & counts).any():
        golden.problem("router_indices: not in the order of groups, and inside a group of falling probability")
    return True


def _by_expert(weights: np.ndarray, indices: np.ndarray, experts: int) -> np.ndarray:
    """Weights [M, N, K] at their experts, [M, N, E]; zero elsewhere."""
    dense = np.zeros((*weights.shape[:-1], experts), np.float32)
    np.put_along_axis(dense, indices, weights, -1)
    return dense


def _compare_tables(
    golden: Golden, names: tuple[str, ...], tables: tuple[np.ndarray, ...], positions: np.ndarray, valid: np.ndarray | None = None
) -> None:
    """Compares tables [B, T, heads, H] with official ones, [B, heads, T, H], or [B, T, H] where all heads share them."""
    valid = np.ones(positions.shape, bool) if valid is None else valid
    for name, table in zip(names, tables, strict=True):
        if name in golden:
            tolerance = table_tolerance(positions)
            if len(golden.shape(name)) == 3 and table.shape[2] == 1:
                golden.compare(name, table[:, :, 0], tolerance[..., None], valid[..., None])
            else:
                golden.compare(name, table.swapaxes(1, 2), tolerance[:, None, :, None], valid[:, None, :, None])


def _compare_bf16(golden: Golden, result: Forward, text: TextConfig, valid: np.ndarray) -> None:
    """Compares loosely, and only tokens with the same experts in every layer."""
    suffix = "_bf16_compute"
    for name in _TABLES:
        if name + suffix in golden:
            rounded = np.asarray(getattr(result, name).astype("bfloat16"), np.float32)
            table = rounded[:, :, 0] if len(golden.shape(name + suffix)) == 3 and rounded.shape[2] == 1 else rounded.swapaxes(1, 2)
            counts = valid.reshape(valid.shape[0], *(1,) * (table.ndim - 3), valid.shape[1], 1)
            golden.compare(name + suffix, table, _BF16_ULP * np.maximum(np.abs(table), 2.0**-6), counts)
    same = valid
    if "router_indices" + suffix in golden and result.router_indices is not None:
        chosen = golden.judged("router_indices" + suffix)
        equal = (np.sort(chosen, -1) == np.sort(result.router_indices, -1)).all(-1)
        golden.row.bf16_experts.add(equal[:, valid.reshape(-1)])
        same = valid & equal.all(0).reshape(valid.shape)
        share = same.sum() / valid.sum()
        golden.note(f"bf16: {int(same.sum())} of {int(valid.sum())} tokens have equal experts in every layer")
        if share < _BF16_EQUAL_TOKENS:
            golden.problem(f"bf16: only {share:.0%} of the tokens have equal experts in every layer, expected {_BF16_EQUAL_TOKENS:.0%}")
    if result.router_logits is not None and result.router_weights is not None and result.router_indices is not None:
        tokens = same.reshape(1, -1, 1)
        if "router_logits" + suffix in golden:
            _compare_loosely(golden, "router_logits" + suffix, result.router_logits, tokens, _BF16_TYPICAL, _BF16_LARGEST)
        if "router_weights" + suffix in golden:
            chosen = golden.get("router_indices" + suffix, result.router_indices).astype(np.int64)
            dense = _by_expert(result.router_weights, result.router_indices, text.num_experts)
            weights = np.take_along_axis(dense, chosen, -1)
            _compare_loosely(golden, "router_weights" + suffix, weights, tokens, _BF16_TYPICAL, _BF16_LARGEST)
    for name in (*_BT, *_LBT):
        if name + suffix in golden:
            ours = result.embeddings if name in ("embeddings", "inputs_embeds") else getattr(result, name)
            _compare_loosely(
                golden, name + suffix, ours, same[..., None] if name in _BT else same[None, ..., None], _BF16_TYPICAL, _BF16_LARGEST
            )


def _compare_loosely(golden: Golden, name: str, ours: np.ndarray, where: np.ndarray, typical: float, largest: float) -> None:
    """Compares the largest and the root mean square error with shares of the golden array's standard deviation."""
    official = np.asarray(golden.input(name), np.float64)
    counts = np.broadcast_to(where, official.shape)
    golden.compare(name, ours, largest * official[counts].std(), where)
    if official.shape == ours.shape:
        error = float(np.sqrt(np.mean((ours - official)[counts] ** 2)) / official[counts].std())
        golden.note(f"{name}: root mean square error {error:.2%} of the spread")
        if not error <= typical:
            golden.problem(f"{name}: root mean square error {error:.2%} of the standard deviation exceeds {typical:.0%}")


def _compare_w8a8(golden: Golden, subject: Subject, inputs: ModelInputs, valid: np.ndarray) -> None:
    _compare_loosely(golden, "logits_w8a8_emulated", emulated_logits(subject, inputs), valid[..., None], _W8A8_TYPICAL, _W8A8_LARGEST)
