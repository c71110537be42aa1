"""The TPU generations these kernels are made for, as their tile choice sees them."""

from __future__ import annotations

import dataclasses

from jax.experimental.pallas import tpu as pltpu

MIB = 1 << 20


@dataclasses.dataclass(frozen=True)
class Chip:
    """One JAX device of a TPU generation.

    Attributes:
      name: as in topology names.
      cores: TensorCores that work on one kernel.
      vmem: bytes of vector memory per core.
      depth: rows of the stationary matrix that a matrix unit holds; a contraction costs whole multiples of it.
      macs_per_cycle: bfloat16 multiply-adds per cycle and core.
      clock: cycles per second.
      hbm: bytes per second of the device.
      native_fp8: whether the matrix units take e4m3 operands at twice the bfloat16 rate, and the vector units convert e4m3.
      bf16_vectors: whether the vector units calculate in bfloat16.
      dequantized: e4m3 elements that the vector units scale and turn into bfloat16 per cycle; read off compiled schedules.
      min_rows: rows up to which streaming hides behind the loading of the stationary matrices.
      chunk: columns of a stationary matrix that lie together in vector memory; the compiler's schedules are worse with more.
      region_overhead: cycles to fill and drain the matrix units around a straight run of products; read off compiled schedules.
    """

    name: str
    cores: int
    vmem: int
    depth: int
    macs_per_cycle: int
    clock: float
    hbm: float
    native_fp8: bool
    bf16_vectors: bool
    dequantized: int
    min_rows: int
    chunk: int
    region_overhead: int

    @property
    def peak(self) -> float:
        """bfloat16 FLOP/s of the device."""
        return 2 * self.macs_per_cycle * self.clock * self.cores


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v5e", 1, 128 * MIB, 128, 4 * 128 * 128, 1.5e9, 819e9, False, False, 700, 48, 512, 190),
        Chip("v5p", 2, 64 * MIB, 128, 4 * 128 * 128, 1.75e9, 2765e9, False, False, 700, 48, 512, 190),
        Chip("v6e", 1, 128 * MIB, 256, 4 * 256 * 256, 1.75e9, 1640e9, False, True, 1140, 128, 512, 290),
        Chip("tpu7x", 1, 64 * MIB, 256, 4 * 256 * 256, 2.2e9, 3690e9, True, True, 2000, 128, 1536, 300),
    )
}

_GENERATIONS = {"v5e": "v5e", "v5p": "v5p", "v6e": "v6e", "7x": "tpu7x"}


def current_chip() -> Chip | None:
    """The chip that the program being traced is for (that of the mesh in force, else the default device); None if not a TPU.

    Raises:
      ValueError: a TPU generation without tables here.
    """
    if not pltpu.is_tpu_device():
        return None
    version = str(pltpu.get_tpu_info().chip_version)
    if version not in _GENERATIONS:
        raise ValueError(f"there are no tile tables for TPU {version}; known are {', '.join(CHIPS)}. Add a row to pallas_kernels.chips.")
    return CHIPS[_GENERATIONS[version]]
