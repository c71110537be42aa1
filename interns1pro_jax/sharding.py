"""Mesh axes and the one table that maps logical dimensions to them.

    data     replicas across slices; parameters are copied, batches are split
    fsdp     batches and parameters are split; weights are gathered where they are used; spans slices where one cannot hold them
    context  the sequence is split
    expert   expert groups are split, one group (or a whole number of groups) per device; for everything else it acts as fsdp

All axes are explicit (`AxisType.Explicit`): a sharding is part of an array's type, so that a wrong one is an error while
tracing. The same code runs on one device (all axes of size 1) and on a pod; there is always a mesh:

    with jax.set_mesh(make_mesh(fsdp=2, expert=4)):
        ...
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, PartitionSpec

from interns1pro_jax.config import ConfigError, TextConfig

AXES = ("data", "fsdp", "context", "expert")

# Logical dimension -> mesh axes. Dimensions not listed are never split.
RULES: dict[str, tuple[str, ...]] = {
    # activations
    "batch": ("data", "fsdp", "expert"),
    "replica": ("data",),
    "sequence": ("context",),
    # parameters: every matrix outside the experts is split along the model width, vectors are copied
    "embed": ("fsdp", "expert"),
    "expert": ("expert",),
    "expert_embed": ("fsdp",),
    # the towers are small (0.3 B parameters) and their widths do not divide over hundreds of devices
    "tower_embed": ("expert",),
}


def spec(*dims: str | None) -> PartitionSpec:
    """PartitionSpec of an array whose dimensions have these logical names (None: not split)."""
    unknown = [d for d in dims if d is not None and d not in RULES]
    if unknown:
        raise ConfigError(f"unknown logical dimensions {unknown}; RULES has {sorted(RULES)}.")
    return PartitionSpec(*(RULES[d] if d is not None else None for d in dims))


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes, and the hardware they are meant for.

    Attributes:
      topology: the TPU slice by the name that libtpu has for it: `v5p:8x8x8` (a device is a chip), `v6e:16x16`, `tpu7x:4x8x8` (a
        chip is two devices). Runs use whatever devices there are; `train.aot` compiles for this one. None: no TPU.
      slices: slices of that topology, joined by the data-centre network along `data`, or where that is 1 along `fsdp`.
    """

    data: int = 1
    fsdp: int = 1
    context: int = 1
    expert: int = 1
    topology: str | None = None
    slices: int = 1

    @property
    def sizes(self) -> dict[str, int]:
        return {axis: getattr(self, axis) for axis in AXES}

    @property
    def size(self) -> int:
        """Devices of the mesh."""
        return math.prod(self.sizes.values())

    def make(self, devices: Sequence[jax.Device] | None = None) -> Mesh:
        """`make_mesh` of these sizes."""
        return make_mesh(**self.sizes, devices=devices)


