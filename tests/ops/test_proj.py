"""The projection's own gradient rule against JAX's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpost.ops.proj import matmul


@pytest.mark.parametrize("shape", [(5, 3), (2, 4, 3)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_gradients_are_those_of_the_plain_product(shape, dtype):
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], shape).astype(dtype)
    weight = jax.random.normal(keys[1], (3, 7)).astype(dtype)
    target = jax.random.normal(keys[2], (*shape[:-1], 7))

    def loss(product, x, weight):
        return jnp.sum((product(x, weight).astype(jnp.float32) - target) ** 2)

    mine, plain = (jax.grad(loss, (1, 2))(f, x, weight) for f in (matmul, jnp.matmul))
    for a, b in zip(mine, plain, strict=True):
        assert a.dtype == dtype and a.shape == b.shape
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        # A sum over tokens is rounded to 8 bits, by some versions after each term.
        bound = 1e-6 if dtype == jnp.float32 else 2.0**-7
        np.testing.assert_allclose(a, b, rtol=0, atol=bound * np.abs(b).max())
