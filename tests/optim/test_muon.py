"""Laws of Muon: by definition, on any mesh, without moving weights that need not move; of groups: what is frozen has nothing."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from interns1pro_jax.config import ConfigError, LoraConfig
from interns1pro_jax.layers.lora import trained_kind
from interns1pro_jax.optim.muon import MuonConfig, letters_of, orthogonalize
from interns1pro_jax.optim.optimizer import OptimizerConfig, make_optimizer
from interns1pro_jax.optim.schedule import constant
from interns1pro_jax.sharding import make_mesh, spec
from interns1pro_jax.train import hlo
from interns1pro_jax.train.state import abstract_init
from tests.tiny import multimodal, text_config

SHARDED = dict(data=1, fsdp=2, context=1, expert=4)
# Parameters by their names, with logical dimensions: stacked experts, attention, a tower's fused projection, on meshes that do and do not
# divide the number of matrices.
PARAMETERS = {
    "text/runs/0/moe/wi_EDF": ((3, 8, 16, 12), (None, "expert", "expert_embed", None)),
    "text/runs/0/moe/wo_EFD": ((3, 8, 6, 16), (None, "expert", None, "expert_embed")),
    "text/runs/0/attention/q_DQH": ((3, 16, 2, 4), (None, "embed", None, None)),
    "text/runs/0/attention/o_QHD": ((3, 2, 4, 16), (None, None, None, "embed")),
    "vision/blocks/qkv_DCQH": ((2, 16, 3, 2, 4), (None, "tower_embed", None, None, None)),
    "vision/merger/fc2_FD": ((8, 16), (None, "tower_embed")),
    "time_series/adapt_in_ED": ((8, 16), (None, None)),
}


def values(name):
    return np.random.default_rng(len(name)).normal(size=PARAMETERS[name][0]).astype(np.float32)


def matrices(name, x):
    """The matrices of a parameter as a list; written out by hand."""
    match name.rpartition("/")[2]:
        case "wi_EDF":
            return [half for layer in x for expert in layer for half in np.split(expert, 2, axis=1)]
        case "wo_EFD":
            return [expert for layer in x for expert in layer]
        case "q_DQH":
            return [layer.reshape(16, 8) for layer in x]
        case "o_QHD":
            return [layer.reshape(8, 16) for layer in x]
        case "qkv_DCQH":
            return [layer[:, c].reshape(16, 8) for layer in x for c in range(3)]
        case "fc2_FD" | "adapt_in_ED":
            return [x]


@pytest.fixture(scope="module")
def orthogonal():
    """Of every parameter on one device and on eight, and the compiled program of the latter."""
    results = {}
    for sizes in ({}, SHARDED):
        mesh = make_mesh(**sizes)
        with jax.set_mesh(mesh):
            given = {name: jax.device_put(values(name), jax.NamedSharding(mesh, spec(*dims))) for name, (_, dims) in PARAMETERS.items()}
            function = jax.jit(lambda given: {name: orthogonalize(x, name, iterations=5, rms=0.2) for name, x in given.items()})
            program = function.lower(given).compile()
            results[len(mesh.devices.flat)] = program(given), hlo.collectives(program.as_text(), mesh)
    return results


def test_every_matrix_is_orthogonalised_by_itself(orthogonal):
    for name, x in orthogonal[1][0].items():
        for got, matrix in zip(matrices(name, np.asarray(x)), matrices(name, values(name)), strict=True):
            u, singular, v = np.linalg.svd(matrix.astype(np.float64), full_matrices=False)
            scale = 0.2 * np.sqrt(max(matrix.shape))
            found = u.T @ (got / scale) @ v.T  # diagonal: the singular vectors stay, the values go near 1
            np.testing.assert_allclose(found - np.diag(np.diag(found)), 0, atol=0.12, err_msg=name)  # bfloat16 turns vectors of near values
            assert (np.abs(np.diag(found) - 0.95)[singular > 0.05 * singular[0]] < 0.35).all(), name


def test_eight_devices_equal_one(orthogonal):
    for name, x in orthogonal[8][0].items():
        np.testing.assert_allclose(x, orthogonal[1][0][name], atol=0.02, err_msg=name)
        assert x.sharding.spec == spec(*PARAMETERS[name][1]), name


def test_only_shares_of_weights_are_exchanged(orthogonal):
    """Two all-to-alls of each parameter, of experts over fsdp alone; nothing is gathered or reduced."""
    kinds = [(c.kind, c.axes) for c in orthogonal[8][1]]
    assert sorted(kinds) == sorted(
        2 * [("all-to-all", ("fsdp",))] * 2 + 2 * [("all-to-all", ("fsdp", "expert"))] * 2 + 2 * [("all-to-all", ("expert",))] * 2
    )


def test_muon_takes_matrices_and_adamw_the_rest_of_a_model():
    with jax.set_mesh(make_mesh(fsdp=2, expert=4)):
        optimizer = make_optimizer(OptimizerConfig(muon=MuonConfig(), moment_dtype="bfloat16"), constant(0.1))
        _, state = abstract_init(multimodal(), optimizer)
    (chain,) = (s for s in state.opt_state if hasattr(s, "inner_states"))
    muon, adam = (chain.inner_states[name].inner_state for name in ("muon", "adam"))
    with_muon, with_adam = (
        {"/".join(map(str, path)) for path, x in nnx.to_flat_state(moments) if isinstance(x, nnx.Variable)}
        for moments in (muon.momentum, adam.mu)
    )
    everything = {"/".join(map(str, path)) for path, _ in nnx.to_flat_state(state.params)}
    assert with_muon | with_adam == everything and not with_muon & with_adam
    assert {name for name in with_muon if "text" in name and "runs/0" in name} == {
        f"text/runs/0/{name}"
        for name in ("attention/q_DQH", "attention/k_DKH", "attention/v_DKH", "attention/o_QHD", "moe/wi_EDF", "moe/wo_EFD")
    }
    assert {name for name in with_adam if not re.search("bias|norm|scale", name)} == {
        "text/embed_VD", "text/lm_head_DV", "text/runs/0/moe/router/kernel_DE", "vision/patch_kernel_ID", "vision/position_ND",
        "time_series/position_ND", "time_series/conv1_XDE", "time_series/conv2_XEE", "time_series/patch_encoder/conv_XD",
    }  # fmt: skip
    assert not any(letters_of(name) for name in with_adam)
    assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves((muon.momentum, adam.mu, adam.nu)))


def test_muon_without_matrices_is_refused(mesh):
    with_adapters = dataclasses.replace(multimodal(), text=text_config(lora=LoraConfig()))
    optimizer = make_optimizer(OptimizerConfig(muon=MuonConfig()), constant(0.1), trained_kind(with_adapters))
    with pytest.raises(ConfigError, match=r"adapters \(TextConfig.lora\) are trained by AdamW.*Drop OptimizerConfig.muon"):
        abstract_init(with_adapters, optimizer)


def test_frozen_parts_have_neither_gradients_nor_moments(mesh):
    optimizer = make_optimizer(OptimizerConfig(freeze=("vision", "projector", "language")), constant(0.1))
    graph, state = abstract_init(multimodal(), optimizer)
    assert set(state.params) == {"time_series"}
    count = len(jax.tree.leaves(state.params))
    assert len(jax.tree.leaves(state.opt_state)) == 2 * count + 1  # two moments each, and a counter
    assert nnx.merge(graph, state.params, state.buffers).text.embed_VD.shape == (96, 32)


def test_groups_have_their_learning_rate(mesh):
    config = OptimizerConfig(learning_rates={"router": 0.5, "text/.*/kernel_DE": 0.5, "text/final": 2.0}, clip_norm=None, weight_decay=0)
    params = nnx.State({"text": {"moe": {"router": {"kernel_DE": nnx.Param(jnp.ones(3))}}, "final_norm_D": nnx.Param(jnp.ones(3))}})
    optimizer = make_optimizer(config, constant(0.1))
    new = optimizer.update(params, optimizer.init(params), params, jnp.int32(0), jnp.float32(0)).params["text"]
    np.testing.assert_allclose(1 - new["moe"]["router"]["kernel_DE"][...], 0.025, rtol=1e-5)  # both groups count
    np.testing.assert_allclose(1 - new["final_norm_D"][...], 0.2, rtol=1e-5)


@pytest.mark.parametrize("wrong", [dict(freeze=("visoin",)), dict(learning_rates={"rooter": 2.0}), dict(freeze=("",))])
def test_groups_that_are_not_there_are_named(mesh, wrong):
    with pytest.raises(ConfigError, match=r"'visoin'|'rooter'|leaves no parameter"):
        abstract_init(dataclasses.replace(multimodal()), make_optimizer(OptimizerConfig(**wrong), constant(0.1)))
