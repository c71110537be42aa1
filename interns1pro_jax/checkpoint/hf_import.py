"""Loading the released checkpoint straight into sharded arrays.

The headers are compared with the model first, so that every missing, surplus or misshapen tensor is named before anything is
read. Then each process reads, for each of its devices, only the slices of the tensors that the device holds, converts them (FP8
blocks are dequantised) and puts them there piece by piece: the host holds one piece of at most `host_bytes` at a time.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from interns1pro_jax.checkpoint.hf_names import HfParameter, hf_parameters
from interns1pro_jax.checkpoint.safetensors_io import Checkpoint, CheckpointError, open_checkpoint
from interns1pro_jax.config import ModelConfig
from interns1pro_jax.models.interns1pro import InternS1Pro
from interns1pro_jax.ops.quantization import WEIGHT_BLOCK, dequantize_box

_FLOATS = ("F64", "F32", "F16", "BF16")
_FP8 = "F8_E4M3"
_SCALES = ("F32", "BF16", "F8_E8M0")
_SCALE_SUFFIX = "_scale_inv"
_SHOWN = 20  # problems spelled out in one error
_HOST_BYTES = 2**30


def load_model(
    directory: str | Path, config: ModelConfig | None = None, *, dtype: str | None = None, param_dtype: str | None = None
) -> InternS1Pro:
    """The model with the weights of a directory in the released layout, sharded over the mesh in force.

    Args:
      directory: holds `model.safetensors`, or shards and their index, in float32, bfloat16, float16 or block-scaled FP8.
      config: the model; None reads `config.json` of the directory.
      dtype, param_dtype: where to compute and store differently from the config.

    Raises:
      CheckpointError: the files are damaged, or do not fit the config; all misfits are named.
      ConfigError: `config.json` is wrong, or the mesh in force cannot hold the model.
    """
    config = (config or ModelConfig.from_hf(directory)).with_dtypes(dtype, param_dtype)
    graph, state = nnx.split(nnx.eval_shape(lambda: InternS1Pro(config, rngs=nnx.Rngs(0))))
    return nnx.merge(graph, load_into(state, open_checkpoint(directory), config))


def load_into(state: Any, checkpoint: Checkpoint, config: ModelConfig, *, host_bytes: int = _HOST_BYTES) -> Any:
    """Fills an abstract state with the checkpoint's weights.

    Args:
      state: `nnx.State` of `jax.ShapeDtypeStruct` leaves; their shardings refer to the mesh in force, their dtypes are what the
        weights are converted to.
      host_bytes: upper bound of a piece of a device's weights that the host prepares at once.

    Returns:
      The same state with arrays.

    Raises:
      CheckpointError: the checkpoint does not fit the config; all misfits are named.
    """
    fused = any(name.endswith(".mlp.experts.gate_up_proj") for name in checkpoint)
    parameters = {parameter.path: parameter for parameter in hf_parameters(config, fused_experts=fused)}
    flat = [(".".join(map(str, path)), variable) for path, variable in nnx.to_flat_state(state)]
    if mismatch := set(parameters) ^ {path for path, _ in flat}:
        raise CheckpointError(f"the name table and the model disagree about {sorted(mismatch)}; was the state made with this config?")
    check_fit(checkpoint, config, list(parameters.values()))
    block = config.quantization.weight_block_size if config.quantization else WEIGHT_BLOCK
    mesh = jax.sharding.get_mesh()
    loaded = []
    for path, variable in flat:
        parameter, like = parameters[path], variable.get_value()
        if like.shape != parameter.shape:
            raise CheckpointError(f"{path} has shape {like.shape} in the model, but {parameter.shape} in the name table.")
        reader = _Reader(checkpoint, parameter, np.dtype(like.dtype), block)
        loaded.append(variable.replace(_assemble(reader, NamedSharding(mesh, like.sharding.spec), host_bytes)))
    return nnx.from_flat_state([(path, variable) for (path, _), variable in zip(nnx.to_flat_state(state), loaded, strict=True)])


def _assemble(reader: _Reader, sharding: NamedSharding, host_bytes: int) -> jax.Array:
    """The sharded array of one parameter; equal shards (replicas) are read once."""
    shape = reader.parameter.shape
    holders: dict[tuple[tuple[int, int], ...], list[jax.Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        box = tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))
        holders.setdefault(box, []).append(device)
    shards: dict[jax.Device, jax.Array] = {}
    for box, devices in holders.items():
        shards |= _put([slice(*bounds) for bounds in box], devices, reader, host_bytes)
    arrays = [shards[device] for device in sharding.addressable_devices_indices_map(shape)]
    return jax.make_array_from_single_device_arrays(shape, sharding, arrays)


def _put(box: Sequence[slice], devices: Sequence[jax.Device], reader: _Reader, host_bytes: int) -> dict[jax.Device, jax.Array]:
    """The part `box` of a parameter on each of `devices`, in one piece or written there piece by piece."""
    shape = tuple(part.stop - part.start for part in box)
    if math.prod(shape) * reader.dtype.itemsize <= host_bytes:
        values = reader.read(box)
        return {device: jax.device_put(values, device) for device in devices}
    shards = {}
    for device in devices:
        with jax.set_mesh(Mesh(np.array([device]), ("device",))):
            shards[device] = jnp.zeros(shape, reader.dtype, device=device)
    for piece in pieces(box, reader.dtype.itemsize, host_bytes):
        values = reader.read(piece)
        start = tuple(np.int32(part.start - whole.start) for part, whole in zip(piece, box, strict=True))
        for device in devices:
            with jax.set_mesh(Mesh(np.array([device]), ("device",))):
                shards[device] = _write(shards[device], jax.device_put(values, device), start).block_until_ready()
    return shards


@functools.partial(jax.jit, donate_argnums=0)
def _write(shard: jax.Array, piece: jax.Array, start: tuple[jax.Array, ...]) -> jax.Array:
    return jax.lax.dynamic_update_slice(shard, piece, start)


def pieces(box: Sequence[slice], itemsize: int, limit: int) -> Iterator[tuple[slice, ...]]:
    """Cuts a box, along its first axes first, into boxes of at most `limit` bytes (or single elements)."""
    sizes = [part.stop - part.start for part in box]
    size = math.prod(sizes) * itemsize
    axis = next((i for i, n in enumerate(sizes) if n > 1), None)
    if size <= limit or axis is None:
        yield tuple(box)
        return
    step = max(1, sizes[axis] * limit // size)
    for start in range(box[axis].start, box[axis].stop, step):
        part = slice(start, min(start + step, box[axis].stop))
        yield from pieces([*box[:axis], part, *box[axis + 1 :]], itemsize, limit)


@dataclasses.dataclass(frozen=True)
class _Reader:
    """Reads parts of one parameter from the checkpoint, converted to `dtype`."""

    checkpoint: Checkpoint
    parameter: HfParameter
    dtype: np.dtype
    block: tuple[int, int]

    def read(self, box: Sequence[slice]) -> np.ndarray:
        """The part `box` of the parameter; touches only the bytes of the tensors that it needs."""
        result = np.empty([part.stop - part.start for part in box], self.dtype)
        stacked = len(self.parameter.stack)
        layout = self.parameter.layout
        width = layout.shape[-1]
        for position, number, name in self.parameter.tensors(box[:stacked]):
            begin, end = max(box[-1].start, number * width), min(box[-1].stop, (number + 1) * width)
            if begin >= end:
                continue
            where = [*box[stacked:-1], slice(begin - number * width, end - number * width)]
            stored, piece_layout, rest = layout.restrict(where)
            target = tuple(p - part.start for p, part in zip(position, box, strict=False))
            columns = slice(begin - box[-1].start, end - box[-1].start)
            result[(*target, ..., columns)] = piece_layout.apply(self._values(name, stored))[rest]
        return result

    def _values(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        values = self.checkpoint.read(name, index)
        if self.checkpoint[name].dtype != _FP8:
            return values
        rows, columns = index[-2:]
        blocks = tuple(slice(part.start // step, -(-part.stop // step)) for part, step in zip((rows, columns), self.block, strict=True))
        scale_name = name + _SCALE_SUFFIX
        scale = self.checkpoint.read(scale_name, (*index[:-2], *blocks)).astype(np.float32)
        if not (np.isfinite(scale).all() and (scale >= 0).all()):
            raise CheckpointError(
                f"{self.checkpoint.path(scale_name)}: scales of {scale_name!r} are not all finite and positive; it is damaged."
            )
        first = (rows.start % self.block[0], columns.start % self.block[1])
        return dequantize_box(values, scale, first, self.block, self.dtype)


def check_fit(checkpoint: Checkpoint, config: ModelConfig, parameters: Sequence[HfParameter]) -> None:
    """Compares the headers with the model.

    Raises:
      CheckpointError: names every missing, surplus or misshapen tensor, wrong dtype, and missing or misshapen scale.
    """
    problems: list[str] = []
    expected: set[str] = set()
    missing: list[str] = []
    for parameter in parameters:
        for _, _, name in parameter.tensors():
            expected.add(name)
            if name not in checkpoint:
                missing.append(name)
                continue
            info = checkpoint[name]
            if info.shape != parameter.layout.stored_shape:
                problems.append(f"{name} has shape {list(info.shape)}, but the config asks for {list(parameter.layout.stored_shape)}")
            if info.dtype == _FP8:
                expected.add(name + _SCALE_SUFFIX)
                problems += _scale_problems(checkpoint, config, name)
            elif info.dtype not in _FLOATS:
                problems.append(f"{name} is stored as {info.dtype}, but weights must be {', '.join(_FLOATS)} or {_FP8}")
    surplus = [name for name in checkpoint if name not in expected and not _is_redundant(checkpoint, config, name)]
    for key, tower, prefix in (("vision_config", config.vision, "model.visual."), ("ts_config", config.time_series, "model.time_series.")):
        if tower is None and (extra := [name for name in surplus if name.startswith(prefix)]):
            problems.append(f"{len(extra)} tensors {prefix}* belong to a tower that the config lacks; add {key} to it")
            surplus = [name for name in surplus if not name.startswith(prefix)]
        if tower is not None and not any(name.startswith(prefix) for name in checkpoint):
            problems.append(f"all tensors {prefix}* are missing; remove {key} from the config, or fetch them")
            missing = [name for name in missing if not name.startswith(prefix)]
    problems += [f"{name} is missing" for name in missing]
    problems += [f"{name} is surplus: the model has no such parameter" for name in surplus]
    if problems:
        more = f"\n  ... and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise CheckpointError(
            f"the checkpoint in {checkpoint.directory} does not fit the model ({len(problems)} problems); "
            "check that config.json and the weights belong together:\n  " + "\n  ".join(problems[:_SHOWN]) + more
        )


def _scale_problems(checkpoint: Checkpoint, config: ModelConfig, name: str) -> Iterator[str]:
    if config.quantization is None:
        yield f"{name} is stored as {_FP8}, but the config has no quantization_config"
        return
    shape = checkpoint[name].shape
    if len(shape) < 2:
        yield f"{name} is stored as {_FP8}, but only matrices may be"
        return
    block = config.quantization.weight_block_size
    wanted = (*shape[:-2], *(-(-size // step) for size, step in zip(shape[-2:], block, strict=True)))
    scale = name + _SCALE_SUFFIX
    if scale not in checkpoint:
        yield f"{scale} is missing: {name} is stored as {_FP8} and needs it"
    elif checkpoint[scale].dtype not in _SCALES:
        yield f"{scale} is stored as {checkpoint[scale].dtype}, but scales must be {', '.join(_SCALES)}"
    elif checkpoint[scale].shape != wanted:
        yield f"{scale} has shape {list(checkpoint[scale].shape)}, but blocks of {list(block)} in {list(shape)} ask for {list(wanted)}"


def _is_redundant(checkpoint: Checkpoint, config: ModelConfig, name: str) -> bool:
    """Whether a tensor without a parameter holds what the model knows anyway (spec 4.2, 8, 9.7).

    Raises:
      CheckpointError: it holds something else.
    """
    if name.endswith("rotary_emb.inv_freq"):
        return True
    if config.time_series is None:
        return False
    if name == "model.time_series.encoder_embed.pos_encoder.pe":
        _check_sinusoids(checkpoint, name, config.time_series.PATCH_WIDTH)
        return True
    if re.fullmatch(r"model\.time_series\.encoder\.layers\.\d+\.self_attn\.k_proj\.bias", name):
        if np.any(checkpoint.read(name) != 0):
            raise CheckpointError(f"{checkpoint.path(name)}: {name!r} is not zero, but this architecture has no bias on keys.")
        return True
    return False


def _check_sinusoids(checkpoint: Checkpoint, name: str, width: int) -> None:
    """Raises `CheckpointError` where the stored positional table [rows, 1, width] is not the formula's of spec 4.2."""
    shape = checkpoint[name].shape
    if len(shape) != 3 or shape[1:] != (1, width):
        raise CheckpointError(f"{checkpoint.path(name)}: {name!r} has shape {list(shape)}, but must be [rows, 1, {width}].")
    stored = checkpoint.read(name)[:, 0].astype(np.float32)
    position = np.arange(shape[0])[:, None]
    phase = position * 10000.0 ** (-np.arange(0, width, 2) / width)
    expected = np.stack([np.sin(phase), np.cos(phase)], -1).reshape(shape[0], width)
    # A table computed in float32 is off by the rounding of its phase; one stored in bfloat16 by that of its values.
    tolerance = 1e-5 + position * 2.0**-21 + (2.0**-8 if checkpoint[name].dtype != "F32" else 0)
    if not np.all(np.abs(stored - expected) <= tolerance):
        raise CheckpointError(f"{checkpoint.path(name)}: {name!r} is not the sinusoidal table of this architecture; it is damaged.")
