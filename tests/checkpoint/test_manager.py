"""Laws of checkpoints: what is saved comes back bit for bit on any mesh, what is not complete is not there, errors say what to do."""

import errno
import functools
import itertools
import os
import shutil
import subprocess
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from interns1pro_jax.checkpoint.errors import CheckpointError
from interns1pro_jax.checkpoint.manager import CheckpointManager
from interns1pro_jax.layers.parameter import Buffer, normal, parameter
from interns1pro_jax.optim.optimizer import OptimizerConfig, make_optimizer
from interns1pro_jax.optim.schedule import constant
from interns1pro_jax.sharding import make_mesh
from interns1pro_jax.train.state import TrainState, abstract_state, init_state


class Tiny(nnx.Module):
    def __init__(self, rngs: nnx.Rngs, width: int = 16, dtype: str = "float32"):
        self.w_DF = parameter(rngs, normal(1.0), (width, 4), ("embed", None), dtype)
        self.wi_EDF = parameter(rngs, normal(1.0), (8, width, 4), ("expert", "expert_embed", None), "bfloat16")
        self.norm_D = parameter(rngs, normal(1.0), (width,), (None,), dtype)
        self.table = parameter(rngs, normal(1.0), (3,), (None,), dtype, Buffer)


@functools.partial(jax.jit, static_argnames=("seed", "width", "dtype"))
def make_state(seed: int = 0, **arguments) -> TrainState:
    """A state with nothing left at zero."""
    _, state = init_state(Tiny(nnx.Rngs(seed), **arguments), make_optimizer(OptimizerConfig(), constant(0.1)))
    return jax.tree.map(lambda x: x + jnp.asarray(3, x.dtype), state)


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("sizes", [dict(fsdp=2, expert=4), dict(fsdp=8), dict(expert=2), dict()])
def test_restores_bit_for_bit_on_any_mesh(tmp_path, sizes):
    with jax.set_mesh(make_mesh(fsdp=2, expert=4)), CheckpointManager(tmp_path, {"seed": 1}) as manager:
        saved = make_state()
        manager.save(5, saved, {"rate": 0.25})
    with jax.set_mesh(make_mesh(**sizes)), CheckpointManager(tmp_path, {"seed": 1}) as manager:
        fresh = make_state(1)
        restored = manager.restore(abstract_state(fresh))
        assert (restored.step, restored.extras) == (5, {"rate": 0.25})
        assert_equal(jax.device_get(restored.state), jax.device_get(saved))
        assert jax.tree.map(lambda x: x.sharding, restored.state) == jax.tree.map(lambda x: x.sharding, fresh)


def test_an_abstract_initialiser_is_enough_to_restore(tmp_path):
    with jax.set_mesh(make_mesh(expert=8)), CheckpointManager(tmp_path, {}) as manager:
        manager.save(1, saved := make_state())
        restored = manager.restore(abstract_state(jax.eval_shape(make_state))).state
        assert_equal(restored, saved)
        assert jax.tree.map(lambda x: x.sharding, restored) == jax.tree.map(lambda x: x.sharding, saved)


def test_a_state_donated_after_save_is_saved_as_it_was(tmp_path):
    advance = jax.jit(lambda state: jax.tree.map(lambda x: x * 2, state), donate_argnums=0)
    with jax.set_mesh(make_mesh(fsdp=8)), CheckpointManager(tmp_path, {}) as manager:
        state, expected = make_state(), jax.device_get(make_state())
        manager.save(1, state)
        for _ in range(5):
            state = advance(state)
        manager.wait()
        assert_equal(jax.device_get(manager.restore(abstract_state(state)).state), expected)


def test_keeps_the_last_and_every_so_many(tmp_path, mesh):
    state = {"x": jnp.arange(3)}
    with CheckpointManager(tmp_path, {}, keep_last=2, keep_every=4) as manager:
        for step in range(1, 8):
            manager.save(step, state)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{step:08d}" for step in (4, 6, 7)]


