"""What a task needs of a device, by arithmetic: bytes of HBM and seconds, for any mesh at once.

State is exact: it follows from the shapes and shardings of the parameters. What a step needs on top is a model of the few buffers that
are large, held against compiled programs by a test: gathered weights, rows of the expert products, the output head. Seconds are computing
at the share of the peak that compiled schedules reach, and the part of the links' time that they do not hide.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax

from interns1pro_jax.config import ConfigError, ModelConfig, TextConfig
from interns1pro_jax.flops import Hardware, attention_flops, text_flops
from interns1pro_jax.kernel_times import ATTENTION_TIME_OVER_BOUND
from interns1pro_jax.layers.decoder import stream_rows
from interns1pro_jax.models.interns1pro import InternS1Pro
from interns1pro_jax.sharding import AXES, MeshConfig, make_mesh
from pallas_kernels.attention import is_short
from pallas_kernels.chips import CHIPS

TASKS = ("train", "sft", "lora", "rl", "serve")

# Share of the peak at which a device computes all but attention: those of v5p and tpu7x fit the compiled schedules of docs/pods_report.md;
# those of v5e and v6e are assumed.
COMPUTE_EFFICIENCY = {"v5e": 0.7, "v5p": 0.79, "v6e": 0.67, "tpu7x": 0.67}
# How often the experts of a layer are moved in HBM, in the times of XLA's estimates: by gathers, products and casts, however few the
# tokens, and again for each further pair of parts, whose gradients are added up. By the same schedules.
EXPERTS_MOVED, EXPERTS_MOVED_AGAIN = {"v5e": 7, "v5p": 7, "v6e": 7, "tpu7x": 12}, 21
# Share of the time of the links in which nothing is computed, with tokens that go through the experts in one part, and in two together,
# by the same schedules; those of v5e and v6e are taken for those of v5p. The network between slices was in none of them.
EXPOSED = {chip: {1: 0.6, 2: 0.14 if chip == "tpu7x" else 0.28} for chip in COMPUTE_EFFICIENCY}
# Gaps in what XLA lays out, in sizes of the inputs of all layers (of two streams of those of one), by the same programs, and with these
# inputs in the host's memory. Those of v5e and v6e are taken for those of v5p.
GAPS_OF_OFFLOAD, GAPS = 0.55, {chip: 0.75 if chip == "tpu7x" else 1.0 for chip in COMPUTE_EFFICIENCY}
# What a plan tries of a step: `StepConfig.remat` and `.moe_chunks` of the recipes, the last for rows that fill a device.
STEPS = (("full", 1), ("full", 2), ("attention", 2), ("offload", 16))
LONG = 16384  # tokens of such a row at least
ROWS = (1, 2, 3, 4, 6, 8, 12, 16)  # per group of devices that share rows
# Share of HBM that a plan fills at most; the rest is for the runtime and for what is not modelled.
FULLEST = 0.92
LORA_RANK = 16
_REST = 2**30  # bytes of towers, code and small buffers


@dataclasses.dataclass(frozen=True)
class Weight:
    """A parameter: its name, shape, and the mesh axes that split each dimension."""

    name: str
    shape: tuple[int, ...]
    axes: tuple[tuple[str, ...], ...]

    def per_device(self, sizes: Mapping[str, int]) -> int | None:
        """Elements that one device holds on a mesh of these sizes; None where a dimension does not divide."""
        parts = [math.prod(sizes[axis] for axis in axes) for axes in self.axes]
        if any(size % part for size, part in zip(self.shape, parts, strict=True)):
            return None
        return math.prod(size // part for size, part in zip(self.shape, parts, strict=True))


@functools.cache
def weights_of(model: ModelConfig) -> tuple[Weight, ...]:
    """All parameters of a model."""
    from flax import nnx

    def axes(x: jax.ShapeDtypeStruct) -> tuple[tuple[str, ...], ...]:
        spec = (*x.sharding.spec, *(None,) * (len(x.shape) - len(x.sharding.spec)))  # type: ignore[union-attr]
        return tuple((dim,) if isinstance(dim, str) else tuple(dim or ()) for dim in spec)

    with jax.set_mesh(make_mesh(devices=jax.devices()[:1])):
        params = nnx.state(nnx.eval_shape(lambda: InternS1Pro(model, rngs=nnx.Rngs(0))), nnx.Param)
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return tuple(Weight(jax.tree_util.keystr(path), tuple(x.shape), axes(x)) for path, x in leaves)


@functools.cache
def parameters_of_device(model: ModelConfig, mesh: MeshConfig) -> int | None:
    """Parameters that one device of a mesh holds; None where they do not divide."""
    held = [weight.per_device(mesh.sizes) for weight in weights_of(model)]
    return None if None in held else sum(count for count in held if count is not None)


@dataclasses.dataclass(frozen=True)
class Footprint:
    """A task on one device of a mesh.

    Attributes:
      mesh: its sizes. tokens: of one device in a step (train, sft, lora, rl) or sequences times length in the cache (serve).
      memory: bytes by part.
      hbm: bytes that there are.
      seconds: of a training step, or of one decoded token of all sequences (a lower bound: links are not counted).
      rate: tokens per second and chip.
      bound: what takes the seconds.
      remat, moe_chunks: of the step; none of what is served.
    """

    task: str
    mesh: MeshConfig
    tokens: int
    memory: dict[str, int]
    hbm: int
    seconds: float
    rate: float
    bound: str
    remat: str | None = None
    moe_chunks: int | None = None

    @property
    def total(self) -> int:
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        return self.total <= FULLEST * self.hbm


def footprint(
    task: str,
    model: ModelConfig,
    hardware: Hardware,
    mesh: MeshConfig,
    length: int,
    rows: int = 1,
    *,
    parameter_bytes: int = 4,
    moment_bytes: int = 4,
    weight_bytes: int = 2,
    remat: str = "full",
    moe_chunks: int = 1,
) -> Footprint | None:
    """The footprint of a task; None where the mesh cannot hold the model or the rows.

    Args:
      length: tokens of a row, or of a sequence that is served.
      rows: of each group of devices that share a row (`context` of them), or sequences per device that are served or rolled out.
      parameter_bytes: of trained parameters and their gradients; moment_bytes: of each of AdamW's moments.
      remat, moe_chunks: what the backward finds of a block (`layers.decoder.REMAT`), and the parts in which tokens go through the experts.
      weight_bytes: of frozen and served weights (2: bfloat16, 1: FP8).

    Raises:
      ConfigError: an unknown task.
    """
    if task not in TASKS:
        raise ConfigError(f"task {task!r} is unknown; use one of {', '.join(TASKS)}.")
    text, sizes = model.text, mesh.sizes
    parameters = parameters_of_device(model, mesh)
    if parameters is None or length % mesh.context or text.router_n_groups % mesh.expert:
        return None
    tokens = rows * length // mesh.context
    cache = cache_bytes(text) * rows * length
    serving = {"weights": weight_bytes * parameters, "key/value cache": cache}
    if task == "serve":
        memory = serving | {"working": 2 * 1024**3}
        seconds, bound = _decode_seconds(hardware, memory), "HBM"
        return Footprint(task, mesh, rows * length, memory, hardware.hbm, seconds, rows * hardware.devices_per_chip / seconds, bound)
    if task == "lora":
        adapters = _adapter_parameters(text) // math.prod(sizes.values()) + 1
        memory = {"weights": weight_bytes * parameters, "adapters": (8 + 2 * moment_bytes) * adapters}
    else:
        trained = parameter_bytes * parameters
        memory = {"parameters": trained, "optimizer": 2 * moment_bytes * parameters, "gradients": trained}
    copied = parameters if task != "lora" and parameter_bytes > 2 else 0
    streams = len(stream_rows(rows, moe_chunks))
    # Splash takes row by row, and there are 16 arrays of a row's queries: these and keys by heads and by tokens, sums, gradients.
    splash = 0 if _is_short(text, hardware, length) else 32 * length // mesh.context * text.num_attention_heads * text.head_dim
    gaps = int(kept_bytes(text, tokens, "full") / streams * (GAPS_OF_OFFLOAD if remat.startswith("offload") else GAPS[hardware.name]))
    step = {"kept": kept_bytes(text, tokens, remat), "working": working_bytes(text, mesh, tokens, moe_chunks, copied, gaps + splash)}
    seconds, bound = train_seconds(text, hardware, mesh, length, tokens, remat=remat, moe_chunks=moe_chunks, frozen=task == "lora")
    if task == "rl":
        # Rollout and training take turns: the transients of the one are free while the other runs.
        rollout = serving | {"working": 2 * 1024**3}
        decode = _decode_seconds(hardware, rollout) * length
        bound = "decoding" if decode > seconds else bound
        seconds += decode
        more = sum(rollout.values()) - sum(step.values()) - memory["gradients"]
        step["more while rolling out"] = max(0, more)
    rate = tokens / seconds * hardware.devices_per_chip
    return Footprint(task, mesh, tokens, memory | step, hardware.hbm, seconds, rate, bound, remat, moe_chunks)


def cache_bytes(text: TextConfig) -> int:
    """Bytes of keys and values of one token, all layers, in bfloat16."""
    return 2 * 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim


def kept_bytes(text: TextConfig, tokens: int, remat: str) -> int:
    """Bytes of what the forward pass keeps of all layers for the backward, of `tokens` in bfloat16, under a policy of
    `layers.decoder.REMAT`; what is offloaded waits in the host's memory and is not counted.

    Raises:
      ConfigError: a policy that keeps what only a compiled program tells.
    """
    if remat in ("none", "dots"):
        raise ConfigError(f"remat={remat!r}: what it keeps is not modelled; compile the step (experiments.launch --compile_only).")
    queries, keys = text.num_attention_heads * text.head_dim, text.num_key_value_heads * text.head_dim
    results = 2 * queries + 4 * text.num_attention_heads  # and the logarithms of the softmax's sums
    more = {"attention": results, "attention_operands": results + 2 * (queries + 2 * keys)}.get(remat, 0)
    inputs = 0 if remat.startswith("offload") else 2 * text.hidden_size
    plan = 12 * text.num_experts_per_tok  # `ops.permutation.PLAN`
    return text.num_hidden_layers * tokens * (inputs + plan + more)


def working_bytes(text: TextConfig, mesh: MeshConfig, tokens: int, moe_chunks: int = 1, copied: int = 0, gaps: int = 0) -> int:
    """Bytes of temporaries of a training step beyond gradients and what is kept of layers.

    They peak in the backward of a layer: its experts gathered, their gradients (of each of two parts that go together), rows of the
    expert products; or after the last one, where the gradients of head and embedding are summed. The counts of equal buffers are those
    of compiled steps (docs/pods_report.md); towers and the rest are taken as constant.

    Args:
      copied: a device's parameters in float32, of which XLA holds two copies in bfloat16, for the forward and the backward pass.
      gaps: bytes between what lives at that time, and of splash's arrays.
    """
    d, f = text.hidden_size, text.moe_intermediate_size
    gathered = 2 * text.num_experts // mesh.expert * 3 * d * f
    rows = tokens * text.num_experts_per_tok
    passing = 2 * rows * (3 * d + 3 * f) + 2 * tokens * mesh.expert * d
    together = 2 - moe_chunks % 2
    layer = (1 + together) * gathered + passing * together // moe_chunks
    if (
        mesh.slices > mesh.data
    ):  # weights that are split over slices are gathered by way of further copies (compiled for four slices of v6e)
        layer += 5 * gathered
    head = 16 * d * text.vocab_size
    return max(layer + gaps, head) + 2 * 2 * copied + _REST


def train_seconds(
    text: TextConfig,
    hardware: Hardware,
    mesh: MeshConfig,
    length: int,
    tokens: int,
    *,
    remat: str = "full",
    moe_chunks: int = 1,
    frozen: bool = False,
) -> tuple[float, str]:
    """Seconds of a training step and what takes most of them. `frozen` weights have no gradients."""
    d, f = text.hidden_size, text.moe_intermediate_size
    together = 2 - moe_chunks % 2
    passes = 2 if frozen else 2 + together  # the gradients of two parts that go together are scattered apart
    experts, projections = text.num_experts // mesh.expert * 3 * d * f, 2 * d * (text.num_attention_heads + text.num_key_value_heads)
    attention = float(tokens * attention_flops(text, length))
    products = (3 if frozen else 4) * (tokens * text_flops(text, length) - attention) / COMPUTE_EFFICIENCY[hardware.name]
    # The gradients of attention compute the scores again, those of splash, for rows that vector memory does not hold, twice.
    short = _is_short(text, hardware, length)
    kernels, again = (("attention_forward", "attention_gradient"), 0.5) if short else (("splash_mha_fwd", "splash_mha_d"), 1.5)
    over, over_gradient = (ATTENTION_TIME_OVER_BOUND[kernel][hardware.name] for kernel in kernels)
    attention *= (1 if "attention" in remat else 2) * over + (2 + again) * over_gradient
    compute = (products + attention) / hardware.peak
    moved = EXPERTS_MOVED[hardware.name] + (0 if frozen else (moe_chunks // together - 1) * EXPERTS_MOVED_AGAIN)
    compute += text.num_moe_layers * moved * 2 * experts / hardware.bandwidth
    weights = passes * experts + (2 if frozen else 3) * projections * text.head_dim
    gathered = 2 * text.num_moe_layers * weights * (mesh.fsdp - 1) / mesh.fsdp
    chips = max(mesh.expert // hardware.devices_per_chip, 1)  # devices of one chip are of one expert group, and share its links
    exchanged = 5 * 2 * text.num_moe_layers * tokens * mesh.expert * d * (chips - 1) / chips
    # An expert group takes one dimension of the torus, the rest of the mesh the others.
    dims = 2 if hardware.wraps_from == 16 else 3
    share = 2 * hardware.link / hardware.devices_per_chip
    links = {"links of fsdp": gathered / (share * (dims - 1)), "links of expert": exchanged / (2 * hardware.link)}
    if mesh.data > 1:
        links["network between slices"] = 2 * 4 * sum_parameters(text) / math.prod(mesh.sizes.values()) * mesh.data / hardware.slice_link
    times = links | {"computing": compute}
    # Transfers hide behind computing as far as there is some, and never all of them.
    transfers, exposed = sum(links.values()), EXPOSED[hardware.name]
    waiting = max(exposed[together] * transfers, exposed[2] * transfers + transfers - compute)
    return compute + waiting, max(times, key=lambda name: times[name])


@functools.cache
def _is_short(text: TextConfig, hardware: Hardware, length: int) -> bool:
    return is_short(length, text.head_dim, "bfloat16", CHIPS[hardware.name])


def sum_parameters(text: TextConfig) -> int:
    """Parameters of the decoder's experts, which are nearly all."""
    return 3 * text.num_moe_layers * text.num_experts * text.hidden_size * text.moe_intermediate_size


