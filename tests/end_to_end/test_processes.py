"""Several processes, each with the rows of its own devices, make the global batch that one process would make; what fails on the first
fails on all."""

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_two_processes_place_one_batch():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.end_to_end.two_processes", address, "2", str(index)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=ROOT,
        )
        for index in range(2)
    ]
    try:
        results = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert all(process.returncode == 0 for process in processes), results
    rows = [line for output, _ in results for line in output.splitlines() if line.startswith("rows")]
    assert all("all hear of no space on process 0" in output for output, _ in results)
    assert rows == [f"rows {list(range(8))}", f"rows {list(range(8, 16))}"]
