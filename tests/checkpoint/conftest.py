"""A writer of safetensors files, so that the tests can make good and bad ones."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from interns1pro_jax.checkpoint.safetensors_io import DTYPES


def _write(path: Path, tensors: Mapping[str, np.ndarray], change: Callable[[dict[str, Any]], Any] = lambda header: None) -> Path:
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, values in tensors.items():
        header[name] = {"dtype": names[values.dtype], "shape": list(values.shape), "data_offsets": [end, end + values.nbytes]}
        end += values.nbytes
    change(header)
    content = json.dumps(header).encode()
    path.write_bytes(len(content).to_bytes(8, "little") + content + b"".join(values.tobytes() for values in tensors.values()))
    return path


@pytest.fixture(scope="session")
def write_safetensors() -> Callable[..., Path]:
    """`write(path, tensors, change=...)`: writes a file; `change` may damage its header first."""
    return _write
