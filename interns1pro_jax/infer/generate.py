"""Prefill and decode with a static cache, as one compiled program."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jaxtyping import Array, Float, Int

from interns1pro_jax import sharding
from interns1pro_jax.config import ConfigError
from interns1pro_jax.infer.sampling import GREEDY, Sampling, sample
from interns1pro_jax.models.inputs import ModelInputs
from interns1pro_jax.models.interns1pro import InternS1Pro, check_inputs
from interns1pro_jax.models.text import KVCache


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Generation:
    """What `generate` returns; N is the number of new tokens asked for.

    Attributes:
      tokens: new tokens; positions after a row's stop token hold 0.
      lengths: new tokens of each row, the stop token included.
      logits: float32 logits that each new token was chosen from; None unless asked for.
      prompt_routing, routing: in-group expert ids of the prompt's and the new tokens, for replay; None without experts.
        A new token's routing is known once it has been read; that of the last one of a row, and of what follows it, is not:
        its ids are the dtype's largest value, which a replay leaves to the router.
    """

    tokens: Int[Array, "B N"]
    lengths: Int[Array, " B"]
    logits: Float[Array, "B N V"] | None
    prompt_routing: Int[Array, "L B T G C"] | None
    routing: Int[Array, "L B N G C"] | None


def generate(
    model: InternS1Pro,
    inputs: ModelInputs,
    max_new_tokens: int,
    *,
    sampling: Sampling = GREEDY,
    stop_tokens: tuple[int, ...] = (),
    seed: int = 0,
    return_logits: bool = False,
) -> Generation:
    """Continues every row of `inputs` (host arrays, the same on every process) by up to `max_new_tokens` tokens.

    Rows may have different lengths: padding (segment id 0) may stand on either side, and each row goes on from the position of
    its last token. A row's result does not depend on the rows beside it. One program is compiled for each shape of the inputs
    and number of new tokens: pad prompts to a few lengths.

    Raises:
      ValueError: a row without a token, ids out of range, placeholders that do not match their contents.
      ConfigError: a mesh that splits the sequence (`context` > 1).
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1.")
    if sharding.axis_size("context") > 1:
        raise ConfigError(f"the mesh axis context={sharding.axis_size('context')} must be 1 for generation: a new token cannot be split.")
    check_inputs(model.config, inputs)
    bad = [t for t in stop_tokens if not 0 <= t < model.config.text.vocab_size]
    if bad:
        raise ValueError(f"stop tokens {bad} lie outside the vocabulary of {model.config.text.vocab_size}.")
    empty = np.nonzero(~(np.asarray(inputs.segment_ids) > 0).any(-1))[0]
    if empty.size:
        raise ValueError(f"rows {empty.tolist()} of the prompt hold no token (all segment ids are 0).")
    rows = inputs.tokens.shape[0]
    inputs = _pad_rows(inputs, -rows % sharding.shards("batch"))
    graphdef, state = nnx.split(model)
    result = _generate(graphdef, state, inputs, jax.random.key(seed), max_new_tokens, sampling, stop_tokens, return_logits)
    if jax.process_count() > 1:
        result = multihost_utils.process_allgather(result, tiled=True)
    row_axis = {"prompt_routing": 1, "routing": 1}
    fields: dict[str, Any] = {field.name: getattr(result, field.name) for field in dataclasses.fields(result)}
    kept: dict[str, Any] = {k: None if v is None else np.asarray(v).take(np.arange(rows), row_axis.get(k, 0)) for k, v in fields.items()}
    return Generation(**kept)


def _pad_rows(inputs: ModelInputs, extra: int) -> ModelInputs:
    """Adds `extra` rows, so that the rows divide over the mesh: copies of the last one, with empty packs of media.

    Raises:
      ValueError: media that are not packed row by row.
    """
    if extra == 0:
        return inputs
    rows = inputs.tokens.shape[0]
    for media in (inputs.vision, inputs.time_series):
        if media is not None and (packs := len(jax.tree.leaves(media)[0])) != rows:
            raise ValueError(
                f"{rows} rows do not divide over {sharding.shards('batch')} batch shards, and their media are in {packs} packs; "
                "give each row its own pack, so that rows can be added."
            )

    def add(fill: Callable[[np.ndarray], np.ndarray], tree: Any) -> Any:
        return jax.tree.map(lambda x: np.concatenate([np.asarray(x), np.repeat(fill(np.asarray(x)[-1:]), extra, 0)]), tree)

    text = add(lambda last: last, dataclasses.replace(inputs, vision=None, time_series=None))
    vision, time_series = (add(np.zeros_like, media) for media in (inputs.vision, inputs.time_series))
    return dataclasses.replace(text, vision=vision, time_series=time_series)


