"""A recipe's training step as far as the compiler's schedule: all but the machine code, which takes most of the time to compile."""

import dataclasses
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests import recipes

# Of what XLA dumps: instructions in their order, and the arrays in HBM; the last file that is written before machine code is made.
PROGRAM, MEMORY = "*.after_optimizations.txt", "*.after_optimizations-memory-usage-report.txt"


@dataclasses.dataclass(frozen=True)
class Scheduled:
    """Attributes:
    text: the optimised HLO. hbm: bytes of all that is laid out in HBM. log: what the command wrote.
    """

    text: str
    hbm: int
    log: str


def schedule(recipe: str, bindings: Mapping[str, Any]) -> Scheduled:
    """By the command that a user gives, `experiments.launch --compile_only`, ended once the program is scheduled.

    Raises:
      AssertionError: the command ended by itself, or took longer than ten minutes.
    """
    with tempfile.TemporaryDirectory() as directory:
        command = [sys.executable, "-m", "experiments.launch", "--compile_only", "--workdir", f"{directory}/run"]
        command += ["--gin_file", str(recipes.DIRECTORY / f"{recipe}.gin")]
        command += [f"--gin_param={name} = {value!r}" for name, value in bindings.items()]
        flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_dump_to={directory}/dump --xla_dump_hlo_as_text --xla_dump_hlo_module_re=jit_step"
        log, dump = Path(directory) / "log", Path(directory) / "dump"
        with log.open("w") as file:
            process = subprocess.Popen(
                command, env={**os.environ, "XLA_FLAGS": flags}, stdout=file, stderr=subprocess.STDOUT, cwd=recipes.launch.ROOT
            )
        try:
            end = time.monotonic() + 600
            while not (written := list(dump.glob(MEMORY))) or "Total bytes" not in written[0].read_text():
                assert process.poll() is None, log.read_text()[-3000:]
                assert time.monotonic() < end, "not scheduled after ten minutes"
                time.sleep(0.1)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
        (program,) = dump.glob(PROGRAM)
        (hbm,) = re.findall(r"Memory Space: default.*\nTotal bytes: (\d+)", written[0].read_text())
        return Scheduled(program.read_text(), int(hbm), log.read_text())
