"""Ahead-of-time compilation for TPU pods on a machine without TPUs, and what the compiled program says about itself.

    mesh = pod_mesh("v5p:4x4x4", fsdp=8, expert=8)
    with jax.set_mesh(mesh):
        program = compile_for(mesh, function, *abstract_arguments)
    print(program.hbm, program.collectives)

libtpu compiles for any topology by its name: `v5p:4x4x4`, `v6e:8x8` (a device is a chip), `tpu7x:4x4x2` (a chip is two devices). It
knows memory, collectives and FLOPs exactly; time it does not. `train.hlo` reads the text of the program, `train.hlo_cost` and
`train.timeline` what it computes, moves and how long that may take, and `train.step_report` says it in words.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from interns1pro_jax import sharding
from interns1pro_jax.config import ConfigError
from interns1pro_jax.flops import hardware_of
from interns1pro_jax.train.hlo import Collective, collectives

# libtpu reads these once, when it is loaded. Without them it looks for the machine's TPU, complains that there is none, refuses to
# be loaded by two processes, and hides the partitioner's warnings in a file.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_STDERR_LOG_LEVEL": "1",
    "TPU_LOG_DIR": "disabled",
}


def can_compile() -> bool:
    """Whether libtpu is installed."""
    return importlib.util.find_spec("libtpu") is not None


def pod_mesh(topology: str, slices: int = 1, **sizes: int) -> Mesh:
    """`sharding.make_mesh` of these sizes over the devices of a topology that need not exist, or of several such slices.

    Raises:
      ConfigError: libtpu is not installed or does not know the topology; the sizes do not multiply to its number of devices.
    """
    if not can_compile():
        raise ConfigError("compiling for TPUs needs libtpu: pip install 'interns1pro_jax[tpu]' (Linux on x86-64).")
    hardware_of(topology)  # libtpu may misread a name that is not one
    options: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
    if set(topology.partition(":")[2]) <= set("1x"):
        options["chips_per_host_bounds"] = (1, 1, 1)  # a host has four chips otherwise
    for variable, value in _ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    try:
        devices = topologies.get_topology_desc(topology_name=topology, platform="tpu", **options).devices
    except Exception as error:  # libtpu's own, of no common type
        raise ConfigError(f"libtpu does not know the topology {topology!r}: {str(error).splitlines()[0]}") from error
    return sharding.make_mesh(**sizes, devices=devices)


@dataclasses.dataclass(frozen=True)
class Program:
    """What one device does in a compiled program.

    Attributes:
      text: the optimised HLO.
      collectives: in the order of the text.
      hbm: bytes that it takes: arguments, results, temporaries and code.
      temporary, code: the last two of them.
      flops: of everything, kernels (custom calls) by their own estimates; bodies of loops count once.
      kernel_flops: of the kernels alone.
      warnings: what the compiler wrote to the standard error.
      seconds: that tracing and compiling took.
      live: bytes of arrays that live at the same time, at most; what is laid out for them leaves gaps, so that `hbm` is more (None: a kept
        program from before this was told).
    """

    text: str
    collectives: tuple[Collective, ...]
    hbm: int
    temporary: int
    code: int
    flops: float
    kernel_flops: float
    warnings: str
    seconds: float
    live: int | None = None


def compile_for(
    mesh: Mesh,
    function: Callable[..., Any],
    *arguments: Any,
    compiler_options: Mapping[str, str] | None = None,
    keep: Path | None = None,
) -> Program:
    """Compiles `function`, which may be jitted, for the devices of `mesh`, which must be in force; `arguments` are
    `jax.ShapeDtypeStruct`s with shardings.

    Args:
      keep: a file; if it holds the very same program, compiled by the same compiler for the same devices, that one is returned,
        else it will hold this one.

    Raises:
      ConfigError: the program needs more memory than a device has.
    """
    jitted = function if isinstance(function, jax.stages.Wrapped) else jax.jit(function)
    start = time.perf_counter()
    lowered = jitted.lower(*arguments)
    made_from = _fingerprint(lowered.as_text(), mesh, compiler_options or {}) if keep else ""
    if keep and (kept := _kept(keep, made_from)):
        return Program(**kept, collectives=tuple(collectives(kept["text"], mesh)))
    with _standard_error() as warnings:
        try:
            compiled = lowered.compile(dict(compiler_options or {}))
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            used = re.search(r"(?:Used|temporaries) \(?([\d.]+\w)\)? (?:of|exceeds available HBM) \(?([\d.]+\w)", str(error))
            numbers = f"{used[1]} of {used[2]}" if used else str(error).splitlines()[0]
            raise ConfigError(
                f"the program does not fit the memory of a device: {numbers}; use more devices or smaller batches."
            ) from error
    text, memory, cost = compiled.as_text(), compiled.memory_analysis(), compiled.cost_analysis()
    assert text is not None and memory is not None and cost is not None
    program = Program(
        text=text,
        collectives=tuple(collectives(text, mesh)),
        hbm=memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.generated_code_size_in_bytes,
        temporary=memory.temp_size_in_bytes,
        code=memory.generated_code_size_in_bytes,
        flops=cost.get("flops", 0.0),  # absent where there are none
        kernel_flops=sum(map(float, re.findall(r'"cost_estimate":\{"flops":"(\d+)"', text))),
        warnings="".join(warnings),
        seconds=time.perf_counter() - start,
        live=memory.peak_memory_in_bytes,
    )
    if keep:
        keep.parent.mkdir(parents=True, exist_ok=True)
        fields = {field.name: getattr(program, field.name) for field in dataclasses.fields(program) if field.name != "collectives"}
        keep.write_bytes(gzip.compress(json.dumps({"made_from": made_from, "program": fields}).encode()))
    return program


def _kept(file: Path, made_from: str) -> dict[str, Any] | None:
    """The fields of the program in `file`, if it is the one that is wanted."""
    if not file.is_file():
        return None
    kept = json.loads(gzip.decompress(file.read_bytes()))
    return kept["program"] if kept["made_from"] == made_from else None


def _fingerprint(lowered: str, mesh: Mesh, compiler_options: Mapping[str, str]) -> str:
    """Of what the compiler gets: the program, the devices and their order, options and versions."""
    devices = [(device.device_kind, getattr(device, "coords", device.id)) for device in mesh.devices.flat]
    versions = [importlib.metadata.version(name) for name in ("jax", "jaxlib", *(["libtpu"] if can_compile() else []))]
    return hashlib.sha256(repr((lowered, devices, sorted(compiler_options.items()), versions)).encode()).hexdigest()


@contextlib.contextmanager
def _standard_error() -> Iterator[list[str]]:
    """Collects what C++ writes to the standard error, which still appears there in the end."""
    lines: list[str] = []
    sys.stderr.flush()
    original = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield lines
        finally:
            os.dup2(original, 2)
            os.close(original)
            file.seek(0)
            lines.extend(line.decode(errors="replace") for line in file)
            sys.stderr.writelines(lines)
