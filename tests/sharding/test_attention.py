"""Attention cut over batch, heads and length: outputs and gradients are those of one device, in float64 to rounding."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptoss_jax.errors import UsageError
from gptoss_jax.ops.attention import attention
from gptoss_jax.ops.attention.reference import attention_reference
from gptoss_jax.sharding import ShardingRules, attention_parallel, make_mesh, param_shardings
from gptoss_jax.sharding.rules import DEFAULT_TABLE
from tests.support.cuda import lower_for_cuda

B, T, N, K, H = 2, 48, 6, 2, 10


def inputs(length=T):
    """A row of three documents, and one with padding on both sides: what is before the row must not be seen either."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((B, length, heads, H)) for heads in (N, K, K))
    token = np.arange(length)
    segments = np.stack([1 + (token > length // 3) + (token > length // 2), (token >= 2) & (token < length - 5)]).astype(np.int32)
    return q, k, v, rng.standard_normal(N), segments


def value_and_grads(function, args):
    cotangent = np.random.default_rng(1).standard_normal(args[0].shape)

    @jax.jit
    def run(*args):
        out, pull = jax.vjp(lambda *floats: function(*floats, args[4]), *args[:4])
        return out, *pull(cotangent)

    return jax.device_get(run(*args))


# (mesh, length of the row, window): halves dealt out on 2 and 8 devices and an odd length that is not; windows of one token, within a neighbour,
# over several neighbours, and longer than the row
CASES = [
    (dict(context=2), T, None),
    (dict(context=8), T, None),
    (dict(context=8), 40, None),
    (dict(context=4, tensor=2), T, None),
    (dict(fsdp=2, context=2, tensor=2), T, 7),
    (dict(context=8), T, 1),
    (dict(context=8), T, 6),
    (dict(context=8), T, 21),
    (dict(context=4), T, 100),
]


@pytest.mark.parametrize("sizes,length,window", CASES, ids=lambda x: "-".join(f"{k}{v}" for k, v in x.items()) if isinstance(x, dict) else str(x))
def test_outputs_and_gradients_equal_one_device(sizes, length, window):
    with jax.enable_x64(True):
        args = inputs(length)
        run = attention_parallel(make_mesh(**sizes))(partial(attention, window=window), window)
        expected = value_and_grads(partial(attention_reference, window=window), args)
        for got, want in zip(value_and_grads(run, args), expected):
            assert got.dtype == np.float64
            np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-12)


def collectives(function, *shapes):
    text = jax.jit(function).lower(*shapes).compile().as_text()
    return {name for name in ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter") if f" {name}(" in text}


def test_sliding_layers_exchange_the_halo_alone_and_heads_nothing():
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in inputs()]
    forward = lambda window, **sizes: attention_parallel(make_mesh(**sizes))(partial(attention, window=window), window)
    assert collectives(forward(7, context=4), *shapes) == {"collective-permute"}
    assert collectives(forward(None, context=4), *shapes) == {"all-gather", "collective-permute"}
    assert collectives(forward(None, data=2, tensor=2), *shapes) == set()


def test_every_device_sees_the_same_number_of_keys(monkeypatch):
    """Full layers: the starts of the two halves of queries that a device computes add up to the same everywhere."""
    seen = []

    def run(q_BTNH, k_BSKH, v_BSKH, sinks_N, segment_ids_BT, keys):
        jax.debug.callback(lambda device, start: seen.append((int(device), int(start))), jax.lax.axis_index("context"), keys.start)
        return q_BTNH

    args = inputs()
    out = attention_parallel(make_mesh(context=4))(run, None)(*args)
    jax.effects_barrier()
    np.testing.assert_array_equal(out, np.float32(args[0]))
    by_device = {device: sorted(start for where, start in seen if where == device) for device in range(4)}
    assert by_device == {0: [0, 42], 1: [6, 36], 2: [12, 30], 3: [18, 24]}


@pytest.mark.parametrize("window", [None, 128])
def test_lowers_for_cuda_with_triton_kernels_at_the_size_of_20b(window):
    shape = lambda *dims, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(dims, dtype)
    q, kv, sinks, segments = shape(1, 8192, 64, 64), shape(1, 8192, 8, 64), shape(64, dtype=jnp.float32), shape(1, 8192, dtype=jnp.int32)
    run = attention_parallel(make_mesh(context=4, tensor=2))(partial(attention, window=window, backend="triton"), window)
    grads = jax.grad(lambda *args: jnp.sum(run(*args).astype(jnp.float32)), argnums=(0, 1, 2, 3))
    text = lower_for_cuda(grads, q, kv, kv, sinks, segments)
    assert all(f'name = "{kernel}"' in text for kernel in ("forward_kernel", "dq_kernel", "dkv_kernel"))


def test_heads_that_the_mesh_does_not_divide_are_refused(tiny_config):
    with pytest.raises(UsageError, match=r"num_key_value_heads = 2 does not divide by tensor = 4; it divides by \[1, 2\]"):
        param_shardings(tiny_config, make_mesh(tensor=4))
    with pytest.raises(UsageError, match="must be the same"):
        param_shardings(tiny_config, make_mesh(tensor=2), ShardingRules({**DEFAULT_TABLE, "kv_heads": ()}))
