"""The time-series tower (spec 4): signals of any length, rate and channel count to embeddings of the text model's width.

    samples -> rows of 4..320 samples -> patch encoder -> pairs of patches -> two convolutions -> causal encoder -> projector

Signals lie end to end in a pack (`models.inputs.TimeSeriesInputs`). Nothing crosses from one signal to another: convolutions
read zeros there and attention stays within a signal, so that every signal is encoded as if it were alone (the released code
lets the padding of a batch leak in, spec 4.6).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal, overload

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from interns1pro_jax.config import TimeSeriesConfig
from interns1pro_jax.layers.parameter import gathered, normal, ones, parameter, zeros
from interns1pro_jax.models.inputs import TimeSeriesInputs
from interns1pro_jax.ops.attention import chunked_attention, dot_product_attention
from interns1pro_jax.ops.norm import layer_norm
from interns1pro_jax.ops.varying import as_varying, varying_axes

_EPS = 1e-5
_ROW_TAPS, _PAIR_TAPS = 5, 3  # kernel sizes of the patch encoder's convolution and of the two after it
# Rows encoded at a time: their widest activation has 2048 values per sample, which would take gigabytes for all rows at once.
_CHUNK_ROWS = 16
_ROW_WIDTHS = (16, 64)  # besides `patch_width`; patches of 100 Hz signals have 48 samples


def sinusoid_table(length: int, width: int) -> np.ndarray:
    """Sine (even columns) and cosine (odd columns) of `position * 10000^(-2i/width)`, fp32 [length, width] (spec 4.2)."""
    # Only this rounding, of the exponent but not within the exponential, gives the released table almost to the bit.
    exponent = np.arange(0, width, 2, dtype=np.float32) * np.float32(-np.log(10000.0) / width)
    frequency = np.exp(exponent.astype(np.float64)).astype(np.float32)
    phase = np.arange(length, dtype=np.float32)[:, None] * frequency
    return np.stack([np.sin(phase), np.cos(phase)], axis=-1).reshape(length, width)


def _linear(equation: str, x: jax.Array, weight: nnx.Variable, bias: nnx.Variable | None = None) -> jax.Array:
    """`einsum(equation, x, weight) + bias` in x's dtype; the result is split as x is, along its first axis only."""
    rank = len(equation.split("->")[1])
    split = PartitionSpec(jax.typeof(x).sharding.spec[0], *(None,) * (rank - 1))
    y = jnp.einsum(equation, x, weight[...].astype(x.dtype), out_sharding=split)
    return y if bias is None else y + bias[...].astype(x.dtype)


def _layer_norm(x: jax.Array, scale: nnx.Variable, bias: nnx.Variable) -> jax.Array:
    return layer_norm(x, scale[...], bias[...], _EPS)


def _gelu(x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x.astype(jnp.float32), approximate=False).astype(x.dtype)


# For the bodies of loops: the backward recomputes each from its input, one at a time.
_recomputed = functools.partial(jax.checkpoint, prevent_cse=False)


