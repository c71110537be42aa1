"""Weights on disk, read box by box: what a conversion takes from, without a model in memory.

A source knows the model's configuration and reads any box of any parameter, in our layout, as NumPy; what the host holds is what was asked
for, and the chunks of storage that it lies in. `HfSource` reads the released layout, `RunSource` the checkpoints of this project's runs.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import tensorstore as ts

from interns1pro_jax.checkpoint.errors import CheckpointError
from interns1pro_jax.checkpoint.hf_import import ParameterReader, check_fit, parameters_of
from interns1pro_jax.checkpoint.hf_names import HfParameter, hf_parameters
from interns1pro_jax.checkpoint.integrity import content_hash, require_whole
from interns1pro_jax.checkpoint.manager import MANIFEST, STATE, failure_reason
from interns1pro_jax.checkpoint.safetensors_io import Checkpoint
from interns1pro_jax.config import ModelConfig
from interns1pro_jax.config_checks import from_dict
from interns1pro_jax.ops.quantization import WEIGHT_BLOCK

_READERS = 8
_CACHE = 2**29  # bytes of adapters that are kept


class Source(Protocol):
    """Attributes: the model's configuration, and what the weights are (a directory and a step)."""

    config: ModelConfig
    identity: str

    def dtype(self, parameter: HfParameter) -> np.dtype:
        """What the parameter is read as."""

    def experts_together(self, parameter: HfParameter) -> int:
        """How many experts are stored together: reading one of them reads all."""

    def read(self, parameter: HfParameter, box: Sequence[slice]) -> np.ndarray:
        """The part `box` of a parameter, in our layout."""


class HfSource:
    """A checkpoint in the released layout; parameters are read as the config's `param_dtype`.

    Raises:
      CheckpointError: it does not fit the config; all misfits are named.
    """

    def __init__(self, checkpoint: Checkpoint, config: ModelConfig):
        parameters = parameters_of(checkpoint, config)
        check_fit(checkpoint, config, parameters)
        self.config, self.identity = config, f"{checkpoint.directory.absolute()} 0"
        self._stored = {parameter.path: parameter for parameter in parameters}
        self._checkpoint = checkpoint
        self._block = config.quantization.weight_block_size if config.quantization else WEIGHT_BLOCK
        self._pool = ThreadPoolExecutor(_READERS)

    def dtype(self, parameter: HfParameter) -> np.dtype:
        return np.dtype(_part(self.config, parameter.path).param_dtype)

    def experts_together(self, parameter: HfParameter) -> int:
        return 1

    def read(self, parameter: HfParameter, box: Sequence[slice]) -> np.ndarray:
        stored = self._stored[parameter.path]
        return ParameterReader(self._checkpoint, stored, self.dtype(parameter), self._block, self._pool).read(box)


class RunSource:
    """A checkpoint of a run (`WORKDIR/checkpoints`), or one that `stream.write_run` or `weights.write_weights` made; parameters are read as
    they are stored, adapters merged.

    Args:
      step: which checkpoint; None takes the newest.

    Raises:
      CheckpointError: there is no such checkpoint, its files are damaged, or it has not the arrays of its own config.
    """

    def __init__(self, directory: str | Path, step: int | None = None):
        directory = Path(directory).absolute()
        steps = steps_in(directory)
        step = max(steps, default=-1) if step is None else step
        if step not in steps:
            raise CheckpointError(f"{directory} has no checkpoint{f' of step {step}' if step >= 0 else ''}; it has {steps or 'none'}.")
        self.directory, self.step, self.identity = directory / f"{step:08d}", step, f"{directory} {step}"
        require_whole(self.directory, (STATE, MANIFEST), steps)
        self.content_hash = content_hash(self.directory, (STATE, MANIFEST))
        try:
            manifest = json.loads((self.directory / MANIFEST / "metadata").read_text())
            config = from_dict(ModelConfig, manifest["identity"]["model"])
            self.config = dataclasses.replace(config, text=dataclasses.replace(config.text, lora=None))
            parameters, arrays = hf_parameters(self.config), manifest["arrays"]
            places = {parameter.path: place_of(run_name(parameter.path), arrays) for parameter in parameters}
            self._stores = _open(self.directory / STATE, places)
            for parameter in parameters:
                if (shape := self._stores[parameter.path].shape) != parameter.shape:
                    raise CheckpointError(f"{places[parameter.path]} has shape {shape}, not {parameter.shape}")
            self._adapters = _open_adapters(self.directory / STATE, config, self._stores, arrays)
        except Exception as error:  # tensorstore raises bare exceptions for damaged files
            raise CheckpointError(
                f"{self.directory} cannot be read ({failure_reason(error)}); give another step (here: {steps}), or fetch it again."
            ) from error

    def dtype(self, parameter: HfParameter) -> np.dtype:
        return self._stores[parameter.path].dtype.numpy_dtype

    def experts_together(self, parameter: HfParameter) -> int:
        return int(self._chunk(parameter)[len(parameter.stack) - 1])

    def times_read(self) -> float:
        """How often a conversion, which goes layer by layer, reads the checkpoint: chunks that hold several layers are read for each."""
        read = stored = 0
        for parameter in hf_parameters(self.config):
            size = math.prod(parameter.shape)
            stored += size
            read += size * (int(self._chunk(parameter)[0]) if parameter.stack else 1)
        return read / stored

    def _chunk(self, parameter: HfParameter) -> Sequence[int]:
        store = self._stores[parameter.path]
        return store.chunk_layout.read_chunk.shape or store.shape  # type: ignore[return-value]

    def read(self, parameter: HfParameter, box: Sequence[slice]) -> np.ndarray:
        try:
            values = np.asarray(self._stores[parameter.path][tuple(box)].read().result())
            adapter = self._adapters.get(parameter.path)
            return values if adapter is None else adapter.merged(values, box)
        except Exception as error:
            raise CheckpointError(
                f"{self.directory}: {parameter.path} cannot be read ({failure_reason(error)}); fetch it again."
            ) from error


