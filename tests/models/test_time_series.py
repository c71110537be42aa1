"""Laws of the time-series tower and its packing, and equality with the official implementation."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from interns1pro_jax.config import TimeSeriesConfig
from interns1pro_jax.models.inputs import TimeSeriesInputs
from interns1pro_jax.models.time_series import TimeSeriesTower
from interns1pro_jax.models.time_series_inputs import (
    PatchPlan,
    Signal,
    TimeSeriesSizes,
    normalize,
    pack_time_series,
    patch_plan,
    prepare_signal,
    required_sizes,
    stride_of,
    tokens_of,
)
from interns1pro_jax.sharding import make_mesh, spec

CONFIG = TimeSeriesConfig(
    d_model=32, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=48, max_source_positions=6, ts_adapt_out_dim=24,
    ts_hidden_dim=24, out_hidden_size=40, dtype="float32", param_dtype="float32",
)  # fmt: skip
SIZES = TimeSeriesSizes(values=512, rows=128, pairs=32, patch_width=16)  # holds `some_signals`
ROUNDING = 5e-6  # sums over more rows, or the same in another order


def make_tower(config: TimeSeriesConfig = CONFIG) -> TimeSeriesTower:
    """A tower whose weights, norms and biases included, are random but the same on every mesh."""
    graph, state = nnx.split(nnx.eval_shape(lambda: TimeSeriesTower(config, rngs=nnx.Rngs(0))))
    random = np.random.default_rng(0)
    mesh = jax.sharding.get_mesh()

    def fill(x: jax.ShapeDtypeStruct) -> jax.Array:
        return jax.device_put(random.normal(0, 0.2, x.shape).astype(x.dtype), jax.sharding.NamedSharding(mesh, x.sharding.spec))

    return nnx.merge(graph, jax.tree.map(fill, state))


def make_signal(length: int, channels: int, rate: float | None, seed: int = 0) -> Signal:
    return Signal(np.random.default_rng(seed).normal(size=(length, channels)), rate)


def some_signals() -> list[Signal]:
    """Odd and even numbers of patches and pairs, one to three channels, four rates, one signal shorter than a patch."""
    return [make_signal(31, 1, 1.0, 1), make_signal(50, 3, 10.0, 2), make_signal(9, 2, 30.0, 3), make_signal(70, 1, 25.0, 4)]


def place(inputs: TimeSeriesInputs, dim: str | None = None) -> TimeSeriesInputs:
    """Puts the inputs on the mesh in force, the packs split along a logical dimension."""
    sharding = jax.sharding.NamedSharding(jax.sharding.get_mesh(), spec(dim))
    return jax.tree.map(lambda x: jax.device_put(x, sharding), inputs)


def pack(*packs: list[Signal], sizes: TimeSeriesSizes | None = SIZES) -> TimeSeriesInputs:
    return place(pack_time_series(packs, CONFIG, sizes=sizes))


TRACED: list[int] = []  # an entry for each compilation of the following function


@nnx.jit
def encode_and_differentiate(tower: TimeSeriesTower, inputs: TimeSeriesInputs) -> tuple[jax.Array, nnx.State]:
    """Embeddings, and the gradients of a loss that depends on all of them, the padded ones included."""

    TRACED.append(1)

    def loss(tower: TimeSeriesTower) -> tuple[jax.Array, jax.Array]:
        embeddings = tower(inputs)
        weights = jnp.cos(jnp.arange(embeddings.shape[-1]))
        return jnp.sum(jnp.sin(embeddings) * weights) / 10, embeddings

    gradients, embeddings = nnx.grad(loss, has_aux=True)(tower)
    return embeddings, gradients


def assert_close(actual: Any, expected: Any, tolerance: float) -> None:
    """Every element of every array within `tolerance`, relative to the array's largest."""
    for (path, a), b in zip(jax.tree.leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
        atol = tolerance * np.abs(np.asarray(b)).max()
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=0, atol=atol, err_msg=jax.tree_util.keystr(path))


