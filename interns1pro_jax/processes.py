"""What the processes of a run tell one another on the host. All of them make the same calls; with one process nothing is sent."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from interns1pro_jax.checkpoint.errors import CheckpointError


def gather(value: Any) -> list[Any]:
    """JSON of every process, in the order of their numbers."""
    if jax.process_count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = np.asarray(multihost_utils.process_allgather(np.int32(text.size))).ravel()
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: text.size] = text
    texts = np.asarray(multihost_utils.process_allgather(padded)).reshape(len(sizes), -1)
    return [json.loads(line[:size].tobytes()) for line, size in zip(texts, sizes.tolist(), strict=True)]


def first_alone(work: Callable[[], None]) -> None:
    """Process 0 does it. Where that fails, all raise its error: the others would wait for it for ever.

    Raises:
      CheckpointError: of `work`.
    """
    problem = ""
    if jax.process_index() == 0:
        try:
            work()
        except CheckpointError as error:
            problem = str(error)
    if problem := gather(problem)[0]:
        raise CheckpointError(problem)


def barrier(where: str) -> None:
    """Returns when all processes have come to `where`."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(where)
