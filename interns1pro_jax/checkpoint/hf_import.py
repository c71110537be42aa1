"""Loading the released checkpoint straight into sharded arrays.

The headers are compared with the model first, so that every missing, surplus or misshapen tensor is named before anything is
read. Then each process reads, for each of its devices, only the slices of the tensors that the device holds, converts them (FP8
blocks are dequantised) and puts them there piece by piece: the host holds one piece at a time, no larger than the largest tensor
of the checkpoint, and the slices of tensors that it is made of.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from interns1pro_jax.checkpoint.errors import CheckpointError
from interns1pro_jax.checkpoint.hf_names import POSITION_TABLE, HfParameter, expert_layout, hf_parameters
from interns1pro_jax.checkpoint.safetensors_io import Checkpoint, open_checkpoint
from interns1pro_jax.config import ModelConfig
from interns1pro_jax.families import FAMILIES
from interns1pro_jax.models.interns1pro import InternS1Pro
from interns1pro_jax.ops.quantization import WEIGHT_BLOCK, dequantize_box

_FLOATS = ("F64", "F32", "F16", "BF16")
_FP8 = "F8_E4M3"
_SCALES = ("F32", "BF16", "F8_E8M0")
SCALE_SUFFIX = "_scale_inv"
_SHOWN = 20  # problems spelled out in one error
_LEAST_PIECE = 2**24  # smaller pieces gain nothing
_COLUMNS = 32  # a transposed copy in strips of this width stays in the processor's cache
_READERS = 16  # threads; most of their time is waiting for pages and copying, both outside the interpreter lock


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


def load_into(state: Any, checkpoint: Checkpoint, config: ModelConfig, *, host_bytes: int | None = None) -> Any:
    """Fills an abstract state with the checkpoint's weights.

    Args:
      state: `nnx.State` of `jax.ShapeDtypeStruct` leaves; their shardings refer to the mesh in force, their dtypes are what the
        weights are converted to.
      host_bytes: upper bound of a piece of a device's weights that the host prepares at once; what is read and converted for
        it is another two or three times as much. None: the size of the checkpoint's largest tensor.

    Returns:
      The same state with arrays.

    Raises:
      CheckpointError: the checkpoint does not fit the config; all misfits are named.
    """
    parameters = {parameter.path: parameter for parameter in parameters_of(checkpoint, config)}
    shapes = {_dotted(path): variable.get_value().shape for path, variable in nnx.to_flat_state(state)}
    if differing := sorted(set(shapes.items()) ^ {(path, parameter.shape) for path, parameter in parameters.items()}):
        raise CheckpointError(f"the state was not made with this config; they differ in {differing[:_SHOWN]}.")
    check_fit(checkpoint, config, list(parameters.values()))
    block = config.quantization.weight_block_size if config.quantization else WEIGHT_BLOCK
    if host_bytes is None:
        host_bytes = max(_LEAST_PIECE, *(info.nbytes for info in checkpoint.values()))
    mesh = jax.sharding.get_mesh()
    with ThreadPoolExecutor(_READERS) as pool:

        def load(path: tuple[Any, ...], variable: nnx.Variable) -> nnx.Variable:
            like = variable.get_value()
            reader = ParameterReader(checkpoint, parameters[_dotted(path)], np.dtype(like.dtype), block, pool)
            return variable.replace(_assemble(reader, NamedSharding(mesh, like.sharding.spec), host_bytes))

        return nnx.map_state(load, state)


def parameters_of(checkpoint: Checkpoint, config: ModelConfig) -> tuple[HfParameter, ...]:
    """The model's parameters with the tensors that this checkpoint stores them in."""
    return hf_parameters(config, experts=expert_layout({name: info.shape for name, info in checkpoint.items()}, config))


def _dotted(path: Sequence[Any]) -> str:
    return ".".join(map(str, path))


