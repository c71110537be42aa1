"""Applies a manifest to a checkpoint in the released layout: reads each tensor once and writes it wherever a copy of it belongs.

Nothing is computed but router noise and new Fourier coefficients, so that all else is the source's to the byte, FP8 values and scales
included, and the host holds a few tensors at a time, whatever the model's size. Like an export it is complete or absent, and goes on with
the next file where it was interrupted.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int

from interns1pro_jax.checkpoint import checksums
from interns1pro_jax.checkpoint.destination import MAX_FILE_BYTES, check_destination, finish_export, start_export
from interns1pro_jax.checkpoint.errors import CheckpointError
from interns1pro_jax.checkpoint.hf_import import SCALE_SUFFIX, check_fit, parameters_of
from interns1pro_jax.checkpoint.hf_names import POSITION_TABLE, HfParameter, hf_parameters
from interns1pro_jax.checkpoint.safetensors_io import DTYPES, Checkpoint
from interns1pro_jax.checkpoint.safetensors_writer import TensorSpec, TensorWriter, split_into_files
from interns1pro_jax.checkpoint.stored_tensors import released_scheme
from interns1pro_jax.checkpoint.stream import Progress
from interns1pro_jax.config import ModelConfig
from interns1pro_jax.expansion.manifest import FILE, Manifest
from interns1pro_jax.ops.fope import initial_coefficients

_WORKERS = 4
_ROUTER, _COEFFICIENTS = ".moe.router.kernel_DE", "text.fope."
_HEAD, _EMBEDDING = "text.lm_head_DV", "text.embed_VD"


class _Copy(NamedTuple):
    """Where a tensor of the source goes.

    Attributes:
      source: its name, "" for new coefficients.
      targets: names in the grown checkpoint.
      layer: index among the MoE layers, for a router.
      part: of a tensor that holds all experts of a layer, the layouts and the slices that make this one; None for a tensor as it is.
    """

    source: str
    targets: tuple[str, ...]
    layer: int | None = None
    part: tuple[HfParameter, HfParameter, int, int] | None = None


def fingerprint(checkpoint: Checkpoint, config: ModelConfig) -> str:
    """Tells checkpoints apart: SHA-256 of the names, dtypes and shapes of all tensors, and of the values of all routers.

    Raises:
      CheckpointError: the checkpoint does not fit the config; all misfits are named.
    """
    parameters = parameters_of(checkpoint, config)
    check_fit(checkpoint, config, parameters)
    content = hashlib.sha256()
    for name in sorted(checkpoint):
        content.update(f"{name} {checkpoint[name].dtype} {checkpoint[name].shape}\n".encode())
    for parameter in parameters:
        if parameter.path.endswith(_ROUTER):
            for _, _, name in parameter.tensors():
                content.update(np.ascontiguousarray(checkpoint.read(name)).view(np.uint8).data)
    return content.hexdigest()


def moe_layers(config: ModelConfig) -> tuple[int, ...]:
    """Numbers of the layers with experts."""
    return tuple(layer for layer in range(config.text.num_hidden_layers) if config.text.is_moe(layer))


def expand_checkpoint(
    checkpoint: Checkpoint,
    config: ModelConfig,
    manifest: Manifest,
    directory: Path,
    *,
    max_file_bytes: int = MAX_FILE_BYTES,
    progress: Progress = lambda what, done, total: None,
) -> ModelConfig:
    """Writes the grown checkpoint, in the released layout, with its manifest (`expansion.json`) and the source's tokenizer and processor
    files beside the weights.

    Args:
      checkpoint, config: the source.
      directory: to make.
      progress: told after every tensor, of the scan for values that are not finite first, then of the writing, then of the checksums.

    Returns:
      the configuration of the grown model.

    Raises:
      CheckpointError: the source does not fit its config or has values that are not finite; the directory holds something else, or has too
        little space. Nothing has been written then.
      ConfigError: the manifest is of another checkpoint, or the source cannot grow so.
    """
    grown = manifest.expansion.target(config)
    manifest.check(fingerprint(checkpoint, config), moe_layers(config), config.text.num_experts)
    if config.quantization is not None:
        scheme = dataclasses.replace(config.quantization, modules_to_not_convert=released_scheme(grown).modules_to_not_convert)
        grown = dataclasses.replace(grown, quantization=scheme)
    copies = list(_copies(checkpoint, config, grown, manifest))
    tensors = _specs(checkpoint, copies, grown)
    files = split_into_files(directory, tensors, max_file_bytes)
    check_destination(directory, files, manifest.fingerprint)
    _check_finite(checkpoint, progress)
    start_export(directory, files, manifest.fingerprint)
    _write(checkpoint, copies, manifest, tensors, TensorWriter(files, functools.partial(progress, "writing")))
    manifest.save(directory / FILE)
    checksums.write(directory, [file.path for file in files], functools.partial(progress, "checksums"))
    finish_export(directory, files, grown, checkpoint.directory, own=(FILE,))
    return grown


def router_rows(
    rows_ED: Float[np.ndarray, "E D"], slots_GS: Int[np.ndarray, "G S"], noise: float, seed: int, layer: int
) -> Float[np.ndarray, "slots D"]:
    """The grown router's rows, in the source's dtype: the source expert's for every slot, with Gaussian noise of `noise` times the standard
    deviation of the row's entries."""
    rows_SD = rows_ED[slots_GS.ravel()]
    if noise == 0:
        return rows_SD
    # The streams of NumPy's new generators may change with its version; those of this one may not (NEP 19).
    random = np.random.RandomState(zlib.crc32(f"noise {seed} {layer}".encode()))
    exact_SD = rows_SD.astype(np.float64)
    scale_S1 = noise * exact_SD.std(axis=1, keepdims=True)
    return (exact_SD + scale_S1 * random.standard_normal(exact_SD.shape)).astype(rows_ED.dtype)


