"""Laws of the vision tower and its packing, and equality with the official implementation."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from interns1pro_jax.config import VisionConfig
from interns1pro_jax.models.inputs import VisionInputs
from interns1pro_jax.models.vision import VisionTower, rotary_angles
from interns1pro_jax.models.vision_inputs import VisionItem, _linspace, bucket_size, pack_vision, tokens_per_item
from interns1pro_jax.sharding import make_mesh, spec

CONFIG = VisionConfig(
    depth=2, hidden_size=32, num_heads=2, intermediate_size=48, patch_size=4, in_channels=1, num_position_embeddings=36, out_hidden_size=24,
    dtype="float32", param_dtype="float32",
)  # fmt: skip
ROUNDING = 2e-6  # sums over more rows, or the same in another order
GRIDS = [(1, 4, 2), (2, 2, 4), (1, 2, 2)]


def make_tower(config: VisionConfig = CONFIG) -> VisionTower:
    """A tower whose weights, norms and biases included, are random but the same on every mesh."""
    graph, state = nnx.split(nnx.eval_shape(lambda: VisionTower(config, rngs=nnx.Rngs(0))))
    random = np.random.default_rng(0)
    mesh = jax.sharding.get_mesh()

    def fill(x: jax.ShapeDtypeStruct) -> jax.Array:
        return jax.device_put(random.normal(0, 0.25, x.shape).astype(x.dtype), jax.sharding.NamedSharding(mesh, x.sharding.spec))

    return nnx.merge(graph, jax.tree.map(fill, state))


def make_item(grid: tuple[int, int, int], seed: int, config: VisionConfig = CONFIG) -> VisionItem:
    return VisionItem(np.random.default_rng(seed).normal(size=(int(np.prod(grid)), config.patch_dim)).astype(np.float32), grid)


def place(inputs: VisionInputs, dim: str | None = None) -> VisionInputs:
    """Puts the inputs on the mesh in force, the packs split along a logical dimension."""
    sharding = jax.sharding.NamedSharding(jax.sharding.get_mesh(), spec(dim))
    return jax.tree.map(lambda x: jax.device_put(x, sharding), inputs)


@nnx.jit
def encode(tower: VisionTower, inputs: VisionInputs) -> jax.Array:
    return tower(inputs)


@nnx.jit
def encode_and_differentiate(tower: VisionTower, inputs: VisionInputs) -> tuple[jax.Array, nnx.State]:
    """Embeddings, and the gradients of a loss that depends on all of them, the padded ones included."""

    def loss(tower: VisionTower) -> tuple[jax.Array, jax.Array]:
        embeddings = tower(inputs)
        weights = jnp.cos(jnp.arange(embeddings.shape[-1]))
        return jnp.sum(jnp.sin(embeddings) * weights) / 10, embeddings

    gradients, embeddings = nnx.grad(loss, has_aux=True)(tower)
    return embeddings, gradients


def assert_close(actual, expected, tolerance: float) -> None:
    """Every element of every array within `tolerance`, relative to the array's largest."""
    for (path, a), b in zip(jax.tree.leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
        atol = tolerance * np.abs(np.asarray(b)).max()
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=0, atol=atol, err_msg=jax.tree_util.keystr(path))


def test_initial_weights_differ_from_block_to_block(mesh):
    state = nnx.state(nnx.jit(lambda: VisionTower(CONFIG, rngs=nnx.Rngs(0)))())
    values = {path[-1]: np.asarray(x[...]) for path, x in nnx.to_flat_state(state)}
    assert len(values["qkv_DCQH"]) == CONFIG.depth and (values["qkv_DCQH"][0] != values["qkv_DCQH"][1]).any()
    assert np.std(values["qkv_DCQH"]) == pytest.approx(CONFIG.initializer_range, rel=0.1)
    assert (values["norm1_scale_D"] == 1).all() and (values["fc1_bias_F"] == 0).all()


@pytest.mark.parametrize("name", ["vision_two_images", "vision_mixed"])
def test_equals_official_implementation(reference, mesh, name):
    from interns1pro_jax.checkpoint.hf_import import load_model

    tower = load_model(reference / "tiny").vision
    golden = np.load(reference / "tiny" / f"{name}.npz")
    grids = [tuple(int(n) for n in grid) for grid in golden["grid_thw"]]
    ends = np.cumsum([np.prod(grid) for grid in grids])
    items = [VisionItem(patches, grid) for patches, grid in zip(np.split(golden["pixel_values"], ends[:-1]), grids, strict=True)]
    output, trace = nnx.jit(lambda tower, inputs: tower(inputs, trace=True))(tower, place(pack_vision([items], tower.config)))
    actual = {**trace, "output": output, "rotary_freqs": trace["rotary"]}
    for key in sorted(set(golden.files) - {"pixel_values", "grid_thw"}):
        expected = golden[key]
        rows = np.asarray(actual[key])[:, 0] if key == "blocks" else np.asarray(actual[key])[0]
        rows = rows[..., : expected.shape[-2], :]
        np.testing.assert_allclose(rows, expected, rtol=0, atol=1e-4, err_msg=key)


