"""What `train.aot` reads out of compiled programs, on small programs whose collectives are known."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from interns1pro_jax.config import ConfigError
from interns1pro_jax.train import aot, hlo

pytestmark = pytest.mark.skipif(not aot.can_compile(), reason="compiling for TPUs needs libtpu (Linux on x86-64)")

TOPOLOGIES = {"v5p": "v5p:2x2x2", "v6e": "v6e:2x4", "tpu7x": "tpu7x:2x2x1"}  # 8 devices each
SHAPE = (64, 8, 1024)  # of each device, float32: 2 MiB
BYTES = 4 * 64 * 8 * 1024

COLLECTIVES = {
    "all-gather": (lambda x, axes: jax.lax.all_gather(x, axes), 1),
    "reduce-scatter": (lambda x, axes: jax.lax.psum_scatter(x, axes, tiled=True), 0),
    "all-reduce": (lambda x, axes: jax.lax.psum(x, axes), 0),
    "all-to-all": (lambda x, axes: jax.lax.all_to_all(x, axes, 0, 0, tiled=True), 0),
}


@pytest.fixture(scope="module", params=TOPOLOGIES)
def mesh(request) -> Mesh:
    return aot.pod_mesh(TOPOLOGIES[request.param], data=2, fsdp=2, expert=2)


def compiled(mesh: Mesh, function) -> aot.Program:
    everywhere = PartitionSpec(mesh.axis_names)
    x = jax.ShapeDtypeStruct((SHAPE[0] * mesh.size, *SHAPE[1:]), jnp.float32, sharding=NamedSharding(mesh, everywhere))
    with jax.set_mesh(mesh):
        shared = jax.shard_map(function, in_specs=everywhere, out_specs=everywhere, check_vma=False)
        return aot.compile_for(mesh, shared, x)


@pytest.mark.parametrize("axes", [("expert",), ("fsdp",), ("data", "expert")], ids=str)
def test_collectives_have_their_kind_size_axes_and_name(mesh, axes):
    def all_of_them(x):
        found = []
        for kind, (collective, _) in COLLECTIVES.items():
            with jax.named_scope(f"the_{kind}"):
                x = jnp.sin(x)
                found.append(collective(x, axes).sum())
        return jnp.stack(found)

    program = compiled(mesh, all_of_them)
    large = {c.kind: c for c in program.collectives if c.bytes >= BYTES}
    assert set(large) == set(COLLECTIVES) and len([c for c in program.collectives if c.bytes >= BYTES]) == len(COLLECTIVES)
    for kind, (_, gathers) in COLLECTIVES.items():
        assert large[kind].axes == axes and large[kind].times == 1, kind
        assert large[kind].bytes == BYTES * 2 ** (gathers * len(axes)), kind
        assert f"the_{kind}" in large[kind].scope, kind


def test_a_program_that_is_kept_is_compiled_again_only_if_it_changed(tmp_path, monkeypatch):
    mesh, keep = aot.pod_mesh(TOPOLOGIES["v5p"], fsdp=8), tmp_path / "of" / "program.json.gz"
    x = jax.ShapeDtypeStruct((64, 1024), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("fsdp")))
    options = {"xla_tpu_scoped_vmem_limit_kib": "16384"}

    def kept(function, options):
        with jax.set_mesh(mesh):
            return aot.compile_for(mesh, function, x, compiler_options=options, keep=keep)

    first = kept(jnp.sum, options)
    assert first.collectives
    with monkeypatch.context() as patch:
        patch.setattr(jax.stages.Lowered, "compile", lambda *_: pytest.fail("compiled again"))
        assert kept(jnp.sum, options) == first
    assert kept(jnp.max, options).text != first.text
    again = kept(jnp.sum, {})  # other options, and another program is kept now
    assert again.seconds != first.seconds and again.collectives == first.collectives


def test_what_does_not_fit_is_told_with_its_size():
    mesh = aot.pod_mesh(TOPOLOGIES["v6e"], fsdp=8)
    with pytest.raises(ConfigError, match=r"the program does not fit the memory of a device: .*1\.00T.*31\.25G.*; use more devices"):
        compiled(mesh, lambda x: x.reshape(1, -1)[..., : 2**19] * jnp.sin(x).reshape(-1, 1)[: 2**19])


def test_what_a_loop_repeats_is_told_from_what_happens_once(mesh):
    def function(x):
        x = jax.lax.fori_loop(0, 3, lambda _, x: jax.lax.psum(jnp.sin(x), "fsdp"), x)
        return jax.lax.psum(x, "expert")

    found = compiled(mesh, function).collectives
    assert sorted((c.kind, c.axes, c.times) for c in found) == [("all-reduce", ("expert",), 1), ("all-reduce", ("fsdp",), 3)]


def test_groups_that_belong_to_no_axes_are_told(mesh):
    pairs = [[0, 7], [1, 6], [2, 5], [3, 4]]
    program = compiled(mesh, lambda x: jax.lax.psum(x, mesh.axis_names, axis_index_groups=pairs))
    assert [(c.kind, c.axes) for c in program.collectives] == [("all-reduce", None)]


def test_the_compilers_warnings_are_kept():
    """A layout that XLA can only reach by gathering everything, as automatic sharding may ask for."""
    devices = aot.pod_mesh(TOPOLOGIES["v6e"], data=2, fsdp=2, expert=2).devices
    automatic = Mesh(devices.reshape(2, 2, 2), ("data", "fsdp", "expert"))

    def function(x):
        x = jax.lax.with_sharding_constraint(jnp.cos(x), NamedSharding(automatic, PartitionSpec(("expert", "fsdp"), "data")))
        x = jnp.tanh(x).reshape(16, 64, 128)
        return jnp.exp(jax.lax.with_sharding_constraint(x, NamedSharding(automatic, PartitionSpec(None, ("fsdp", "data", "expert")))))

    x = jax.ShapeDtypeStruct((1024, 128), jnp.float32, sharding=NamedSharding(automatic, PartitionSpec(("data", "fsdp"), "expert")))
    assert "Involuntary full rematerialization" in aot.compile_for(automatic, function, x).warnings


@pytest.mark.parametrize(
    "written, groups",
    [
        ("{{0,1},{2,3}}", [[0, 1], [2, 3]]),
        ("{}", [[0, 1, 2, 3]]),
        ("[2,2]<=[4]", [[0, 1], [2, 3]]),
        ("[2,2]<=[2,2]T(1,0)", [[0, 2], [1, 3]]),
        ("mesh['x'=2,'y'=2] {'x'}", [[0, 2], [1, 3]]),
        ("mesh['x'=2,'y'=2] {'y','x'}", [[0, 2, 1, 3]]),
        ("mesh['x'=4] {'x':(1)2}", [[0, 2], [1, 3]]),
        ("mesh['x'=4] {'x':(2)2}", [[0, 1], [2, 3]]),
        ("mesh[x=2,y=2], device_ids=([2,2]T(1,0)) {x}", [[0, 1], [2, 3]]),
    ],
    ids=str,
)
def test_replica_groups_are_read_in_every_notation(written, groups):
    assert hlo.replica_groups(f", channel_id=1, replica_groups={written}, use_global_device_ids=true", devices=4) == groups


def test_an_unknown_notation_is_an_error():
    with pytest.raises(ValueError, match="replica groups of an unknown form"):
        hlo.replica_groups("replica_groups=something", devices=4)


@pytest.mark.parametrize(
    "topology, message", [("v9:2x2", "starts with one of v5e"), ("v5p:3x5x7x2", "does not know the topology 'v5p:3x5x7x2'")]
)
def test_unknown_topologies_are_named(topology, message):
    with pytest.raises(ConfigError, match=message):
        aot.pod_mesh(topology)
