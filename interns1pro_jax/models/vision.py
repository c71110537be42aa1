"""The native-resolution vision tower (spec 3): patches of images and videos to embeddings of the text decoder's width."""

from __future__ import annotations

from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from interns1pro_jax import sharding
from interns1pro_jax.config import ConfigError, VisionConfig
from interns1pro_jax.layers.parameter import gathered, normal, ones, parameter, zeros
from interns1pro_jax.models.inputs import VisionInputs
from interns1pro_jax.ops import context
from interns1pro_jax.ops.attention import dot_product_attention
from interns1pro_jax.ops.fope import apply_rotary, inverse_frequencies
from interns1pro_jax.ops.norm import layer_norm

_NORM_EPS = 1e-6
_ROTARY_BASE = 10000.0

Trace = dict[str, Array]


class VisionTower(nnx.Module):
    """Patch embedding, interpolated positions, pre-norm blocks with attention inside each frame, and the patch merger."""

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs):
        d, dtype, init = config.hidden_size, config.param_dtype, normal(config.initializer_range)
        self.config = config
        self.patch_kernel_ID = parameter(rngs, init, (config.patch_dim, d), (None, "tower_embed"), dtype)
        self.patch_bias_D = parameter(rngs, zeros, (d,), (None,), dtype)
        self.position_ND = parameter(rngs, init, (config.num_position_embeddings, d), (None, "tower_embed"), dtype)

        @nnx.vmap(in_axes=0, out_axes=0)
        def stack(key: jax.Array) -> VisionBlock:
            return VisionBlock(config, rngs=nnx.Rngs(key))

        self.blocks = stack(jax.random.split(rngs.params(), config.depth))
        self.merger = VisionMerger(config, rngs=rngs)

    @overload
    def __call__(self, inputs: VisionInputs, *, trace: Literal[False] = False) -> Float[Array, "P tokens D"]: ...

    @overload
    def __call__(self, inputs: VisionInputs, *, trace: Literal[True]) -> tuple[Float[Array, "P tokens D"], Trace]: ...

    def __call__(self, inputs: VisionInputs, *, trace: bool = False) -> Any:
        """Encodes packs of patches.

        Args:
          inputs: packs made by `models.vision_inputs`. The leading axis P may be sharded; the result keeps its sharding. Devices that share
            rows (the mesh axis `context`) share the patches of their packs.
          trace: also return the intermediate activations, for comparison with a reference.

        Returns:
          Embeddings [P, I / merge**2, out_hidden], zero where padded: merged patches in row-major order of the merged grid, frame after
          frame. With `trace`, also a dict of `patch_embed`, `pos_embed` [P, I, D], `rotary` (angles) [P, I, H/2], `rotary_cos`,
          `rotary_sin` [P, I, H], `blocks` [depth, P, I, D] and `merger_norm` [P, I, D].
        """
        dtype = jnp.dtype(self.config.dtype)
        whole_ids, inputs = inputs.frame_ids, _shared(inputs, self.config.spatial_merge_size**2)
        valid_PI = inputs.frame_ids > 0
        # Whatever lies in the padding, even NaN, must not reach a product: 0 * NaN would spoil sums over patches.
        patches_PIX = jnp.where(valid_PI[..., None], inputs.patches, 0).astype(dtype)
        patch_embed_PID = jnp.einsum("PIX,XD->PID", patches_PIX, gathered(self.patch_kernel_ID, dtype)) + gathered(self.patch_bias_D, dtype)
        pos_embed_PID = _interpolate(gathered(self.position_ND, dtype), inputs.position_index, inputs.position_weight)
        angles_PIH = rotary_angles(inputs.row_col, self.config.head_dim)
        cos_PIH, sin_PIH = (jnp.concatenate([f(angles_PIH)] * 2, axis=-1) for f in (jnp.cos, jnp.sin))

        definition, stacked = nnx.split(self.blocks)

        def step(x_PID: Array, state: nnx.State) -> tuple[Array, Array | None]:
            x_PID = nnx.merge(definition, state)(x_PID, cos_PIH, sin_PIH, inputs.frame_ids, whole_ids)
            return x_PID, x_PID if trace else None

        # The backward recomputes each block from its input, so that a pack costs depth * I * D values of memory, not depth * I * (5D + 2F).
        x_PID, blocks_LPID = jax.lax.scan(jax.checkpoint(step, prevent_cse=False), patch_embed_PID + pos_embed_PID, stacked)
        merged, merger_norm_PID = self.merger(x_PID)
        embeddings = _whole(jnp.where(valid_PI[:, :: self.config.spatial_merge_size**2, None], merged, 0))
        if not trace:
            return embeddings
        return embeddings, dict(
            patch_embed=patch_embed_PID, pos_embed=pos_embed_PID, rotary=angles_PIH, rotary_cos=cos_PIH, rotary_sin=sin_PIH,
            blocks=blocks_LPID, merger_norm=merger_norm_PID,
        )  # fmt: skip


