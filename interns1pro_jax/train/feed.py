"""Batches from the host to the mesh, prepared by a thread while the devices compute."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import jax
import numpy as np

from interns1pro_jax import sharding


class Batches(Protocol):
    """All batches of a run by number. A batch is a pytree of NumPy arrays and the same whenever and wherever it is asked for."""

    def __getitem__(self, step: int, /) -> Any: ...


class DataPlace(Protocol):
    """What the batches of a run keep in its checkpoints, and tell its log."""

    def state(self, step: int) -> Mapping[str, Any]:
        """JSON that takes `restore` to where `step` batches have been used."""
        ...

    def restore(self, state: Mapping[str, Any]) -> None: ...

    def metrics(self, step: int) -> Mapping[str, float]:
        """Numbers for the log after `step` batches; called by all processes, where they wait anyway."""
        ...


def local_rows(batch_size: int) -> np.ndarray:
    """The rows of a batch that are on devices of this process, in the mesh in force."""
    mesh = jax.sharding.get_mesh()
    sharding.check_divisible("batch", (batch_size,), ("batch",))
    rows = np.arange(batch_size)
    places = jax.NamedSharding(mesh, sharding.spec("batch")).addressable_devices_indices_map((batch_size,))
    return np.unique(np.concatenate([rows[index] for index in places.values()]))


def place_batch(batch: Any, rows: np.ndarray | None = None, batch_size: int | None = None) -> Any:
    """Puts each array of a batch on the mesh in force, split along its first axis; each process puts the part of its devices.

    Args:
      batch: arrays of all rows, or of some.
      rows: which ones they are, in growing order, at least the process's `local_rows`; default all.
      batch_size: how many rows there are in all processes together.

    Raises:
      ConfigError: a first axis does not divide over the mesh.
    """
    mesh = jax.sharding.get_mesh()

    def put(x: np.ndarray) -> jax.Array:
        shape = np.shape(x) if rows is None or batch_size is None or not np.ndim(x) else (batch_size, *np.shape(x)[1:])
        dims = ("batch", *(None,) * (np.ndim(x) - 1)) if np.ndim(x) else ()
        sharding.check_divisible("batch array", shape, dims)

        def part(index: tuple[slice, ...] | None) -> np.ndarray:
            if rows is None or not index:
                return np.asarray(x)[index or ()]
            first, *rest = index
            wanted = np.searchsorted(rows, np.arange(*first.indices(shape[0])))
            return np.asarray(x)[wanted][(slice(None), *rest)]

        return jax.make_array_from_callback(shape, jax.NamedSharding(mesh, sharding.spec(*dims)), part)

    return jax.tree.map(put, batch)


def abstract_batch(row: Any, rows: int) -> Any:
    """What `place_batch` makes of a batch of `rows` rows that are all like `row`, a batch of one row: shapes, dtypes, shardings."""
    mesh = jax.sharding.get_mesh()

    def leaf(x: np.ndarray) -> jax.ShapeDtypeStruct:
        shape, dims = (rows * x.shape[0], *x.shape[1:]), ("batch", *(None,) * (x.ndim - 1))
        sharding.check_divisible("batch array", shape, dims)
        return jax.ShapeDtypeStruct(shape, x.dtype, sharding=jax.NamedSharding(mesh, sharding.spec(*dims)))

    return jax.tree.map(leaf, row)


class Feed:
    """Iterates over (step, batch on the host, batch on the mesh) in order, up to `depth` batches ahead.

    An exception while a batch is made is raised where that batch was due, with a note that names it. Use as a context manager,
    so that the thread ends with the loop.
    """

    def __init__(self, batches: Batches, steps: range, place: Callable[[Any], Any] = place_batch, depth: int = 2):
        self._queue: queue.Queue[tuple[int, Any, Any] | BaseException | None] = queue.Queue(maxsize=depth)
        self._closed = threading.Event()
        self._thread = threading.Thread(
            target=self._produce, args=(batches, steps, place, jax.sharding.get_mesh()), name="feed", daemon=True
        )
        self._thread.start()

    def __iter__(self) -> Iterator[tuple[int, Any, Any]]:
        while (item := self._queue.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item

    def __enter__(self) -> Feed:
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._thread.join()

    def _produce(self, batches: Batches, steps: range, place: Callable[[Any], Any], mesh: jax.sharding.Mesh) -> None:
        with jax.set_mesh(mesh):  # the mesh in force belongs to a thread
            for step in steps:
                try:
                    batch = batches[step]
                    item: tuple[int, Any, Any] | Exception = (step, batch, place(batch))
                except Exception as error:
                    error.add_note(f"while preparing batch {step}")
                    item = error
                if not self._put(item) or isinstance(item, Exception):
                    return
        self._put(None)

    def _put(self, item: tuple[int, Any, Any] | Exception | None) -> bool:
        """Waits for room; False if the loop has ended."""
        while not self._closed.is_set():
            try:
                self._queue.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False
