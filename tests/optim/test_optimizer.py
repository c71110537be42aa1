"""Laws of the optimizer: AdamW by definition, what decays, and that a non-finite step changes nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from interns1pro_jax.config import ConfigError, ModelConfig, TextConfig, TimeSeriesConfig, VisionConfig
from interns1pro_jax.models.interns1pro import InternS1Pro
from interns1pro_jax.optim.optimizer import OptimizerConfig, decay_mask, make_optimizer
from interns1pro_jax.optim.schedule import constant
from interns1pro_jax.sharding import make_mesh, spec


def small_params(seed=0, dtype="float32"):
    keys = jax.random.split(jax.random.key(seed), 3)
    sharding = jax.NamedSharding(jax.sharding.get_mesh(), spec("embed", None))
    return nnx.State(
        {
            "w_DF": nnx.Param(jax.device_put(jax.random.normal(keys[0], (16, 4), dtype), sharding)),
            "embed_VD": nnx.Param(jax.random.normal(keys[1], (4, 16), dtype)),
            "norm_D": nnx.Param(jax.random.normal(keys[2], (16,), dtype)),
        }
    )


def adamw_by_definition(params, grads_of_steps, rate, config, decayed):
    """arXiv:1711.05101, algorithm 2, with clipping; float64 numpy."""
    params = {k: np.asarray(v, np.float64) for k, v in params.items()}
    m = {k: np.zeros_like(v) for k, v in params.items()}
    v = {k: np.zeros_like(x) for k, x in params.items()}
    for t, grads in enumerate(grads_of_steps, 1):
        grads = {k: np.asarray(g, np.float64) for k, g in grads.items()}
        norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
        scale = min(1.0, config.clip_norm / norm)
        for k, g in grads.items():
            m[k] = config.b1 * m[k] + (1 - config.b1) * g * scale
            v[k] = config.b2 * v[k] + (1 - config.b2) * (g * scale) ** 2
            adam = (m[k] / (1 - config.b1**t)) / (np.sqrt(v[k] / (1 - config.b2**t)) + config.eps)
            params[k] = params[k] - rate * (adam + config.weight_decay * decayed[k] * params[k])
    return params


def values(state):
    return {path[-1]: np.asarray(x) for path, x in nnx.to_flat_state(nnx.as_pure(state))}


@pytest.mark.parametrize("clip_norm", [0.5, 1e3])
def test_adamw_equals_its_definition(mesh, clip_norm):
    config = OptimizerConfig(clip_norm=clip_norm, weight_decay=0.3)
    optimizer = make_optimizer(config, constant(0.05))
    params = small_params()
    grads = [small_params(seed) for seed in (1, 2, 3)]
    expected = adamw_by_definition(
        values(params), [values(g) for g in grads], 0.05, config, {"w_DF": True, "embed_VD": False, "norm_D": False}
    )
    update, opt_state = jax.jit(optimizer.update), optimizer.init(params)
    for step, g in enumerate(grads):
        result = update(g, opt_state, params, jnp.int32(step), jnp.float32(1))
        params, opt_state = result.params, result.opt_state
    assert bool(result.applied)
    for name, value in values(params).items():
        np.testing.assert_allclose(value, expected[name], rtol=2e-6, atol=2e-6)


def test_moments_have_their_parameters_sharding():
    with jax.set_mesh(make_mesh(fsdp=2, expert=4)):
        params = small_params()
        optimizer = make_optimizer(OptimizerConfig(), constant(0.1))
        result = jax.jit(optimizer.update)(params, optimizer.init(params), params, jnp.int32(0), jnp.float32(0))
        (adam,) = (s for s in result.opt_state if hasattr(s, "mu"))
        for moment in (adam.mu, adam.nu):
            assert jax.tree.map(lambda x: x.sharding, moment) == jax.tree.map(lambda x: x.sharding, params)


def test_bfloat16_moments_are_stored_so_and_stay_close(mesh):
    results = {}
    for dtype in ("float32", "bfloat16"):
        optimizer = make_optimizer(OptimizerConfig(moment_dtype=dtype), constant(0.05))
        params = small_params(dtype="bfloat16")
        opt_state = optimizer.init(params)
        for step in range(3):
            result = optimizer.update(small_params(step, "bfloat16"), opt_state, params, jnp.int32(step), jnp.float32(1))
            params, opt_state = result.params, result.opt_state
        (adam,) = (s for s in opt_state if hasattr(s, "mu"))
        assert {x.dtype for x in jax.tree.leaves((adam.mu, adam.nu))} == {jnp.dtype(dtype)}
        results[dtype] = values(params)
    for name, value in results["float32"].items():
        assert value.dtype == jnp.bfloat16
        np.testing.assert_allclose(results["bfloat16"][name].astype(np.float32), value.astype(np.float32), atol=0.02)


@pytest.mark.parametrize("poison", ["loss", "gradient"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_nonfinite_step_changes_nothing_and_does_not_shift_the_schedule(mesh, poison, value):
    optimizer = make_optimizer(OptimizerConfig(), lambda step: 0.1 * (step + 1))
    params = small_params()
    opt_state = optimizer.update(small_params(1), optimizer.init(params), params, jnp.int32(0), jnp.float32(1)).opt_state
    grads = small_params(2)
    if poison == "gradient":
        grads["norm_D"] = grads["norm_D"].replace(grads["norm_D"][...].at[3].set(value))
    loss = jnp.float32(value if poison == "loss" else 1)
    result = jax.jit(optimizer.update)(grads, opt_state, params, jnp.int32(1), loss)
    assert not bool(result.applied)
    jax.tree.map(np.testing.assert_array_equal, (result.params, result.opt_state), (params, opt_state))
    following = optimizer.update(small_params(2), opt_state, params, jnp.int32(2), jnp.float32(1))
    assert bool(following.applied) and np.isclose(following.learning_rate, 0.3)


def test_decay_takes_the_matrices_of_the_model_and_nothing_else(mesh):
    config = ModelConfig(
        TextConfig(
            vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_experts=16,
            router_n_groups=8, moe_intermediate_size=16, intermediate_size=64, mlp_only_layers=(0,), attention_bias=True,
            max_position_embeddings=128,
        ),
        VisionConfig(
            depth=2, hidden_size=32, num_heads=2, intermediate_size=64, patch_size=4, num_position_embeddings=16, out_hidden_size=32
        ),
        TimeSeriesConfig(
            d_model=32, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=64, max_source_positions=64, num_mel_bins=8,
            ts_adapt_out_dim=32, ts_hidden_dim=32, out_hidden_size=32,
        ),
    )  # fmt: skip
    params = nnx.state(nnx.eval_shape(lambda: InternS1Pro(config, rngs=nnx.Rngs(0))), nnx.Param)
    stacks = {"runs", "layers", "blocks"}  # modules whose parameters have a leading axis of layers

    def is_vector(path, param):
        return len(param.shape) - bool(stacks & set(path)) == 1 or "bias" in path[-1]

    shapes = dict(nnx.to_flat_state(params))
    masks = {everything: dict(nnx.to_flat_state(decay_mask(params, everything))) for everything in (False, True)}
    tables = {path for path in shapes if masks[True][path] and not masks[False][path]}
    assert {path for path, param in shapes.items() if not masks[True][path]} == {p for p, x in shapes.items() if is_vector(p, x)}
    assert tables == {("text", "embed_VD"), ("vision", "position_ND"), ("time_series", "position_ND")}


@pytest.mark.parametrize(
    "wrong", [dict(b1=1.0), dict(b2=-0.1), dict(eps=0.0), dict(weight_decay=-1.0), dict(clip_norm=0.0), dict(moment_dtype="float16")]
)
def test_impossible_values_are_named(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(ConfigError, match=f"{name}={value!r}"):
        OptimizerConfig(**wrong)
