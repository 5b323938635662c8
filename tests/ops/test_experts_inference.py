"""Experts without gradients equal those of training, for any number of rows, any form of the weights, any place in the stack."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from gptoss_jax.formats import mxfp4
from gptoss_jax.ops.experts import expert_mlp, inference
from gptoss_jax.ops.experts.inference import expert_mlp_inference, group_few_rows
from gptoss_jax.ops.grouped_matmul import group_rows, mxfp4_triton, triton
from gptoss_jax.ops.grouped_matmul.tiles import Tile
from gptoss_jax.ops.swiglu import clamped_swiglu

L, E, A, D, F = 3, 8, 3, 96, 64
LIMIT = 7.0
TINY = Tile(rows=16, cols=32, depth=32, stages=2, warps=1)


def operands(rows: int, dtype="float32"):
    """x, chosen experts, weights; the four parameters of L layers in one stack."""
    rng = np.random.default_rng(rows)
    normal = lambda *shape, scale=1.0: jnp.asarray(scale * rng.normal(size=shape), dtype)
    experts = np.stack([rng.permutation(E)[:A] for _ in range(rows)]).astype(np.int32)
    weights = jnp.asarray(rng.dirichlet(np.ones(A), rows), jnp.float32)
    params = normal(L * E, 2 * F, D, scale=0.3), normal(L * E, 2 * F), normal(L * E, D, F, scale=0.3), normal(L * E, D)
    return normal(rows, D), jnp.asarray(experts), weights, params


@pytest.mark.parametrize("rows", [1, 2, 9, 85, 100])
def test_equals_the_experts_of_training(rows):
    """One token, few rows, and from 86 tokens on the pieces of training."""
    x, experts, weights, params = operands(rows)
    without = jax.jit(lambda first: expert_mlp_inference(x, experts, weights, *params, first=first, num_experts=E, limit=LIMIT, backend="xla"))
    training = jax.jit(lambda params: expert_mlp(x, experts, weights, *params, limit=LIMIT, backend="xla"))
    for layer in (0, 2):
        want = training([p[layer * E : (layer + 1) * E] for p in params])
        got = without(layer * E)
        np.testing.assert_allclose(got, want, atol=1e-5 * float(jnp.abs(want).max()))


@pytest.mark.parametrize("rows", [1, 9, 100])
def test_parts_of_the_experts_add_up(rows):
    """As on devices that hold 3 and 5 of 8 experts, told apart by the number past their own."""
    x, experts, weights, params = operands(rows)
    run = lambda part, chosen, count, elsewhere: expert_mlp_inference(
        x, chosen, weights, *part, first=0, num_experts=count, limit=LIMIT, backend="xla", elsewhere=elsewhere
    )
    one = [p[:E] for p in params]
    parts = [([p[start:end] for p in one], np.where((experts >= start) & (experts < end), experts - start, end - start), end - start)
             for start, end in ((0, 3), (3, 8))]  # fmt: skip
    want = run(one, experts, E, False)
    got = sum(run(part, jnp.asarray(chosen, jnp.int32), count, True) for part, chosen, count in parts)
    np.testing.assert_allclose(got, want, atol=1e-5 * float(jnp.abs(want).max()))


@pytest.mark.parametrize("rows", [1, 9, 100])
def test_bits_of_bfloat16_and_packed_codes_give_the_bits_of_plain_weights(rows):
    x, experts, weights, (up, bias_up, down, bias_down) = operands(rows, "bfloat16")
    codes = [mxfp4.encode(w) for w in (up, down)]

    @jax.jit
    def run(up, down):
        return expert_mlp_inference(x, experts, weights, up, bias_up, down, bias_down, first=E, num_experts=E, limit=LIMIT, backend="xla")

    as_bits = lambda w: lax.bitcast_convert_type(w, jnp.uint16)
    plain = [mxfp4.decode(q, jnp.bfloat16) for q in codes]
    want = run(*plain)
    assert want.dtype == jnp.bfloat16 and jnp.isfinite(want).all()
    for form in (map(as_bits, plain), codes):
        np.testing.assert_array_equal(np.asarray(run(*form), np.float32), np.asarray(want, np.float32))


@pytest.mark.parametrize("packed", [False, True])
def test_kernels_find_the_layer_in_the_stack(packed):
    """Triton kernels, interpreted, with plain and with packed weights."""
    x, experts, weights, (up, bias_up, down, bias_down) = operands(9)
    codes = [mxfp4.encode(w) for w in (up, down)]
    values = [mxfp4.decode(q, jnp.float32) for q in codes]
    run = lambda up, down: (x, experts, weights, up, bias_up, down, bias_down)
    want = expert_mlp_inference(*run(*values), first=2 * E, num_experts=E, limit=LIMIT, backend="xla")
    forward = partial((mxfp4_triton if packed else triton).forward, tile=TINY, interpret=True)
    up, down = codes if packed else values
    groups = group_few_rows(experts, E, 16)
    got = inference.composed(x, weights, (up, bias_up, down, bias_down), groups, 2 * E, partial(clamped_swiglu, limit=LIMIT), forward)
    np.testing.assert_allclose(got, want, atol=1e-5 * float(jnp.abs(want).max()))


@pytest.mark.parametrize("tokens, per_token, experts, rows", [(8, 4, 32, 8), (32, 4, 8, 16), (64, 4, 128, 8), (2, 1, 1, 8), (5, 3, 8, 1)])
def test_grouping_by_comparison_equals_grouping_by_sorting(tokens, per_token, experts, rows):
    rng = np.random.default_rng(0)
    chosen = jnp.asarray(np.stack([rng.permutation(experts)[:per_token] for _ in range(tokens)]), jnp.int32)
    both = jax.jit(lambda chosen: (group_few_rows(chosen, experts, rows), group_rows(chosen, experts, rows)))
    for got, want in zip(*both(chosen), strict=True):
        assert got.dtype == want.dtype
        np.testing.assert_array_equal(got, want)


def test_no_product_for_rows_that_do_not_exist():
    """Experts that nobody chose may hold anything."""
    x, experts, weights, params = operands(9)
    unused = sorted(set(range(E)) - set(np.asarray(experts).ravel().tolist())) or [E - 1]
    experts = jnp.where(jnp.isin(experts, jnp.asarray(unused)), (experts + 1) % E, experts)
    broken = [p.at[jnp.asarray(unused)].set(jnp.nan) for p in params]
    run = jax.jit(lambda *rows: expert_mlp_inference(*rows, *broken, first=0, num_experts=E, limit=LIMIT, backend="xla"))
    for rows in (1, 9):
        assert jnp.isfinite(run(x[:rows], experts[:rows], weights[:rows])).all()
