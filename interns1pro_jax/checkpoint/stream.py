"""Conversion of checkpoints tensor by tensor: from any source to the released layout, or to a checkpoint of a run.

No model is made: a few boxes of weights are on their way at a time, so that one host with a few times the largest tensor of memory converts
a model of any size. All that will be written is read once before, to see that it is finite; nothing is written until that, the fit of names
and shapes, and the disk's room are known to be right. What was begun goes on where it was interrupted, and is no checkpoint before it is
complete.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from interns1pro_jax.checkpoint import checksums, integrity
from interns1pro_jax.checkpoint.destination import MAX_FILE_BYTES, check_destination, finish_export, start_export
from interns1pro_jax.checkpoint.errors import CheckpointError
from interns1pro_jax.checkpoint.hf_import import SCALE_SUFFIX, parameters_of, pieces
from interns1pro_jax.checkpoint.hf_names import HfParameter, hf_parameters
from interns1pro_jax.checkpoint.manager import MANIFEST, STATE, check_writable
from interns1pro_jax.checkpoint.safetensors_io import Checkpoint
from interns1pro_jax.checkpoint.safetensors_writer import PARTIAL, OutputFile, TensorWriter, split_into_files, write_json
from interns1pro_jax.checkpoint.sources import Source, run_name, steps_in
from interns1pro_jax.checkpoint.stored_tensors import Unit, check_belongs, constants, tensor_specs, units_of
from interns1pro_jax.config import ModelConfig
from interns1pro_jax.ops.quantization import quantize_blocks
from interns1pro_jax.processes import barrier, first_alone

_WORKERS = 4
_BOX = 2**26  # bytes of experts that are handled at once, and of a chunk of a run's checkpoint
_PLAN = "convert.json"

Progress = Callable[[str, int, int], None]
"""Called with what is being done ("checking", "writing", "checksums"), the bytes done and their total."""


class _Item(NamedTuple):
    """A box of a parameter, in which all matrices are whole, and the tensors that it becomes."""

    unit: Unit
    box: tuple[slice, ...]

    def tensors(self) -> Iterator[tuple[tuple[int, ...], int, str]]:
        """(position in the box's stacked axes, number of the part along our last axis, tensor name)."""
        stacked = self.box[: len(self.unit.parameter.stack)]
        for position, number, name in self.unit.parameter.tensors(stacked):
            yield tuple(p - part.start for p, part in zip(position, stacked, strict=True)), number, name

    @property
    def elements(self) -> int:
        return math.prod(part.stop - part.start for part in self.box)


def write_hf(
    source: Source,
    config: ModelConfig,
    directory: Path,
    *,
    dtype: str | None = None,
    like: Checkpoint | None = None,
    carry: Path | None = None,
    max_file_bytes: int = MAX_FILE_BYTES,
    progress: Progress = lambda what, done, total: None,
) -> None:
    """Writes the released layout; arguments and errors as in `hf_export.export_model`. Where several processes call it (they must all see
    the directory), each makes the files of its own."""
    parameters = hf_parameters(config) if like is None else parameters_of(like, config)
    units = list(units_of(parameters))
    check_belongs(like, config, units)
    tensors = tensor_specs(units, config, np.dtype(dtype or config.text.dtype), like)
    files = split_into_files(directory, tensors, max_file_bytes)
    mine = _share(files, jax.process_index(), jax.process_count())
    identity = f"{source.identity} {config.text.dtype} {dtype}"
    first_alone(lambda: check_destination(directory, files, identity))
    writer = TensorWriter(mine, functools.partial(progress, "writing"))

    def is_wanted(name: str) -> bool:
        return name in writer or name + SCALE_SUFFIX in writer  # the scales may be in the next file

    items = [item for unit in units for item in _items(source, unit) if any(is_wanted(name) for _, _, name in item.tensors())]
    _check_finite(source, items, progress)
    first_alone(lambda: start_export(directory, files, identity))
    one_large = threading.Lock()

    def convert(item: _Item) -> None:
        # Few are larger than a box of experts, and one of those at a time is enough.
        with one_large if item.elements * source.dtype(item.unit.parameter).itemsize > 2 * _BOX else contextlib.nullcontext():
            convert_box(item)

    def convert_box(item: _Item) -> None:
        layout = item.unit.parameter.layout
        inverse, width = layout.inverse(), layout.shape[-1]
        values = source.read(item.unit.parameter, item.box)
        for position, number, name in item.tensors():
            if not is_wanted(name):
                continue
            stored = inverse.apply(values[position][..., number * width : (number + 1) * width])
            if (scale := tensors.get(name + SCALE_SUFFIX)) is None:
                writer.write(name, stored.astype(tensors[name].dtype))
                continue
            assert config.quantization is not None
            kept = None
            if like is not None and name + SCALE_SUFFIX in like and like[name + SCALE_SUFFIX].shape == scale.shape:
                kept = like.read(name + SCALE_SUFFIX).astype(np.float32)
            quantized, scales = _quantize(config.quantization.weight_block_size)(stored.astype(ml_dtypes.bfloat16), kept)
            writer.write(name, np.asarray(quantized))
            writer.write(name + SCALE_SUFFIX, np.asarray(scales).astype(scale.dtype))

    with ThreadPoolExecutor(_WORKERS) as pool:
        for _ in pool.map(convert, items):
            pass
    for constant in constants(config, {name for unit in units for name in unit.names}, like):
        if constant.name in writer:
            writer.write(constant.name, constant.read())
    barrier("files are complete")
    if jax.process_index() == 0:
        checksums.write(directory, [file.path for file in files], functools.partial(progress, "checksums"))
        finish_export(directory, files, config if dtype is None else config.with_dtypes(dtype), carry, like)
    barrier("conversion is done")


def write_run(
    source: Source,
    directory: Path,
    step: int = 0,
    *,
    dtype: str | None = None,
    progress: Progress = lambda what, done, total: None,
) -> None:
    """Writes a checkpoint like those of runs, of weights alone: what `weights.read_weights` reads. Arrays are uncompressed and in chunks of
    whole matrices, at most 64 MiB where a matrix is not more, so that any part can be read alone.

    Args:
      dtype: of the arrays; default what the source is read as.

    Raises:
      CheckpointError: weights are not finite; the directory holds checkpoints, or an unfinished one of something else, or cannot be
        written, or has too little space. Nothing has been written then.
    """
    if steps := steps_in(directory):
        raise CheckpointError(f"{directory} holds checkpoints already ({', '.join(map(str, steps[:4]))}); choose an empty directory.")
    config = source.config.with_dtypes(param_dtype=dtype)
    parameters = hf_parameters(config)
    arrays = {parameter.path: _Array.of(parameter, np.dtype(dtype) if dtype else source.dtype(parameter)) for parameter in parameters}
    where = directory.absolute() / f"{step:08d}{PARTIAL}"
    plan = {"of": source.identity, "arrays": {path: f"{array.dtype}{list(array.shape)}" for path, array in arrays.items()}}
    boxes = [(parameter, box) for parameter in parameters for box in arrays[parameter.path].boxes()]
    if (where / _PLAN).exists():
        if json.loads((where / _PLAN).read_text()) != plan:
            raise CheckpointError(f"{where} is an unfinished conversion of something else; finish that, or remove it.")
        boxes = [(parameter, box) for parameter, box in boxes if not arrays[parameter.path].file(where / STATE, box).exists()]
    elif where.exists():
        shutil.rmtree(where)  # stopped before its plan was complete
    check_writable(directory)
    total, done, lock = sum(arrays[p.path].bytes_of(box) for p, box in boxes), 0, threading.Lock()
    if (free := shutil.disk_usage(directory).free) < total:
        raise CheckpointError(
            f"no space for the checkpoint in {directory}: it needs {total:,} more bytes and {free:,} are free; free some space, or choose "
            "another directory."
        )
    _check_finite(source, [_Item(Unit(parameter, None), box) for parameter, box in boxes], progress)
    if not (where / _PLAN).exists():
        _begin_run(where, {run_name(path): array for path, array in arrays.items()}, config, source.identity)
        write_json(where / _PLAN, plan)
    stores = {path: array.open(where / STATE) for path, array in arrays.items()}

    def convert(job: tuple[HfParameter, tuple[slice, ...]]) -> None:
        nonlocal done
        parameter, box = job
        array = arrays[parameter.path]
        stores[parameter.path][box].write(source.read(parameter, box).astype(array.dtype)).result()
        with lock:
            done += array.bytes_of(box)
            progress("writing", done, total)

    with ThreadPoolExecutor(_WORKERS) as pool:
        for _ in pool.map(convert, boxes):
            pass
    for item in (STATE, MANIFEST):
        integrity.write_sums(where / item)
    beside = (where / _PLAN, where / checksums.FILE)
    files = sorted(path for path in where.rglob("*") if path.is_file() and path not in beside)
    checksums.write(where, files, functools.partial(progress, "checksums"))
    os.replace(where, where.with_suffix(""))
    (where.with_suffix("") / _PLAN).unlink()


@dataclasses.dataclass(frozen=True)
class _Array:
    """An array to be, in a run's checkpoint, and the chunks that it is stored in."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    chunk: tuple[int, ...]

    @classmethod
    def of(cls, parameter: HfParameter, dtype: np.dtype) -> _Array:
        stacked, shape = len(parameter.stack), parameter.shape
        chunk = [1] * stacked + list(shape[stacked:])
        limit = _BOX // dtype.itemsize
        if "E" in dict(parameter.stack):
            chunk[stacked - 1] = min(shape[stacked - 1], max(1, limit // math.prod(chunk)))
        # Along the first axis of the stored tensor a part of it is contiguous.
        layout = parameter.layout
        axis = next(i for i, dims in enumerate(layout.ours) if layout.stored[0][0] in dims) if layout.stored and layout.stored[0] else 0
        if math.prod(chunk) > limit and len(parameter.names) == 1 and layout.ours:
            chunk[stacked + axis] = max(1, chunk[stacked + axis] * limit // math.prod(chunk))
        return cls(run_name(parameter.path), shape, dtype, tuple(chunk))

    def boxes(self) -> Iterator[tuple[slice, ...]]:
        counts = [-(-size // part) for size, part in zip(self.shape, self.chunk, strict=True)]
        for index in np.ndindex(*counts):
            starts = [i * part for i, part in zip(index, self.chunk, strict=True)]
            yield tuple(slice(s, min(s + part, size)) for s, part, size in zip(starts, self.chunk, self.shape, strict=True))

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def bytes_of(self, box: Sequence[slice]) -> int:
        return math.prod(part.stop - part.start for part in box) * self.dtype.itemsize

    def file(self, state: Path, box: Sequence[slice]) -> Path:
        return state / self.name / ".".join(str(part.start // size) for part, size in zip(box, self.chunk, strict=True))

    def open(self, state: Path) -> ts.TensorStore:
        """The array in the directory `state`, made where it is not there yet."""
        metadata = {"compressor": None, "chunks": list(self.chunk), "dimension_separator": "."}
        spec = {
            "driver": "zarr",
            "kvstore": {"driver": "file", "path": f"{state / self.name}/"},
            "metadata": metadata,
            "store_data_equal_to_fill_value": True,
        }
        return ts.open(spec, shape=self.shape, dtype=self.dtype, create=True, open=True).result()


class _ArrayHandler(ocp.type_handlers.TypeHandler):
    """Makes the arrays of a checkpoint without their values, so that all else of its form is Orbax's own."""

    def typestr(self) -> str:
        return "np.ndarray"

    async def metadata(self, infos: Sequence[Any]) -> Sequence[Any]:
        raise NotImplementedError("read checkpoints with `weights.read_weights`")

    async def serialize(self, values: Sequence[_Array], infos: Sequence[Any], args: Sequence[Any] | None = None) -> Sequence[Any]:
        for array, info in zip(values, infos, strict=True):
            await info.await_path_creation()
            array.open(Path(info.parent_dir))
        return []

    async def deserialize(self, infos: Sequence[Any], args: Sequence[Any] | None = None) -> Sequence[Any]:
        raise NotImplementedError("read checkpoints with `weights.read_weights`")


def _begin_run(where: Path, arrays: dict[str, _Array], config: ModelConfig, origin: str) -> None:
    """Makes a run's checkpoint with empty arrays."""
    registry = ocp.type_handlers.create_type_handler_registry((_Array, _ArrayHandler()))
    state = ocp.PyTreeCheckpointHandler(use_ocdbt=False, type_handler_registry=registry)
    described = {name: f"{array.dtype}[{','.join(map(str, array.shape))}]" for name, array in arrays.items()}
    manifest = {
        "identity": {"model": json.loads(json.dumps(dataclasses.asdict(config)))},
        "extras": {"origin": origin},
        "arrays": described,
    }
    for item, handler, args in (
        (STATE, state, ocp.args.PyTreeSave(arrays)),
        (MANIFEST, ocp.JsonCheckpointHandler(), ocp.args.JsonSave(manifest)),
    ):
        (where / item).mkdir(parents=True)
        handler.save(ocp.path.step.epath.Path(where / item), args=args)  # type: ignore[attr-defined]
        handler.finalize(ocp.path.step.epath.Path(where / item))  # type: ignore[attr-defined]
        handler.close()


def _share(files: Sequence[OutputFile], process: int, processes: int) -> list[OutputFile]:
    """The files that a process makes: each, the largest first, goes to the process that has least."""
    shares: list[list[OutputFile]] = [[] for _ in range(processes)]
    for file in sorted(files, key=lambda file: file.size, reverse=True):
        min(shares, key=lambda share: sum(other.size for other in share)).append(file)
    return shares[process]


def _items(source: Source, unit: Unit) -> Iterator[_Item]:
    """The unit in boxes of whole matrices: a layer of most parameters, of experts as many as are stored together or are not much."""
    box = [*unit.stacked, *(slice(0, size) for size in unit.parameter.shape[len(unit.parameter.stack) :])]
    if not unit.has_experts:
        yield _Item(unit, tuple(box))
        return
    axis = len(unit.parameter.stack) - 1
    matrix = math.prod(unit.parameter.shape[axis + 1 :]) * source.dtype(unit.parameter).itemsize
    together = max(1, _BOX // matrix)
    stored = source.experts_together(unit.parameter)
    together = max(together // stored, 1) * stored
    for start in range(0, box[axis].stop, together):
        yield _Item(unit, (*box[:axis], slice(start, min(start + together, box[axis].stop)), *box[axis + 1 :]))


def _check_finite(source: Source, items: Sequence[_Item], progress: Progress) -> None:
    total, done, lock = sum(item.elements * source.dtype(item.unit.parameter).itemsize for item in items), 0, threading.Lock()
    bad: list[str] = []

    def check(item: _Item) -> None:
        nonlocal done
        for piece in pieces(item.box, source.dtype(item.unit.parameter).itemsize, 4 * _BOX):
            if not np.isfinite(source.read(item.unit.parameter, piece)).all():
                bad.append(", ".join(name for _, _, name in _Item(item.unit, piece).tensors())[:200])
        with lock:
            done += item.elements * source.dtype(item.unit.parameter).itemsize
            progress("checking", done, total)

    with ThreadPoolExecutor(_WORKERS) as pool:
        for _ in pool.map(check, items):
            pass
    if bad:
        raise CheckpointError(f"weights are NaN or infinite in {'; '.join(bad[:4])} ({len(bad)} places); take another checkpoint.")


@functools.cache
def _quantize(block: tuple[int, int]) -> Callable[..., tuple[jax.Array, jax.Array]]:
    return jax.jit(lambda values, keep: quantize_blocks(values.astype(jnp.float32), block, keep=keep))
