"""Saving a model in the released layout: `config.json`, safetensors files and their index, FP8 with block scales if the config says so.

The way back of `hf_import`, by the same table of names. Layer after layer is brought into a form in which each device holds whole
experts; each process writes the tensors of its own devices, one at a time, where they belong in files of fixed size. So no process needs
more memory than a layer's share on its devices and a few tensors on the host, whatever the model's size. A file has its name when it is
complete, and an export that was interrupted goes on with the next file when it is started again.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from interns1pro_jax.checkpoint.destination import MAX_FILE_BYTES, finish_export, start_export
from interns1pro_jax.checkpoint.errors import CheckpointError
from interns1pro_jax.checkpoint.hf_import import SCALE_SUFFIX, parameters_of
from interns1pro_jax.checkpoint.hf_names import hf_parameters
from interns1pro_jax.checkpoint.safetensors_io import Checkpoint
from interns1pro_jax.checkpoint.safetensors_writer import OutputFile, split_into_files
from interns1pro_jax.checkpoint.stored_tensors import Unit, check_belongs, constants, tensor_specs, units_of
from interns1pro_jax.config import ModelConfig
from interns1pro_jax.ops.quantization import quantize_blocks
from interns1pro_jax.processes import barrier, first_alone

_WRITERS = 4

Progress = Callable[[int, int], None]
"""Called with the bytes that this process has written, and those that all processes have to write."""


def export_model(
    model: nnx.Module,
    config: ModelConfig,
    directory: str | Path,
    *,
    dtype: str | None = None,
    like: Checkpoint | None = None,
    carry: Path | None = None,
    max_file_bytes: int = MAX_FILE_BYTES,
    identity: str = "",
    progress: Progress = lambda done, total: None,
) -> None:
    """Writes a model as a directory in the released layout. All processes call it; all must see the directory.

    Args:
      model: on the mesh in force.
      config: of the model. With `quantization`, its matrices are stored as e4m3 with power-of-two scales per block, of the weight
        rounded to bfloat16 first (spec 1.10); everything else in `dtype`.
      dtype: of what is not quantised; default `config.text.dtype`.
      like: a checkpoint whose tensors' dtypes are kept, and whose scales, wherever they represent a block exactly: what was only read and
        written is then the same to the byte. The dtype of a tensor that it lacks is `dtype`.
      carry: a directory whose other files (tokenizer, chat template, processors, generation config) are copied along.
      max_file_bytes: of a file, unless a single tensor is larger.
      identity: what the weights are (a run and its step, say); an interrupted export goes on only with the same.
      progress: told after every tensor.

    Raises:
      CheckpointError: the directory holds something else or an export of something else, or cannot be written; there is too little
        space; the weights are not finite; `like` has tensors that this model has not. Nothing has been written then.
    """
    directory = Path(directory)
    state = {_dotted(path): variable.get_value() for path, variable in nnx.to_flat_state(nnx.state(model))}
    parameters = hf_parameters(config) if like is None else parameters_of(like, config)
    if sorted(state) != sorted(parameter.path for parameter in parameters):
        raise CheckpointError("the model was not made with this config; load or create it with the one that is exported.")
    units = list(units_of(parameters))
    check_belongs(like, config, units)
    tensors = tensor_specs(units, config, np.dtype(dtype or config.text.dtype), like)
    files = split_into_files(directory, tensors, max_file_bytes)
    _check_finite(state)
    first_alone(lambda: start_export(directory, files, identity))
    _Job(state, config, files, like, progress).run(units)
    if jax.process_index() == 0:
        finish_export(directory, files, config if dtype is None else config.with_dtypes(dtype), carry, like)
    barrier("export is done")


def _check_finite(state: Mapping[str, jax.Array]) -> None:
    finite = jax.jit(lambda arrays: jax.tree.map(lambda x: jnp.isfinite(x).all(), arrays))(dict(state))
    if bad := [path for path, is_finite in finite.items() if not bool(is_finite)]:
        raise CheckpointError(f"weights are NaN or infinite in {', '.join(bad[:8])} ({len(bad)} parameters); export an earlier checkpoint.")


class _Job:
    """Brings unit after unit into the stored form and writes what this process's devices hold of it."""

    def __init__(
        self,
        state: Mapping[str, jax.Array],
        config: ModelConfig,
        files: Sequence[OutputFile],
        like: Checkpoint | None,
        progress: Progress,
    ):
        self.state, self.config, self.files, self.like, self.progress = state, config, files, like, progress
        self.done = {file.path for file in files if file.is_complete()}
        self.file_of = {name: file for file in files for name in file.tensors}
        self.total = sum(spec.nbytes for file in files if file.path not in self.done for spec in file.tensors.values())
        self.written, self.lock = 0, threading.Lock()
        self.functions: dict[str, Callable[..., Any]] = {}

    def run(self, units: Sequence[Unit]) -> None:
        fixed = list(constants(self.config, {name for unit in units for name in unit.names}, self.like))
        ends = {file.path: i for i, unit in enumerate(units) for file in self._files(unit)}
        with ThreadPoolExecutor(_WRITERS) as pool:
            pending: list[Future] = []
            for i, unit in enumerate(units):
                if not all(file.path in self.done for file in self._files(unit)):
                    for name, values in self._stored(unit):
                        pending.append(pool.submit(self._write, name, values))
                        if len(pending) > 2 * _WRITERS:
                            pending.pop(0).result()
                if i + 1 == len(units) and jax.process_index() == 0:
                    pending += [pool.submit(lambda c: self._write(c.name, c.read()), constant) for constant in fixed]
                complete = [file for file in self.files if file.path not in self.done and ends.get(file.path, len(units) - 1) <= i]
                if complete:
                    while pending:
                        pending.pop(0).result()
                    barrier(f"tensors of {complete[-1].path.name}")
                    for file in complete:
                        self.done.add(file.path)
                        if jax.process_index() == 0:
                            file.finish()

    def _files(self, unit: Unit) -> list[OutputFile]:
        return list(
            {
                file.path: file for name in unit.names for file in [self.file_of[name], self.file_of.get(name + SCALE_SUFFIX)] if file
            }.values()
        )

    def _write(self, name: str, values: np.ndarray) -> None:
        file = self.file_of[name]
        if file.path in self.done:
            return
        file.write(name, values)
        with self.lock:
            self.written += values.nbytes
            self.progress(self.written, self.total)

    def _stored(self, unit: Unit) -> Iterator[tuple[str, np.ndarray]]:
        """Names and values of the tensors that this process writes."""
        parts, names = len(unit.parameter.names), unit.names
        layer = None if unit.layer is None else np.int32(unit.layer)
        results = self._function(unit)(self.state[unit.parameter.path], layer, self._scales(unit))
        for number, both in enumerate(results):
            for suffix, array in zip(("", SCALE_SUFFIX), both, strict=False):
                for shard in array.addressable_shards:
                    if shard.replica_id == 0:
                        values = np.asarray(shard.data)
                        first = shard.index[0].indices(array.shape[0])[0] if unit.has_experts else 0
                        for i, value in enumerate(values if unit.has_experts else values[None]):
                            yield names[(first + i) * parts + number] + suffix, value

    def _is_in(self, like: Checkpoint, name: str) -> bool:
        return name in like and like[name].shape == self.file_of[name].tensors[name].shape

    def _scales(self, unit: Unit) -> list[jax.Array | None]:
        """Scales that `like` has for the unit's tensors, as they are split; one entry for each part along our last axis."""
        parts, names, like = len(unit.parameter.names), unit.names, self.like
        found: list[jax.Array | None] = []
        for number in range(parts):
            mine = [name + SCALE_SUFFIX for name in names[number::parts]]
            if like is None or mine[0] not in self.file_of or not all(self._is_in(like, name) for name in mine):
                found.append(None)
                continue
            if not unit.has_experts:
                found.append(jax.device_put(like.read(mine[0]).astype(np.float32), NamedSharding(jax.sharding.get_mesh(), PartitionSpec())))
                continue
            shape = (len(mine), *self.file_of[mine[0]].tensors[mine[0]].shape)
            sharding = NamedSharding(jax.sharding.get_mesh(), _whole_experts(unit))

            def read(index: Any, mine: list[str] = mine, like: Checkpoint = like) -> np.ndarray:
                return np.stack([like.read(name).astype(np.float32) for name in mine[index[0]]])

            found.append(jax.make_array_from_callback(shape, sharding, read))
        return found

    def _function(self, unit: Unit) -> Callable[..., list[tuple[jax.Array, ...]]]:
        """The compiled way from a parameter to the stored tensors of one of its layers, experts in front, each with its scales if it has
        any; for each of the parts along our last axis."""
        if unit.parameter.path not in self.functions:
            layout, names = unit.parameter.layout, unit.names[: len(unit.parameter.names)]
            inverse, width, split = layout.inverse(), layout.shape[-1], _whole_experts(unit)
            block = None if self.config.quantization is None else self.config.quantization.weight_block_size
            dtypes = [self.file_of[name].tensors[name].dtype for name in names]
            scale_names = [name + SCALE_SUFFIX for name in names]
            scale_dtypes = [self.file_of[name].tensors[name].dtype if name in self.file_of else None for name in scale_names]

            def stored(array: jax.Array, layer: jax.Array | None, kept: list[jax.Array | None]) -> list[tuple[jax.Array, ...]]:
                if layer is not None:
                    array = jax.lax.dynamic_index_in_dim(array, layer, keepdims=False)
                array = jax.sharding.reshard(array, split)
                results: list[tuple[jax.Array, ...]] = []
                for number, (dtype, scale_dtype) in enumerate(zip(dtypes, scale_dtypes, strict=True)):

                    def one(
                        part: jax.Array, keep: jax.Array | None, dtype: Any = dtype, scale_dtype: Any = scale_dtype
                    ) -> tuple[jax.Array, ...]:
                        values = inverse.apply(part)
                        if scale_dtype is None:
                            return (values.astype(dtype),)
                        assert block is not None
                        quantized, scale = quantize_blocks(values.astype(jnp.bfloat16).astype(jnp.float32), block, keep=keep)
                        return quantized, scale.astype(scale_dtype)

                    part = array[..., number * width : (number + 1) * width]
                    if unit.has_experts:
                        results.append(jax.shard_map(jax.vmap(one), in_specs=split, out_specs=split)(part, kept[number]))
                    else:
                        results.append(one(part, kept[number]))
                return results

            self.functions[unit.parameter.path] = jax.jit(stored)
        return self.functions[unit.parameter.path]


def _whole_experts(unit: Unit) -> PartitionSpec:
    """How a unit is split where whole tensors are written: experts over as many devices as divide them, anything else on all."""
    if not unit.has_experts:
        return PartitionSpec()
    mesh, count = jax.sharding.get_abstract_mesh(), dict(unit.parameter.stack)["E"]
    axes: list[str] = []
    for axis in ("expert", "fsdp", "context", "data"):
        if len(count) % math.prod(mesh.shape[a] for a in (*axes, axis)) == 0:
            axes.append(axis)
    return PartitionSpec(tuple(axes))


def _dotted(path: Sequence[Any]) -> str:
    return ".".join(map(str, path))
