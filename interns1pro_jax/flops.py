"""Analytic FLOPs, and the hardware they run on. Which operations count as useful is a convention, stated here once.

Model FLOPs of a training step are 6 per active matrix parameter and token (2 forward, 4 backward; 8 of 512 experts are active), and
`6 * L * Q * H * S` per token for causal attention over rows of S tokens: half of the products of all queries with all keys. Lookups,
norms, router statistics and the optimizer are not counted, nor is anything computed twice. The towers are counted in the same way
for all patches and samples that a row has room for, apart from the decoder. MFU is the decoder's model FLOPs per second over the
bfloat16 peak, so that the towers' time counts against it.
"""

from __future__ import annotations

import dataclasses

from interns1pro_jax.config import ConfigError, ModelConfig, TextConfig
from interns1pro_jax.data.packing import RowSize
from pallas_kernels.chips import CHIPS

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Hardware:
    """One JAX device and its share of the network.

    Attributes:
      name: as in topology names.
      peak: bfloat16 FLOP/s.
      hbm: bytes that programs may use: what libtpu's compiler holds against them.
      bandwidth: bytes per second of HBM.
      devices_per_chip: JAX devices that share a chip and its links.
      link: bytes per second of one link between neighbouring chips, in each direction.
      wraps_from: length from which a dimension of the torus is closed to a ring.
      slice_link: bytes per second of a device's share of the data-centre network between slices.
      host_link: bytes per second of a device's share of the bus between its chip and the host's memory, each way.
    """

    name: str
    peak: float
    hbm: int
    bandwidth: float
    devices_per_chip: int
    link: float
    wraps_from: int
    slice_link: float
    host_link: float


def _tpu(name: str, hbm: float, devices_per_chip: int, wraps_from: int) -> Hardware:
    """TPUs' links carry 90 GB/s each way (v5e: 45), a chip's share of the network between slices is 6.25 GB/s and its bus to the host
    carries 16 GB/s each way (v6e: 32; jax-ml.github.io/scaling-book, "TPUs"). For tpu7x Google's page gives 1,200 GB/s both ways for six
    links, 11 % more; the book's 16 GB/s are v4's, taken for v5e, v5p and tpu7x as well."""
    chip = CHIPS[name]
    link = 45e9 if name == "v5e" else 90e9
    return Hardware(
        name, chip.peak, int(hbm * GIB), chip.hbm, devices_per_chip, link, wraps_from,
        slice_link=6.25e9 / devices_per_chip, host_link=(32e9 if name == "v6e" else 16e9) / devices_per_chip,
    )  # fmt: skip


HARDWARE = {
    hardware.name: hardware
    for hardware in (_tpu("v5e", 15.75, 1, 16), _tpu("v5p", 95, 1, 4), _tpu("v6e", 31.25, 1, 16), _tpu("tpu7x", 94.75, 2, 4))
}


def hardware_of(topology: str) -> Hardware:
    """The hardware of a topology by its name, `v5p:8x8x8`."""
    name = topology.partition(":")[0]
    if name not in HARDWARE:
        raise ConfigError(f"topology {topology!r}: the name starts with one of {', '.join(HARDWARE)} and a colon, as in 'v5p:4x4x4'.")
    return HARDWARE[name]


# bfloat16 FLOP/s of a JAX device, by how it names itself (`device_kind`).
_PEAKS = {
    "TPU v5 lite": HARDWARE["v5e"].peak,
    "TPU v5e": HARDWARE["v5e"].peak,
    "TPU v5": HARDWARE["v5p"].peak,
    "TPU v5p": HARDWARE["v5p"].peak,
    "TPU v6 lite": HARDWARE["v6e"].peak,
    "TPU v6e": HARDWARE["v6e"].peak,
    "TPU7x": HARDWARE["tpu7x"].peak,
    "NVIDIA H100 80GB HBM3": 989.4e12,  # SXM, dense (NVIDIA's data sheet)
}


@dataclasses.dataclass(frozen=True)
class Work:
    """Model FLOPs of a training step, and the bfloat16 peak (FLOP/s) of all its devices together; None where none is known."""

    flops: float
    peak: float | None

    @classmethod
    def of_step(cls, config: TextConfig, length: int, rows: int, device_kind: str, devices: int) -> Work:
        """Of a batch of `rows` rows of `length` tokens."""
        peak = _PEAKS.get(device_kind)
        return cls(3.0 * rows * length * text_flops(config, length), None if peak is None else peak * devices)

    def metrics(self, seconds: float) -> dict[str, float]:
        """Of a step that took so long: FLOP/s, and MFU where the peak is known."""
        rate = {"model_flops_per_second": self.flops / seconds}
        return rate if self.peak is None else rate | {"mfu": self.flops / seconds / self.peak}


def active_parameters(config: TextConfig) -> int:
    """Matrix parameters that a token is multiplied with: projections, router, its own experts, the output head."""
    d, heads = config.hidden_size, config.num_attention_heads + config.num_key_value_heads
    attention = 2 * d * heads * config.head_dim
    moe = d * config.num_experts + 3 * config.num_experts_per_tok * d * config.moe_intermediate_size
    dense = 3 * d * config.intermediate_size
    layers = sum(count * (attention + (moe if is_moe else dense)) for is_moe, _, count in config.layer_runs)
    return layers + d * config.vocab_size


def attention_flops(config: TextConfig, length: int) -> int:
    """Forward FLOPs per token of causal attention over rows of `length` tokens, all layers."""
    return 2 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * length


def text_flops(config: TextConfig, length: int) -> int:
    """Forward FLOPs per token of the decoder; a training step has three times as many."""
    return 2 * active_parameters(config) + attention_flops(config, length)


def tower_flops(config: ModelConfig, row: RowSize) -> int:
    """Forward FLOPs of the towers for one row, at all the patches and samples that it has room for."""
    total = 0
    if (vision := config.vision) is not None and row.patches:
        d, merged = vision.hidden_size, vision.hidden_size * vision.spatial_merge_size**2
        block = 4 * d * d + 2 * d * vision.intermediate_size
        total += row.patches * (2 * (vision.depth * block + vision.patch_dim * d) + 4 * vision.depth * d * row.patches)
        total += row.patches // vision.spatial_merge_size**2 * 2 * vision.merger_width * (merged + vision.out_hidden_size)
    if (series := config.time_series) is not None and row.samples:
        d, pairs = series.d_model, row.signal_pairs
        block = 4 * d * d + 2 * d * series.encoder_ffn_dim
        total += pairs * (2 * series.encoder_layers * block + 4 * series.encoder_layers * d * pairs)
    return total
