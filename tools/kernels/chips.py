"""The chips that kernels are compiled for, with published peaks. Everything is per JAX device, the unit that a kernel runs on."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, eq=False)
class Chip:
    """One JAX device of a TPU generation.

    Attributes:
      topology: smallest topology's name, for ahead-of-time compilation.
      clock: cycles per second.
      depth: rows and columns of a stationary tile of a matrix unit; a contraction costs whole multiples of it.
      cores: TensorCores of a device; a kernel's parallel grid dimension is divided among them, and so is the HBM bandwidth.
      flops: peak floating-point operations per second by dtype of the operands.
      hbm: peak bytes per second to and from HBM.
      vmem: bytes of vector memory of each core.
    """

    name: str
    topology: str
    clock: float
    depth: int
    cores: int
    flops: dict[str, float]
    hbm: float
    vmem: int


# v5p: a device is a chip of two cores. v6e: one core. tpu7x: a chip is two devices of one core, so half of the published
# 2307 (FP8: 4614) TFLOP/s and 7380 GB/s. FP8 runs at the rate of bfloat16 on v6e and is emulated on v5p.
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v5p", "v5p:2x2x1", 1.75e9, 128, 2, {"bfloat16": 459e12, "float8_e4m3fn": 459e12}, 2765e9, 64 << 20),
        Chip("v6e", "v6e:2x2", 1.75e9, 256, 1, {"bfloat16": 918e12, "float8_e4m3fn": 918e12}, 1640e9, 128 << 20),
        Chip("tpu7x", "tpu7x:2x2x1", 2.2e9, 256, 1, {"bfloat16": 1153.5e12, "float8_e4m3fn": 2307e12}, 3690e9, 64 << 20),
    )
}
