"""Named configurations of the benchmarks, and the floating-point operations that they cannot do without."""

from __future__ import annotations

import dataclasses

from interns1pro_jax.config import ConfigError, FopeConfig, ModelConfig, TextConfig


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """A model and the sizes it is measured at: training on `batch` rows of `sequence` tokens, decoding `new_tokens` after a
    prompt of `prompt` tokens."""

    text: TextConfig
    batch: int
    sequence: int
    prompt: int
    new_tokens: int

    def model(self, dtype: str, param_dtype: str) -> ModelConfig:
        """The text model alone, computing in `dtype` with parameters in `param_dtype`."""
        return ModelConfig(text=self.text, vision=None, time_series=None).with_dtypes(dtype, param_dtype)


CONFIGS = {
    "bench-cpu": Benchmark(
        TextConfig(
            vocab_size=32768,
            hidden_size=512,
            num_hidden_layers=8,
            num_attention_heads=8,
            num_key_value_heads=2,
            head_dim=64,
            num_experts=64,
            num_experts_per_tok=8,
            router_n_groups=8,
            moe_intermediate_size=256,
            max_position_embeddings=4096,
            fope=FopeConfig(),
        ),
        batch=4,
        sequence=512,
        prompt=128,
        new_tokens=64,
    ),
    "bench-tiny": Benchmark(
        TextConfig(
            vocab_size=512,
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            num_experts=16,
            num_experts_per_tok=8,
            router_n_groups=8,
            moe_intermediate_size=32,
            max_position_embeddings=4096,
            fope=FopeConfig(),
        ),
        batch=8,
        sequence=64,
        prompt=16,
        new_tokens=8,
    ),
}


def get(name: str) -> Benchmark:
    if name not in CONFIGS:
        raise ConfigError(f"there is no benchmark {name!r}; choose one of {', '.join(sorted(CONFIGS))}.")
    return CONFIGS[name]


def matmul_parameters(text: TextConfig) -> int:
    """Parameters of the matrices that a token passes through (the experts it chooses; not the input embedding)."""
    attention = 2 * text.hidden_size * text.head_dim * (text.num_attention_heads + text.num_key_value_heads)
    total = text.hidden_size * text.vocab_size
    for layer in range(text.num_hidden_layers):
        total += attention
        if text.is_moe(layer):
            total += text.num_experts_per_tok * 3 * text.hidden_size * text.moe_intermediate_size + text.hidden_size * text.num_experts
        else:
            total += 3 * text.hidden_size * text.intermediate_size
    return total


def useful_flops(text: TextConfig, tokens: int, sequence: int, training: bool) -> int:
    """Operations of a pass over `tokens` tokens in rows of `sequence`: products only, causal attention counted by the half that
    is not masked, nothing counted twice for recomputation. Training is three forward passes."""
    attention = text.num_hidden_layers * 2 * sequence * text.num_attention_heads * text.head_dim
    return (2 * matmul_parameters(text) + attention) * tokens * (3 if training else 1)
