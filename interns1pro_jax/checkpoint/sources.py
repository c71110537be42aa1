"""Weights on disk, read box by box: what a conversion takes from, without a model in memory.

A source knows the model's configuration and reads any box of any parameter, in our layout, as NumPy; what the host holds is what was asked
for, and the chunks of storage that it lies in. `HfSource` reads the released layout, `RunSource` the checkpoints of this project's runs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import tensorstore as ts

from interns1pro_jax.checkpoint.errors import CheckpointError
from interns1pro_jax.checkpoint.hf_import import ParameterReader, check_fit, parameters_of
from interns1pro_jax.checkpoint.hf_names import HfParameter, hf_parameters
from interns1pro_jax.checkpoint.manager import MANIFEST, STATE, failure_reason
from interns1pro_jax.checkpoint.safetensors_io import Checkpoint
from interns1pro_jax.config import ModelConfig
from interns1pro_jax.config_checks import from_dict
from interns1pro_jax.ops.quantization import WEIGHT_BLOCK

_READERS = 8


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
    they are stored.

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
        try:
            identity = json.loads((self.directory / MANIFEST / "metadata").read_text())["identity"]
            self.config = from_dict(ModelConfig, identity["model"])
            zarr3 = json.loads((self.directory / STATE / "_METADATA").read_text()).get("use_zarr3", False)
            self._stores = _open_stores(self.directory / STATE, zarr3, hf_parameters(self.config))
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
            return np.asarray(self._stores[parameter.path][tuple(box)].read().result())
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


def _open_stores(state: Path, zarr3: bool, parameters: Sequence[HfParameter]) -> Mapping[str, ts.TensorStore]:
    collected = (state / "manifest.ocdbt").exists()
    context = ts.Context({"cache_pool": {"total_bytes_limit": 0}})
    opened = {}
    for parameter in parameters:
        name = run_name(parameter.path)
        kvstore: dict[str, Any] = {"driver": "file", "path": f"{state}/{name}/"}
        if collected:
            kvstore = {"driver": "ocdbt", "base": f"file://{state}/", "path": f"{name}/"}
        spec = {"driver": "zarr3" if zarr3 else "zarr", "kvstore": kvstore}
        opened[parameter.path] = ts.open(spec, open=True, read=True, context=context)
    stores = {path: future.result() for path, future in opened.items()}
    for parameter in parameters:
        if stores[parameter.path].shape != parameter.shape:
            raise CheckpointError(f"{run_name(parameter.path)} has shape {stores[parameter.path].shape}, not {parameter.shape}")
    return stores


def _part(config: ModelConfig, path: str) -> Any:
    return getattr(config, path.split(".")[0])
