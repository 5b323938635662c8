"""Padding takes part in nothing that is reported."""

import jax.numpy as jnp
import numpy as np

from gptoss_jax.model import forward
from tests.support.params import lively_params


def test_padding_does_not_count_in_router_statistics(tiny_config):
    params = lively_params(tiny_config)
    tokens = np.arange(20, dtype=np.int32)[None]
    segments = (np.arange(20) < 14).astype(np.int32)[None]
    router = forward(tiny_config, params, tokens, segments, dtype=jnp.float32).router
    np.testing.assert_array_equal(router.num_tokens, 14)
    np.testing.assert_allclose(router.assignments_E.sum(-1), 14 * tiny_config.num_experts_per_tok)
    alone = forward(tiny_config, params, tokens[:, :14], dtype=jnp.float32).router
    for got, want in zip(router, alone):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
