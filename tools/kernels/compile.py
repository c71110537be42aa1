"""Compiles functions with Pallas kernels for TPU topologies on a machine without TPUs, and keeps the schedules.

    with Compiler() as compiler:
        compilation = compiler.compile(CHIPS["v6e"], Launch(function, (jax.ShapeDtypeStruct(shape, dtype), ...)))
        print(compilation.schedules[0].root.tree())

libtpu reads its flags once, when it is loaded: one `Compiler` must exist before anything in the process asks for a TPU topology.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from tools.kernels.chips import Chip
from tools.kernels.kept import Compilation, Kept, as_json, from_json
from tools.kernels.schedule import read_schedules

# Keeps libtpu from looking for a TPU, and lets several processes compile at once.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
# Without the pattern a dump has hundreds of megabytes and takes ten times as long.
_DUMP = "--xla_jf_dump_to={} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=.*(final.*bundle|pre-delay).*"


class CompileError(RuntimeError):
    """Compilation is not possible here, or a kernel does not compile; the message says why in a line."""


@dataclasses.dataclass(frozen=True)
class Launch:
    """A function, what it is called with, and options of the compiler."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    options: Mapping[str, str] = dataclasses.field(default_factory=dict)


class Compiler:
    """Compiles for TPUs and reads the dumps; use as a context manager, which removes them. Compilations are kept in `keep`, if given."""

    def __init__(self, keep: Path | None = None) -> None:
        if importlib.util.find_spec("libtpu") is None:
            raise CompileError("libtpu is not installed; it comes with `pip install interns1pro_jax[tpu]`.")
        self._directory = Path(tempfile.mkdtemp(prefix="kernel_report_"))
        self._kept = Kept(keep) if keep else None
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        os.environ["LIBTPU_INIT_ARGS"] = f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {_DUMP.format(self._directory)}".strip()
        jax.config.update("jax_platforms", "cpu")

    def __enter__(self) -> Compiler:
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self._directory, ignore_errors=True)

    def compile(self, chip: Chip, launch: Launch) -> Compilation:
        """Compiles for one device of `chip`, unless it is kept from before.

        Raises:
          CompileError: it does not compile.
          ScheduleError: it compiles, but the dump is not understood.
        """
        start = time.monotonic()
        lowered = self._lower(chip, launch)
        place = self._kept.place(lowered.as_text(), chip, launch.options) if self._kept else None
        if place and place.exists():
            return from_json(place.read_text())
        program = self._compile(lowered, launch)
        seconds = time.monotonic() - start
        schedules = read_schedules(self._directory)
        text = program.as_text()
        kernels = text.count('custom_call_target="tpu_custom_call"')
        if kernels and not schedules:
            raise CompileError("libtpu wrote no dump: it was loaded before the Compiler was made, or takes flags of another name.")
        estimate = sum(map(int, re.findall(r'"estimated_cycles":"(\d+)"', text)))
        compilation = Compilation(schedules, scoped_vmem(text), _code_bytes(program) - self._code_of_nothing(chip), seconds, estimate)
        if place:
            place.write_text(as_json(compilation))
        return compilation

    def _lower(self, chip: Chip, launch: Launch):  # type: ignore[no-untyped-def]
        device = _device(chip)
        arguments = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=SingleDeviceSharding(device)), launch.arguments
        )
        # Kernels that ask which chip they are traced for learn it from the abstract mesh.
        abstract = jax.sharding.AbstractDevice(platform="tpu", device_kind=device.device_kind, num_cores=chip.cores)
        mesh = jax.sharding.AbstractMesh((1,), ("device",), abstract_device=abstract)
        with _objections(), jax.sharding.use_abstract_mesh(mesh):
            return jax.jit(launch.function).lower(*arguments)

    def _compile(self, lowered, launch: Launch):  # type: ignore[no-untyped-def]
        for path in self._directory.iterdir():
            path.unlink()
        with _objections():
            return lowered.compile(compiler_options=dict(launch.options) or None)

    @functools.cache  # noqa: B019  (one compiler per process)
    def _code_of_nothing(self, chip: Chip) -> int:
        launch = Launch(lambda x: x + 1, (jax.ShapeDtypeStruct((8, 128), "float32"),))
        return _code_bytes(self._compile(self._lower(chip, launch), launch))


@contextlib.contextmanager
def _objections() -> Iterator[None]:
    """Whatever tracing, Mosaic or XLA objects to is what the report has to show."""
    try:
        yield
    except Exception as error:
        raise CompileError(f"{type(error).__name__}: {brief(str(error))}") from error


def scoped_vmem(text: str) -> dict[str, int]:
    """Bytes of VMEM that each kernel in a compiled module was given."""
    found = {}
    for instruction in re.split(r"\n\s*(?:ROOT )?%(?=\S+ = )", text):
        used = re.search(r'"used_scoped_memory_configs":\[(.*?)\]', instruction)
        if 'custom_call_target="tpu_custom_call"' in instruction and used:
            sizes = re.findall(r'"memory_space":"1","offset":"\d+","size":"(\d+)"', used[1])
            found[instruction.split(" = ", 1)[0]] = sum(map(int, sizes))
    return found


def brief(text: str, limit: int = 400) -> str:
    """The beginning of a message, in one line."""
    return " ".join(text.split())[:limit]


def _code_bytes(program) -> int:  # type: ignore[no-untyped-def]
    return program.memory_analysis().generated_code_size_in_bytes


@functools.cache
def _device(chip: Chip):  # type: ignore[no-untyped-def]
    try:
        return topologies.get_topology_desc(topology_name=chip.topology, platform="tpu").devices[0]
    except Exception as error:
        raise CompileError(f"libtpu has no topology {chip.topology}: {brief(str(error))}") from error