def test_frequencies_equal_official_to_the_bit(reference, mesh):
    expected = np.load(reference / "real_frequencies.npz")["vision_inv_freq"]
    row_and_column = np.asarray(rotary_angles(jnp.ones((1, 1, 2), jnp.int32), VisionConfig().head_dim))[0, 0]
    np.testing.assert_array_equal(row_and_column, np.concatenate([expected, expected]))


def some_packs(count: int, size: int = 28) -> VisionInputs:
    """Packs of different contents, one of them empty where there are several; the last fills 28 patches."""
    packs = [[make_item(GRIDS[(p + i) % 3], 10 * p + i) for i in range(p % 3)] for p in range(count - 1)]
    return pack_vision([*packs, [make_item(grid, seed) for seed, grid in enumerate(GRIDS)]], CONFIG, size=size)


def test_padding_changes_nothing(mesh):
    tower = make_tower()
    padded = some_packs(1, size=96)
    dirty = dataclasses.replace(padded, patches=np.where(padded.frame_ids[..., None] > 0, padded.patches, np.nan))
    expected, expected_gradients = encode_and_differentiate(tower, place(some_packs(1)))
    for inputs in (padded, dirty):
        actual, gradients = encode_and_differentiate(tower, place(inputs))
        assert_close(actual[:, :7], expected, ROUNDING)
        assert_close(gradients, expected_gradients, ROUNDING)
        assert not np.asarray(actual[:, 7:]).any()


def test_empty_pack_is_zero_and_finite(mesh):
    embeddings, gradients = encode_and_differentiate(make_tower(), place(pack_vision([[]], CONFIG, size=28)))
    assert not np.asarray(embeddings).any()
    assert all(np.isfinite(np.asarray(g)).all() and not np.asarray(g).any() for g in jax.tree.leaves(gradients))


def test_packed_together_equals_alone_in_one_compilation(mesh):
    tower = make_tower()
    items = [make_item(grid, seed) for seed, grid in enumerate(GRIDS)]
    traced = 0

    @nnx.jit
    def run(tower, inputs):
        nonlocal traced
        traced += 1
        return tower(inputs)[0]

    together = run(tower, place(pack_vision([items], CONFIG)))
    reverse = run(tower, place(pack_vision([items[::-1]], CONFIG)))
    alone = [run(tower, place(pack_vision([[item]], CONFIG)))[: tokens_per_item(item.grid, CONFIG)] for item in items]
    assert_close(together[:7], jnp.concatenate(alone), ROUNDING)
    assert_close(reverse[:7], jnp.concatenate(alone[::-1]), ROUNDING)
    assert traced == 1


def test_video_frames_do_not_see_each_other(mesh):
    tower = make_tower()
    video = make_item((3, 4, 2), 0)
    frames = [VisionItem(patches, (1, 4, 2)) for patches in np.split(video.patches, 3)]
    assert_close(encode(tower, place(pack_vision([[video]], CONFIG))), encode(tower, place(pack_vision([frames], CONFIG))), ROUNDING)


def test_patches_of_a_frame_see_each_other_and_their_places(mesh):
    tower = make_tower()
    item = make_item((1, 4, 4), 0)
    expected = encode(tower, place(pack_vision([[item]], CONFIG)))[0, :4]
    changed = item.patches.copy()
    changed[0] += 1
    assert (np.abs(encode(tower, place(pack_vision([[VisionItem(changed, item.grid)]], CONFIG)))[0, :4] - expected).max(-1) > 1e-3).all()
    moved = encode(tower, place(pack_vision([[VisionItem(item.patches, (1, 2, 8))]], CONFIG)))[0, :4]
    assert (np.abs(moved - expected).max(-1) > 1e-3).all()


@pytest.mark.parametrize(("fsdp", "expert", "packs"), [(1, 8, 8), (2, 4, 8), (8, 1, 8), (2, 4, 1)])
def test_eight_devices_equal_one(fsdp, expert, packs, single_device):
    dim = "batch" if packs == 8 else None
    with jax.set_mesh(make_mesh(fsdp=fsdp, expert=expert)):
        tower = make_tower()
        embeddings, gradients = encode_and_differentiate(tower, place(some_packs(packs), dim))
        assert jax.typeof(embeddings).sharding.spec == spec(dim, None, None)
        assert_shardings_equal(gradients, nnx.state(tower))
    expected, expected_gradients = single_device[packs]
    assert_close(embeddings, expected, 1e-5)
    assert_close(gradients, expected_gradients, 1e-5)