def steps_in(directory: Path) -> list[int]:
    """The steps of the checkpoints in a directory."""
    return sorted(int(path.name) for path in directory.glob("[0-9]*") if path.name.isdecimal() and (path / STATE).is_dir())


def run_name(path: str) -> str:
    """The name of a parameter (`text.embed_VD`) in the checkpoints of runs."""
    kind = "buffers" if path.startswith("text.fope.") else "params"
    return f"{kind}/{path.replace('.', '/')}"


def place_of(name: str, saved: Collection[str]) -> str:
    """Where a run has saved an array of the model: what it did not train lies beside the buffers, adapters among the parameters."""
    kind, _, rest = name.partition("/")
    other = {"params": "buffers", "buffers": "params"}[kind] + "/" + rest
    return other if name not in saved and other in saved else name


class _Adapter(NamedTuple):
    """The factors of a low-rank change `scale * A B` of a parameter; before the sizes that A or B has alone, both have `shared` axes."""

    a: ts.TensorStore
    b: ts.TensorStore
    shared: int
    scale: float

    def merged(self, values: np.ndarray, box: Sequence[slice]) -> np.ndarray:
        """The part `box` of the parameter with its change, as `layers.lora.merged` computes it."""
        into = self.a.ndim - 1
        a = np.asarray(self.a[(*box[:into], slice(None))].read().result())
        b = np.asarray(self.b[(*box[: self.shared], slice(None), *box[into:])].read().result())
        stacked, rank = values.shape[: self.shared], a.shape[-1]
        change = (a.reshape(*stacked, -1, rank) @ b.reshape(*stacked, rank, -1)).reshape(values.shape)
        return (values.astype(np.float32) + self.scale * change).astype(values.dtype)


def _open_adapters(
    state: Path, config: ModelConfig, stores: Mapping[str, ts.TensorStore], saved: Collection[str]
) -> Mapping[str, _Adapter]:
    """The adapters of the parameters that have one: `attention/lora/q/a` and `b` of `attention/q_DQH`, `moe/lora/wi_a_EDR` and `wi_b_ERF`
    of `moe/wi_EDF`."""
    if config.text.lora is None:
        return {}
    left = {name.partition("/")[2]: name for name in saved if name.startswith(("params/", "buffers/")) and "/lora/" in name}
    adapters = {}
    for path, store in stores.items():
        block, _, leaf = path.replace(".", "/").rpartition("/")
        which, _, dims = leaf.partition("_")
        factor = re.compile(rf"{block}/lora/{which}(/[ab]|_[ab]_[A-Z]+)")
        if not dims[:1].isupper() or not (names := sorted(name for name in left if factor.fullmatch(name))):
            continue
        # Several boxes are made of one chunk of factors.
        factors = _open(state, {name: left.pop(name) for name in names}, _CACHE)
        a, b = (factors[name] for name in names)
        adapter = adapters[path] = _Adapter(a, b, a.ndim + b.ndim - 2 - store.ndim, config.text.lora.scale)
        if a.shape[:-1] + b.shape[adapter.shared + 1 :] != store.shape:
            raise CheckpointError(f"adapters {', '.join(names)} have shapes {a.shape} and {b.shape}, which do not make {store.shape}")
    if left:
        raise CheckpointError(f"adapters belong to no parameter: {', '.join(sorted(left.values())[:4])}")
    return adapters


def _open(state: Path, places: Mapping[str, str], cache: int = 0) -> Mapping[str, ts.TensorStore]:
    """The arrays stored at these places; `cache` is the bytes of chunks that are kept once they are read."""
    collected = (state / "manifest.ocdbt").exists()
    zarr3 = json.loads((state / "_METADATA").read_text()).get("use_zarr3", False)
    context = ts.Context({"cache_pool": {"total_bytes_limit": cache}})
    opened = {}
    for path, name in places.items():
        kvstore: dict[str, Any] = {"driver": "file", "path": f"{state}/{name}/"}
        if collected:
            kvstore = {"driver": "ocdbt", "base": f"file://{state}/", "path": f"{name}/"}
        spec = {"driver": "zarr3" if zarr3 else "zarr", "kvstore": kvstore}
        opened[path] = ts.open(spec, open=True, read=True, context=context)
    return {path: future.result() for path, future in opened.items()}


def _part(config: ModelConfig, path: str) -> Any:
    return getattr(config, path.split(".")[0])