def _adapter_parameters(text: TextConfig) -> int:
    """LoRA of rank 16 on the four projections of every attention layer."""
    q, k, d = text.num_attention_heads * text.head_dim, text.num_key_value_heads * text.head_dim, text.hidden_size
    return LORA_RANK * text.num_hidden_layers * (2 * (d + q) + 2 * (d + k))


def _decode_seconds(hardware: Hardware, memory: Mapping[str, int]) -> float:
    """A lower bound: all weights and the whole cache are read once for a token of every sequence."""
    return (memory["weights"] + memory["key/value cache"]) / hardware.bandwidth


def topology_of(hardware: Hardware, chips: int) -> tuple[str, int]:
    """The usual slice of so many chips, by libtpu's name, and how many of them: tori as cubic as can be, at most a pod each.

    Raises:
      ConfigError: no slice has so many chips.
    """
    flat = hardware.wraps_from == 16
    slices = max(1, chips // 256) if flat else 1
    chips_of_slice = chips // slices
    if chips < 1 or chips & (chips - 1) or chips_of_slice * slices != chips:
        raise ConfigError(f"{chips} chips: slices have a power of two of chips.")
    bits = chips_of_slice.bit_length() - 1
    dims = 2 if flat else 3
    shape = [2 ** (bits // dims + (dims - 1 - place < bits % dims)) for place in range(dims)]
    return f"{hardware.name}:{'x'.join(map(str, shape))}", slices


def meshes(hardware: Hardware, chips: int, length: int) -> list[MeshConfig]:
    """The meshes worth trying on so many chips: expert degrees of at least 4 where they fit, the sequence split where it is long."""
    topology, slices = topology_of(hardware, chips)
    devices = chips * hardware.devices_per_chip
    found = []
    for expert in (8, 4, 2, 1):
        for context in (1, 2, 4, 8):
            rest = devices // (expert * context * slices)
            if rest * expert * context * slices == devices and (context == 1 or length // context >= 4096):
                found.append(MeshConfig(data=slices, fsdp=rest, context=context, expert=expert, topology=topology, slices=slices))
    return found


def best_step(task: str, model: ModelConfig, hardware: Hardware, mesh: MeshConfig, length: int, **options: Any) -> Footprint | None:
    """The fastest footprint that fits, of all steps in `STEPS` and up to 64k tokens of a device, or of as many sequences as fit; the
    smallest where none fits, None where the mesh holds none."""
    if task == "serve":
        rows = [2**power for power in range(24) if power == 0 or 2**power * length <= 2**24]
        tried = (footprint(task, model, hardware, mesh, length, count, **options) for count in rows)
    else:
        rows = [count for count in ROWS if count == 1 or count * length // mesh.context <= 2**16]
        steps = [step for step in STEPS if step[0] != "offload" or length >= LONG]
        tried = (
            footprint(task, model, hardware, mesh, length, count, remat=remat, moe_chunks=chunks, **options)
            for remat, chunks in steps
            for count in rows
        )
    found = [each for each in tried if each is not None]
    fitting = [each for each in found if each.fits]
    if fitting:
        return max(fitting, key=lambda each: each.rate)
    return min(found, key=lambda each: each.total, default=None)


assert set(AXES) == {"data", "fsdp", "context", "expert"}  # `meshes` tries all of them