@pytest.fixture(scope="module")
def single_device() -> dict[int, tuple]:
    """Embeddings and gradients on one device, by the number of packs."""
    with jax.set_mesh(make_mesh()):
        tower = make_tower()
        return {packs: jax.device_get(encode_and_differentiate(tower, place(some_packs(packs)))) for packs in (8, 1)}


def assert_shardings_equal(actual, expected) -> None:
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.sharding.is_equivalent_to(b.sharding, a.ndim), (a.sharding, b.sharding)


def test_bfloat16_is_close_to_float32(mesh):
    inputs = place(some_packs(1, size=64))
    expected = encode(make_tower(), inputs)
    actual = encode(make_tower(dataclasses.replace(CONFIG, dtype="bfloat16", param_dtype="bfloat16")), inputs)
    assert actual.dtype == jnp.bfloat16
    assert np.sqrt(np.mean(np.square(actual - expected))) < 0.03 * np.sqrt(np.mean(np.square(expected)))


def test_a_grid_as_large_as_the_position_table_reads_it_unchanged():
    inputs = pack_vision([[make_item((1, 6, 6), 0)]], CONFIG, size=36)
    rows, columns = np.moveaxis(inputs.row_col[0], -1, 0)
    np.testing.assert_array_equal(inputs.position_index[0, :, 0], 6 * rows + columns)
    np.testing.assert_array_equal(inputs.position_weight[0], np.tile([1.0, 0, 0, 0], (36, 1)))
    # Every four patches are a square of the frame, and the squares follow in row-major order.
    np.testing.assert_array_equal(inputs.row_col[0].reshape(3, 3, 2, 2, 2)[1, 2], [[[2, 4], [2, 5]], [[3, 4], [3, 5]]])


def test_positions_step_from_both_ends():
    np.testing.assert_array_equal(_linspace(47, 1), [0])
    for count in range(2, 200):
        x = _linspace(47, count)
        assert x.dtype == np.float32 and x[0] == 0 and x[-1] == 47 and (np.diff(x) > 0).all()
        np.testing.assert_array_equal(x[(count + 1) // 2 :], np.float32(47) - x[: count // 2][::-1])
        np.testing.assert_allclose(x, np.linspace(0, 47, count), rtol=0, atol=4e-6)


def test_buckets_are_few_and_fit():
    sizes = {bucket_size(n, CONFIG) for n in range(2000)}
    assert sizes == {64, 128, 256, 512, 1024, 2048}
    assert all(n <= bucket_size(n, CONFIG) <= max(2 * n, 64) for n in range(2000))


def spoiled(value: float) -> VisionItem:
    item = make_item((1, 2, 2), 0)
    item.patches[1, 3] = value
    return item


@pytest.mark.parametrize(
    ("packs", "size", "message"),
    [
        ([], None, "no pack"),
        ([make_item((1, 2, 2), 0)], None, "expected a VisionItem"),
        ([[], [make_item((1, 3, 2), 0)]], None, "pack 1, item 0: .*spatial_merge_size=2.*multiples of 8 pixels"),
        ([[make_item((1, 2, 2), 0), VisionItem(np.zeros((4, 32), np.float32), (1, 2, 4))]], None, "item 1: 4 patches do not .*which has 8"),
        ([[VisionItem(np.zeros((4, 31), np.float32), (1, 2, 2))]], None, r"shape \(4, 31\), expected \[patches, 32\]"),
        ([[VisionItem(np.zeros((4, 32), np.uint8), (1, 2, 2))]], None, "uint8, expected normalised floats"),
        ([[VisionItem(np.zeros((0, 32), np.float32), (1, 0, 2))]], None, r"grid=\(1, 0, 2\) must be three positive"),
        ([[spoiled(np.nan)]], None, "1 of 128 pixel values are NaN"),
        ([[spoiled(np.inf)]], None, "1 of 128 pixel values are NaN or infinite"),
        ([[], [make_item((1, 4, 4), 0)]], 12, "pack 1 has 16 patches, but size=12"),
        ([[]], 30, r"size=30 must be a positive multiple of spatial_merge_size\*\*2=4"),
    ],
)
def test_bad_input_is_named(packs, size, message):
    with pytest.raises(ValueError, match=message):
        pack_vision(packs, CONFIG, size=size)
