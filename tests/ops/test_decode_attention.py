"""One token against a cache equals the last row of dense attention, whatever the slots held before, with sinks and rings."""

import jax.numpy as jnp
import numpy as np
import pytest

from gptoss_jax.ops.attention.decode import decode_attention, slot_positions
from gptoss_jax.ops.attention.reference import attention_reference

N, K, H, LENGTH = 6, 2, 20, 40


def test_a_slot_holds_the_latest_position_that_falls_on_it():
    for slots in (1, 7, 50):
        lengths = np.arange(30)
        got = np.asarray(slot_positions(jnp.asarray(lengths), slots))
        for n in lengths:
            want = [max((p for p in range(n) if p % slots == s), default=None) for s in range(slots)]
            assert [p if p >= 0 else None for p in got[n]] == want


@pytest.mark.parametrize("window, slots", [(None, LENGTH), (None, 64), (7, 7), (7, 64), (1, 1)])
def test_equals_the_last_row_of_dense_attention(window, slots):
    """Rows of different lengths, from none to several turns of the ring. Slots without a visible token hold large numbers."""
    lengths = np.array([0, 1, 6, 7, 8, 13, 14, 33, LENGTH - 1])
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(len(lengths), LENGTH, heads, H)).astype(np.float32) for heads in (N, K, K))
    sinks = rng.normal(size=N).astype(np.float32)
    past_k, past_v = (np.full((len(lengths), K, slots, H), 1e3, np.float32) for _ in range(2))
    for b, n in enumerate(lengths):
        for p in range(n):
            past_k[b, :, p % slots], past_v[b, :, p % slots] = k[b, p], v[b, p]
    rows = np.arange(len(lengths))
    new = q[rows, lengths], k[rows, lengths], v[rows, lengths]
    got = decode_attention(*new, past_k, past_v, sinks, jnp.asarray(lengths), window)
    want = attention_reference(q, k, v, sinks, jnp.ones((len(lengths), LENGTH), jnp.int32), window)
    np.testing.assert_allclose(got, np.asarray(want)[rows, lengths], atol=1e-6)
