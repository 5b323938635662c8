"""The embedding on meshes: rows and gradients are those of one device, and the table stays where it lies."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptoss_jax.ops.embedding import embedding
from gptoss_jax.sharding import ShardingRules, embedding_parallel, make_mesh
from gptoss_jax.sharding.rules import DEFAULT_TABLE

B, T, V, D = 8, 12, 40, 24
MESHES = [dict(fsdp=2, expert=2, context=2), dict(data=2, fsdp=2, tensor=2), dict(tensor=4)]


def run(lookup, dtype):
    rng = np.random.default_rng(0)
    weight, tokens = rng.standard_normal((V, D)), rng.integers(0, V, (B, T)).astype(np.int32)
    tokens[:, ::2] = 7  # half of all tokens are the same
    cotangent = rng.standard_normal((B, T, D))
    function = lambda weight: jnp.sum(cotangent * lookup(weight, tokens, dtype))
    return jax.jit(lambda weight: (lookup(weight, tokens, dtype), jax.grad(function)(weight)))(weight)


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_rows_and_gradient_equal_one_device(sizes):
    with jax.enable_x64(True):
        rows, gradient = run(lambda weight, tokens, dtype: embedding(weight, tokens).astype(dtype), jnp.float64)
        got_rows, got_gradient = run(embedding_parallel(make_mesh(**sizes)), jnp.float64)
        np.testing.assert_array_equal(got_rows, rows)
        np.testing.assert_allclose(got_gradient, gradient, rtol=1e-12, atol=1e-12)


def test_neither_table_nor_gradient_travels():
    mesh = make_mesh(fsdp=4, context=2)
    place = lambda shape, dtype, *spec: jax.ShapeDtypeStruct(shape, dtype, sharding=jax.NamedSharding(mesh, jax.P(*spec)))
    weight, tokens = place((160, D), jnp.float32, None, ("fsdp", "context")), place((B, T), jnp.int32, "fsdp", "context")
    lookup = embedding_parallel(mesh)
    value = lambda weight, tokens: jnp.sum(lookup(weight, tokens, jnp.bfloat16).astype(jnp.float32) ** 2)
    text = jax.jit(jax.grad(value), out_shardings=weight.sharding).lower(weight, tokens).compile().as_text()
    kinds = "all-gather|reduce-scatter|all-reduce|all-to-all|collective-permute"
    # groups of one device each, the sum over axes that are not there, send nothing
    found = {(kind, dtype) for dtype, kind in re.findall(rf"= \(?(\w+)\[.*? ({kinds})\(.*?replica_groups=..\d+,", text)}
    assert found == {("all-gather", "s32"), ("all-to-all", "f32")}, "ids are gathered, rows exchanged (XLA:CPU has float32 for bfloat16 here)"


def test_rules_under_which_a_device_without_tokens_holds_columns_are_left_to_the_compiler():
    lookup = embedding_parallel(make_mesh(tensor=2), ShardingRules({**DEFAULT_TABLE, "vocab": (), "embed": ("tensor",)}))
    weight, tokens = jnp.arange(V * D, dtype=jnp.float32).reshape(V, D), jnp.arange(B * T).reshape(B, T) % V
    np.testing.assert_array_equal(jax.jit(lookup, static_argnums=2)(weight, tokens, jnp.float32), weight[tokens])
