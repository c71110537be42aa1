"""The weights of a run's checkpoint without its optimizer: to export, serve or evaluate them, or to start another run from them."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Collection, Iterator
from pathlib import Path

import jax
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import NamedSharding

from interns1pro_jax.checkpoint.errors import CheckpointError
from interns1pro_jax.checkpoint.integrity import RestoreArrays, RestoreJson, SummedArrays, SummedJson, require_whole
from interns1pro_jax.checkpoint.manager import MANIFEST, STATE, CheckpointManager, failure_reason, named_leaves
from interns1pro_jax.checkpoint.sources import place_of
from interns1pro_jax.config import ModelConfig
from interns1pro_jax.config_checks import from_dict
from interns1pro_jax.layers.lora import Adapter, merged
from interns1pro_jax.models.interns1pro import InternS1Pro


@contextlib.contextmanager
def _opened(
    directory: str | Path, step: int | None, items: Collection[str] = (STATE, MANIFEST)
) -> Iterator[tuple[ocp.CheckpointManager, int]]:
    """Orbax's manager of checkpoints that are only read, and the step of the one asked for (None: the newest), whose `items` are whole."""
    directory = Path(directory).absolute()
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is no directory; give that of a run's checkpoints.")
    handlers = {STATE: SummedArrays(), MANIFEST: SummedJson()}
    options = ocp.CheckpointManagerOptions(step_format_fixed_length=8, read_only=True)
    with ocp.CheckpointManager(directory, options=options, item_handlers=handlers) as manager:
        steps = manager.all_steps()
        step = max(steps, default=-1) if step is None else step
        if step not in steps:
            raise CheckpointError(
                f"{directory} has no checkpoint{f' of step {step}' if step >= 0 else ''}; it has {sorted(steps) or 'none'}."
            )
        where = directory / f"{step:08d}"
        require_whole(where, items, steps)
        try:
            yield manager, step
        except CheckpointError:
            raise
        except Exception as error:  # Orbax raises bare `Exception` for damaged arrays
            raise CheckpointError(
                f"{where} cannot be read ({failure_reason(error)}); give another step (here: {sorted(steps)}), or fetch it again."
            ) from error


def read_config(directory: str | Path, step: int | None = None) -> tuple[ModelConfig, int]:
    """The model of the weights that `read_weights` returns, and their step.

    Raises:
      CheckpointError: there is no such checkpoint, or its manifest is damaged.
    """
    with _opened(directory, step, (MANIFEST,)) as (manager, step):
        manifest = manager.restore(step, args=ocp.args.Composite(**{MANIFEST: RestoreJson()}))[MANIFEST]
        config = from_dict(ModelConfig, manifest["identity"]["model"])
    return dataclasses.replace(config, text=dataclasses.replace(config.text, lora=None)), step


def read_weights(
    directory: str | Path, step: int | None = None, *, dtype: str | None = None, param_dtype: str | None = None
) -> tuple[InternS1Pro, int]:
    """The model of a run's checkpoint, sharded over the mesh in force, and its step; adapters are merged. The directory is only read: the
    run may go on.

    Args:
      directory: of the run's checkpoints (`WORKDIR/checkpoints`), or one made by `write_weights`.
      step: which checkpoint; None takes the newest.
      dtype, param_dtype: where to compute and store differently from the run.

    Raises:
      CheckpointError: there is no such checkpoint, or its files are damaged.
    """
    with _opened(directory, step) as (manager, step):
        manifest = manager.restore(step, args=ocp.args.Composite(**{MANIFEST: RestoreJson()}))[MANIFEST]
        config = from_dict(ModelConfig, manifest["identity"]["model"]).with_dtypes(dtype, param_dtype)
        model = nnx.eval_shape(lambda: InternS1Pro(config, rngs=nnx.Rngs(0)))
        params, buffers = nnx.state(model, nnx.Param, ...)
        abstract = jax.tree.map(_placed, {"params": params, "buffers": buffers})
        wanted = named_leaves(abstract)
        places = {name: place_of(name, manifest["arrays"]) for name in wanted}
        stored = {places[name]: x for name, x in wanted.items()}
        args = RestoreArrays(stored, restore_args=ocp.checkpoint_utils.construct_restore_args(stored), partial_restore=True)
        found = manager.restore(step, args=ocp.args.Composite(**{STATE: args}))[STATE]
    state = jax.tree.unflatten(jax.tree.structure(abstract), [found[places[name]] for name in wanted])
    if config.text.lora is not None:
        params, (adapters, buffers) = state["params"], nnx.split_state(state["buffers"], Adapter, ...)
        config, params = merged(config, params, adapters)
        plain = nnx.eval_shape(lambda: InternS1Pro(config, rngs=nnx.Rngs(0)))
        return nnx.merge(nnx.graphdef(plain), params, buffers), step
    return nnx.merge(nnx.graphdef(model), state["params"], state["buffers"]), step


def write_weights(directory: str | Path, model: InternS1Pro, step: int = 0, origin: str = "") -> None:
    """Saves a model alone, in the form of a run's checkpoint.

    Raises:
      CheckpointError: the directory holds checkpoints, which this one would replace; it cannot be written, or has too little
        space.
    """
    if there := sorted(path.name for path in Path(directory).glob("*") if path.name.isdecimal()):
        raise CheckpointError(f"{directory} holds checkpoints already ({', '.join(there[:4])}); choose an empty directory.")
    params, buffers = nnx.state(model, nnx.Param, ...)
    identity = {"model": json.loads(json.dumps(dataclasses.asdict(model.config)))}
    with CheckpointManager(directory, identity, keep_last=1) as manager:
        manager.save(step, {"params": params, "buffers": buffers}, {"origin": origin})


def _placed(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    spec = x.sharding.spec  # type: ignore[union-attr]
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(jax.sharding.get_mesh(), spec))  # type: ignore[arg-type]
