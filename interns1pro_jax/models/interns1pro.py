"""The whole model: towers fill the placeholders of the token sequence, the decoder reads it (spec 2.7)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from interns1pro_jax import sharding
from interns1pro_jax.config import ConfigError, ModelConfig
from interns1pro_jax.models.inputs import ModelInputs
from interns1pro_jax.models.internvit import InternVit
from interns1pro_jax.models.text import KVCache, TextModel, TextOutput
from interns1pro_jax.models.time_series import TimeSeriesTower
from interns1pro_jax.models.vision import VisionTower
from interns1pro_jax.tower_config import AnyVision, InternVitConfig, VisionConfig


class InternS1Pro(nnx.Module):
    """Intern-S1-Pro, or a model of an ancestor's family.

    Build it under a mesh: `with jax.set_mesh(make_mesh()): model = create_model(config)`.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.text = TextModel(config.text, rngs=rngs)
        self.vision = _vision_tower(config.vision, rngs)
        self.time_series = None if config.time_series is None else TimeSeriesTower(config.time_series, rngs=rngs)

    def embed(self, inputs: ModelInputs) -> Float[Array, "B T D"]:
        """Token embeddings with the towers' embeddings in place of the placeholders, in reading order."""
        x_BTD = self.text.embed(inputs.tokens)
        if inputs.vision is not None:
            if self.vision is None:
                raise ConfigError("the batch has images or videos, but the model has no vision tower; set ModelConfig.vision.")
            mask = (inputs.tokens == self.config.image_token_id) | (inputs.tokens == self.config.video_token_id)
            x_BTD = _filled(x_BTD, mask, self.vision, inputs.vision, inputs.vision.frame_ids)
        if inputs.time_series is not None:
            if self.time_series is None:
                raise ConfigError("the batch has signals, but the model has no time-series tower; set ModelConfig.time_series.")
            mask = inputs.tokens == self.config.ts_token_id
            x_BTD = _filled(x_BTD, mask, self.time_series, inputs.time_series, inputs.time_series.pair_ids)
        return x_BTD

    def __call__(
        self,
        inputs: ModelInputs,
        *,
        cache: KVCache | None = None,
        replay_LBTGC: Int[Array, "L B T G C"] | None = None,
        probe_LR: Float[Array, "L R"] | None = None,
        remat: str = "none",
        moe_chunks: int = 1,
        trace: bool = False,
    ) -> TextOutput:
        """Runs towers and decoder; arguments as in `TextModel`. Check host-made inputs with `check_inputs` first: inside a
        compiled program a mismatch cannot raise."""
        return self.text(
            self.embed(inputs),
            inputs.positions,
            inputs.segment_ids,
            cache=cache,
            replay_LBTGC=replay_LBTGC,
            probe_LR=probe_LR,
            remat=remat,
            moe_chunks=moe_chunks,
            trace=trace,
        )


def _vision_tower(config: AnyVision | None, rngs: nnx.Rngs) -> VisionTower | InternVit | None:
    match config:
        case VisionConfig():
            return VisionTower(config, rngs=rngs)
        case InternVitConfig():
            return InternVit(config, rngs=rngs)
    return None


def create_model(config: ModelConfig, seed: int = 0) -> InternS1Pro:
    """A randomly initialised model, its parameters created where the mesh in force puts them. The values do not depend on the mesh."""
    graph = nnx.graphdef(nnx.eval_shape(lambda: InternS1Pro(config, rngs=nnx.Rngs(0))))

    @jax.jit
    def initial(key: jax.Array):
        return nnx.state(InternS1Pro(config, rngs=nnx.Rngs(key)))

    return nnx.merge(graph, initial(jax.random.key(seed)))


def _filled(x_BTD: Array, mask_BT: Array, tower: nnx.Module, inputs: Any, ids: Array) -> Array:
    """`x_BTD` with the tower's embeddings at the marked positions. Where no pack of the batch has contents (`ids` are all 0), the tower and
    its collectives are left out, on all devices alike: they see the same number."""
    graph, state = nnx.split(tower)

    def fill(state: nnx.State, inputs: Any, x_BTD: Array) -> Array:
        return place(x_BTD, mask_BT, nnx.merge(graph, state)(inputs))

    return jax.lax.cond(jnp.any(ids > 0), fill, lambda state, inputs, x_BTD: x_BTD, state, inputs, x_BTD)


