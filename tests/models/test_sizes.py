"""The released model, built abstractly: parameter totals of spec 1, sharded as the table says."""

import jax
from flax import nnx
from jax.sharding import PartitionSpec

from interns1pro_jax.config import ModelConfig
from interns1pro_jax.models.interns1pro import InternS1Pro
from interns1pro_jax.sharding import make_mesh


def test_released_sizes_and_shardings():
    with jax.set_mesh(make_mesh(expert=8)):
        model = nnx.eval_shape(lambda: InternS1Pro(ModelConfig(), rngs=nnx.Rngs(0)))
    totals = {name: sum(x.size for x in jax.tree.leaves(nnx.state(getattr(model, name)))) for name in ("text", "vision", "time_series")}
    coefficients = 2 * 4 * 45 * 45
    assert totals == {"text": 916_555_836_928 + coefficients, "vision": 339_807_232, "time_series": 145_973_200}
    experts = model.text.runs[0].moe.wi_EDF.get_value()
    assert experts.shape == (94, 512, 4096, 3072)
    assert experts.sharding.spec == PartitionSpec(None, ("expert",), ("fsdp",), None)
