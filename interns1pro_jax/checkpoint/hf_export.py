"""Saving a model in the released layout: `config.json`, safetensors files and their index, FP8 with block scales if the config says so.

The way back of `hf_import`, by the same table of names. Layer after layer is brought into a form in which each device holds whole
experts; each process writes the tensors of its own devices, one at a time, where they belong in files of fixed size. So no process needs
more memory than a layer's share on its devices and a few tensors on the host, whatever the model's size. A file has its name when it is
complete, and an export that was interrupted goes on with the next file when it is started again.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
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

from interns1pro_jax.checkpoint.errors import CheckpointError
from interns1pro_jax.checkpoint.hf_import import SCALE_SUFFIX, parameters_of, surplus_problems
from interns1pro_jax.checkpoint.hf_names import POSITION_ROWS, POSITION_TABLE, HfParameter, hf_parameters
from interns1pro_jax.checkpoint.manager import check_writable
from interns1pro_jax.checkpoint.safetensors_io import DTYPES, INDEX, Checkpoint
from interns1pro_jax.checkpoint.safetensors_writer import (
    PARTIAL,
    OutputFile,
    TensorSpec,
    check_space,
    split_into_files,
    write_index,
    write_json,
)
from interns1pro_jax.config import Fp8Config, ModelConfig
from interns1pro_jax.config_checks import load_json
from interns1pro_jax.families import FAMILIES
from interns1pro_jax.models.time_series import sinusoid_table
from interns1pro_jax.ops.quantization import quantize_blocks
from interns1pro_jax.processes import barrier, first_alone

MAX_FILE_BYTES = 5 * 10**9
_UNFINISHED = "export.json" + PARTIAL  # what an export is of, as long as it goes on
_WRITERS = 4
# Matrices that the released scheme quantises, where `modules_to_not_convert` does not name them (spec section 7).
_QUANTIZED = r"\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(experts\.\d+\.)?(gate|up|down)_proj)\.weight$"
# Files of a released directory that are no weights: tokenizer, chat template, processors, generation defaults.
CARRIED = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "LICENSE*", "README*")

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


def _config_json(config: ModelConfig, like: Checkpoint | None) -> dict[str, Any]:
    """The content of `config.json`; of what is no model here, `like` has the keys."""
    content = config.to_hf()
    if (kept := FAMILIES[config.family].kept) and like is not None:
        original = load_json(like.directory / "config.json")
        for key in kept:
            part, _, name = key.rpartition(".")
            source, target = (original.get(part, {}), content[part]) if part else (original, content)
            if name in source:
                target[name] = source[name]
    return content


@dataclasses.dataclass(frozen=True)
class Unit:
    """What is written together: a parameter, or one layer of it."""

    parameter: HfParameter
    layer: int | None

    @property
    def names(self) -> list[str]:
        return [name for _, _, name in self.parameter.tensors(self.stacked)]

    @property
    def stacked(self) -> list[slice]:
        sizes = [slice(0, len(values)) for _, values in self.parameter.stack]
        if self.layer is not None:
            sizes[0] = slice(self.layer, self.layer + 1)
        return sizes

    @property
    def has_experts(self) -> bool:
        return any(letter == "E" for letter, _ in self.parameter.stack)


def units_of(parameters: Sequence[HfParameter]) -> Iterator[Unit]:
    """All parameters in the order in which they are stored: what has no layers first, then layer by layer."""
    runs: dict[Any, list[HfParameter]] = {}
    for parameter in parameters:
        if parameter.stack and parameter.stack[0][0] == "L":
            runs.setdefault((parameter.path.split(".")[0], parameter.stack[0][1]), []).append(parameter)
        else:
            yield Unit(parameter, None)
    for (_, layers), members in runs.items():
        for layer in range(len(layers)):
            yield from (Unit(parameter, layer) for parameter in members)


def tensor_specs(units: Sequence[Unit], config: ModelConfig, dtype: np.dtype, like: Checkpoint | None) -> dict[str, TensorSpec]:
    specs: dict[str, TensorSpec] = {}
    for unit in units:
        shape = unit.parameter.layout.stored_shape
        for name in unit.names:
            if is_quantized(name, config.quantization):
                assert config.quantization is not None
                specs[name] = TensorSpec(np.dtype(jnp.float8_e4m3fn), shape)
                blocks = tuple(-(-size // step) for size, step in zip(shape, config.quantization.weight_block_size, strict=True))
                specs[name + SCALE_SUFFIX] = TensorSpec(_dtype_in(like, name + SCALE_SUFFIX, np.dtype(np.float32)), blocks)
            else:
                specs[name] = TensorSpec(_dtype_in(like, name, dtype), shape)
    return specs | {name: TensorSpec(values.dtype, values.shape) for name, values in constants(config, specs, like)}


def _dtype_in(like: Checkpoint | None, name: str, default: np.dtype) -> np.dtype:
    if like is None or name not in like or like[name].dtype.startswith("F8_E4M3"):
        return default
    return DTYPES[like[name].dtype]


def constants(config: ModelConfig, parameters: Mapping[str, Any], like: Checkpoint | None) -> Iterator[tuple[str, np.ndarray]]:
    """Tensors of the released layout that are no parameters here, because the architecture fixes their values."""
    if like is not None:
        known = {*parameters, *(name + SCALE_SUFFIX for name in parameters)}
        if config.text.tie_word_embeddings:
            known.add(FAMILIES[config.family].head + "weight")  # where it is stored, it repeats the embedding
        yield from ((name, like.read(name)) for name in like if name not in known)
    elif config.time_series is not None:
        yield POSITION_TABLE, sinusoid_table(POSITION_ROWS, config.time_series.PATCH_WIDTH)[:, None]


def check_belongs(like: Checkpoint | None, config: ModelConfig, units: Sequence[Unit]) -> None:
    """What `like` has besides parameters is written as it is, so it must be what the model knows anyway; and where models of the family
    have more than ours, it must be given."""
    if like is None:
        if untouched := FAMILIES[config.family].untouched:
            raise CheckpointError(
                f"models of the family {config.family} have tensors {untouched}* that are no model here; give a checkpoint to take them "
                "from (`like`), or export the text as another family."
            )
        return
    names = {name for unit in units for name in unit.names}
    surplus = [name for name in like if name not in names and name.removesuffix(SCALE_SUFFIX) not in names]
    if problems := [problem for name in surplus for problem in surplus_problems(like, config, name)]:
        raise CheckpointError(
            f"{like.directory} is of another model ({'; '.join(problems[:4])}; {len(problems)} in all); follow a checkpoint of the same."
        )


def is_quantized(name: str, quantization: Fp8Config | None) -> bool:
    """Whether the released scheme stores this tensor as FP8: a projection of attention or of a feed-forward network that is not listed."""
    if quantization is None or not re.search(_QUANTIZED, name):
        return False
    module = name.removesuffix(".weight")
    return not any(module == entry or module.startswith(entry + ".") for entry in quantization.modules_to_not_convert)


def released_scheme(config: ModelConfig) -> Fp8Config:
    """The released FP8 scheme for this model: attention projections and experts, nothing else (spec section 7)."""
    names = [name for unit in units_of(hf_parameters(dataclasses.replace(config, time_series=None))) for name in unit.names]
    modules = {name.rpartition(".")[0] for name in names if not re.search(_QUANTIZED, name) or name.startswith("model.visual.")}
    return Fp8Config(modules_to_not_convert=tuple(sorted(modules)))


def _check_finite(state: Mapping[str, jax.Array]) -> None:
    finite = jax.jit(lambda arrays: jax.tree.map(lambda x: jnp.isfinite(x).all(), arrays))(dict(state))
    if bad := [path for path, is_finite in finite.items() if not bool(is_finite)]:
        raise CheckpointError(f"weights are NaN or infinite in {', '.join(bad[:8])} ({len(bad)} parameters); export an earlier checkpoint.")


def start_export(directory: Path, files: Sequence[OutputFile], identity: str) -> None:
    """Checks the directory (see `check_destination`), and makes room for what is not there yet."""
    check_destination(directory, files, identity)
    for path in directory.glob(f"*.safetensors{PARTIAL}"):
        path.unlink()
    write_json(directory / _UNFINISHED, _plan(files, identity))
    for file in files:
        if not file.is_complete():
            file.create()


def _plan(files: Sequence[OutputFile], identity: str) -> dict[str, Any]:
    return {"of": identity, "files": {file.path.name: file.size for file in files}}


def check_destination(directory: Path, files: Sequence[OutputFile], identity: str) -> None:
    """Checks that the directory is empty or holds the beginning of this export, and that there is room for the rest.

    Raises:
      CheckpointError: it holds something else, or there is too little space. Nothing has been written then.
    """
    check_writable(directory)
    marker = directory / _UNFINISHED
    if marker.exists():
        if json.loads(marker.read_text()) != _plan(files, identity):
            raise CheckpointError(f"{directory} holds an unfinished export of something else; finish that, or empty the directory.")
    elif there := [path.name for pattern in ("*.safetensors", "config.json", INDEX) for path in directory.glob(pattern)]:
        raise CheckpointError(f"{directory} holds {', '.join(sorted(there)[:4])} already; choose an empty directory.")
    check_space(directory, files)


def finish_export(
    directory: Path, files: Sequence[OutputFile], config: ModelConfig, carry: Path | None, like: Checkpoint | None = None
) -> None:
    """Writes what stands beside the files of weights, once these are complete, the index last."""
    if carry is not None:
        _carry_along(carry, directory)
    write_json(directory / "config.json", _config_json(config, like))
    write_index(directory, files)
    (directory / _UNFINISHED).unlink()


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
        fixed = dict(constants(self.config, {name: None for unit in units for name in unit.names}, self.like))
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
                    pending += [pool.submit(self._write, name, values) for name, values in fixed.items()]
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


def _carry_along(source: Path, directory: Path) -> None:
    """Copies what belongs to a released model besides its weights: tokenizer, chat template, processors, generation config."""
    for pattern in CARRIED:
        for path in source.glob(pattern):
            if path.is_file() and path.name not in ("config.json", INDEX):
                shutil.copyfile(path, directory / path.name)


def _dotted(path: Sequence[Any]) -> str:
    return ".".join(map(str, path))
