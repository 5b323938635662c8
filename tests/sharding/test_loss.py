"""The cross-entropy on meshes: that of one device, and logits never travel."""

import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptoss_jax.ops.cross_entropy import blocks, cross_entropy_sum
from gptoss_jax.ops.cross_entropy.reference import cross_entropy_sum_reference
from gptoss_jax.sharding import DEFAULT_RULES, ShardingRules, loss_parallel, make_mesh
from gptoss_jax.sharding.rules import DEFAULT_TABLE

B, V, D = 4, 40, 24
WHOLE_VOCABULARY = ShardingRules({**DEFAULT_TABLE, "vocab": ()})  # so that the devices of `tensor` have nothing but tokens to share
MESHES = {
    "length": (dict(fsdp=2, context=4), 16, DEFAULT_RULES),
    "length-and-vocabulary": (dict(data=2, context=2, tensor=2), 12, DEFAULT_RULES),
    "vocabulary": (dict(tensor=8), 15, DEFAULT_RULES),
    "length-and-tensor": (dict(data=2, context=2, tensor=2), 12, WHOLE_VOCABULARY),
    "length-that-tensor-does-not-divide": (dict(fsdp=4, tensor=2), 15, WHOLE_VOCABULARY),
}


def inputs(length, dtype):
    rng = np.random.default_rng(0)
    hidden, w, weights = rng.standard_normal((B, length, D)), rng.standard_normal((V, D)), rng.random((B, length))
    return hidden.astype(dtype), w.astype(dtype), rng.integers(0, V, (B, length)).astype(np.int32), weights.astype(dtype)


def on_mesh(sizes, dtype, rules=DEFAULT_RULES):
    run = lambda *arrays, gathers=(), vocab=(): cross_entropy_sum(*arrays, jnp.dtype(dtype), gathers, vocab)
    return loss_parallel(make_mesh(**sizes), rules)(run)


@pytest.fixture(autouse=True)
def several_blocks(monkeypatch):
    monkeypatch.setattr(blocks, "MAX_BLOCK_LOGITS", 3 * V)


@pytest.mark.parametrize("sizes,length,rules", MESHES.values(), ids=MESHES)
def test_loss_and_gradients_equal_one_device(sizes, length, rules):
    with jax.enable_x64(True):
        hidden, w, targets, weights = inputs(length, np.float64)
        run = lambda function: jax.jit(jax.value_and_grad(lambda hidden, w: 3 * function(hidden, w, targets, weights), argnums=(0, 1)))(hidden, w)
        expected = run(partial(cross_entropy_sum_reference, dtype=jnp.float64))
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-12), run(on_mesh(sizes, "float64", rules)), expected)
        only_value = jax.jit(on_mesh(sizes, "float64", rules))(hidden, w, targets, weights)
        np.testing.assert_allclose(3 * only_value, expected[0], rtol=1e-12)


def largest_moved(sizes):
    """Elements of the largest array of each kind of collective, compiled with the layout of parameters and batch."""
    mesh = make_mesh(**sizes)
    place = lambda x, *spec: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.NamedSharding(mesh, jax.P(*spec)))
    hidden, w, targets, weights = (jnp.tile(x, (2, *[1] * (x.ndim - 1))) if x.shape[0] == B else x for x in inputs(16, np.float32))
    grads = jax.jit(jax.grad(on_mesh(sizes, "bfloat16"), argnums=(0, 1)))
    args = place(hidden.astype(jnp.bfloat16), "fsdp"), place(w, "tensor", "fsdp"), place(targets, "fsdp"), place(weights, "fsdp")
    compiled = grads.lower(*args).compile()
    moved = {}
    kinds = "all-gather|reduce-scatter|all-reduce|all-to-all|collective-permute"
    for dims, kind in re.findall(rf"= \w+\[([\d,]*)\]\S* ({kinds})\(", compiled.as_text()):
        moved[kind] = max(moved.get(kind, 0), math.prod(int(n) for n in dims.split(",") if n))
    return moved


def test_what_travels_is_the_unembedding_and_its_gradient():
    """Whole [V, D] once each, the loss itself, and nothing of the size of logits."""
    assert largest_moved(dict(fsdp=8)) == {"all-gather": V * D, "reduce-scatter": V * D // 8, "all-reduce": 1}


def test_where_the_vocabulary_is_cut_what_travels_are_rows_of_gradients():
    """No unembedding, and of the logits a maximum and a sum per token: what remains is the gradient of hidden."""
    assert largest_moved(dict(tensor=8)) == {"all-reduce": 2 * B * 16 * D}