def _assemble(reader: ParameterReader, sharding: NamedSharding, host_bytes: int) -> jax.Array:
    """The sharded array of one parameter; equal shards (replicas) are read once."""
    shape = reader.parameter.shape
    holders: dict[tuple[tuple[int, int], ...], list[jax.Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        box = tuple(part.indices(size)[:2] for part, size in zip(index or (), shape, strict=True))
        holders.setdefault(box, []).append(device)
    shards: dict[jax.Device, jax.Array] = {}
    for box, devices in holders.items():
        shards |= _put([slice(*bounds) for bounds in box], devices, reader, host_bytes)
    arrays = [shards[device] for device in sharding.addressable_devices_indices_map(shape)]
    return jax.make_array_from_single_device_arrays(shape, sharding, arrays)


def _put(box: Sequence[slice], devices: Sequence[jax.Device], reader: ParameterReader, host_bytes: int) -> dict[jax.Device, jax.Array]:
    """The part `box` of a parameter on each of `devices`, in one piece or written there piece by piece."""
    shape = tuple(part.stop - part.start for part in box)
    if math.prod(shape) * reader.dtype.itemsize <= host_bytes:
        values = reader.read(box)
        return {device: jax.device_put(values, device).block_until_ready() for device in devices}
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
class ParameterReader:
    """Reads parts of one parameter from the checkpoint, converted to `dtype`."""

    checkpoint: Checkpoint
    parameter: HfParameter
    dtype: np.dtype
    block: tuple[int, int]
    pool: ThreadPoolExecutor

    def read(self, box: Sequence[slice]) -> np.ndarray:
        """The part `box` of the parameter; touches only the bytes of the tensors that it needs."""
        result = np.empty([part.stop - part.start for part in box], self.dtype)
        stacked, layout = len(self.parameter.stack), self.parameter.layout
        width = layout.shape[-1]

        def fill(tensor: tuple[tuple[int, ...], int, str]) -> None:
            position, number, name = tensor
            begin, end = max(box[-1].start, number * width), min(box[-1].stop, (number + 1) * width)
            if begin >= end:
                return
            stored, part_layout, rest = layout.restrict([*box[stacked:-1], slice(begin - number * width, end - number * width)])
            at = tuple(p - part.start for p, part in zip(position, box, strict=False))
            target = result[(*at, ..., slice(begin - box[-1].start, end - box[-1].start))]
            values = part_layout.apply(self._values(name, stored))[rest]
            for column in range(0, end - begin, _COLUMNS):
                target[..., column : column + _COLUMNS] = values[..., column : column + _COLUMNS]

        for _ in self.pool.map(fill, self.parameter.tensors(box[:stacked])):
            pass
        return result

    def _values(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        values = self.checkpoint.read(name, index)
        if self.checkpoint[name].dtype != _FP8:
            return values
        rows, columns = index[-2:]
        blocks = tuple(slice(part.start // step, -(-part.stop // step)) for part, step in zip((rows, columns), self.block, strict=True))
        scale_name = name + SCALE_SUFFIX
        scale = self.checkpoint.read(scale_name, (*index[:-2], *blocks)).astype(np.float32)
        if not (np.isfinite(scale).all() and (scale >= 0).all()):
            raise CheckpointError(
                f"{self.checkpoint.path(scale_name)}: {scale_name!r} has scales that are negative or not finite; it is damaged."
            )
        first = (rows.start % self.block[0], columns.start % self.block[1])
        return dequantize_box(values, scale, first, self.block, self.dtype)


def check_fit(checkpoint: Checkpoint, config: ModelConfig, parameters: Sequence[HfParameter]) -> None:
    """Compares the headers with the model.

    Raises:
      CheckpointError: names every missing, surplus or misshapen tensor, wrong dtype, and missing or misshapen scale.
    """
    shapes = {name: parameter.layout.stored_shape for parameter in parameters for _, _, name in parameter.tensors()}
    scales = {name + SCALE_SUFFIX for name in shapes if name in checkpoint and checkpoint[name].dtype == _FP8}
    missing = [name for name in shapes if name not in checkpoint]
    surplus = [name for name in checkpoint if name not in shapes and name not in scales]
    problems: list[str] = []
    family = FAMILIES[config.family]
    for key, tower, prefix in (("vision_config", config.vision, family.vision), ("ts_config", config.time_series, family.time_series)):
        if not prefix:
            continue
        inside = sum(name.startswith(prefix) for name in checkpoint)
        if tower is None and inside:
            problems.append(f"{inside} tensors {prefix}* are surplus: the config has no {key}; add it, or remove them")
            surplus = [name for name in surplus if not name.startswith(prefix)]
        if tower is not None and not inside:
            problems.append(f"all tensors {prefix}* are missing, but the config has a {key}; remove it, or fetch them")
            missing = [name for name in missing if not name.startswith(prefix)]
    problems += [f"{name} is missing" for name in missing]
    for name in surplus:
        problems += surplus_problems(checkpoint, config, name)
    for name, shape in shapes.items():
        if name in checkpoint:
            problems += _tensor_problems(checkpoint, config, name, shape)
    if problems:
        more = f"\n  ... and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise CheckpointError(
            f"the checkpoint in {checkpoint.directory} does not fit the model ({len(problems)} problems); "
            "check that config.json and the weights belong together:\n  " + "\n  ".join(problems[:_SHOWN]) + more
        )


def _tensor_problems(checkpoint: Checkpoint, config: ModelConfig, name: str, shape: tuple[int, ...]) -> Iterator[str]:
    info = checkpoint[name]
    if info.shape != shape:
        yield f"{name} has shape {list(info.shape)}, but the config asks for {list(shape)}"
    elif info.dtype == _FP8:
        yield from _scale_problems(checkpoint, config, name)
    elif info.dtype not in _FLOATS:
        yield f"{name} is stored as {info.dtype}, but weights must be {', '.join(_FLOATS)} or {_FP8}"


def _scale_problems(checkpoint: Checkpoint, config: ModelConfig, name: str) -> Iterator[str]:
    """What is wrong with the scales of an FP8 tensor [..., R, C]: they are [..., ceil(R / rows), ceil(C / columns)]."""
    scale, shape = name + SCALE_SUFFIX, checkpoint[name].shape
    if config.quantization is None:
        yield f"{name} is stored as {_FP8}, but the config has no quantization_config"
    elif len(shape) < 2:
        yield f"{name} is stored as {_FP8}, but only matrices may be"
    elif scale not in checkpoint:
        yield f"{scale} is missing: {name} is stored as {_FP8} and needs it"
    elif checkpoint[scale].dtype not in _SCALES:
        yield f"{scale} is stored as {checkpoint[scale].dtype}, but scales must be {', '.join(_SCALES)}"
    else:
        block = config.quantization.weight_block_size
        wanted = (*shape[:-2], *(-(-size // step) for size, step in zip(shape[-2:], block, strict=True)))
        if checkpoint[scale].shape != wanted:
            yield f"{scale} has shape {list(checkpoint[scale].shape)}, but blocks of {list(block)} in {list(shape)} ask for {list(wanted)}"


def surplus_problems(checkpoint: Checkpoint, config: ModelConfig, name: str) -> Iterator[str]:
    """Tensors without a parameter are wrong, except where they hold what the model knows anyway (spec 4.2, 8, 9.7), or are of a part that
    is no model here."""
    family = FAMILIES[config.family]
    if name.endswith("rotary_emb.inv_freq") or (family.untouched and name.startswith(family.untouched)):
        return
    if name == family.head + "weight" and config.text.tie_word_embeddings:
        if not np.array_equal(checkpoint.read(name), checkpoint.read(family.text + "embed_tokens.weight")):
            yield f"{name} is not the embedding, but the config says tie_word_embeddings=true; correct the config"
        return
    if name == POSITION_TABLE and config.time_series is not None:
        if not _is_sinusoidal(checkpoint.read(name), config.time_series.PATCH_WIDTH):
            yield f"{name} is not the sinusoidal table of this architecture, [rows, 1, {config.time_series.PATCH_WIDTH}]"
    elif re.fullmatch(r"model\.time_series\.encoder\.layers\.\d+\.self_attn\.k_proj\.bias", name):
        if np.any(checkpoint.read(name) != 0):
            yield f"{name} is not zero, but this architecture has no bias on keys"
    else:
        yield f"{name} is surplus: the model has no such parameter"


def _is_sinusoidal(table: np.ndarray, width: int) -> bool:
    """Whether [rows, 1, width] holds sin and cos of `row * 10000^(-2i/width)`, interleaved, to the accuracy of its dtype."""
    if table.ndim != 3 or table.shape[1:] != (1, width):
        return False
    row = np.arange(table.shape[0])[:, None]
    phase = row * 10000.0 ** (-np.arange(0, width, 2) / width)
    expected = np.stack([np.sin(phase), np.cos(phase)], -1).reshape(-1, width)
    # Made in float32, the table is off by the rounding of its phases; stored in 16 bits, by that of its values.
    tolerance = 1e-5 + row * 2.0**-21 + (2.0**-8 if table.dtype.itemsize < 4 else 0)
    return bool(np.all(np.abs(table[:, 0].astype(np.float64) - expected) <= tolerance))