def place(x_BTD: Float[Array, "B T D"], mask_BT: Bool[Array, "B T"], embeddings_PnD: Float[Array, "P n D"]) -> Float[Array, "B T D"]:
    """Puts the n-th embedding of a pack at the n-th marked position of the pack's rows (rows p*B/P .. (p+1)*B/P-1).

    Each device fills the rows it holds from the packs it holds, so P must be a multiple of the mesh's batch shards.
    """
    packs = embeddings_PnD.shape[0]
    sharding.check_divisible("packs of media", (packs,), ("batch",))
    if x_BTD.shape[0] % packs:
        raise ValueError(f"{packs} packs of media do not divide over {x_BTD.shape[0]} rows; give each pack the same number of rows.")

    def ranks(mask_BT: Array) -> Array:
        counted = jnp.cumsum(mask_BT.reshape(packs // sharding.shards("batch"), -1), -1).reshape(mask_BT.shape)
        return jnp.where(mask_BT, counted - 1, -1)

    def fill(x_BTD: Array, rank_BT: Array, embeddings_PnD: Array) -> Array:
        by_pack = rank_BT.reshape(embeddings_PnD.shape[0], -1)
        found = jax.vmap(lambda e, i: e.at[i].get(mode="clip"))(embeddings_PnD.astype(x_BTD.dtype), by_pack)
        return jnp.where(rank_BT[..., None] >= 0, found.reshape(x_BTD.shape), x_BTD)

    # Only the ranks need whole rows; embeddings go to every device that has a part of their rows.
    rank_BT = jax.shard_map(ranks, out_specs=sharding.spec("batch", None))(sharding.constrain(mask_BT, "batch", None))
    return jax.shard_map(fill, out_specs=sharding.spec("batch", "sequence", None))(
        sharding.constrain(x_BTD, "batch", "sequence", None),
        sharding.constrain(rank_BT, "batch", "sequence"),
        sharding.constrain(embeddings_PnD, "batch", None, None),
    )


def check_inputs(config: ModelConfig, inputs: ModelInputs) -> None:
    """Raises `ValueError` where host-made inputs cannot be right: token ids out of range, or placeholders and media that do
    not match; the message names both numbers."""
    tokens = np.asarray(inputs.tokens)
    if tokens.size and (tokens.min() < 0 or tokens.max() >= config.text.vocab_size):
        raise ValueError(
            f"token ids must lie in 0..{config.text.vocab_size - 1}, got {tokens.min()}..{tokens.max()}; "
            "the tokenizer and the model's vocab_size do not belong together."
        )
    vision = series = None
    if inputs.vision is not None:
        merge = 1 if config.vision is None else config.vision.spatial_merge_size**2
        vision = (np.asarray(inputs.vision.frame_ids) > 0).sum(-1) // merge
    if inputs.time_series is not None:
        series = (np.asarray(inputs.time_series.pair_ids)[:, ::2] > 0).sum(-1)
    kinds = (
        ("image and video", "vision", config.vision, (config.image_token_id, config.video_token_id), vision),
        ("time-series", "time-series", config.time_series, (config.ts_token_id,), series),
    )
    for kind, tower, tower_config, ids, embeddings in kinds:
        marked = np.isin(tokens, ids)
        if embeddings is not None and tower_config is None:
            raise ValueError(f"the inputs have {kind} contents, but the model has no {tower} tower.")
        if embeddings is None:
            # Without its tower the id is an ordinary token.
            if tower_config is not None and marked.any():
                raise ValueError(f"the tokens have {int(marked.sum())} {kind} placeholders, but no {kind} contents were given.")
            continue
        if tokens.shape[0] % len(embeddings):
            raise ValueError(f"{len(embeddings)} packs of {kind} contents do not divide over {tokens.shape[0]} rows.")
        wanted = marked.reshape(len(embeddings), -1).sum(-1)
        for pack in np.nonzero(wanted != embeddings)[0]:
            raise ValueError(
                f"pack {pack}: the tokens have {int(wanted[pack])} {kind} placeholders, but the contents give "
                f"{int(embeddings[pack])} embeddings; expand each placeholder to as many tokens as its contents need."
            )