# Patch plan


def test_stride_and_tokens_equal_official_table(reference):
    table = json.loads((reference / "preprocess" / "time_series_token_table.json").read_text())
    assert len(table["rows"]) > 1000
    for row in table["rows"]:
        length, rate, stride, patches, tokens = row[: table["columns"].index("stride_f64")]
        assert stride_of(rate) == stride, rate
        if patches >= 2:  # the others fail in the official code
            assert patch_plan(length, rate) == PatchPlan(stride, 2 * stride, patches, tokens), (length, rate)
        else:
            assert tokens_of(length, rate) == 1, (length, rate)


def test_tokens_equal_official_cases(reference):
    for case in json.loads((reference / "tiny" / "time_series_cases.json").read_text()):
        plan = patch_plan(case["length"], case["sampling_rate"])
        assert plan == PatchPlan(case["stride"], case["patch"], case["num_patches"], case["num_tokens"])
        assert plan.pairs == case["len_after_concat"]
    for file in json.loads((reference / "preprocess" / "time_series.json").read_text()):
        signal = make_signal(file["length"], file["channels"], file["sampling_rate_given"])
        assert (signal.sampling_rate, signal.tokens) == (file["sampling_rate_used"], file["num_tokens"])


@pytest.mark.parametrize("rate", [1.0, 100.0, 1000.0, 1e6])
def test_every_length_has_tokens_for_its_patches(rate):
    for length in (1, 2, 5, stride_of(rate), 2 * stride_of(rate), 2 * stride_of(rate) + 1, 4321):
        plan = patch_plan(length, rate)
        assert plan.tokens == -(-plan.pairs // 2) >= 1
        assert plan.samples > length - 2 * plan.stride  # at most the odd last patch is lost


# Signals


def test_normalize_equals_official(reference):
    golden = np.load(reference / "preprocess" / "time_series.npz")
    files = sorted({name.rsplit(".", 1)[0] for name in golden.files})
    for file in files:
        np.testing.assert_allclose(normalize(golden[f"{file}.raw"]), golden[f"{file}.normalized"], rtol=0, atol=1e-5, err_msg=file)


def test_normalized_channels_have_mean_zero_and_deviation_one():
    x = np.random.default_rng(0).normal(3, [1e-3, 1, 1e6], (100, 3)) + 1e7
    for ddof in (0, 1):
        np.testing.assert_allclose(normalize(x, ddof).mean(0), 0, atol=1e-5)
        np.testing.assert_allclose(normalize(x, ddof).std(0, ddof=ddof), 1, rtol=1e-4)
    assert not normalize(np.full(50, 1e9 + 0.1)).any()


def test_long_recordings_are_normalized_then_cut_and_say_so():
    x = np.arange(100.0)
    with pytest.warns(UserWarning, match="100 samples was cut to its first 40"):
        signal = prepare_signal(x, max_samples=40)
    assert signal.samples_cut == 60 and signal.sampling_rate == 10.0
    np.testing.assert_array_equal(signal.values, normalize(x)[:40])
    whole = prepare_signal(x, 5.0)
    assert whole.samples_cut == 0 and len(whole.values) == 100


@pytest.mark.parametrize(
    ("values", "rate", "message"),
    [
        (np.zeros((0, 2)), 1.0, "0 samples in 2 channels is empty"),
        (np.zeros((5, 0)), 1.0, "5 samples in 0 channels is empty"),
        (np.zeros((2, 3, 4)), 1.0, r"not \[2, 3, 4\]"),
        (np.float32(1), 1.0, r"not \[\]"),
        (["a", "b"], 1.0, "real numbers"),
        ([1.0, np.nan, np.inf], 1.0, r"2 non-finite values, the first \(nan\) at sample 1 of channel 0"),
        ([1.0, 1e39], 1.0, "non-finite"),
        ([1.0, 2.0], float("nan"), "sampling rate nan"),
        ([1.0, 2.0], float("inf"), "sampling rate inf"),
    ],
)
def test_bad_signals_are_named(values, rate, message):
    with pytest.raises(ValueError, match=message), np.errstate(over="ignore"):
        Signal(values, rate)


def test_normalize_needs_enough_samples():
    with pytest.raises(ValueError, match="ddof=1"):
        normalize([1.0], ddof=1)


# Packing


def test_rows_are_the_memory_of_the_patches():
    signals = some_signals()
    inputs = pack_time_series([signals], CONFIG)
    rows_of_patch: dict[int, list] = {}
    for start, length, patch, weight in sorted(
        zip(inputs.row_start[0], inputs.row_length[0], inputs.row_patch[0], inputs.row_weight[0], strict=True)
    ):
        if length:
            rows_of_patch.setdefault(int(patch), []).append((weight, inputs.values[0, start : start + length]))
    first_pair = 0
    for number, signal in enumerate(signals, start=1):
        plan, (length, channels) = signal.plan, signal.values.shape
        padded = np.concatenate([signal.values, np.zeros((max(plan.samples - length, 0), channels), np.float32)])
        for patch in range(2 * plan.pairs):
            rows = rows_of_patch.pop(2 * first_pair + patch)
            block = padded[patch * plan.stride : patch * plan.stride + plan.patch]
            np.testing.assert_array_equal(np.stack([samples for _, samples in rows]), block.reshape(channels, plan.patch))
            np.testing.assert_allclose([weight for weight, _ in rows], 1 / channels)
        assert (inputs.pair_ids[0, first_pair : first_pair + plan.pairs] == number).all()
        np.testing.assert_array_equal(inputs.pair_position[0, first_pair : first_pair + plan.pairs], range(plan.pairs))
        first_pair += 2 * plan.tokens
    assert not rows_of_patch
    assert (inputs.pair_ids[0, ::2] > 0).sum() == sum(signal.tokens for signal in signals)


def test_default_sizes_are_powers_of_two_that_suffice():
    packs = [some_signals(), [], [make_signal(700, 2, 1e4)]]
    needed = required_sizes(packs)
    inputs = pack_time_series(packs, CONFIG)
    assert needed == TimeSeriesSizes(values=1600, rows=78, pairs=24, patch_width=320)
    sizes = TimeSeriesSizes(inputs.values.shape[1], inputs.row_start.shape[1], inputs.pair_ids.shape[1], inputs.patch_width)
    assert sizes == needed.bucketed()
    for name in ("values", "rows", "pairs"):
        size, need = getattr(sizes, name), getattr(needed, name)
        assert size & (size - 1) == 0 and need <= size < 2 * need


def test_packing_errors_name_the_numbers():
    signals = some_signals()
    needed = required_sizes([signals])
    with pytest.raises(ValueError, match=rf"rows: {needed.rows} > 7, patch_width: {needed.patch_width} > 4"):
        pack_time_series([signals], CONFIG, sizes=dataclasses.replace(needed, rows=7, patch_width=4))
    with pytest.raises(ValueError, match="pairs=33 must be even"):
        pack_time_series([signals], CONFIG, sizes=dataclasses.replace(needed, pairs=33))
    with pytest.raises(ValueError, match="no pack"):
        pack_time_series([], CONFIG)


# Tower


def test_equals_official_implementation(reference, mesh):
    """All signals of all golden files in one pack, so that each is also independent of the others."""
    from interns1pro_jax.checkpoint.hf_import import load_model

    tower = load_model(reference / "tiny").time_series
    assert tower is not None
    single, batch, *prompts = (
        np.load(reference / "tiny" / f"{name}.npz") for name in ("time_series", "time_series_batch", "mm_time_series_0", "mm_time_series_1")
    )
    cases = len(single["table"])
    signals = [Signal(single[f"case{i}.signal"], float(single[f"case{i}.sampling_rate"])) for i in range(cases)]
    signals += [Signal(batch["signals"][i, : batch["lengths"][i]], float(batch["sampling_rate"][i])) for i in range(2)]
    signals += [Signal(prompt["signal"], float(prompt["sampling_rate"])) for prompt in prompts]
    output, trace = nnx.jit(lambda tower, inputs: tower(inputs, trace=True))(tower, place(pack_time_series([signals], tower.config)))
    actual = {"output": output[0], "encoder": trace["encoder"][0], "layers": trace["layers"][:, 0], "subsampled": trace["subsampled"][0]}

    def check(name: str, actual: jax.Array, expected: np.ndarray) -> None:
        np.testing.assert_allclose(np.asarray(actual), expected, rtol=0, atol=1e-4, err_msg=name)

    starts = np.cumsum([0] + [signal.tokens for signal in signals])
    for i, signal in enumerate(signals):
        tokens, pairs = slice(starts[i], starts[i + 1]), slice(2 * starts[i], 2 * starts[i] + signal.plan.pairs)
        if i < cases:
            for key in ("output", "encoder"):
                check(f"case{i}.{key}", actual[key][tokens], single[f"case{i}.{key}"])
            check(f"case{i}.layers", actual["layers"][:, tokens], single[f"case{i}.layers"])
            check(f"case{i}.subsampled", actual["subsampled"][pairs], single[f"case{i}.subsampled"])
        elif i < cases + 2:
            row, length = i - cases, signal.plan.pairs
            assert batch["subsampled_lengths"][row] == length
            check(f"single{row}", actual["output"][tokens], batch[f"single{row}"])
            check(f"batch {row}", actual["subsampled"][pairs], batch["subsampled"][row, :length])
            # Token t reads pairs up to 2t + 2. Beyond the signal's own, the official batch reads its padding instead of zeros.
            whole = length == batch["subsampled"].shape[1]
            exact = signal.tokens if whole else (length - 1) // 2
            check(f"batch {row}", actual["output"][tokens][:exact], batch["output"][row, :exact])
        else:
            check(f"prompt {i - cases - 2}", actual["output"][tokens], prompts[i - cases - 2]["ts_embeds"])


@nnx.jit
def encode(tower: TimeSeriesTower, inputs: TimeSeriesInputs) -> jax.Array:
    return tower(inputs)


def test_initial_weights_let_the_signal_through(mesh):
    tower = nnx.jit(lambda: TimeSeriesTower(CONFIG, rngs=nnx.Rngs(0)))()
    weights = {path: np.asarray(x[...]) for path, x in nnx.to_flat_state(nnx.state(tower))}
    assert (weights["layers", "q_DQH"][0] != weights["layers", "q_DQH"][1]).any()
    assert np.std(weights["layers", "q_DQH"]) == pytest.approx(CONFIG.initializer_range, rel=0.1)
    assert (weights["layers", "mlp_norm_scale_D"] == 1).all() and not weights["layers", "fc1_bias_F"].any()
    first, second = (encode(tower, pack([make_signal(70, 1, 25.0, seed)]))[0, :3] for seed in (1, 2))
    assert np.abs(first - second).mean() > 0.1 * np.abs(first).mean()


def test_packed_together_equals_alone_and_gradients_add_up_in_one_compilation(mesh):
    tower, signals = make_tower(), some_signals()
    traced = len(TRACED)
    together, gradients = encode_and_differentiate(tower, pack(signals))
    alone = [encode_and_differentiate(tower, pack([signal])) for signal in signals]
    assert len(TRACED) == traced + 1
    tokens = [signal.tokens for signal in signals]
    expected = jnp.concatenate([embeddings[0, :n] for (embeddings, _), n in zip(alone, tokens, strict=True)])
    assert_close(together[0, : sum(tokens)], expected, ROUNDING)
    assert not np.asarray(together[0, sum(tokens) :]).any()
    assert_close(gradients, jax.tree.map(lambda *g: sum(g), *(g for _, g in alone)), 5 * ROUNDING)

    embeddings, gradients = encode_and_differentiate(tower, pack([]))
    assert not np.asarray(embeddings).any() and not any(np.asarray(g).any() for g in jax.tree.leaves(gradients))
    assert len(TRACED) == traced + 1


def test_larger_sizes_change_nothing(mesh):
    tower, signals = make_tower(), some_signals()
    exact = encode(tower, pack(signals, sizes=required_sizes([signals])))
    assert exact.shape[1] == sum(signal.tokens for signal in signals)
    assert_close(encode(tower, pack(signals, sizes=SIZES))[:, : exact.shape[1]], exact, ROUNDING)


def test_a_token_sees_its_past_and_a_little_ahead(mesh):
    """The two convolutions look ahead by two pairs of patches: token t reads the samples before (4t + 7) * stride, no more."""
    tower, signal = make_tower(), make_signal(70, 1, 1.0)
    expected = np.asarray(encode(tower, pack([signal])))[0]
    for token in (0, 3):
        end = (4 * token + 7) * signal.plan.stride
        for changed_from, unchanged in ((end, token + 1), (end - 1, token)):
            values = signal.values.copy()
            values[changed_from] += 3
            actual = np.asarray(encode(tower, pack([dataclasses.replace(signal, values=values)])))[0]
            np.testing.assert_array_equal(actual[:unchanged], expected[:unchanged])
            assert (np.abs(actual[unchanged : signal.tokens] - expected[unchanged : signal.tokens]).max(-1) > 0).all()


def test_positions_past_the_end_of_the_table_are_zero(mesh):
    tower, signal = make_tower(), make_signal(70, 1, 1.0)
    missing = signal.tokens - CONFIG.max_source_positions
    assert missing > 0
    expected = encode(tower, pack([signal]))
    tower.position_ND = nnx.Param(jnp.pad(tower.position_ND[...], ((0, missing), (0, 0))))
    assert_close(encode(tower, pack([signal])), expected, ROUNDING)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_constant_and_very_short_signals_are_finite(mesh, dtype):
    config = dataclasses.replace(CONFIG, dtype=dtype)
    tower = make_tower(config)
    signals = [prepare_signal(np.full(40, 7.0)), prepare_signal([3.0]), prepare_signal([[1.0, 2.0], [2.0, 1.0]], 40.0)]
    embeddings = encode(tower, pack(signals))
    tokens = sum(signal.tokens for signal in signals)
    assert embeddings.dtype == dtype and np.isfinite(embeddings).all()
    assert (np.abs(embeddings[0, :tokens]).max(-1) > 0).all() and not np.asarray(embeddings[0, tokens:]).any()


def uneven_packs() -> TimeSeriesInputs:
    """Eight packs of different contents, two of them empty."""
    signals = some_signals()
    return pack_time_series([signals[: p % 5] for p in range(8)], CONFIG, sizes=SIZES)


@pytest.fixture(scope="module")
def single_device() -> Any:
    """Embeddings and gradients on one device."""
    with jax.set_mesh(make_mesh()):
        return jax.device_get(encode_and_differentiate(make_tower(), place(uneven_packs())))


@pytest.mark.parametrize(("fsdp", "expert"), [(1, 8), (2, 4), (8, 1)])
def test_eight_devices_equal_one(fsdp, expert, single_device):
    with jax.set_mesh(make_mesh(fsdp=fsdp, expert=expert)):
        tower = make_tower()
        embeddings, gradients = encode_and_differentiate(tower, place(uneven_packs(), "batch"))
        assert jax.typeof(embeddings).sharding.spec == spec("batch", None, None)
        for gradient, weight in zip(jax.tree.leaves(gradients), jax.tree.leaves(nnx.state(tower)), strict=True):
            assert gradient.sharding.is_equivalent_to(weight.sharding, weight.ndim)
    expected, expected_gradients = single_device
    assert_close(embeddings, expected, 1e-5)
    assert_close(gradients, expected_gradients, 1e-5)