def test_leftovers_of_a_killed_save_or_removal_are_never_restored(tmp_path, mesh):
    state = {"x": jnp.arange(3)}
    with CheckpointManager(tmp_path, {}) as manager:
        manager.save(1, state)
    shutil.copytree(tmp_path / "00000001", tmp_path / "00000002.orbax-checkpoint-tmp")
    shutil.copytree(tmp_path / "00000001", tmp_path / "deleted" / "00000000")
    with CheckpointManager(tmp_path, {}) as manager:
        assert manager.latest_step == 1
        assert [path.name for path in tmp_path.iterdir()] == ["00000001"]
        manager.save(2, state)
        manager.wait()
        assert manager.restore(state).step == 2


def test_nothing_to_restore(tmp_path, mesh):
    with CheckpointManager(tmp_path, {}) as manager:
        assert manager.latest_step is None
        with pytest.raises(CheckpointError, match="no checkpoint of step 7; it has none"):
            manager.restore({"x": jnp.arange(3)}, step=7)


def test_another_configuration_is_named(tmp_path, mesh):
    state = {"x": jnp.arange(3)}
    with CheckpointManager(tmp_path, {"model": {"text": {"hidden_size": 64, "layers": (1, 2)}}, "seed": 0}) as manager:
        manager.save(1, state)
    changed = {"model": {"text": {"hidden_size": 32, "layers": (1, 2)}}, "data": "ab"}
    with CheckpointManager(tmp_path, changed) as manager, pytest.raises(CheckpointError) as error:
        manager.restore(state)
    assert "model.text.hidden_size: saved 64, now 32" in str(error.value)
    assert "data: saved 'nothing', now 'ab'" in str(error.value) and "seed: saved 0" in str(error.value)
    assert "layers" not in str(error.value)


@pytest.mark.parametrize(
    "change, named",
    [
        (dict(width=32), "params/w_DF: saved float32[16,4], now float32[32,4]"),
        (dict(dtype="bfloat16"), "params/norm_D: saved float32[16], now bfloat16[16]"),
    ],
)
def test_arrays_that_do_not_fit_are_named(tmp_path, mesh, change, named):
    with CheckpointManager(tmp_path, {}) as manager:
        manager.save(1, make_state())
        with pytest.raises(CheckpointError) as error:
            manager.restore(make_state(**change))
    assert named in str(error.value)


def test_another_tree_is_named(tmp_path, mesh):
    with CheckpointManager(tmp_path, {}) as manager:
        manager.save(1, {"a": jnp.arange(3), "b": jnp.arange(3)})
        with pytest.raises(CheckpointError, match="c is missing there; b is not in this run"):
            manager.restore({"a": jnp.arange(3), "c": jnp.arange(3)})


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGE = {
    "bytes instead of": lambda file: os.truncate(file, file.stat().st_size // 2),
    "other content than was written": flip,
    "cannot be read": Path.unlink,
}


def test_any_damage_to_any_file_is_found_and_the_checkpoint_before_is_used(tmp_path, mesh, caplog):
    states = {step: {"x": jnp.asarray(np.random.default_rng(step).normal(size=(64, 64)))} for step in (1, 2)}
    with CheckpointManager(tmp_path / "whole", {}) as manager:
        for step, state in states.items():
            manager.save(step, state)
    newest = tmp_path / "whole" / "00000002"
    files = [path.relative_to(newest) for item in ("state", "manifest") for path in (newest / item).rglob("*") if path.is_file()]
    files = [file for file in files if file.name != "commit_success.txt"]  # Orbax's mark, which nothing reads
    assert len(files) > 6
    aside = tmp_path / "broken" / "damaged" / "00000002"
    with CheckpointManager(tmp_path / "broken", {}) as manager:
        for file, said in itertools.product(files, DAMAGE):
            shutil.rmtree(aside, ignore_errors=True)
            for step in states:
                shutil.copytree(tmp_path / "whole" / f"{step:08d}", tmp_path / "broken" / f"{step:08d}", dirs_exist_ok=True)
            DAMAGE[said](tmp_path / "broken" / "00000002" / file)
            manager._orbax.reload()
            restored = manager.restore(states[1])
            assert restored.step == manager.latest_step == 1
            assert_equal(restored.state, states[1])
            message = restored.damaged[2]
            assert str(aside) in message and message in caplog.text and aside.is_dir()
            if not file.name.startswith("checksums"):
                assert said in message and str(file) in message
    flip(next((tmp_path / "broken" / "00000001" / "state").rglob("ocdbt.process_0/d/*")))
    with CheckpointManager(tmp_path / "broken", {}) as manager:
        with pytest.raises(CheckpointError, match=r"00000001: The checkpoint of step 1 is damaged.*Choose another step \(here: none\)"):
            manager.restore(states[1], step=1)
        with pytest.raises(CheckpointError, match=r"no checkpoint that is whole; nothing was moved\. The checkpoint of step 1 is damaged"):
            manager.restore(states[1])
        assert manager.steps == [1]


@pytest.mark.parametrize("reads", ["checkpoint.integrity._sum", "checkpoint.integrity.Path.read_text"])
def test_a_disk_that_does_not_answer_damages_nothing(tmp_path, mesh, monkeypatch, reads):
    state = random_state(100)

    def stale(*_, **__):
        raise OSError(errno.ESTALE, "Stale file handle")

    with CheckpointManager(tmp_path, {}) as manager:
        manager.save(1, state)
        manager.save(2, state)
        manager.wait()
        with monkeypatch.context() as patch:
            patch.setattr(f"interns1pro_jax.{reads}", stale)
            with pytest.raises(CheckpointError, match=r"00000002 cannot be read now .*Stale file handle.*nothing was moved"):
                manager.restore(state)
        assert manager.restore(state).step == 2 and not (tmp_path / "damaged").exists()


def test_nothing_starts_anew_where_only_damaged_checkpoints_are(tmp_path, mesh):
    with CheckpointManager(tmp_path, {}) as manager:
        manager.check_beginning()
        (tmp_path / "damaged" / "00000003").mkdir(parents=True)
        with pytest.raises(CheckpointError, match=rf"no checkpoint, but damaged ones in {tmp_path}/damaged \(00000003\)"):
            manager.check_beginning()


def test_a_directory_that_cannot_be_made(tmp_path, mesh):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"file/checkpoints cannot be written \(Not a directory\); choose another directory"):
        CheckpointManager(tmp_path / "file" / "checkpoints", {})


