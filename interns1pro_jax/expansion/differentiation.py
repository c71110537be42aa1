"""How far the copies of an expert have grown apart, and how evenly experts are used."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from interns1pro_jax.config import ConfigError
from interns1pro_jax.models.inputs import ModelInputs
from interns1pro_jax.models.interns1pro import InternS1Pro
from interns1pro_jax.ops.norm import rms_norm

_PROBED = 256  # tokens on which the experts' outputs are compared


def copies_of(slots_GS: Int[np.ndarray, "G S"], growth: int) -> Int[np.ndarray, "E k"]:
    """The slots that copy each expert of the source, in ascending order."""
    return np.argsort(slots_GS.ravel(), kind="stable").reshape(-1, growth)


def copy_statistics(model: InternS1Pro, inputs: ModelInputs, copies_LEk: Int[Array, "L E k"]) -> dict[str, Array]:
    """Distances between the copies of one expert, means over the experts and MoE layers of a grown model; for use under jit.

    `weights_cosine` between the copies' weights; `router_cosine` between their router rows; `router_overlap`: tokens that chose both of two
    copies, as a share of those that chose either (Jaccard); `output_difference`: root mean square of the difference of two copies' outputs
    on the same tokens, relative to that of independent outputs of the same size (0 equal, 1 unrelated).

    Raises:
      ConfigError: the model has dense layers, or the experts are split over devices: this is a measurement for small models.
    """
    text = model.config.text
    if len(text.layer_runs) != 1 or jax.sharding.get_abstract_mesh().size > 1:
        raise ConfigError("copies are compared on one device, in models whose layers all have experts.")
    out = model(inputs, trace=True)
    assert out.trace is not None
    (trace,) = out.trace
    block = model.text.runs[0]
    assert trace.hidden_BTD is not None and trace.mlp_BTD is not None and trace.ids_BTGC is not None
    growth = copies_LEk.shape[-1]
    pairs = growth * (growth - 1)

    def layer(hidden_BTD, mlp_BTD, ids_BTGC, norm_D, wi_EDF, wo_EFD, kernel_DE, copies_Ek):  # type: ignore[no-untyped-def]
        experts = wi_EDF.shape[0]
        h_ND = rms_norm(hidden_BTD - mlp_BTD, norm_D, text.rms_norm_eps).reshape(-1, hidden_BTD.shape[-1])
        gate, up = jnp.split(jnp.einsum("nd,edf->enf", h_ND[:_PROBED], wi_EDF), 2, -1)
        outputs_E = jnp.einsum("enf,efd->end", jax.nn.silu(gate) * up, wo_EFD).reshape(experts, -1)
        weights_E = jnp.concatenate([wi_EDF.reshape(experts, -1), wo_EFD.reshape(experts, -1)], -1)
        ids = (ids_BTGC + text.experts_per_group * jnp.arange(text.router_n_groups)[:, None]).reshape(-1, text.num_experts_per_tok)
        chosen_EN = jax.nn.one_hot(ids, experts).sum(1).T

        def cosine(vectors_E: Array) -> Array:
            unit = (vectors_E / jnp.linalg.norm(vectors_E, axis=-1, keepdims=True))[copies_Ek]
            return ((jnp.square(unit.sum(1)).sum(-1) - growth) / pairs).mean()

        both_Ekk = jnp.einsum("ekn,ejn->ekj", chosen_EN[copies_Ek], chosen_EN[copies_Ek])
        count_Ek = chosen_EN.sum(-1)[copies_Ek]
        either_Ekk = count_Ek[:, :, None] + count_Ek[:, None, :] - both_Ekk
        apart = 1 - jnp.eye(growth)
        copies_Ekx = outputs_E[copies_Ek]
        between_copies = jnp.square(copies_Ekx - copies_Ekx.mean(1, keepdims=True)).sum()
        return {
            "weights_cosine": cosine(weights_E),
            "router_cosine": cosine(kernel_DE.T),
            "router_overlap": (both_Ekk * apart).sum() / jnp.maximum((either_Ekk * apart).sum(), 1),
            "output_difference": jnp.sqrt(growth / (growth - 1) * between_copies / jnp.square(copies_Ekx).sum()),
        }

    moe = block.moe
    values = (
        trace.hidden_BTD,
        trace.mlp_BTD,
        trace.ids_BTGC,
        block.mlp_norm_D[...],
        moe.wi_EDF[...],
        moe.wo_EFD[...],
        moe.router.kernel_DE[...],
    )
    whole = [jax.sharding.reshard(x, PartitionSpec()) for x in (*values, copies_LEk)]
    results = jax.vmap(layer)(*whole)
    return jax.tree.map(jnp.mean, results)


def use_of_experts(load_LE: Float[np.ndarray, "L E"], groups: int, devices: int) -> dict[str, float]:
    """How evenly tokens use experts, from each expert's number of tokens.

    `device_load_max`: rows of the fullest of `devices`, which hold contiguous experts, relative to the mean, in the worst layer;
    `expert_load_max`: the same for an expert within its group, mean over the layers; `unused_experts`: share of experts without a token.
    """
    load_LDe = load_LE.reshape(len(load_LE), devices, -1).sum(-1)
    load_LGe = load_LE.reshape(len(load_LE), groups, -1)
    return {
        "device_load_max": float((load_LDe.max(-1) / load_LDe.mean(-1)).max()),
        "expert_load_max": float((load_LGe.max(-1) / load_LGe.mean(-1)).max(-1).mean()),
        "unused_experts": float((load_LE == 0).mean()),
    }