class VisionBlock(nnx.Module):
    """x += attention(norm1(x)); x += feed_forward(norm2(x))."""

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs):
        d, q, h, f = config.hidden_size, config.num_heads, config.head_dim, config.intermediate_size
        dtype, init = config.param_dtype, normal(config.initializer_range)
        self.config = config
        self.norm1_scale_D = parameter(rngs, ones, (d,), (None,), dtype)
        self.norm1_bias_D = parameter(rngs, zeros, (d,), (None,), dtype)
        self.qkv_DCQH = parameter(rngs, init, (d, 3, q, h), ("tower_embed", None, None, None), dtype)
        self.qkv_bias_CQH = parameter(rngs, zeros, (3, q, h), (None, None, None), dtype)
        self.proj_QHD = parameter(rngs, init, (q, h, d), (None, None, "tower_embed"), dtype)
        self.proj_bias_D = parameter(rngs, zeros, (d,), (None,), dtype)
        self.norm2_scale_D = parameter(rngs, ones, (d,), (None,), dtype)
        self.norm2_bias_D = parameter(rngs, zeros, (d,), (None,), dtype)
        self.fc1_DF = parameter(rngs, init, (d, f), ("tower_embed", None), dtype)
        self.fc1_bias_F = parameter(rngs, zeros, (f,), (None,), dtype)
        self.fc2_FD = parameter(rngs, init, (f, d), (None, "tower_embed"), dtype)
        self.fc2_bias_D = parameter(rngs, zeros, (d,), (None,), dtype)

    def __call__(
        self,
        x_PID: Float[Array, "P I D"],
        cos_PIH: Float[Array, "P I H"],
        sin_PIH: Float[Array, "P I H"],
        frame_ids_PI: Int[Array, "P I"],
        whole_ids_PI: Int[Array, "P I"],
    ) -> Float[Array, "P I D"]:
        """`frame_ids_PI` are those of the patches in `x_PID`, `whole_ids_PI` those of whole packs, in reading order."""
        dtype = x_PID.dtype
        y_PID = layer_norm(x_PID, self.norm1_scale_D[...], self.norm1_bias_D[...], _NORM_EPS)
        qkv = jnp.einsum("PID,DCQH->CPIQH", y_PID, gathered(self.qkv_DCQH, dtype))
        q_PIQH, k_PIQH, v_PIQH = qkv + gathered(self.qkv_bias_CQH, dtype)[:, None, None]
        cos, sin = cos_PIH[:, :, None], sin_PIH[:, :, None]
        q_PIQH, k_PIQH = (apply_rotary(a.astype(jnp.float32), cos, sin).astype(dtype) for a in (q_PIQH, k_PIQH))
        y_PIQH = dot_product_attention(q_PIQH, k_PIQH, v_PIQH, q_segment_ids=frame_ids_PI, kv_segment_ids=whole_ids_PI, causal=False)
        x_PID += jnp.einsum("PIQH,QHD->PID", y_PIQH, gathered(self.proj_QHD, dtype)) + gathered(self.proj_bias_D, dtype)

        y_PID = layer_norm(x_PID, self.norm2_scale_D[...], self.norm2_bias_D[...], _NORM_EPS)
        y_PIF = gelu(jnp.einsum("PID,DF->PIF", y_PID, gathered(self.fc1_DF, dtype)) + gathered(self.fc1_bias_F, dtype), approximate=True)
        return x_PID + jnp.einsum("PIF,FD->PID", y_PIF, gathered(self.fc2_FD, dtype)) + gathered(self.fc2_bias_D, dtype)