@pytest.fixture
def tiny_disk(tmp_path):
    """A file system of 1 MiB; needs the right to mount."""
    where = tmp_path / "disk"
    where.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", where], capture_output=True, check=False)
    if done.returncode:
        pytest.skip("mounting a small tmpfs is not allowed here")
    yield where
    subprocess.run(["umount", "-l", where], check=True)


def random_state(size):
    return {"x": jnp.asarray(np.random.default_rng(0).normal(size=size), jnp.float32)}


def check_full_disk_error(error, where: Path):
    message = str(error.value)
    assert str(where) in message and "no space" in message and "free" in message and "keep fewer checkpoints" in message
    assert "checkpoints of steps [1] are complete" in message


@pytest.mark.parametrize("seen_beforehand", [True, False])
def test_a_full_disk_loses_nothing(tiny_disk, mesh, seen_beforehand, monkeypatch):
    """The space is checked before a save; where others fill the disk meanwhile, the failed write is reported the same way."""
    state, where = random_state(150_000), tiny_disk / "checkpoints"
    manager = CheckpointManager(where, {})
    manager.save(1, state)
    manager.wait()
    if not seen_beforehand:
        monkeypatch.setattr(CheckpointManager, "_check_space", lambda *_: None)
    with pytest.raises(CheckpointError) as error:
        manager.save(2, state)
        manager.wait()
    check_full_disk_error(error, where)
    manager.close()
    assert [path.name for path in where.iterdir()] == ["00000001"]
    with CheckpointManager(where, {}) as again:
        assert_equal(again.restore(state).state, state)


@pytest.mark.parametrize("at", ["check", "wait", "save", "close"])
def test_a_failure_in_the_background_is_raised_by_the_next_call(tmp_path, mesh, monkeypatch, at):
    state = random_state(100)
    manager = CheckpointManager(tmp_path, {})
    manager.save(1, state)
    manager.wait()

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(ocp.PyTreeCheckpointHandler, "finalize", full)
        manager.save(2, state)
        while manager._orbax.is_saving_in_progress():
            time.sleep(0.001)
    with pytest.raises(CheckpointError) as error:
        dict(check=manager.check, wait=manager.wait, save=lambda: manager.save(3, state), close=manager.close)[at]()
    check_full_disk_error(error, tmp_path)
    manager.close()
    assert [path.name for path in tmp_path.iterdir()] == ["00000001"]
