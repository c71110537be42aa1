"""Small configurations and batches shared by tests."""

import dataclasses
from typing import Any

import numpy as np

from interns1pro_jax.config import ModelConfig, TextConfig
from interns1pro_jax.models.inputs import ModelInputs


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
