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

# Of what XLA dumps: instructions in their order; the arrays in HBM, which is the last file that is written before machine code is made.
PROGRAM, MEMORY = "*.jit_step.*after_optimizations.txt", "*.jit_step.*after_optimizations-memory-usage-report.txt"
MINUTES = 10


@dataclasses.dataclass(frozen=True)
class Scheduled:
    """Attributes:
    text: the optimised HLO. hbm: bytes of all that is laid out in HBM. warnings: of the compiler.
    """

    text: str
    hbm: int
    warnings: str


def schedule(recipe: str, bindings: Mapping[str, Any]) -> Scheduled:
    """By the command that a user gives, `experiments.launch --compile_only`, ended once the program is scheduled.

    Raises:
      AssertionError: the command ended by itself, or took too long.
    """
    command = [sys.executable, "-m", "experiments.launch", "--compile_only", "--gin_file", str(recipes.DIRECTORY / f"{recipe}.gin")]
    command += [f"--gin_param={name} = {value!r}" for name, value in bindings.items()]
    with tempfile.TemporaryDirectory() as directory:
        log, dump, warnings = (Path(directory) / name for name in ("log", "dump", "warnings"))
        warnings.mkdir()
        flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_dump_to={dump} --xla_dump_hlo_as_text --xla_dump_hlo_module_re=jit_step"
        # What libtpu says while it compiles would be kept back until it is done.
        environment = {**os.environ, "XLA_FLAGS": flags, "TPU_LOG_DIR": str(warnings)}
        with log.open("w") as file:
            process = subprocess.Popen(
                [*command, "--workdir", f"{directory}/run"], env=environment, stdout=file, stderr=file, cwd=recipes.launch.ROOT
            )
        try:
            end = time.monotonic() + 60 * MINUTES
            while not (written := list(dump.glob(MEMORY))) or "Total bytes" not in written[0].read_text():
                there = sorted(path.name for path in dump.glob("*"))
                assert process.poll() is None, f"{recipe} ended before XLA wrote {MEMORY}; it wrote {there}: {log.read_text()[-3000:]}"
                assert time.monotonic() < end, f"{recipe}: no {MEMORY} after {MINUTES} minutes, of XLA there are {there}"
                time.sleep(0.1)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
        (program,) = dump.glob(PROGRAM)
        (hbm,) = re.findall(r"Memory Space: default.*\nTotal bytes: (\d+)", written[0].read_text())
        said = "".join(path.read_text() for path in warnings.glob("*.WARNING.*"))
        assert said, "libtpu wrote no log, so that its warnings cannot be counted"
        return Scheduled(program.read_text(), int(hbm), said)
