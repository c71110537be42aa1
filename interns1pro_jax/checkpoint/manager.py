"""Checkpoints of a run: asynchronous, complete or absent, whole or set aside, readable on another mesh.

A checkpoint is a directory `DIR/<step>` that Orbax writes under a temporary name and renames when every byte is there, and
that is moved to `DIR/deleted` before it is removed. So whatever carries a step's name is complete, at whatever moment the
process dies. Inside: `state/`, the arrays under the names of their places in the tree (`params/text/lm_head_DV`), and
`manifest/`, JSON with their shapes and dtypes, what the run must have in common with its successor, and what the caller adds.
Both have checksums of their files (`checkpoint.integrity`), which are compared before anything is read. A checkpoint that was damaged
later is moved to `DIR/damaged`, and the one before it is used.

The place in the data is the step: batches are a function of it.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import logging
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from interns1pro_jax.checkpoint.errors import CheckpointError
from interns1pro_jax.checkpoint.integrity import RestoreArrays, RestoreJson, SaveArrays, SaveJson, SummedArrays, SummedJson, damage
from interns1pro_jax.processes import barrier, first_alone

_TEMPORARY, _DELETED, _DAMAGED = "*.orbax-checkpoint-tmp", "deleted", "damaged"
_CHUNK = 2**26  # bytes
_log = logging.getLogger(__name__)
STATE, MANIFEST = "state", "manifest"
_LISTED = 8  # names shown in an error
_OVERHEAD = 16_384  # bytes of metadata and blocks on disk for an array, at most


@dataclasses.dataclass(frozen=True)
class Restored:
    """What `CheckpointManager.restore` returns.

    Attributes:
      state: the arrays.
      step: that they were saved at.
      extras: the JSON that was saved beside them.
      damaged: newer checkpoints that could not be used, by step: what is wrong with them, and where they are now.
    """

    state: Any
    step: int
    extras: dict[str, Any]
    damaged: Mapping[int, str] = dataclasses.field(default_factory=dict)


class CheckpointManager:
    """Saves and restores pytrees of arrays under one directory. All processes of a run make the same calls.

    Args:
      directory: created where it does not exist.
      identity: JSON values (nested mappings allowed) that must be the same when a run is continued: model configuration, data
        fingerprint, seed. `restore` names every key that differs.
      keep_last: how many of the newest checkpoints are kept.
      keep_every: checkpoints of steps divisible by this are kept for ever; None keeps none of them.

    Raises:
      CheckpointError: the directory cannot be written.
    """

    def __init__(self, directory: str | Path, identity: Mapping[str, Any], *, keep_last: int = 2, keep_every: int | None = None):
        if keep_last < 1:
            raise CheckpointError(f"keep_last={keep_last} must be at least 1: a restart continues from the newest; 2 survive damage to it.")
        self.directory = Path(directory).absolute()
        self._identity = json.loads(json.dumps(identity))
        first_alone(self._prepare)
        policies = [ocp.checkpoint_managers.LatestN(keep_last)]
        if keep_every is not None:
            policies.append(ocp.checkpoint_managers.EveryNSteps(keep_every))
        self._orbax = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                step_format_fixed_length=8,
                todelete_subdir=_DELETED,
                preservation_policy=ocp.checkpoint_managers.AnyPreservationPolicy(policies),
            ),
            item_handlers={STATE: SummedArrays(), MANIFEST: SummedJson()},
        )

    def __enter__(self) -> CheckpointManager:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def latest_step(self) -> int | None:
        """The newest complete checkpoint; None if there is none."""
        return self._orbax.latest_step()

    @property
    def steps(self) -> list[int]:
        """All complete checkpoints, the newest last."""
        return sorted(self._orbax.all_steps())

    def discard_after(self, step: int) -> None:
        """Removes all checkpoints after `step`."""
        for later in [x for x in self.steps if x > step]:
            self._orbax.delete(later)

    def save(self, step: int, state: Any, extras: Mapping[str, Any] | None = None) -> None:
        """Starts to save `state`, which may be donated as soon as this returns. Waits for an earlier save that is not done.

        Args:
          extras: JSON to keep beside the state.

        Raises:
          CheckpointError: this save, or an earlier one that ran in the background, failed. What was complete stays.
        """
        self.wait()
        arrays = named_leaves(state)
        manifest = {"identity": self._identity, "extras": dict(extras or {}), "arrays": _describe(arrays)}
        first_alone(lambda: self._make_room(step, sum(x.nbytes + _OVERHEAD for x in arrays.values())))
        state_args = SaveArrays(arrays, save_args={name: _chunked(x) for name, x in arrays.items()})
        items = ocp.args.Composite(**{STATE: state_args, MANIFEST: SaveJson(manifest)})
        try:
            self._orbax.save(step, args=items, force=True)
        except Exception as error:
            raise self._failure(error) from error

    def check(self) -> None:
        """Raises `CheckpointError` if a save in the background has failed; does not wait for one that is going on."""
        if not self._orbax.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Waits until the last save is complete.

        Raises:
          CheckpointError: it failed.
        """
        try:
            self._orbax.wait_until_finished()
        except Exception as error:
            raise self._failure(error) from error

    def restore(self, abstract: Any, step: int | None = None) -> Restored:
        """Reads a checkpoint, each process and device only what `abstract` puts there.

        Args:
          abstract: the tree to fill: `jax.ShapeDtypeStruct` with shardings, or arrays (`train.state.abstract_state`). The mesh may
            differ from the one that was saved from.
          step: which checkpoint; None takes the newest that is not damaged, and sets newer ones aside once it has been read.

        Raises:
          CheckpointError: there is no such checkpoint, it was made with another identity, its arrays have other names, shapes or
            dtypes, or its files are damaged or cannot be read. Nothing has been moved then.
        """
        self.wait()
        steps = self.steps
        if not steps or (step is not None and step not in steps):
            which = "" if step is None else f" of step {step}"
            raise CheckpointError(f"{self.directory} has no checkpoint{which}; it has {steps or 'none'}.")
        damaged: dict[int, str] = {}
        for chosen in reversed(steps) if step is None else [step]:
            if not (problems := damage(self._where(chosen), (STATE, MANIFEST))):
                break
            damaged[chosen] = f"The checkpoint of step {chosen} is damaged: {_list(problems)}."
        else:
            if step is not None:
                others = [x for x in steps if x != step]
                raise CheckpointError(f"{self._where(step)}: {damaged[step]} Choose another step (here: {others or 'none'}).")
            raise CheckpointError(
                f"{self.directory} has no checkpoint that is whole; nothing was moved. {' '.join(damaged.values())} Put back a copy, "
                "or choose another workdir to start anew."
            )
        restored = self._restore(abstract, chosen)
        for later in damaged:
            damaged[later] += f" It has been moved to {self._set_aside(later)}."
            _log.error("%s", damaged[later])
        return dataclasses.replace(restored, damaged=damaged)

    def check_beginning(self) -> None:
        """To be called before a run starts anew here.

        Raises:
          CheckpointError: there were checkpoints, which were damaged: who starts anew would erase the records of that run.
        """

        empty = self.latest_step is None

        def check() -> None:
            aside = self.directory / _DAMAGED
            if empty and aside.is_dir() and (found := sorted(path.name for path in aside.iterdir())):
                raise CheckpointError(
                    f"{self.directory} has no checkpoint, but damaged ones in {aside} ({_list(found)}). Put back a copy of one to continue "
                    f"that run; remove {aside}, or choose another workdir, to start anew."
                )

        first_alone(check)

    def _where(self, step: int) -> Path:
        return self.directory / f"{step:08d}"

    def _set_aside(self, step: int) -> Path:
        """Moves a damaged checkpoint where nothing is in its way, to be looked at; returns where to."""
        target = self.directory / _DAMAGED / f"{step:08d}"
        while target.exists():
            target = target.with_name(f"{target.name}_again")
        barrier("a damaged checkpoint has its new name")

        def move() -> None:
            try:
                target.parent.mkdir(exist_ok=True)
                self._where(step).rename(target)
            except OSError as error:
                raise CheckpointError(
                    f"{self._where(step)} is damaged and cannot be moved to {target} ({error.strerror}); move it, then start again."
                ) from error

        first_alone(move)
        self._orbax.reload()
        return target

    def _restore(self, abstract: Any, step: int) -> Restored:
        """A checkpoint whose files are as they were written."""
        where = self._where(step)
        wanted = named_leaves(abstract)
        manifest = self._read(step, MANIFEST, RestoreJson())
        self._compare_identity(where, manifest["identity"])
        self._compare_arrays(where, manifest["arrays"], _describe(wanted))
        args = RestoreArrays(wanted, restore_args=ocp.checkpoint_utils.construct_restore_args(wanted))
        found = self._read(step, STATE, args)
        leaves = [found[name] for name in wanted]
        return Restored(jax.tree.unflatten(jax.tree.structure(abstract), leaves), step, manifest["extras"])

    def _read(self, step: int, item: str, args: ocp.args.CheckpointArgs) -> Any:
        try:
            return self._orbax.restore(step, args=ocp.args.Composite(**{item: args}))[item]
        except Exception as error:  # Orbax raises bare `Exception` for damaged arrays
            others = sorted(set(self._orbax.all_steps()) - {step})
            raise CheckpointError(
                f"{self._where(step)} cannot be read ({failure_reason(error)}), though its files are as they were written. Look for what "
                "keeps this process from it (memory, file system, other versions of the libraries), or move it away to continue from an "
                f"earlier checkpoint (here: {others or 'none'})."
            ) from error

    def close(self) -> None:
        """Waits for the last save and lets go of the directory.

        Raises:
          CheckpointError: the last save failed.
        """
        try:
            self.wait()
        finally:
            self._orbax.close()
            if jax.process_index() == 0:
                self._sweep()

    def _prepare(self) -> None:
        check_writable(self.directory)
        self._sweep()

    def _make_room(self, step: int, needed: int) -> None:
        self._sweep()
        self._check_space(step, needed)

    def _sweep(self) -> None:
        """Removes what an interrupted or failed save left behind, and checkpoints that are no longer kept."""
        for path in (*self.directory.glob(_TEMPORARY), self.directory / _DELETED):
            shutil.rmtree(path, ignore_errors=True)

    def _check_space(self, step: int, needed: int) -> None:
        free = shutil.disk_usage(self.directory).free
        if free < needed:
            raise CheckpointError(
                f"no space for the checkpoint of step {step} in {self.directory}: it needs up to {needed:,} bytes and {free:,} are free. "
                f"{self._kept()} Free some space or keep fewer checkpoints, then start again."
            )

    def _failure(self, error: Exception) -> CheckpointError:
        """What a failed save means for the user."""
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)
        reason, remedy = failure_reason(error), "Put that right"
        if full:
            reason = f"no space left, {shutil.disk_usage(self.directory).free:,} bytes are free"
            remedy = "Free some space or keep fewer checkpoints"
        self._orbax.reload()
        if jax.process_index() == 0:
            self._sweep()
        return CheckpointError(f"saving a checkpoint in {self.directory} failed: {reason}. {self._kept()} {remedy}, then start again.")

    def _kept(self) -> str:
        steps = sorted(self._orbax.all_steps())
        return f"The checkpoints of steps {steps} are complete." if steps else "No checkpoint is complete yet."

    def _compare_identity(self, where: Path, saved: Mapping[str, Any]) -> None:
        old, new = _flatten(saved), _flatten(self._identity)
        differing = sorted(key for key in old | new if old.get(key) != new.get(key))
        changed = [f"{key}: saved {old.get(key, 'nothing')!r}, now {new.get(key, 'nothing')!r}" for key in differing]
        if changed:
            raise CheckpointError(
                f"{where} was saved by a run with another configuration ({_list(changed)}). Set these back to continue it, or choose "
                "another workdir to start anew."
            )

    @staticmethod
    def _compare_arrays(where: Path, saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
        problems = [f"{name} is missing there" for name in wanted if name not in saved]
        problems += [f"{name} is not in this run" for name in saved if name not in wanted]
        problems += [f"{name}: saved {saved[name]}, now {x}" for name, x in wanted.items() if name in saved and saved[name] != x]
        if problems:
            raise CheckpointError(
                f"{where} does not fit this model and optimizer ({_list(problems)}). Continue with the code and configuration that "
                "saved it, or choose another workdir."
            )


def check_writable(directory: Path) -> None:
    """Creates `directory` if need be, and writes a byte there to see that it can.

    Raises:
      CheckpointError: naming the directory, the reason and the remedy.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory) as file:
            file.write(b"0")
            file.flush()
    except OSError as error:
        raise CheckpointError(
            f"{directory} cannot be written ({error.strerror}); choose another directory, or change its permissions or mount."
        ) from error


def named_leaves(tree: Any) -> dict[str, Any]:
    """Leaves by the names of their places; the array inside an NNX variable has the variable's name."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value"): leaf for path, leaf in leaves}


def _chunked(x: Any) -> ocp.SaveArgs:
    """Shards larger than a chunk are stored layer by layer, so that a layer can be read without the rest of its stack."""
    return ocp.SaveArgs(chunk_byte_size=_CHUNK, shard_axes=(0,)) if x.nbytes > _CHUNK else ocp.SaveArgs()


def _describe(arrays: Mapping[str, Any]) -> dict[str, str]:
    return {name: f"{x.dtype}[{','.join(map(str, x.shape))}]" for name, x in arrays.items()}


def _flatten(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in content.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat


def _list(items: list[str]) -> str:
    more = len(items) - _LISTED
    return "; ".join(items[:_LISTED]) + (f"; and {more} more" if more > 0 else "")


def failure_reason(error: BaseException) -> str:
    """The first line of what started a chain of exceptions."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).splitlines() or [type(error).__name__])[0][:300]