class PatchEncoder(nnx.Module):
    """One convolution and one post-norm transformer layer over the samples of a row (spec 4.2).

    Its 0.6 million parameters are copied to every device, since each device encodes the rows of its own packs.
    """

    def __init__(self, config: TimeSeriesConfig, *, rngs: nnx.Rngs):
        D, Q, F = config.PATCH_WIDTH, config.PATCH_HEADS, config.PATCH_FFN
        self.dtype = jnp.dtype(config.dtype)

        def matrix(fan_in: int, *shape: int) -> nnx.Variable:
            # By the fan-in, not by `initializer_range`: at 0.02 the sinusoids would drown the samples in a fresh model.
            return parameter(rngs, normal(fan_in**-0.5), shape, (None,) * len(shape), config.param_dtype)

        def vector(*shape: int, init=zeros) -> nnx.Variable:
            return parameter(rngs, init, shape, (None,) * len(shape), config.param_dtype)

        self.conv_XD, self.conv_bias_D = matrix(_ROW_TAPS, _ROW_TAPS, D), vector(D)
        self.qkv_DCQH, self.qkv_bias_CQH = matrix(D, D, 3, Q, D // Q), vector(3, Q, D // Q)
        self.out_QHD, self.out_bias_D = matrix(D, Q, D // Q, D), vector(D)
        self.norm1_scale_D, self.norm1_bias_D = vector(D, init=ones), vector(D)
        self.fc1_DF, self.fc1_bias_F = matrix(D, D, F), vector(F)
        self.fc2_FD, self.fc2_bias_D = matrix(F, F, D), vector(D)
        self.norm2_scale_D, self.norm2_bias_D = vector(D, init=ones), vector(D)

    def __call__(self, rows_RW: Float[Array, "R W"], length_R: Int[Array, " R"]) -> Float[Array, "R D"]:
        """Mean encoding, in fp32, of the first `length_R` samples of each row; the samples after them must be zero."""
        W = rows_RW.shape[1]
        # Samples and sinusoids stay in fp32 up to the transformer layer, as in the authors' trainer (spec 4.6).
        padded = jnp.pad(rows_RW, ((0, 0), (_ROW_TAPS // 2, _ROW_TAPS // 2)))
        window_RWX = jnp.stack([padded[:, x : x + W] for x in range(_ROW_TAPS)], axis=-1)
        x_RWD = jax.nn.relu(_linear("rwx,xd->rwd", window_RWX, self.conv_XD, self.conv_bias_D))
        x_RWD = (x_RWD + sinusoid_table(W, x_RWD.shape[-1])).astype(self.dtype)

        inside_RW = jnp.arange(W) < length_R[:, None]
        segment_RW = inside_RW.astype(jnp.int32)
        qkv = _linear("rwd,dcqh->rwcqh", x_RWD, self.qkv_DCQH, self.qkv_bias_CQH)
        q_RWQH, k_RWQH, v_RWQH = (qkv[:, :, part] for part in range(3))
        # Rows are short, and already inside a `shard_map`.
        mixed = chunked_attention(q_RWQH, k_RWQH, v_RWQH, q_segment_ids=segment_RW, kv_segment_ids=segment_RW, causal=False)
        x_RWD += _linear("rwqh,qhd->rwd", mixed, self.out_QHD, self.out_bias_D)
        x_RWD = _layer_norm(x_RWD, self.norm1_scale_D, self.norm1_bias_D)
        hidden_RWF = jax.nn.relu(_linear("rwd,df->rwf", x_RWD, self.fc1_DF, self.fc1_bias_F))
        x_RWD += _linear("rwf,fd->rwd", hidden_RWF, self.fc2_FD, self.fc2_bias_D)
        x_RWD = _layer_norm(x_RWD, self.norm2_scale_D, self.norm2_bias_D)

        total = jnp.sum(x_RWD.astype(jnp.float32), axis=1, where=inside_RW[..., None])
        return total / jnp.maximum(length_R, 1)[:, None]


def _encode_rows(
    encoder: PatchEncoder, values: Float[Array, " X"], start_R: Int[Array, " R"], length_R: Int[Array, " R"], width: int
) -> Float[Array, "R D"]:
    """Encodes the rows `values[start : start + length]`, a chunk of neighbouring rows at a time.

    A chunk is as wide as its longest row asks for, and nothing is done for a chunk of padding: where one static shape serves
    signals of every rate, most of the capacity (rows times width) is unused.
    """
    rows = len(start_R)
    chunk = min(_CHUNK_ROWS, rows)
    widths = [w for w in _ROW_WIDTHS if w < width] + [width]

    def encode(start: jax.Array, length: jax.Array, *, width: int) -> jax.Array:
        step = jnp.arange(width)
        samples = values.at[start[:, None] + step].get(mode="clip")
        return encoder(jnp.where(step < length[:, None], samples, 0), length)

    def skip(start: jax.Array, length: jax.Array) -> jax.Array:
        zeros_RD = jnp.zeros((chunk, encoder.conv_bias_D.shape[0]), jnp.float32)
        return as_varying(zeros_RD, varying_axes(length))

    branches: list[Callable[..., jax.Array]] = [skip, *(functools.partial(encode, width=w) for w in widths)]

    def encode_chunk(chunk_rows: tuple[jax.Array, jax.Array]) -> jax.Array:
        start, length = chunk_rows
        branch = jnp.searchsorted(jnp.array([0, *widths]), jnp.max(length))
        return jax.lax.switch(branch, branches, start, length)

    chunks = tuple(jnp.pad(x, (0, -rows % chunk)).reshape(-1, chunk) for x in (start_R, length_R))
    encoded = jax.lax.map(_recomputed(encode_chunk), chunks)
    return encoded.reshape(-1, encoded.shape[-1])[:rows]


def encode_pairs(encoder: PatchEncoder, inputs: TimeSeriesInputs) -> Float[Array, "P pairs 256"]:
    """Patch encodings, two neighbours concatenated; zeros at padding (spec 4.2, 4.3). Each device encodes its own packs."""
    graph, state = nnx.split(encoder)
    pairs = inputs.pair_ids.shape[1]

    def local(state, values, row_start, row_length, row_patch, row_weight):
        packs, X = values.shape
        pack = jnp.arange(packs)[:, None]
        # Typed as differing between devices here, the weights' gradients are summed over the devices here too: once, and not in
        # every chunk, where devices that skip a chunk would miss the collective.
        state = jax.tree.map(lambda w: as_varying(w, varying_axes(values)), state)
        encoded = _encode_rows(
            nnx.merge(graph, state), values.reshape(-1), (row_start + pack * X).reshape(-1), row_length.reshape(-1), inputs.patch_width
        )
        patch = (row_patch + pack * (2 * pairs)).reshape(-1)
        patches = jax.ops.segment_sum(encoded * row_weight.reshape(-1, 1), patch, num_segments=packs * 2 * pairs)
        return patches.reshape(packs, pairs, -1)

    per_pack = PartitionSpec(jax.typeof(inputs.values).sharding.spec[0])
    return jax.shard_map(local, in_specs=(PartitionSpec(), *(per_pack,) * 5), out_specs=per_pack)(
        state, inputs.values, inputs.row_start, inputs.row_length, inputs.row_patch, inputs.row_weight
    )


def _with_neighbours(x_PIE: Float[Array, "P I E"], ids_PI: Int[Array, "P I"]) -> Float[Array, "P I 3 E"]:
    """Each position after its left and before its right neighbour, which are zero where they belong to another signal."""
    same = (ids_PI[:, 1:] == ids_PI[:, :-1])[..., None]
    left = jnp.pad(jnp.where(same, x_PIE[:, :-1], 0), ((0, 0), (1, 0), (0, 0)))
    right = jnp.pad(jnp.where(same, x_PIE[:, 1:], 0), ((0, 0), (0, 1), (0, 0)))
    return jnp.stack([left, x_PIE, right], axis=2)


class EncoderLayer(nnx.Module):
    """Pre-norm transformer layer with causal attention within a signal (spec 4.4)."""

    def __init__(self, config: TimeSeriesConfig, *, rngs: nnx.Rngs):
        D, Q, F = config.d_model, config.encoder_attention_heads, config.encoder_ffn_dim
        H = D // Q

        def matrix(shape: tuple[int, ...], *dims: str | None) -> nnx.Variable:
            return parameter(rngs, normal(config.initializer_range), shape, dims, config.param_dtype)

        def vector(*shape: int, init=zeros) -> nnx.Variable:
            return parameter(rngs, init, shape, (None,) * len(shape), config.param_dtype)

        self.attention_norm_scale_D, self.attention_norm_bias_D = vector(D, init=ones), vector(D)
        self.q_DQH, self.q_bias_QH = matrix((D, Q, H), "tower_embed", None, None), vector(Q, H)
        self.k_DQH = matrix((D, Q, H), "tower_embed", None, None)
        self.v_DQH, self.v_bias_QH = matrix((D, Q, H), "tower_embed", None, None), vector(Q, H)
        self.out_QHD, self.out_bias_D = matrix((Q, H, D), None, None, "tower_embed"), vector(D)
        self.mlp_norm_scale_D, self.mlp_norm_bias_D = vector(D, init=ones), vector(D)
        self.fc1_DF, self.fc1_bias_F = matrix((D, F), "tower_embed", None), vector(F)
        self.fc2_FD, self.fc2_bias_D = matrix((F, D), None, "tower_embed"), vector(D)

    def __call__(self, x_PTD: Float[Array, "P T D"], ids_PT: Int[Array, "P T"]) -> Float[Array, "P T D"]:
        y_PTD = _layer_norm(x_PTD, self.attention_norm_scale_D, self.attention_norm_bias_D)
        q_PTQH = _linear("ptd,dqh->ptqh", y_PTD, self.q_DQH, self.q_bias_QH)
        k_PTQH = _linear("ptd,dqh->ptqh", y_PTD, self.k_DQH)
        v_PTQH = _linear("ptd,dqh->ptqh", y_PTD, self.v_DQH, self.v_bias_QH)
        mixed_PTQH = dot_product_attention(q_PTQH, k_PTQH, v_PTQH, q_segment_ids=ids_PT, kv_segment_ids=ids_PT, causal=True)
        x_PTD += _linear("ptqh,qhd->ptd", mixed_PTQH, self.out_QHD, self.out_bias_D)
        y_PTD = _layer_norm(x_PTD, self.mlp_norm_scale_D, self.mlp_norm_bias_D)
        hidden_PTF = _gelu(_linear("ptd,df->ptf", y_PTD, self.fc1_DF, self.fc1_bias_F))
        return x_PTD + _linear("ptf,fd->ptd", hidden_PTF, self.fc2_FD, self.fc2_bias_D)


class Projector(nnx.Module):
    """LayerNorm and two linear layers to the text model's width (spec 4.5)."""

    def __init__(self, config: TimeSeriesConfig, *, rngs: nnx.Rngs):
        D, F = config.ts_hidden_dim, config.out_hidden_size

        def matrix(shape: tuple[int, ...], *dims: str | None) -> nnx.Variable:
            return parameter(rngs, normal(config.initializer_range), shape, dims, config.param_dtype)

        def vector(size: int, init=zeros) -> nnx.Variable:
            return parameter(rngs, init, (size,), (None,), config.param_dtype)

        self.norm_scale_D, self.norm_bias_D = vector(D, ones), vector(D)
        self.fc1_DF, self.fc1_bias_F = matrix((D, F), "tower_embed", None), vector(F)
        self.fc2_FD, self.fc2_bias_D = matrix((F, F), None, "tower_embed"), vector(F)

    def __call__(self, x_PTD: Float[Array, "P T D"]) -> Float[Array, "P T out"]:
        y_PTD = _layer_norm(x_PTD, self.norm_scale_D, self.norm_bias_D)
        hidden_PTF = _gelu(_linear("ptd,df->ptf", y_PTD, self.fc1_DF, self.fc1_bias_F))
        return _linear("ptf,fd->ptd", hidden_PTF, self.fc2_FD, self.fc2_bias_D)


class TimeSeriesTower(nnx.Module):
    """The whole tower. Parameters in the order in which they are applied."""

    def __init__(self, config: TimeSeriesConfig, *, rngs: nnx.Rngs):
        self.config = config
        patches, mels, D, out = config.ts_adapt_in_dim, config.num_mel_bins, config.d_model, config.ts_adapt_out_dim

        def matrix(shape: tuple[int, ...], *dims: str | None, stddev: float = config.initializer_range) -> nnx.Variable:
            return parameter(rngs, normal(stddev), shape, dims, config.param_dtype)

        def vector(size: int, init=zeros) -> nnx.Variable:
            return parameter(rngs, init, (size,), (None,), config.param_dtype)

        self.patch_encoder = PatchEncoder(config, rngs=rngs)
        # Up to the encoder by the fan-in, so that in a fresh model the signal is as loud as its positions.
        self.adapt_in_ED = matrix((patches, mels), "tower_embed", None, stddev=patches**-0.5)
        self.adapt_in_bias_D = vector(mels)
        self.conv1_XDE = matrix((_PAIR_TAPS, mels, D), None, None, "tower_embed", stddev=(_PAIR_TAPS * mels) ** -0.5)
        self.conv1_bias_E = vector(D)
        self.conv2_XEE = matrix((_PAIR_TAPS, D, D), None, None, "tower_embed", stddev=(_PAIR_TAPS * D) ** -0.5)
        self.conv2_bias_E = vector(D)
        self.position_ND = matrix((config.max_source_positions, D), None, "tower_embed")

        @nnx.vmap(in_axes=0, out_axes=0)
        def make_layer(key: jax.Array) -> EncoderLayer:
            return EncoderLayer(config, rngs=nnx.Rngs(key))

        self.layers = make_layer(jax.random.split(rngs.params(), config.encoder_layers))
        self.norm_scale_D, self.norm_bias_D = vector(D, ones), vector(D)
        self.adapt_out_DE, self.adapt_out_bias_E = matrix((D, out), "tower_embed", None), vector(out)
        self.projector = Projector(config, rngs=rngs)

    @overload
    def __call__(self, inputs: TimeSeriesInputs, *, trace: Literal[False] = False) -> jax.Array: ...

    @overload
    def __call__(self, inputs: TimeSeriesInputs, *, trace: Literal[True]) -> tuple[jax.Array, dict[str, jax.Array]]: ...

    def __call__(self, inputs: TimeSeriesInputs, *, trace: bool = False) -> jax.Array | tuple[jax.Array, dict[str, jax.Array]]:
        """Embeds the signals; the packs stay split over the mesh as they are.

        Args:
          inputs: from `models.time_series_inputs.pack_time_series`.
          trace: also return the intermediate results.

        Returns:
          [P, pairs/2, out_hidden_size] in the compute dtype, zero at padding. With `trace`, also `subsampled`
          [P, pairs, 256], `layers` [L, P, pairs/2, d_model] and `encoder` [P, pairs/2, ts_adapt_out_dim].
        """
        pairs_PIE = encode_pairs(self.patch_encoder, inputs)
        ids_PI, ids_PT = inputs.pair_ids, inputs.pair_ids[:, ::2]
        x_PID = _linear("pie,ed->pid", pairs_PIE.astype(self.config.dtype), self.adapt_in_ED, self.adapt_in_bias_D)
        x_PIE = _gelu(_linear("pixd,xde->pie", _with_neighbours(x_PID, ids_PI), self.conv1_XDE, self.conv1_bias_E))
        x_PTE = _gelu(_linear("ptxd,xde->pte", _with_neighbours(x_PIE, ids_PI)[:, ::2], self.conv2_XEE, self.conv2_bias_E))
        x_PTD = x_PTE + self._positions(inputs.pair_position[:, ::2] // 2, x_PTE.dtype)

        graph, stack = nnx.split(self.layers)

        def apply_layer(x_PTD: jax.Array, layer: nnx.State) -> tuple[jax.Array, jax.Array | None]:
            x_PTD = nnx.merge(graph, layer)(x_PTD, ids_PT)
            return x_PTD, x_PTD if trace else None

        x_PTD, layers = jax.lax.scan(_recomputed(apply_layer), x_PTD, stack)
        x_PTD = _layer_norm(x_PTD, self.norm_scale_D, self.norm_bias_D)
        encoded_PTE = _linear("ptd,de->pte", x_PTD, self.adapt_out_DE, self.adapt_out_bias_E)
        output = jnp.where(ids_PT[..., None] > 0, self.projector(encoded_PTE), 0)
        return (output, dict(subsampled=pairs_PIE, layers=layers, encoder=encoded_PTE)) if trace else output

    def _positions(self, index_PT: Int[Array, "P T"], dtype: jnp.dtype) -> Float[Array, "P T D"]:
        """Learned positions; zero beyond the table's end."""
        split = PartitionSpec(jax.typeof(index_PT).sharding.spec[0], None, None)
        return gathered(self.position_ND, dtype).at[index_PT].get(mode="fill", fill_value=0, out_sharding=split)
