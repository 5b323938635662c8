"""Rows that travel only to the devices of their experts: what arrives, what comes back, and that either is the other's gradient."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptoss_jax.model.moe import StoredExperts, run_experts
from gptoss_jax.quant import plain_cast
from gptoss_jax.sharding import expert_parallel, make_mesh
from gptoss_jax.sharding.experts import choose_transport
from gptoss_jax.sharding.transport import expected_share, from_experts, make_route, to_experts
from tests.support.cuda import lower_for_cuda

P, S, A, D = 4, 6, 3, 5
AXES = ("expert",)


def owners():
    """Random, but: device 0 needs every token, nobody needs device 2, and all experts of one token are on one device."""
    rng = np.random.default_rng(0)
    owner_PSA = rng.choice([0, 1, 3, P], (P, S, A))
    owner_PSA[:, :, 1] = 0
    owner_PSA[1, 2] = 3
    owner_PSA[3] = P  # and one device sends nothing
    return owner_PSA.astype(np.int32)


def on_devices(function, *arrays):
    """`function` on the part of each device; results one after the other."""
    spec = jax.P("expert")
    return jax.jit(jax.shard_map(function, mesh=make_mesh(expert=P), in_specs=(jax.P(), *[spec] * len(arrays)), out_specs=spec, check_vma=False))(
        owners(), *arrays
    )


def needed():
    """[P, S, P]: whether a token is needed on a device."""
    return (owners()[..., None] == np.arange(P)).any(2)


def test_each_row_arrives_once_where_it_is_needed_and_nowhere_else():
    x_PSD = np.random.default_rng(1).standard_normal((P, S, D)).astype(np.float32)
    got = on_devices(lambda owner, x: to_experts(x[0], make_route(owner, AXES), AXES)[None], x_PSD)
    for device, received_QSD in enumerate(np.asarray(got).reshape(P, P, S, D)):
        for source in range(P):
            rows = x_PSD[source][needed()[source, :, device]]
            np.testing.assert_array_equal(received_QSD[source], np.pad(rows, [(0, S - len(rows)), (0, 0)]))


def test_back_comes_the_sum_over_the_devices_that_had_the_token():
    y_PQSD = np.random.default_rng(2).standard_normal((P, P, S, D)).astype(np.float32)
    got = on_devices(lambda owner, y: from_experts(y[0].reshape(P * S, D), make_route(owner, AXES), AXES)[None], y_PQSD)
    expected_PSD = np.zeros((P, S, D))
    for device in range(P):
        for source in range(P):
            there = needed()[source, :, device]
            expected_PSD[source, there] += y_PQSD[device, source, : there.sum()]
    np.testing.assert_allclose(got, expected_PSD, atol=1e-6)


# every kind of exchange: over `expert` alone, with experts cut over tensor too, and with experts stored over fsdp
MESHES = [dict(expert=4), dict(expert=2, tensor=2), dict(data=2, expert=2, fsdp=2)]


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_outputs_and_gradients_are_those_of_the_gather(sizes):
    rng = np.random.default_rng(3)
    experts, width, hidden = 8, 16, 12
    with jax.enable_x64(True):
        arrays = [rng.standard_normal(shape) for shape in ((8, 6, hidden), (8, 6, A), (experts, 2 * width, hidden), (experts, 2 * width),
                                                           (experts, hidden, width), (experts, hidden))]  # fmt: skip
        bias_E = np.array([0, 0, 0, 9, -1, 0, 0, 0])  # expert 3 is never chosen, 4 always
        chosen_BTA = np.argsort(rng.random((8, 6, experts)) + bias_E, axis=-1)[..., :A].astype(np.int32)
        cotangent = rng.standard_normal((8, 6, hidden))
        run = partial(run_experts, expert_quant=plain_cast(jnp.float64), limit=7.0, backend="xla")

        def results(transport):
            layer = expert_parallel(make_mesh(**sizes), transport=transport)(run, False)

            def loss(x, weights, *stored):
                out, num_rows, _ = layer(x, chosen_BTA, weights, StoredExperts(*stored))
                return jnp.sum(cotangent * out), (out, jnp.sum(num_rows))

            return jax.jit(jax.value_and_grad(loss, argnums=tuple(range(6)), has_aux=True))(*arrays)

        ((_, (out, num_rows)), grads), ((_, expected), expected_grads) = results("ragged"), results("gather")
        np.testing.assert_allclose(out, expected[0], rtol=1e-10, atol=1e-12)
        assert num_rows == expected[1] == chosen_BTA.size
        for got, want in zip(grads, expected_grads):
            assert np.abs(want).max() > 0
            np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-12)


def test_lowers_for_cuda_to_ragged_all_to_all_at_the_size_of_120b():
    shape = lambda *dims, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(dims, dtype)
    stored = shape(128, 5760, 2880), shape(128, 5760), shape(128, 2880, 2880), shape(128, 2880)
    layer = expert_parallel(make_mesh(expert=8), transport="ragged")(
        partial(run_experts, expert_quant=plain_cast(jnp.bfloat16), limit=7.0, backend="triton"), False
    )
    loss = lambda x, weights, chosen, *stored: jnp.sum(layer(x, chosen, weights, StoredExperts(*stored))[0].astype(jnp.float32))
    args = shape(8, 4096, 2880), shape(8, 4096, 4, dtype=jnp.float32), shape(8, 4096, 4, dtype=jnp.int32), *stored
    text = lower_for_cuda(jax.grad(loss, argnums=(0, 1, 3)), *args)
    assert text.count("@ragged_all_to_all") == 3, "rows there, and gradients of results there and of rows back; nobody asks for the results"
    gathered = [line for line in text.splitlines() if "stablehlo.all_gather" in line]
    assert gathered and not any("2880" in line for line in gathered), "choices, weights and places are gathered, rows are not"
    assert "stablehlo.all_to_all" not in text


def test_auto_is_ragged_on_gpus_where_it_saves():
    assert expected_share(32, 4, 8) == pytest.approx(1 - (28 * 27 * 26 * 25) / (32 * 31 * 30 * 29))
    assert choose_transport("auto", True, 32, 4, 8) == "ragged" and choose_transport("auto", True, 32, 4, 2) == "gather"
    assert choose_transport("auto", False, 32, 4, 8) == "gather" and choose_transport("ragged", False, 32, 4, 2) == "ragged"