def _copies(checkpoint: Checkpoint, config: ModelConfig, grown: ModelConfig, manifest: Manifest) -> Iterator[_Copy]:
    """Every tensor of the source once, or once for each of its parts, layer by layer."""
    sources = {parameter.path: parameter for parameter in parameters_of(checkpoint, config)}
    first_of_run = {f"text.runs.{run}.": first for run, (_, first, _) in enumerate(config.text.layer_runs)}
    index_of = {layer: index for index, layer in enumerate(manifest.layers)}
    plan: list[tuple[int, _Copy]] = []
    for target in hf_parameters(grown):
        if target.path.startswith(_COEFFICIENTS) and target.path not in sources:
            plan += [(-1, _Copy("", (name,))) for _, _, name in target.tensors()]
            continue
        source = sources[_EMBEDDING if target.path == _HEAD and config.text.tie_word_embeddings else target.path]
        first = next((first for run, first in first_of_run.items() if target.path.startswith(run)), None)
        names = {(position, number): name for position, number, name in target.tensors()}
        if "E" not in dict(target.stack):
            for position, number, name in source.tensors():
                layer = -1 if first is None else first + position[0]
                router = index_of[layer] if target.path.endswith(_ROUTER) else None
                plan.append((layer, _Copy(name, (names[position, number],), router)))
            continue
        assert first is not None
        from_names = {(position, number): name for position, number, name in source.tensors()}
        for offset in range(len(dict(target.stack)["L"])):
            slots = manifest.slots_LGS[index_of[first + offset]].ravel()
            for expert in range(config.text.num_experts):
                places = np.flatnonzero(slots == expert).tolist()
                for number in range(len(target.names)):
                    targets = tuple(names[(offset, place), number] for place in places)
                    if "E" in dict(source.stack):
                        plan.append((first + offset, _Copy(from_names[(offset, expert), number], targets)))
                    else:
                        plan.append((first + offset, _Copy(from_names[(offset,), 0], targets, None, (source, target, expert, number))))
    if POSITION_TABLE in checkpoint and grown.time_series is not None:
        plan.append((-1, _Copy(POSITION_TABLE, (POSITION_TABLE,))))
    for _, copy in sorted(plan, key=lambda entry: entry[0]):
        yield copy
        if copy.source + SCALE_SUFFIX in checkpoint:
            if copy.part is not None:
                raise CheckpointError(
                    f"{copy.source} holds all experts of a layer in FP8, which cannot be taken apart as it is; convert the source to "
                    "bfloat16 first (python -m tools.convert ... --quantization none)."
                )
            yield _Copy(copy.source + SCALE_SUFFIX, tuple(name + SCALE_SUFFIX for name in copy.targets))


