import collections
import dataclasses
import json
import math
import re

import jax
import numpy as np
import pytest
from flax import nnx

from interns1pro_jax.checkpoint.hf_names import Layout, hf_parameters
from interns1pro_jax.config import ModelConfig, TimeSeriesConfig
from interns1pro_jax.models.interns1pro import InternS1Pro
from interns1pro_jax.sharding import make_mesh


def test_the_official_config_gives_exactly_the_released_names_and_shapes(reference):
    config = ModelConfig.from_hf(reference / "official")
    released = json.loads((reference / "key_patterns.json").read_text())
    found: dict[str, tuple[tuple[int, ...], int]] = {}
    for parameter in hf_parameters(config):
        for _, _, name in parameter.tensors():
            pattern = re.sub(
                r"experts\.\d+\.", "experts.{E}.", re.sub(r"layers\.\d+\.", "layers.{L}.", re.sub(r"blocks\.\d+\.", "blocks.{B}.", name))
            )
            shape, count = found.get(pattern, (parameter.layout.stored_shape, 0))
            assert shape == parameter.layout.stored_shape
            found[pattern] = shape, count + 1
    assert found == {name: (tuple(entry["shape"]), entry["count"]) for name, entry in released["patterns"].items()}
    assert sum(math.prod(parameter.shape) for parameter in hf_parameters(config)) == released["totals"]["all_with_buffers"]


@pytest.mark.parametrize("name", ["official", "tiny", "tiny_fp8", "variant_shared_coef_topk", "variant_plain_rope_2per_group"])
def test_the_table_is_the_model(reference, name):
    config = ModelConfig.from_hf(reference / name)
    if name == "official":
        config = dataclasses.replace(config, time_series=TimeSeriesConfig())
    with jax.set_mesh(make_mesh(expert=1)):
        state = nnx.state(nnx.eval_shape(lambda: InternS1Pro(config, rngs=nnx.Rngs(0))))
    model = {".".join(map(str, path)): variable.get_value().shape for path, variable in nnx.to_flat_state(state)}
    for experts in ("separate", "fused", "fused_transposed"):
        assert {parameter.path: parameter.shape for parameter in hf_parameters(config, experts=experts)} == model


def test_every_stored_tensor_belongs_to_one_place(reference):
    places = collections.Counter(
        name for parameter in hf_parameters(ModelConfig.from_hf(reference / "tiny")) for *_, name in parameter.tensors()
    )
    assert set(places.values()) == {1}


LAYOUTS = ["(Q H) D -> D Q H", "D (Q H) -> Q H D", "(C Q H) D -> D C Q H", "D c t y -> (c t y) D", "D 1 X -> X D", "D b X -> X b D", "V D"]
SIZES = dict(zip("QHDCctyXbV", (2, 3, 5, 3, 2, 4, 3, 5, 4, 6), strict=True))


@pytest.mark.parametrize("text", LAYOUTS)
def test_a_layout_can_be_inverted(text):
    layout = Layout.parse(text, SIZES)
    stored = np.arange(math.prod(layout.stored_shape)).reshape(layout.stored_shape)
    ours = layout.apply(stored)
    assert ours.shape == layout.shape
    np.testing.assert_array_equal(layout.inverse().apply(ours), stored)


def test_a_layout_puts_elements_where_it_says():
    stored = np.arange(30).reshape(6, 5)
    ours = Layout.parse("(Q H) D -> D Q H", SIZES).apply(stored)
    assert all(ours[d, q, h] == stored[q * 3 + h, d] for d in range(5) for q in range(2) for h in range(3))


@pytest.mark.parametrize("text", LAYOUTS)
def test_the_restricted_layout_reads_the_part_and_nothing_else(text):
    layout = Layout.parse(text, SIZES)
    stored = np.arange(math.prod(layout.stored_shape)).reshape(layout.stored_shape)
    ours = layout.apply(stored)
    random = np.random.default_rng(0)
    for _ in range(50):
        index = []
        for size in layout.shape:
            start = random.integers(size)
            index.append(slice(int(start), int(random.integers(start, size)) + 1))
        where, part_layout, rest = layout.restrict(index)
        np.testing.assert_array_equal(part_layout.apply(stored[where])[rest], ours[tuple(index)])
        only_width = [slice(0, size) for size in layout.shape]
        axis = layout.ours.index(("D",))
        only_width[axis] = index[axis]
        where, _, _ = layout.restrict(only_width)
        assert stored[where].size == ours[tuple(only_width)].size
