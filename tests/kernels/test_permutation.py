"""Single numbers are put in the order that a permutation says, in one window of scalar memory or in several."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as emulator
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.permutation import invert, permute, permute_reference

EMULATED = pltpu.InterpretParams(detect_races=True)


@pytest.mark.parametrize("size, window", [(50, 64), (100, 64)])
def test_equals_the_definition(size, window):
    dest = np.random.default_rng(0).permutation(size).astype(np.int32)
    x = jax.random.normal(jax.random.key(0), (size,))
    got = permute(x, jnp.asarray(dest), window=window, block=16, interpret=EMULATED)
    np.testing.assert_array_equal(np.asarray(got)[dest], x)
    np.testing.assert_array_equal(got, permute_reference(x, jnp.asarray(dest)))
    np.testing.assert_array_equal(invert(jnp.asarray(dest), window=window, block=16, interpret=EMULATED), np.argsort(dest))
    assert emulator.races is None or not emulator.races.races_found


@pytest.mark.parametrize(
    "x, dest, error, message",
    [
        (jnp.zeros(3), jnp.zeros(4, jnp.int32), ValueError, r"the same length, got shapes \(3,\) and \(4,\)"),
        (jnp.zeros(4, jnp.bfloat16), jnp.zeros(4, jnp.int32), TypeError, "32 bits, got bfloat16"),
        (jnp.zeros(4), jnp.zeros(4, jnp.uint32), TypeError, "dest_M must be int32, got uint32"),
    ],
)
def test_misuse_is_an_error_while_tracing(x, dest, error, message):
    with pytest.raises(error, match=message):
        permute(x, dest)
