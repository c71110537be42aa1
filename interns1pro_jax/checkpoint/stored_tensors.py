"""What the files of an export hold: its tensors in their order, their dtypes and shapes, and which of them are FP8."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from interns1pro_jax.checkpoint.errors import CheckpointError
from interns1pro_jax.checkpoint.hf_import import SCALE_SUFFIX, surplus_problems
from interns1pro_jax.checkpoint.hf_names import POSITION_ROWS, POSITION_TABLE, HfParameter, hf_parameters
from interns1pro_jax.checkpoint.safetensors_io import DTYPES, Checkpoint
from interns1pro_jax.checkpoint.safetensors_writer import TensorSpec
from interns1pro_jax.config import Fp8Config, ModelConfig
from interns1pro_jax.families import FAMILIES
from interns1pro_jax.models.time_series import sinusoid_table

# Matrices that the released scheme quantises, where `modules_to_not_convert` does not name them (spec section 7).
_QUANTIZED = (
    r"\.layers\.\d+\.((self_attn\.[qkvo]_proj|mlp\.(experts\.\d+\.)?(gate|up|down)_proj)\.weight|mlp\.experts\.(gate_up|down)_proj)$"
)


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
                block = config.quantization.weight_block_size
                blocks = (*shape[:-2], *(-(-size // step) for size, step in zip(shape[-2:], block, strict=True)))
                specs[name + SCALE_SUFFIX] = TensorSpec(_dtype_in(like, name + SCALE_SUFFIX, np.dtype(np.float32)), blocks)
            else:
                specs[name] = TensorSpec(_dtype_in(like, name, dtype), shape)
    return specs | {constant.name: constant.spec for constant in constants(config, specs, like)}


def _dtype_in(like: Checkpoint | None, name: str, default: np.dtype) -> np.dtype:
    if like is None or name not in like or like[name].dtype.startswith("F8_E4M3"):
        return default
    return DTYPES[like[name].dtype]


class Constant(NamedTuple):
    """A tensor of the released layout that is no parameter here, because the architecture fixes its values."""

    name: str
    spec: TensorSpec
    read: Callable[[], np.ndarray]


def constants(config: ModelConfig, parameters: Collection[str], like: Checkpoint | None) -> Iterator[Constant]:
    """The constants of a checkpoint with these tensors of parameters."""
    if like is not None:
        known = {*parameters, *(name + SCALE_SUFFIX for name in parameters)}
        if config.text.tie_word_embeddings:
            known.add(FAMILIES[config.family].head + "weight")  # where it is stored, it repeats the embedding
        for name in like:
            if name not in known:
                yield Constant(name, TensorSpec(DTYPES[like[name].dtype], like[name].shape), functools.partial(like.read, name))
    elif config.time_series is not None:
        width = config.time_series.PATCH_WIDTH
        spec = TensorSpec(np.dtype(np.float32), (POSITION_ROWS, 1, width))
        yield Constant(POSITION_TABLE, spec, lambda: sinusoid_table(POSITION_ROWS, width)[:, None])


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