@partial(jax.jit, static_argnames=("graphdef", "new_tokens", "sampling", "stop_tokens", "return_logits"))
def _generate(
    graphdef: nnx.GraphDef,
    state: Any,
    inputs: ModelInputs,
    key: jax.Array,
    new_tokens: int,
    sampling: Sampling,
    stop_tokens: tuple[int, ...],
    return_logits: bool,
) -> Generation:
    model: InternS1Pro = nnx.merge(graphdef, state)
    text = model.config.text
    batch, prompt = inputs.tokens.shape
    rows = sharding.spec("batch")
    segments = sharding.constrain(inputs.segment_ids, "batch", None)
    positions = sharding.constrain(inputs.positions, "batch", None)
    tokens = sharding.constrain(inputs.tokens, "batch", None)

    out = model(inputs, cache=KVCache.empty(text, batch, prompt + new_tokens))
    last = prompt - 1 - jnp.argmax(segments[:, ::-1] > 0, -1)
    at_last = jnp.arange(prompt) == last[:, None]
    # A masked sum instead of a gather: exact, and local to each row's device.
    hidden = jnp.where(at_last[..., None], out.hidden_BTD, 0).sum(1, keepdims=True)
    position = jnp.where(at_last, positions, 0).sum(-1)
    segment = jnp.where(at_last, segments, 0).sum(-1)
    row_keys = jax.random.split(key, batch)
    vocabulary = jnp.arange(text.vocab_size)
    seen = jnp.zeros((batch, text.vocab_size), bool, out_sharding=sharding.spec("batch", None))
    if sampling.repetition_penalty != 1:
        scan = jax.lax.scan(lambda s, tv: (s | ((vocabulary == tv[0][:, None]) & tv[1][:, None]), None), seen, (tokens.T, segments.T > 0))
        seen = scan[0]

    def choose(hidden: jax.Array, seen: jax.Array, index: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = sharding.constrain(model.text.logits(hidden)[:, 0].astype(jnp.float32), "batch", None)
        keys = jax.vmap(jax.random.fold_in, (0, None))(row_keys, index)
        return sample(logits, seen, keys, sampling), logits

    def write(buffer: jax.Array, values: jax.Array, index: jax.Array, axis: int) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(buffer, jnp.expand_dims(values, axis).astype(buffer.dtype), index, axis)

    result = Generation(
        tokens=jnp.zeros((batch, new_tokens), jnp.int32, out_sharding=sharding.spec("batch", None)),
        lengths=jnp.zeros((batch,), jnp.int32, out_sharding=rows),
        logits=jnp.zeros((batch, new_tokens, text.vocab_size), jnp.float32, out_sharding=sharding.spec("batch", None, None))
        if return_logits
        else None,
        prompt_routing=out.routing_LBTGC,
        routing=None
        if out.routing_LBTGC is None
        else jnp.full(
            (*out.routing_LBTGC.shape[:2], new_tokens, *out.routing_LBTGC.shape[3:]),
            jnp.iinfo(out.routing_LBTGC.dtype).max,
            out.routing_LBTGC.dtype,
            out_sharding=sharding.spec(None, "batch", None, None, None),
        ),
    )

    def record(result: Generation, hidden, seen, done, index):
        """Chooses token `index` of every row that is not done."""
        token, logits = choose(hidden, seen, index)
        token = jnp.where(done, 0, token)
        result = dataclasses.replace(
            result,
            tokens=write(result.tokens, token, index, 1),
            lengths=result.lengths + jnp.where(done, 0, 1),
            logits=None if result.logits is None else write(result.logits, logits, index, 1),
        )
        if sampling.repetition_penalty != 1:
            seen = seen | ((vocabulary == token[:, None]) & ~done[:, None])
        stopped = (token[:, None] == jnp.asarray(stop_tokens, jnp.int32)).any(-1) if stop_tokens else jnp.zeros_like(done)
        return result, token, seen, done | stopped

    def unfinished(carry) -> jax.Array:
        index, done = carry[0], carry[-1]
        return (index < new_tokens) & ~done.all()

    def decode(carry):
        index, result, cache, token, seen, done = carry
        step = ModelInputs(
            tokens=token[:, None],
            positions=(position + index)[:, None],
            segment_ids=jnp.where(done, 0, segment)[:, None],
        )
        out = model(step, cache=cache)
        if result.routing is not None and out.routing_LBTGC is not None:
            ids = jnp.where(done[:, None, None], jnp.iinfo(out.routing_LBTGC.dtype).max, out.routing_LBTGC[:, :, 0])
            result = dataclasses.replace(result, routing=write(result.routing, ids, index - 1, 2))
        result, token, seen, done = record(result, out.hidden_BTD, seen, done, index)
        return index + 1, result, out.cache, token, seen, done

    done = jnp.zeros((batch,), bool, out_sharding=rows)
    result, token, seen, done = record(result, hidden, seen, done, jnp.int32(0))
    carry = (jnp.int32(1), result, out.cache, token, seen, done)
    return jax.lax.while_loop(unfinished, decode, carry)[1]
