"""Routing to blocks, dispatch, combine and the grouped matmul: values and gradients against dense oracles, one class for all backends."""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptoss_jax.ops import grouped_matmul as package
from gptoss_jax.ops.grouped_matmul import RowGroups, combine, dispatch, group_rows, grouped_matmul, triton, xla
from gptoss_jax.ops.grouped_matmul.reference import grouped_matmul_reference
from gptoss_jax.ops.grouped_matmul.tiles import Tile
from gptoss_jax.ops.grouped_matmul.xla import cut
from tests.ops.routing import KINDS, routing

S, A, E, M = 23, 3, 8, 32  # 32 rows in a block: two tiles of 16
TINY = Tile(rows=16, cols=16, depth=16, stages=2, warps=1)
TOLERANCE = {"float32": dict(rtol=1e-5, atol=1e-5), "bfloat16": dict(rtol=2**-8, atol=1e-5)}  # of the sums; bfloat16 rounds them once
# (forward, backward); the Triton kernels run as plain JAX
BACKENDS = {
    "xla": (xla.forward, xla.backward),
    "triton": (partial(triton.forward, tile=TINY, interpret=True), partial(triton.backward, tile=TINY, interpret=True)),
}


@pytest.mark.parametrize("block", [1, 4, 7, 64])
@pytest.mark.parametrize("kind", KINDS)
def test_every_assignment_has_one_slot_in_a_block_of_its_expert(kind, block):
    experts = routing(kind, S, E, A)
    groups = group_rows(experts, E, block)
    slots = np.asarray(groups.slot_SA).ravel()
    assert len(set(slots.tolist())) == S * A
    np.testing.assert_array_equal(np.asarray(groups.assignment_P)[slots], np.arange(S * A))
    np.testing.assert_array_equal(np.asarray(groups.block_expert_G)[slots // block], np.asarray(experts).ravel())
    assert slots.max() < int(groups.num_blocks) * block <= groups.assignment_P.shape[0]
    np.testing.assert_array_equal(groups.group_sizes_E, np.bincount(np.asarray(experts).ravel(), minlength=E))


def operands(groups: RowGroups, inputs: int, outputs: int, dtype="float32"):
    """x and dy are zero on padding, as dispatch and combine leave them."""
    keys = jax.random.split(jax.random.key(7), 4)
    is_row_P1 = (groups.assignment_P < S * A)[:, None]
    rows = lambda key, width: jnp.where(is_row_P1, jax.random.normal(key, (is_row_P1.shape[0], width)), 0).astype(dtype)
    w_ENK = jax.random.normal(keys[1], (E, outputs, inputs)).astype(dtype)
    bias_EN = jax.random.normal(keys[2], (E, outputs)).astype(dtype)
    return rows(keys[0], inputs), w_ENK, bias_EN, rows(keys[3], outputs)


@partial(jax.jit, static_argnums=0)
def products(backend, x_PK, w_ENK, bias_EN, dy_PN, groups):
    """(y, dx, dw, dbias)"""
    forward, backward = BACKENDS[backend]
    return forward(x_PK, w_ENK, bias_EN, groups), *backward(dy_PN, x_PK, w_ENK, groups)


def used_slots(groups) -> np.ndarray:
    return np.arange(groups.assignment_P.shape[0]) < int(groups.num_blocks) * groups.block_rows


@pytest.mark.parametrize("backend", BACKENDS)
class TestBackends:
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    @pytest.mark.parametrize("inputs, outputs", [(20, 38), (32, 48)])  # no multiples of the tile, and multiples of it, which go without masks
    @pytest.mark.parametrize("kind", ["random", "one_takes_all", "empty_experts"])
    def test_products_match_dense_float64(self, backend, kind, inputs, outputs, dtype):
        groups = group_rows(routing(kind, S, E, A), E, M)
        x, w, bias, dy = arrays = operands(groups, inputs, outputs, dtype)
        y, dx, dw, dbias = products(backend, *arrays, groups)
        assert y.dtype == dx.dtype == dtype and dw.dtype == dbias.dtype == "float32"

        used = used_slots(groups)
        x64, w64, bias64, dy64 = (np.asarray(a, np.float64) for a in (x, w, bias, dy))
        of_expert_EP = (np.repeat(groups.block_expert_G, M) == np.arange(E)[:, None]) & used
        y64 = np.einsum("ep,pk,enk->pn", of_expert_EP, x64, w64) + np.einsum("ep,en->pn", of_expert_EP, bias64)
        dx64 = np.einsum("ep,pn,enk->pk", of_expert_EP, dy64, w64)
        np.testing.assert_allclose(np.asarray(y, np.float64), y64, **TOLERANCE[dtype])
        np.testing.assert_allclose(np.asarray(dx, np.float64), dx64, **TOLERANCE[dtype])
        np.testing.assert_allclose(dw, np.einsum("ep,pn,pk->enk", of_expert_EP, dy64, x64), **TOLERANCE["float32"])
        np.testing.assert_allclose(dbias, np.einsum("ep,pn->en", of_expert_EP, dy64), **TOLERANCE["float32"])
        if kind == "random":
            reference = grouped_matmul_reference(x, w, bias, groups)
            np.testing.assert_allclose(np.asarray(y, np.float64)[used], np.asarray(reference, np.float64)[used], **TOLERANCE[dtype])

    def test_nan_stays_with_its_expert(self, backend):
        """NaN in expert 6's rows, in slots that no block uses, and in everything of experts without rows."""
        groups = group_rows(routing("empty_experts", S, E, A), E, M)  # experts 5, 6, 7
        x, w, bias, dy = operands(groups, 20, 38)
        clean = products(backend, x, w, bias, dy, groups)
        used, expert_P = used_slots(groups), np.repeat(groups.block_expert_G, M)
        assert not used.all()
        poisoned_P1 = (~used | (expert_P == 6))[:, None]
        without_rows = np.asarray(groups.group_sizes_E) == 0
        nan_in = lambda a, where: jnp.where(where, jnp.nan, a)
        y, dx, dw, dbias = products(backend, 
            nan_in(x, poisoned_P1), nan_in(w, without_rows[:, None, None]), nan_in(bias, without_rows[:, None]), nan_in(dy, poisoned_P1), groups
        )
        healthy_P = ~used | (expert_P != 6)
        for got, want in zip((y, dx), clean[:2]):
            np.testing.assert_array_equal(np.asarray(got)[healthy_P], np.asarray(want)[healthy_P])
            assert not np.asarray(got)[~used].any()
        for got, want in zip((dw, dbias), clean[2:]):
            np.testing.assert_array_equal(np.delete(got, 6, axis=0), np.delete(want, 6, axis=0))
            assert not np.asarray(got)[without_rows].any()

    def test_gradients_through_the_public_function(self, backend, monkeypatch):
        monkeypatch.setattr(package, "_module", lambda name: SimpleNamespace(**dict(zip(("forward", "backward"), BACKENDS[name]))))
        groups = group_rows(routing("random", S, E, A), E, M)
        _, w, bias, _ = operands(groups, 20, 38)
        keys = jax.random.split(jax.random.key(1), 3)
        x, weights, cotangent = jax.random.normal(keys[0], (S, 20)), jax.random.uniform(keys[1], (S, A)), jax.random.normal(keys[2], (S, 38))
        experts = routing("random", S, E, A)

        def ours(x, w, bias, weights):
            return jnp.sum(combine(grouped_matmul(dispatch(x, groups), w, bias, groups, backend), weights, groups) * cotangent)

        def dense(x, w, bias, weights):
            chosen = jnp.take_along_axis(jnp.einsum("sk,enk->sen", x, w) + bias, experts[..., None], axis=1)
            return jnp.sum(jnp.einsum("san,sa->sn", chosen, weights) * cotangent)

        gradients = lambda loss: jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))(x, w, bias, weights)
        for got, want in zip(gradients(ours), gradients(dense)):
            np.testing.assert_allclose(got, want, **TOLERANCE["float32"])


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_cover_every_used_block_once_and_stay_with_one_expert(kind):
    groups = group_rows(routing(kind, 200, E, A), E, 4)
    covered = np.zeros(groups.assignment_P.shape[0], int)
    expert_P = np.repeat(groups.block_expert_G, 4)
    for pieces in cut(groups):
        for j in range(int(pieces.count)):
            rows = slice(int(pieces.start_J[j]), int(pieces.start_J[j]) + pieces.rows)
            covered[rows] += 1
            assert (expert_P[rows] == int(pieces.expert_J[j])).all()
    np.testing.assert_array_equal(covered, used_slots(groups))


def test_work_follows_routed_rows_not_experts():
    """Of 32 experts two have rows: the rows in pieces are theirs, rounded up to blocks."""
    groups = group_rows(jnp.tile(jnp.array([[3, 17]]), (250, 1)), 32, 32)
    assert sum(pieces.rows * int(pieces.count) for pieces in cut(groups)) == 2 * 256
