"""InternViT and its projector: tiles of one size to embeddings of the text decoder's width.

The tower of Intern-S1 and Intern-S1-mini, after the class `InternVLVisionModel` of the transformers library. A tile is a square of
patches with a class token before it, whose output nobody reads. All tiles of a pack are one row of tokens with a segment for each tile, so
that the attention is the decoder's; the patches of a tile come in merge order, as in `models.vision_inputs`, so that the patches of an
embedding are neighbours.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from interns1pro_jax.config import ConfigError
from interns1pro_jax.layers.parameter import Initializer, gathered, normal, ones, parameter, zeros
from interns1pro_jax.models.inputs import VisionInputs
from interns1pro_jax.models.vision import gelu
from interns1pro_jax.ops.attention import dot_product_attention
from interns1pro_jax.ops.norm import layer_norm, rms_norm
from interns1pro_jax.tower_config import InternVitConfig

_PROJECTOR_NORM_EPS = 1e-5
_LANES = 128  # the attention kernel takes rows of whole lanes


class InternVit(nnx.Module):
    """Patch embedding, class token, learned positions, pre-norm blocks with scaled branches, and the projector."""

    def __init__(self, config: InternVitConfig, *, rngs: nnx.Rngs):
        d, dtype, init = config.hidden_size, config.param_dtype, normal(config.initializer_range)
        self.config = config
        self.patch_kernel_ID = parameter(rngs, init, (config.patch_dim, d), (None, "tower_embed"), dtype)
        self.patch_bias_D = parameter(rngs, zeros, (d,), (None,), dtype)
        self.class_D = parameter(rngs, init, (d,), (None,), dtype)
        self.position_ND = parameter(rngs, init, (1 + config.num_position_embeddings, d), (None, "tower_embed"), dtype)

        @nnx.vmap(in_axes=0, out_axes=0)
        def stack(key: jax.Array) -> InternVitBlock:
            return InternVitBlock(config, rngs=nnx.Rngs(key))

        self.blocks = stack(jax.random.split(rngs.params(), config.depth))
        self.projector = Projector(config, rngs=rngs)

    def __call__(self, inputs: VisionInputs) -> Float[Array, "P tokens D"]:
        """Encodes packs of whole tiles.

        Args:
          inputs: packs made by `models.vision_inputs`; every frame of an item is a tile. The leading axis P may be sharded; the result
            keeps its sharding.

        Returns:
          Embeddings [P, I / merge**2, out_hidden], zero where padded: tile after tile, each in row-major order of its merged grid.

        Raises:
          ConfigError: packs that do not consist of whole tiles.
        """
        cfg, dtype = self.config, jnp.dtype(self.config.dtype)
        packs, count = inputs.frame_ids.shape
        size = cfg.pack_unit
        if count % size:
            raise ConfigError(f"packs of {count} patches do not consist of tiles of {size}; make packs a multiple of that.")
        tiles = count // size
        valid_PI = inputs.frame_ids > 0
        # Whatever lies in the padding, even NaN, must not reach a product: 0 * NaN would spoil sums over patches.
        patches_PIX = jnp.where(valid_PI[..., None], inputs.patches, 0).astype(dtype)
        x_PID = jnp.einsum("PIX,XD->PID", patches_PIX, gathered(self.patch_kernel_ID, dtype)) + gathered(self.patch_bias_D, dtype)
        position_ND = gathered(self.position_ND, dtype)
        x_PtnD = x_PID.reshape(packs, tiles, size, -1) + position_ND[1 + _merge_order(cfg)]
        class_D = gathered(self.class_D, dtype) + position_ND[0]
        class_Pt1D = jnp.zeros_like(x_PtnD[:, :, :1]) + class_D
        ids_Pt = inputs.frame_ids[:, ::size]
        padding = -tiles * (1 + size) % _LANES if tiles * (1 + size) > _LANES else 0
        x_PSD = jnp.pad(jnp.concatenate([class_Pt1D, x_PtnD], 2).reshape(packs, tiles * (1 + size), -1), ((0, 0), (0, padding), (0, 0)))
        ids_PS = jnp.pad(jnp.repeat(ids_Pt, 1 + size, axis=1, total_repeat_length=tiles * (1 + size)), ((0, 0), (0, padding)))

        definition, stacked = nnx.split(self.blocks)

        def step(x_PSD: Array, state: nnx.State) -> tuple[Array, None]:
            return nnx.merge(definition, state)(x_PSD, ids_PS), None

        # The backward recomputes each block from its input, as in `models.vision`.
        x_PSD, _ = jax.lax.scan(jax.checkpoint(step, prevent_cse=False), x_PSD, stacked)
        x_PtnD = x_PSD[:, : tiles * (1 + size)].reshape(packs, tiles, 1 + size, -1)[:, :, 1:]
        merged = cfg.spatial_merge_size**2
        embeddings = self.projector(x_PtnD.reshape(packs, count // merged, -1))
        return jnp.where(valid_PI[:, ::merged, None], embeddings, 0)


class InternVitBlock(nnx.Module):
    """x += scale1 * attention(norm1(x)); x += scale2 * feed_forward(norm2(x))."""

    def __init__(self, config: InternVitConfig, *, rngs: nnx.Rngs):
        d, q, h, f = config.hidden_size, config.num_heads, config.head_dim, config.intermediate_size
        dtype, init = config.param_dtype, normal(config.initializer_range)
        self.config = config
        self.norm1 = Norm(config, rngs=rngs)
        self.q_DQH = parameter(rngs, init, (d, q, h), ("tower_embed", None, None), dtype)
        self.k_DQH = parameter(rngs, init, (d, q, h), ("tower_embed", None, None), dtype)
        self.v_DQH = parameter(rngs, init, (d, q, h), ("tower_embed", None, None), dtype)
        if config.attention_bias:
            self.q_bias_QH = parameter(rngs, zeros, (q, h), (None, None), dtype)
            self.k_bias_QH = parameter(rngs, zeros, (q, h), (None, None), dtype)
            self.v_bias_QH = parameter(rngs, zeros, (q, h), (None, None), dtype)
        if config.use_qk_norm:
            self.q_norm_D = parameter(rngs, ones, (d,), (None,), dtype)
            self.k_norm_D = parameter(rngs, ones, (d,), (None,), dtype)
        self.proj_QHD = parameter(rngs, init, (q, h, d), (None, None, "tower_embed"), dtype)
        self.proj_bias_D = parameter(rngs, zeros, (d,), (None,), dtype)
        self.scale1_D = parameter(rngs, _constant(config.layer_scale_init_value), (d,), (None,), dtype)
        self.norm2 = Norm(config, rngs=rngs)
        self.fc1_DF = parameter(rngs, init, (d, f), ("tower_embed", None), dtype)
        self.fc1_bias_F = parameter(rngs, zeros, (f,), (None,), dtype)
        self.fc2_FD = parameter(rngs, init, (f, d), (None, "tower_embed"), dtype)
        self.fc2_bias_D = parameter(rngs, zeros, (d,), (None,), dtype)
        self.scale2_D = parameter(rngs, _constant(config.layer_scale_init_value), (d,), (None,), dtype)

    def __call__(self, x_PSD: Float[Array, "P S D"], ids_PS: Int[Array, "P S"]) -> Float[Array, "P S D"]:
        dtype = x_PSD.dtype
        y_PSD = self.norm1(x_PSD)
        q_PSQH, k_PSQH, v_PSQH = (self._project(y_PSD, name) for name in "qkv")
        out = dot_product_attention(q_PSQH, k_PSQH, v_PSQH, q_segment_ids=ids_PS, kv_segment_ids=ids_PS, causal=False)
        y_PSD = jnp.einsum("PSQH,QHD->PSD", out, gathered(self.proj_QHD, dtype)) + gathered(self.proj_bias_D, dtype)
        x_PSD += gathered(self.scale1_D, dtype) * y_PSD
        y_PSF = jnp.einsum("PSD,DF->PSF", self.norm2(x_PSD), gathered(self.fc1_DF, dtype)) + gathered(self.fc1_bias_F, dtype)
        y_PSF = gelu(y_PSF, approximate=False)
        y_PSD = jnp.einsum("PSF,FD->PSD", y_PSF, gathered(self.fc2_FD, dtype)) + gathered(self.fc2_bias_D, dtype)
        return x_PSD + gathered(self.scale2_D, dtype) * y_PSD

    def _project(self, y_PSD: Array, name: str) -> Float[Array, "P S Q H"]:
        """Queries, keys or values ("q", "k", "v"), with bias and norm where the config has them."""
        cfg, dtype = self.config, y_PSD.dtype
        x_PSQH = jnp.einsum("PSD,DQH->PSQH", y_PSD, gathered(getattr(self, f"{name}_DQH"), dtype))
        if cfg.attention_bias:
            x_PSQH += gathered(getattr(self, f"{name}_bias_QH"), dtype)
        if cfg.use_qk_norm and name != "v":
            x_PSD = x_PSQH.reshape(*x_PSQH.shape[:2], -1)
            x_PSQH = rms_norm(x_PSD, getattr(self, f"{name}_norm_D")[...], cfg.layer_norm_eps).reshape(x_PSQH.shape)
        return x_PSQH


class Norm(nnx.Module):
    """The norm that the config names."""

    def __init__(self, config: InternVitConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.scale_D = parameter(rngs, ones, (config.hidden_size,), (None,), config.param_dtype)
        if config.norm_type == "layer_norm":
            self.bias_D = parameter(rngs, zeros, (config.hidden_size,), (None,), config.param_dtype)

    def __call__(self, x: Float[Array, "*dims D"]) -> Float[Array, "*dims D"]:
        eps = self.config.layer_norm_eps
        if self.config.norm_type == "layer_norm":
            return layer_norm(x, self.scale_D[...], self.bias_D[...], eps)
        return rms_norm(x, self.scale_D[...], eps)


class Projector(nnx.Module):
    """Normalises the joined patches of an embedding (width E) and maps them to the text width (O)."""

    def __init__(self, config: InternVitConfig, *, rngs: nnx.Rngs):
        e, o = config.hidden_size * config.spatial_merge_size**2, config.out_hidden_size
        dtype, init = config.param_dtype, normal(config.initializer_range)
        self.norm_scale_E = parameter(rngs, ones, (e,), (None,), dtype)
        self.norm_bias_E = parameter(rngs, zeros, (e,), (None,), dtype)
        self.fc1_EO = parameter(rngs, init, (e, o), ("tower_embed", None), dtype)
        self.fc1_bias_O = parameter(rngs, zeros, (o,), (None,), dtype)
        self.fc2_OO = parameter(rngs, init, (o, o), (None, "tower_embed"), dtype)
        self.fc2_bias_O = parameter(rngs, zeros, (o,), (None,), dtype)

    def __call__(self, x_PtE: Float[Array, "P tokens E"]) -> Float[Array, "P tokens O"]:
        dtype = x_PtE.dtype
        y = layer_norm(x_PtE, self.norm_scale_E[...], self.norm_bias_E[...], _PROJECTOR_NORM_EPS)
        y = gelu(jnp.einsum("PtE,EO->PtO", y, gathered(self.fc1_EO, dtype)) + gathered(self.fc1_bias_O, dtype), approximate=False)
        return jnp.einsum("PtO,Oo->Pto", y, gathered(self.fc2_OO, dtype)) + gathered(self.fc2_bias_O, dtype)


def _constant(value: float) -> Initializer:
    return jax.nn.initializers.constant(value)  # type: ignore[return-value]


def _merge_order(config: InternVitConfig) -> np.ndarray:
    """The row-major number of each patch of a tile, in merge order."""
    side, merge = config.tile_side, config.spatial_merge_size
    numbers = np.arange(side * side).reshape(side // merge, merge, side // merge, merge)
    return numbers.transpose(0, 2, 1, 3).reshape(-1)
