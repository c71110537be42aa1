"""One device, eight devices of one process, and two processes of four devices give the same loss and gradients."""

import socket
import subprocess
import sys
from pathlib import Path

import numpy as np

from tests.multi_device.sharded_gradient import gradients

ROOT = Path(__file__).parents[2]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def test_one_device_equals_eight_equals_two_processes(tmp_path):
    file, port = tmp_path / "results.npz", str(free_port())
    command = [sys.executable, "-m", "tests.multi_device.sharded_gradient", str(file), port, "2"]
    processes = [subprocess.Popen([*command, str(index)], cwd=ROOT) for index in range(2)]
    try:
        one, eight = gradients(), gradients(fsdp=2, context=2, expert=2)
        assert [p.wait(timeout=600) for p in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    with np.load(file) as saved:
        several = [saved[name] for name in saved.files]
    assert len(one) == len(eight) == len(several) > 10
    for x, y, z in zip(one, eight, several, strict=True):
        bound = 1e-5 * max(np.abs(x).max(), 1e-3)
        np.testing.assert_allclose(y, x, atol=bound)
        np.testing.assert_allclose(z, y, atol=bound)
