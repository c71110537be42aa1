"""Small configurations and batches shared by tests."""

import dataclasses
from typing import Any

import numpy as np

from interns1pro_jax.config import ModelConfig, TextConfig, TimeSeriesConfig, VisionConfig
from interns1pro_jax.models.inputs import Batch, ModelInputs
from interns1pro_jax.models.time_series_inputs import Signal, pack_time_series, prepare_signal, tokens_of
from interns1pro_jax.models.vision_inputs import VisionItem, pack_vision


def text_config(**changes: Any) -> TextConfig:
    """Two MoE layers, 32 experts in 8 groups, Fourier encoding with 6 of 8 frequencies."""
    return dataclasses.replace(
        TextConfig(
            vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
            num_experts=32, num_experts_per_tok=8, router_n_groups=8, moe_intermediate_size=16, intermediate_size=24,
            max_position_embeddings=1024, rope_theta=1e4, initializer_range=0.3, dtype="float32", param_dtype="float32",
        ),
        **changes,
    )  # fmt: skip


def text_only(**changes: Any) -> ModelConfig:
    return ModelConfig(text=text_config(**changes), vision=None, time_series=None)


def random_inputs(rows: int = 8, length: int = 12, vocab: int = 96, seed: int = 0) -> ModelInputs:
    tokens = np.random.default_rng(seed).integers(0, vocab, (rows, length)).astype(np.int32)
    return ModelInputs(tokens, np.tile(np.arange(length, dtype=np.int32), (rows, 1)), np.ones_like(tokens))


def multimodal() -> ModelConfig:
    """A complete model of tiny towers; ids 90 to 95 are the placeholders and their marks."""
    tower = dict(out_hidden_size=32, initializer_range=0.2, dtype="float32", param_dtype="float32")
    return ModelConfig(
        text=text_config(),
        vision=VisionConfig(
            depth=2, hidden_size=32, num_heads=2, intermediate_size=48, patch_size=4, num_position_embeddings=16, **tower
        ),
        time_series=TimeSeriesConfig(
            d_model=32, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=48, max_source_positions=40, ts_adapt_out_dim=32,
            ts_hidden_dim=32, **tower,
        ),
        image_token_id=90, video_token_id=91, vision_start_token_id=92, vision_end_token_id=92, ts_token_id=93, ts_start_token_id=94,
        ts_end_token_id=94,
    )  # fmt: skip


def multimodal_batch(config: ModelConfig, rows: int = 8, length: int = 24) -> Batch:
    """Rows with two documents and padding; every row has its own images and signals (of different sizes) or none."""
    assert config.vision is not None and config.time_series is not None
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 90, (rows, length)).astype(np.int32)
    images: list[list[VisionItem]] = []
    signals: list[list[Signal]] = []
    for row in range(rows):
        grids = [(1, 2, 4), (1, 4, 2)][: row % 3]  # two embeddings each
        images.append([VisionItem(rng.normal(size=(8, config.vision.patch_dim)).astype(np.float32), grid) for grid in grids])
        lengths = [9 + row, 14][: (row + 1) % 3]
        signals.append([prepare_signal(rng.normal(size=(n, 1 + row % 2)), 1.0) for n in lengths])
        tokens[row, 1 : 1 + 2 * len(grids)] = config.image_token_id
        count = sum(tokens_of(n, 1.0) for n in lengths)
        tokens[row, 8 : 8 + count] = config.ts_token_id
    split = np.arange(length) < 16
    positions = np.where(split, np.arange(length), np.arange(length) - 16).astype(np.int32)
    segments = np.where(split, 1, np.where(np.arange(length) < 22, 2, 0)).astype(np.int32)
    labels = np.where((segments > 0) & (tokens < 90), rng.integers(0, 90, tokens.shape), -100).astype(np.int32)
    inputs = ModelInputs(
        tokens,
        np.tile(positions, (rows, 1)),
        np.tile(segments, (rows, 1)),
        vision=pack_vision(images, config.vision, size=32),
        time_series=pack_time_series(signals, config.time_series),
    )
    return Batch(inputs, labels)