class VisionMerger(nnx.Module):
    """Normalises each patch, joins merge x merge of them and maps the result to the text width (E: the joined width)."""

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs):
        d, out = config.hidden_size, config.out_hidden_size
        e = d * config.spatial_merge_size**2
        dtype, init = config.param_dtype, normal(config.initializer_range)
        self.config = config
        self.norm_scale_D = parameter(rngs, ones, (d,), (None,), dtype)
        self.norm_bias_D = parameter(rngs, zeros, (d,), (None,), dtype)
        self.fc1_EF = parameter(rngs, init, (e, e), ("tower_embed", None), dtype)
        self.fc1_bias_F = parameter(rngs, zeros, (e,), (None,), dtype)
        self.fc2_FD = parameter(rngs, init, (e, out), (None, "tower_embed"), dtype)
        self.fc2_bias_D = parameter(rngs, zeros, (out,), (None,), dtype)

    def __call__(self, x_PID: Float[Array, "P I D"]) -> tuple[Float[Array, "P tokens out"], Float[Array, "P I D"]]:
        """The embeddings, and the normalised patches that they were made of."""
        dtype = x_PID.dtype
        norm_PID = layer_norm(x_PID, self.norm_scale_D[...], self.norm_bias_D[...], _NORM_EPS)
        p, i, d = norm_PID.shape
        merged = self.config.spatial_merge_size**2
        y = norm_PID.reshape(p, i // merged, merged, d).reshape(p, i // merged, merged * d)
        y = gelu(jnp.einsum("PIE,EF->PIF", y, gathered(self.fc1_EF, dtype)) + gathered(self.fc1_bias_F, dtype), approximate=False)
        return jnp.einsum("PIF,FD->PID", y, gathered(self.fc2_FD, dtype)) + gathered(self.fc2_bias_D, dtype), norm_PID


def rotary_angles(row_col: Int[Array, "P I 2"], head_dim: int) -> Float[Array, "P I H/2"]:
    """Angles by which the pairs of a head turn, fp32: those of the row, then those of the column (spec 3.3)."""
    angles = row_col.astype(jnp.float32)[..., None] * inverse_frequencies(_ROTARY_BASE, head_dim // 2)
    return angles.reshape(*row_col.shape[:2], head_dim // 2)


def _shared(inputs: VisionInputs, merged: int) -> VisionInputs:
    """Packs split over `context` in the order of `ops.context`, so that each device has its share of the tower's work."""
    ranks, patches = sharding.axis_size(context.AXIS), inputs.frame_ids.shape[1]
    if ranks == 1:
        return inputs
    if patches % (2 * ranks * merged):
        raise ConfigError(
            f"packs of {patches} patches do not divide into {2 * ranks} chunks of whole embeddings ({merged} patches each), two for each "
            f"device of the mesh axis {context.AXIS}={ranks}; make packs a multiple of {2 * ranks * merged} patches."
        )

    def share(x: Array) -> Array:
        packs = jax.typeof(x).sharding.spec[0]
        return context.balance(jax.sharding.reshard(x, PartitionSpec(packs, context.AXIS, *(None,) * (x.ndim - 2))))

    return jax.tree.map(share, inputs)


def _whole(embeddings_PnD: Array) -> Array:
    """The inverse of `_shared`, for embeddings."""
    if sharding.axis_size(context.AXIS) == 1:
        return embeddings_PnD
    packs = jax.typeof(embeddings_PnD).sharding.spec[0]
    return jax.sharding.reshard(context.reading_order(embeddings_PnD), PartitionSpec(packs, None, None))


def _interpolate(table_ND: Array, index_PI4: Array, weight_PI4: Array) -> Float[Array, "P I D"]:
    """Bilinear interpolation of the position table, with weights rounded to the table's dtype as the released model has it."""
    rows = jax.typeof(index_PI4).sharding.spec
    corners = table_ND.at[index_PI4].get(out_sharding=PartitionSpec(*rows, None))
    return jnp.sum(corners * weight_PI4.astype(table_ND.dtype)[..., None], axis=2)


def gelu(x: Array, *, approximate: bool) -> Array:
    """GELU in float32, by tanh or exact."""
    return jax.nn.gelu(x.astype(jnp.float32), approximate=approximate).astype(x.dtype)
