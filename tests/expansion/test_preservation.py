"""Where the construction says that the output stays the same, it does, on any number of devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from interns1pro_jax.checkpoint.hf_export import export_model
from interns1pro_jax.checkpoint.hf_import import load_model
from interns1pro_jax.checkpoint.safetensors_io import open_checkpoint
from interns1pro_jax.expansion.assignment import ExpansionConfig, assign
from interns1pro_jax.expansion.checkpoint import expand_checkpoint, fingerprint, moe_layers
from interns1pro_jax.expansion.manifest import Manifest
from interns1pro_jax.expansion.routing_counts import count_routing
from interns1pro_jax.layers.moe import Moe
from interns1pro_jax.models.interns1pro import create_model
from interns1pro_jax.sharding import constrain, make_mesh
from tests.expansion.conftest import source_config
from tests.tiny import random_inputs, text_config

COMPUTE = jax.jit(lambda model, inputs: model.text.logits(model(inputs).hidden_BTD))


def test_a_top_1_model_does_not_change_where_every_group_holds_all_experts(tmp_path):
    """Eight groups of all eight experts, FoPE from RoPE with no frequency clipped; one, two, four and eight expert-parallel devices."""
    config = source_config(num_experts_per_tok=1, max_position_embeddings=32768, num_hidden_layers=2, mlp_only_layers=())
    inputs = random_inputs(rows=8)
    with jax.set_mesh(make_mesh()):
        model = create_model(config)
        wanted = COMPUTE(model, inputs)
        export_model(model, config, tmp_path / "source")
    source = open_checkpoint(tmp_path / "source")
    expansion = ExpansionConfig(growth=8, groups=8, experts_per_token=8, method="copy")
    manifest = Manifest(fingerprint(source, config), expansion, None, moe_layers(config), assign(expansion, 2, 8))
    grown = expand_checkpoint(source, config, manifest, tmp_path / "grown")
    assert grown.text.fope is not None and grown.text.num_experts == 64
    for degree in (1, 2, 4, 8):
        with jax.set_mesh(make_mesh(expert=degree)):
            logits = COMPUTE(load_model(tmp_path / "grown", grown), inputs)
        np.testing.assert_allclose(logits, wanted, rtol=0, atol=2e-6 * float(jnp.abs(wanted).max()), err_msg=f"{degree} devices")


@pytest.mark.parametrize("normalised", [True, False])
def test_a_layer_keeps_the_output_of_the_tokens_whose_top_two_every_cut_separates(mesh, normalised):
    """And gives all others the sum that the package's formula says."""
    sizes = dict(num_experts=16, num_experts_per_tok=2, router_n_groups=1, norm_topk_prob=normalised)
    source_text, expansion = text_config(**sizes), ExpansionConfig(experts_per_token=8)
    layer = Moe(source_text, rngs=nnx.Rngs(0))
    x_BTD = jax.random.normal(jax.random.key(1), (1, 256, source_text.hidden_size))

    @nnx.jit
    def apply(layer, x):
        x = constrain(x, "batch", "sequence", None)
        routing, _, logits = layer.router(x, valid_BT=jnp.ones(x.shape[:2], bool))
        return *layer((x,), (routing,)), routing, logits

    wanted_BTD, routing, logits_BTE = apply(layer, x_BTD)
    ids_LNK = np.asarray(routing.ids_BTGC).reshape(1, 256, 2)
    counts = count_routing(ids_LNK, np.ones(256, bool), 16, depth=2)
    slots_GS = assign(expansion, 1, 16, counts)[0]

    text = text_config(**sizes | dict(num_experts=64, num_experts_per_tok=8, router_n_groups=8))
    grown = Moe(text, rngs=nnx.Rngs(1))
    for new, old, axis in (
        (grown.router.kernel_DE, layer.router.kernel_DE, 1),
        (grown.wi_EDF, layer.wi_EDF, 0),
        (grown.wo_EFD, layer.wo_EFD, 0),
    ):
        new.set_value(jax.device_put(np.asarray(old[...]).take(slots_GS.ravel(), axis), new[...].sharding))
    found_BTD, routing, _ = apply(grown, x_BTD)

    first, second = ids_LNK[0].T
    holds_GE = (slots_GS[:, :, None] == np.arange(16)).any(1)
    kept_N = ~(holds_GE[:, first] & holds_GE[:, second]).any(0)
    assert 0.2 < kept_N.mean() < 0.95
    found_ND, wanted_ND = np.asarray(found_BTD)[0], np.asarray(wanted_BTD)[0]
    scale = np.abs(wanted_ND).max()
    np.testing.assert_allclose(found_ND[kept_N], wanted_ND[kept_N], rtol=0, atol=2e-6 * scale)
    assert (np.abs(found_ND - wanted_ND)[~kept_N].max(-1) > 1e-3 * scale).all()

    p_NE = np.asarray(jax.nn.softmax(logits_BTE[0]), np.float64)
    weight_NG = np.stack([np.where(holds, p_NE, 0).max(-1) for holds in holds_GE], -1)
    best_NG = np.stack([np.where(holds, p_NE, -1).argmax(-1) for holds in holds_GE], -1)
    weight_NG = weight_NG / weight_NG.sum(-1, keepdims=True) if normalised else weight_NG / expansion.growth
    wi_EDF, wo_EFD = np.asarray(layer.wi_EDF[...], np.float64), np.asarray(layer.wo_EFD[...], np.float64)
    gate_NEF, up_NEF = np.split(np.einsum("nd,edf->nef", np.asarray(x_BTD[0], np.float64), wi_EDF), 2, -1)
    every_NED = np.einsum("nef,efd->ned", gate_NEF / (1 + np.exp(-gate_NEF)) * up_NEF, wo_EFD)
    formula_ND = np.einsum("ng,ngd->nd", weight_NG, every_NED[np.arange(256)[:, None], best_NG])
    np.testing.assert_allclose(found_ND, formula_ND, rtol=0, atol=2e-6 * scale)