def _specs(checkpoint: Checkpoint, copies: Sequence[_Copy], grown: ModelConfig) -> dict[str, TensorSpec]:
    """The tensors of the grown checkpoint, in the order in which they are stored."""
    shapes = {name: parameter.layout.stored_shape for parameter in hf_parameters(grown) for _, _, name in parameter.tensors()}
    return {
        name: TensorSpec(
            DTYPES[checkpoint[copy.source].dtype] if copy.source else np.dtype(np.float32),
            shapes[name] if name in shapes else checkpoint[copy.source].shape,
        )
        for copy in copies
        for name in copy.targets
    }


def _check_finite(checkpoint: Checkpoint, progress: Progress) -> None:
    """Reads everything once; a NaN that is copied k times is found late."""
    total, done, bad = sum(info.nbytes for info in checkpoint.values()), 0, []
    with ThreadPoolExecutor(_WORKERS) as pool:

        def is_finite(name: str) -> bool:
            return bool(np.isfinite(checkpoint.read(name).astype(np.float32)).all())

        for name, finite in zip(checkpoint, pool.map(is_finite, checkpoint), strict=True):
            bad += [] if finite else [name]
            done += checkpoint[name].nbytes
            progress("checking", done, total)
    if bad:
        raise CheckpointError(
            f"{checkpoint.directory} has values that are NaN or infinite in {', '.join(bad[:8])} ({len(bad)} tensors); take another."
        )


def _write(
    checkpoint: Checkpoint, copies: Sequence[_Copy], manifest: Manifest, specs: Mapping[str, TensorSpec], writer: TensorWriter
) -> None:
    def place(copy: _Copy) -> None:
        if targets := [name for name in copy.targets if name in writer]:
            values = _values(checkpoint, copy, manifest, specs[targets[0]])
            for name in targets:
                writer.write(name, values)

    with ThreadPoolExecutor(_WORKERS) as pool:
        for _ in pool.map(place, copies):
            pass


def _values(checkpoint: Checkpoint, copy: _Copy, manifest: Manifest, spec: TensorSpec) -> np.ndarray:
    expansion = manifest.expansion
    if not copy.source:
        assert expansion.fope is not None
        seed = zlib.crc32(f"{copy.targets[0].rpartition('.')[2]} {expansion.seed}".encode())
        return np.asarray(initial_coefficients(jax.random.key(seed), spec.shape, expansion.fope.init_factor), np.float32)
    if copy.layer is not None:
        slots_GS = manifest.slots_LGS[copy.layer]
        return router_rows(checkpoint.read(copy.source), slots_GS, expansion.noise, expansion.seed, manifest.layers[copy.layer])
    if copy.part is None:
        return checkpoint.read(copy.source)
    source, target, expert, number = copy.part
    width = target.layout.shape[-1]
    whole = [slice(0, size) for size in target.layout.shape[:-1]]
    stored, layout, rest = source.layout.restrict([slice(expert, expert + 1), *whole, slice(number * width, (number + 1) * width)])
    ours = layout.apply(checkpoint.read(copy.source, stored))[rest]
    return target.layout.inverse().apply(ours[0])