def make_mesh(data: int = 1, fsdp: int = 1, context: int = 1, expert: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of these sizes over `devices` (default: as many of the process's visible devices as the sizes multiply to).

    Raises:
      ConfigError: the product of the sizes differs from the number of devices given, or exceeds the number visible; slices
        divide neither `data` nor `fsdp`.
    """
    sizes = dict(data=data, fsdp=fsdp, context=context, expert=expert)
    if any(n < 1 for n in sizes.values()):
        raise ConfigError(f"mesh sizes must be positive, got {sizes}.")
    wanted = math.prod(sizes.values())
    visible = list(devices) if devices is not None else jax.devices()
    if wanted > len(visible) or (devices is not None and wanted != len(visible)) or (jax.process_count() > 1 and wanted != len(visible)):
        shown = " x ".join(f"{k}={v}" for k, v in sizes.items())
        raise ConfigError(
            f"the mesh {shown} needs {wanted} devices, but {len(visible)} are available; change the mesh sizes, or on CPU set "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={wanted}."
        )
    shape = tuple(sizes.values())
    slices = len({getattr(device, "slice_index", 0) for device in visible})
    if wanted < len(visible) or visible[0].platform == "cpu":
        layout = np.asarray(visible[:wanted]).reshape(shape)
    elif slices > 1:
        # Replicas talk to each other least. Where one slice cannot hold the parameters, they are split over all.
        spanning = "data" if data % slices == 0 else "fsdp"
        if sizes[spanning] % slices:
            raise ConfigError(f"data={data} or fsdp={fsdp} must be a multiple of the {slices} slices: the other axes stay within a slice.")
        across = {axis: slices if axis == spanning else 1 for axis in AXES}
        within = tuple(sizes[axis] // across[axis] for axis in AXES)
        layout = mesh_utils.create_hybrid_device_mesh(within, tuple(across.values()), visible, allow_split_physical_axes=True)
    else:
        # An axis of 8 never equals an axis of a torus of 4k chips, so physical axes may be split.
        layout = mesh_utils.create_device_mesh(shape, visible, allow_split_physical_axes=True)
    return Mesh(layout, AXES, axis_types=(AxisType.Explicit,) * len(AXES))


def axis_size(*axes: str) -> int:
    """Product of the sizes of these axes of the mesh in force.

    Raises:
      ConfigError: no mesh is in force.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        raise ConfigError("no mesh is in force; wrap the call in `with jax.set_mesh(make_mesh()):`.")
    return math.prod(mesh.shape[a] for a in axes)


def shards(dim: str) -> int:
    """Into how many parts the mesh in force splits a logical dimension."""
    return axis_size(*RULES[dim])


def token_axes() -> tuple[str, ...]:
    """The mesh axes that split tokens."""
    return RULES["batch"] + RULES["sequence"]


def check_divisible(what: str, shape: Sequence[int], dims: Sequence[str | None]) -> None:
    """Raises `ConfigError`, with the numbers, where a dimension cannot be split evenly over the mesh in force."""
    for size, dim in zip(shape, dims, strict=True):
        if dim is not None and size % shards(dim):
            axes = ", ".join(f"{a}={axis_size(a)}" for a in RULES[dim])
            raise ConfigError(
                f"{what}: dimension '{dim}' of size {size} (shape {tuple(shape)}) does not divide over the mesh axes {axes}; "
                f"choose a size divisible by {shards(dim)} or another mesh."
            )


def check_expert_axis(config: TextConfig) -> None:
    """Raises `ConfigError` where the mesh in force would split an expert group over devices (DESIGN 3)."""
    groups, expert = config.router_n_groups, axis_size("expert")
    if groups % expert:
        raise ConfigError(
            f"the mesh axis expert={expert} must divide router_n_groups={groups}, so that each device owns a whole number of "
            f"expert groups; use one of {[n for n in range(1, groups + 1) if groups % n == 0]}."
        )


def split_rows(x: jax.Array, counts: Sequence[int], axis: int = 0) -> tuple[jax.Array, ...]:
    """The rows of every device in parts of so many rows; `axis` is that of the rows. The parts hold other rows than those of the whole
    in order: what belongs together is split by the same counts."""
    if len(counts) == 1:
        return (x,)
    spec = jax.typeof(x).sharding.spec
    bounds = np.cumsum(counts)[:-1].tolist()
    return jax.shard_map(lambda x: tuple(jnp.split(x, bounds, axis)), in_specs=spec, out_specs=(spec,) * len(counts))(x)


def join_rows(parts: Sequence[jax.Array], axis: int = 0) -> jax.Array:
    """The inverse of `split_rows`."""
    if len(parts) == 1:
        return parts[0]
    spec = jax.typeof(parts[0]).sharding.spec
    return jax.shard_map(lambda *parts: jnp.concatenate(parts, axis), in_specs=(spec,) * len(parts), out_specs=spec)(*parts)


def constrain(x: jax.Array, *dims: str | None) -> jax.Array:
    """Moves `x` to the sharding of these logical dimensions (a no-op where it has it already)."""
    return jax.sharding.reshard(x, spec(*dims))
