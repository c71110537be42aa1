"""Configuration of the text decoder: its sizes, its position encoding, its router, and adapters."""

from __future__ import annotations

import dataclasses

from interns1pro_jax.config_checks import check_divides, check_dtypes, check_fields, check_positive, check_sizes, require


@dataclasses.dataclass(frozen=True)
class FopeConfig:
    """Fourier position encoding, spec 2.3. `None` in `TextConfig.fope` means plain rotary encoding.

    Attributes:
      init_factor: gain of the Xavier-normal initialiser of the coefficients.
      sep_head: one coefficient matrix per key/value head (True) or one for all (False).
      num_inv_freq: frequencies kept; None keeps those with a period shorter than `max_position_embeddings`.
    """

    init_factor: float = 0.5
    sep_head: bool = True
    num_inv_freq: int | None = None

    def __post_init__(self) -> None:
        check_fields(self)


@dataclasses.dataclass(frozen=True)
class RouterConfig:
    """Training behaviour of the router that the released config does not describe (paper section on the router).

    Attributes:
      straight_through: backward through the dense softmax over all experts (spec 1.2); the forward is unchanged.
      temperature: tau of the straight-through softmax.
      balance_coef: weight of the load-balancing loss, which is 1 when balanced. The released format's `router_aux_loss_coef`
        weighs a loss that is `num_experts_per_tok` when balanced (spec 2.4), so it is smaller by that factor: 0.001 where absent.
      balance_in_group_coef: weight of the same loss within each group, from a softmax over its experts.
      balance_over: what the load-balancing losses take an expert's share of: the tokens of the `batch`, of each `microbatch` (as in the
        authors' trainer), or of each `row`, which asks for more balance. Only the first gives the same gradient however the batch
        is packed and accumulated; where it is accumulated, that costs a forward pass that counts beforehand.
      z_coef: weight of the z-loss, mean of logsumexp(logits)^2.
      z_in_group_coef: weight of the same over the logits of each group, and the mean of the groups.
    """

    straight_through: bool = True
    temperature: float = 1.0
    balance_coef: float = 1e-3
    balance_in_group_coef: float = 0.0
    balance_over: str = "batch"
    z_coef: float = 0.0
    z_in_group_coef: float = 0.0

    def __post_init__(self) -> None:
        check_fields(self)
        require(self.temperature > 0, f"RouterConfig.temperature={self.temperature} must be positive.")
        spans = ("batch", "microbatch", "row")
        require(self.balance_over in spans, f"RouterConfig.balance_over={self.balance_over!r} is unknown; use one of {', '.join(spans)}.")
        for name in ("balance_coef", "balance_in_group_coef", "z_coef", "z_in_group_coef"):
            require(getattr(self, name) >= 0, f"RouterConfig.{name}={getattr(self, name)} must not be negative; zero switches it off.")


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (arXiv:2106.09685), the only parameters that are trained then: W + alpha / rank * A B.

    Attributes:
      rank: columns of A, rows of B.
      attention, experts: whether the four attention projections, and the experts' three, have adapters.
    """

    rank: int = 16
    alpha: float = 32.0
    attention: bool = True
    experts: bool = True

    def __post_init__(self) -> None:
        check_fields(self)
        check_positive("LoraConfig.rank", self.rank)
        require(self.alpha > 0, f"LoraConfig.alpha={self.alpha} must be positive: adapters would change nothing.")
        require(self.attention or self.experts, "LoraConfig.attention=False and LoraConfig.experts=False leave nothing to train.")

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """The text decoder, spec section 2. Defaults are the released model's. Its ancestors have other sizes: no experts at all
    (`num_experts=0`), one group of them, no Fourier encoding, or an embedding that is the output head too.

    Attributes that the released config does not have:
      expert_products: `dtype`, or `fp8` for the experts' products and their gradients in e4m3 (`ops.fp8`); all else stays in `dtype`.
      lora: adapters; None for a model without.
    """

    vocab_size: int = 155008
    hidden_size: int = 4096
    num_hidden_layers: int = 94
    num_attention_heads: int = 64
    num_key_value_heads: int = 4
    head_dim: int = 128
    attention_bias: bool = False
    num_experts: int = 512
    num_experts_per_tok: int = 8
    router_n_groups: int = 8
    moe_intermediate_size: int = 1536
    intermediate_size: int = 12288
    decoder_sparse_step: int = 1
    mlp_only_layers: tuple[int, ...] = ()
    norm_topk_prob: bool = True
    rms_norm_eps: float = 1e-6
    rope_theta: float = 5e6
    fope: FopeConfig | None = FopeConfig()
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 262144
    initializer_range: float = 0.02
    bos_token_id: int | None = 151643
    eos_token_id: int | None = 151645
    router: RouterConfig = RouterConfig()
    dtype: str = "bfloat16"
    param_dtype: str = "bfloat16"
    expert_products: str = "dtype"
    lora: LoraConfig | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        products = ("dtype", "fp8")
        require(self.expert_products in products, f"TextConfig.expert_products={self.expert_products!r} is unknown; use one of {products}.")
        check_sizes(
            self, "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
            "head_dim", "decoder_sparse_step", "max_position_embeddings",
        )  # fmt: skip
        check_dtypes(self)
        check_divides("num_attention_heads", self.num_attention_heads, "num_key_value_heads", self.num_key_value_heads)
        require(self.head_dim % 2 == 0, f"head_dim={self.head_dim} must be even: rotary encoding turns pairs.")
        outside = [layer for layer in self.mlp_only_layers if not 0 <= layer < self.num_hidden_layers]
        require(not outside, f"mlp_only_layers names layers {outside}, but the model has {self.num_hidden_layers} layers.")
        if any(self.is_moe(layer) for layer in range(self.num_hidden_layers)):
            check_sizes(self, "num_experts", "num_experts_per_tok", "router_n_groups", "moe_intermediate_size")
            check_divides("num_experts", self.num_experts, "router_n_groups", self.router_n_groups)
            check_divides("num_experts_per_tok", self.num_experts_per_tok, "router_n_groups", self.router_n_groups)
            require(
                self.experts_per_group_per_token <= self.experts_per_group,
                f"num_experts_per_tok={self.num_experts_per_tok} asks for {self.experts_per_group_per_token} experts in each of "
                f"{self.router_n_groups} groups, but a group has only {self.experts_per_group}.",
            )
        if any(not self.is_moe(layer) for layer in range(self.num_hidden_layers)):
            check_sizes(self, "intermediate_size")
        if self.fope is not None and self.fope.num_inv_freq is not None:
            require(
                0 < self.fope.num_inv_freq <= self.head_dim // 2,
                f"num_inv_freq={self.fope.num_inv_freq} must lie in 1..head_dim/2={self.head_dim // 2}.",
            )

    def is_moe(self, layer: int) -> bool:
        """Whether layer `layer` (from 0) has experts (spec 2.5)."""
        return self.num_experts > 0 and layer not in self.mlp_only_layers and (layer + 1) % self.decoder_sparse_step == 0

    @property
    def experts_per_group(self) -> int:
        return self.num_experts // self.router_n_groups

    @property
    def experts_per_group_per_token(self) -> int:
        return self.num_experts_per_tok // self.router_n_groups

    @property
    def layer_runs(self) -> tuple[tuple[bool, int, int], ...]:
        """Maximal runs of equal layers, as (is_moe, first layer, number of layers). Each run is one stacked module."""
        runs: list[tuple[bool, int, int]] = []
        for layer in range(self.num_hidden_layers):
            moe = self.is_moe(layer)
            if runs and runs[-1][0] == moe:
                runs[-1] = (moe, runs[-1][1], runs[-1][2] + 1)
            else:
                runs.append((moe, layer, 1))
        return tuple(runs)

    @property
    def num_moe_layers(self) -> int:
        return sum(count for moe, _, count in self.layer_runs if moe)
