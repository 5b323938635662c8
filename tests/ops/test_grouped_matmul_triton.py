"""The Triton grouped matmul: its operations run in plain JAX against dense oracles, its programs lowered for CUDA, its tiles against the cards."""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptoss_jax.formats import mxfp4
from gptoss_jax.ops import grouped_matmul as package
from gptoss_jax.ops.grouped_matmul import RowGroups, combine, dispatch, group_rows, grouped_matmul, mxfp4_triton, triton
from gptoss_jax.ops.grouped_matmul.reference import grouped_matmul_reference
from gptoss_jax.ops.grouped_matmul.tiles import SHARED_BYTES, TILES, Tile, choose_tile
from tests.support.triton_ir import TARGETS, lower_for_cuda

S, A, E, M = 23, 3, 8, 32  # 32 rows in a block: two tiles of 16
TINY = Tile(rows=16, cols=16, depth=16, stages=2, warps=1)
TOLERANCE = {"float32": dict(rtol=1e-5, atol=1e-5), "bfloat16": dict(rtol=2**-8, atol=1e-5)}  # of the sums; bfloat16 rounds them once


def routing(kind: str):
    """[S, A] distinct experts per token."""
    if kind == "one_takes_all":
        return jnp.tile(jnp.array([[5, 0, 1]]), (S, 1))
    if kind == "empty_experts":
        return jnp.stack([jax.random.permutation(jax.random.key(s), 3) + 4 for s in range(S)])
    return jnp.stack([jax.random.permutation(jax.random.key(s), E)[:A] for s in range(S)])


@partial(jax.jit, static_argnames="tile")
def all_products(x_PK, w_ENK, bias_EN, dy_PN, groups, tile=TINY):
    """(y, dx, dw, dbias)"""
    return (
        triton.forward(x_PK, w_ENK, bias_EN, groups, tile, interpret=True),
        triton.input_gradient(dy_PN, w_ENK, groups, tile, interpret=True),
        *triton.weight_gradient(dy_PN, x_PK, groups, tile, interpret=True),
    )


def operands(groups: RowGroups, inputs: int, outputs: int, dtype="float32"):
    """x and dy are zero on padding, as dispatch and combine leave them."""
    keys = jax.random.split(jax.random.key(7), 4)
    is_row_P1 = (groups.assignment_P < S * A)[:, None]
    rows = lambda key, width: jnp.where(is_row_P1, jax.random.normal(key, (is_row_P1.shape[0], width)), 0).astype(dtype)
    w_ENK = jax.random.normal(keys[1], (E, outputs, inputs)).astype(dtype)
    bias_EN = jax.random.normal(keys[2], (E, outputs)).astype(dtype)
    return rows(keys[0], inputs), w_ENK, bias_EN, rows(keys[3], outputs)


def used_slots(groups) -> np.ndarray:
    return np.arange(groups.assignment_P.shape[0]) < int(groups.num_blocks) * groups.block_rows


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("inputs, outputs", [(20, 38), (32, 48)])  # no multiples of the tile, and multiples of it, which go without masks
@pytest.mark.parametrize("kind", ["random", "one_takes_all", "empty_experts"])
def test_products_match_dense_float64(kind, inputs, outputs, dtype):
    groups = group_rows(routing(kind), E, M)
    x, w, bias, dy = arrays = operands(groups, inputs, outputs, dtype)
    y, dx, dw, dbias = all_products(*arrays, groups)
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


def test_nan_stays_with_its_expert():
    """NaN in expert 5's rows, in slots that no block uses, and in everything of experts without rows (E - 1, to which unused blocks point, too)."""
    groups = group_rows(routing("empty_experts"), E, M)  # experts 4, 5, 6
    x, w, bias, dy = operands(groups, 20, 38)
    clean = all_products(x, w, bias, dy, groups)
    used, expert_P = used_slots(groups), np.repeat(groups.block_expert_G, M)
    assert not used.all()
    poisoned_P1 = (~used | (expert_P == 5))[:, None]
    without_rows = np.asarray(groups.group_sizes_E) == 0
    nan_in = lambda a, where: jnp.where(where, jnp.nan, a)
    y, dx, dw, dbias = all_products(
        nan_in(x, poisoned_P1), nan_in(w, without_rows[:, None, None]), nan_in(bias, without_rows[:, None]), nan_in(dy, poisoned_P1), groups
    )
    healthy_P = ~used | (expert_P != 5)
    for got, want in zip((y, dx), clean[:2]):
        np.testing.assert_array_equal(np.asarray(got)[healthy_P], np.asarray(want)[healthy_P])
        assert not np.asarray(got)[~used].any()
    for got, want in zip((dw, dbias), clean[2:]):
        np.testing.assert_array_equal(np.delete(got, 5, axis=0), np.delete(want, 5, axis=0))
        assert not np.asarray(got)[without_rows].any()


def test_gradients_through_the_public_function_match_xla(monkeypatch):
    forward = partial(triton.forward, tile=TINY, interpret=True)
    backward = partial(triton.backward, tile=TINY, interpret=True)
    monkeypatch.setitem(package._BACKENDS, "triton", SimpleNamespace(forward=forward, backward=backward))
    groups = group_rows(routing("random"), E, M)
    _, w, bias, _ = operands(groups, 20, 38)
    keys = jax.random.split(jax.random.key(1), 3)
    x, weights, cotangent = jax.random.normal(keys[0], (S, 20)), jax.random.uniform(keys[1], (S, A)), jax.random.normal(keys[2], (S, 38))

    def loss(x, w, bias, weights, backend):
        return jnp.sum(combine(grouped_matmul(dispatch(x, groups), w, bias, groups, backend), weights, groups) * cotangent)

    gradients = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)), static_argnums=4)
    for got, want in zip(gradients(x, w, bias, weights, "triton"), gradients(x, w, bias, weights, "xla")):
        np.testing.assert_allclose(got, want, **TOLERANCE["float32"])


@pytest.mark.parametrize("row_tiles, block_rows", [(1, 32), (16, 16), (37, 32), (37, 16)])
def test_every_tile_has_one_program(row_tiles, block_rows):
    static = triton.Product(TINY, block_rows, row_tiles, inputs=20, outputs=38, outputs_first=True, has_bias=False, load_weight=triton.load_weight)
    programs = jnp.arange(row_tiles * 3, dtype=jnp.int32)
    rows, cols = jax.vmap(static.row_and_col_tile)(programs)
    assert sorted(zip(rows.tolist(), cols.tolist())) == [(r, c) for r in range(row_tiles) for c in range(3)]


def test_blocks_and_types_that_the_kernels_cannot_take_are_refused():
    groups = group_rows(routing("random"), E, 24)
    x, w, bias, _ = operands(groups, 20, 38)
    with pytest.raises(ValueError, match="not 24"):
        triton.forward(x, w, bias, groups, interpret=True)
    with pytest.raises(TypeError, match=r"'x': 'bfloat16', 'w': 'float32'"):
        triton.forward(x.astype(jnp.bfloat16), w, bias, groups, interpret=True)


def random_codes(outputs: int, inputs: int) -> mxfp4.Codes:
    """Any code; scales around 1, and for expert 3 every byte there is but NaN, expert 2 has a block of NaN."""
    rng = np.random.default_rng(3)
    packed = rng.integers(0, 256, (E, outputs, inputs // 2), dtype=np.uint8)
    scales = rng.integers(122, 130, (E, outputs, inputs // 32), dtype=np.uint8)
    scales[3].flat = np.arange(scales[3].size) % 255
    scales[2, 5, 1] = mxfp4.NAN_SCALE
    return mxfp4.Codes(jnp.asarray(packed), jnp.asarray(scales))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_packed_codes_give_the_bits_of_decoding_first(dtype):
    groups = group_rows(routing("random"), E, M)
    codes = random_codes(outputs=38, inputs=96)
    x, _, bias, dy = operands(groups, 96, 38, dtype)
    tile = Tile(rows=16, cols=64, depth=64, stages=2, warps=1)  # one and a half tiles of 96

    @jax.jit
    def both(x, bias, dy, codes, w):
        options = dict(groups=groups, tile=tile, interpret=True)
        packed = mxfp4_triton.forward(x, codes, bias, **options), mxfp4_triton.input_gradient(dy, codes, **options)
        return packed, (triton.forward(x, w, bias, **options), triton.input_gradient(dy, w, **options))

    packed, decoded = both(x, bias, dy, codes, mxfp4.decode(codes, jnp.dtype(dtype)))
    for got, want in zip(packed, decoded):
        assert got.dtype == dtype and np.isfinite(np.asarray(got, np.float32)).any() and np.isnan(np.asarray(got, np.float32)).any()
        np.testing.assert_array_equal(np.asarray(got, np.float32), np.asarray(want, np.float32))


def test_codes_beyond_32_bit_offsets_are_refused():
    groups = group_rows(routing("random"), E, M)
    codes = mxfp4.Codes(abstract(300, 5760, 1440, dtype="uint8"), abstract(300, 5760, 90, dtype="uint8"))
    with pytest.raises(ValueError, match="split the experts"):
        mxfp4_triton.input_gradient(abstract(groups.assignment_P.shape[0], 5760), codes, groups)


# ---- lowering and tiles ---------------------------------------------------------------------------------------------------------
def abstract(*shape, dtype="bfloat16"):
    return jax.ShapeDtypeStruct(shape, dtype)


def real_products(experts: int, outputs: int, inputs: int, dtype: str, tile=None):
    """(name, function, arguments) of the three products for 8192 tokens."""
    blocks = 8192 * 4 // 128 + experts
    index = partial(abstract, dtype="int32")
    groups = RowGroups(index(8192, 4), index(blocks * 128), index(blocks), index(), index(experts))
    x, dy = abstract(blocks * 128, inputs, dtype=dtype), abstract(blocks * 128, outputs, dtype=dtype)
    w, bias = abstract(experts, outputs, inputs, dtype=dtype), abstract(experts, outputs, dtype=dtype)
    return (
        ("_product_kernel", partial(triton.forward, tile=tile), (x, w, bias, groups)),
        ("_product_kernel", partial(triton.input_gradient, tile=tile), (dy, w, groups)),
        ("_weight_kernel", partial(triton.weight_gradient, tile=tile), (dy, x, groups)),
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("experts", [32, 128])  # 20b, 120b
@pytest.mark.parametrize("outputs", [5760, 2880])  # gate_up, down
def test_products_of_gpt_oss_lower_to_valid_triton_programs(experts, outputs, dtype):
    for name, function, arguments in real_products(experts, outputs, 2880, dtype):
        text, programs = lower_for_cuda(function, *arguments)
        assert any(target in text for target in TARGETS)
        assert name in text
        for program in programs:
            assert "tt.dot" in program and "scf.for" in program
            if (experts, outputs, dtype) == (128, 5760, "float32"):  # weights of 8.5e9 bytes
                assert "muli" in program and "xi64>" in program


@pytest.mark.parametrize("experts", [32, 128])
def test_products_with_packed_codes_lower_to_valid_triton_programs(experts):
    (_, _, (x, _, bias, groups)), (_, _, (dy, _, _)), _ = real_products(experts, 5760, 2880, "bfloat16")
    codes = mxfp4.Codes(abstract(experts, 5760, 1440, dtype="uint8"), abstract(experts, 5760, 90, dtype="uint8"))
    for function, arguments in ((mxfp4_triton.forward, (x, codes, bias, groups)), (mxfp4_triton.input_gradient, (dy, codes, groups))):
        text, programs = lower_for_cuda(function, *arguments)
        assert any(target in text for target in TARGETS)
        assert all("tt.dot" in program and "tt.join" in program for program in programs)


def test_float32_products_are_exact_where_highest_precision_is_asked():
    _, function, arguments = real_products(32, 2880, 2880, "float32")[0]
    assert "HIGHEST" not in str(jax.make_jaxpr(function)(*arguments))
    with jax.default_matmul_precision("highest"):
        assert "HIGHEST" in str(jax.make_jaxpr(function)(*arguments))


@pytest.mark.parametrize("itemsize", TILES)
@pytest.mark.parametrize("capability, kibibytes", [(80, 163), (86, 99), (89, 99), (90, 227)])
def test_tiles_fit_the_shared_memory_of_every_card(capability, kibibytes, itemsize):
    tile = choose_tile(itemsize, capability)
    assert SHARED_BYTES[capability] == kibibytes * 1024
    assert tile.shared_bytes(itemsize) == itemsize * tile.depth * (tile.rows + tile.cols) * tile.stages <= kibibytes * 1024
    for size in tile[:3]:
        assert size >= triton.MIN_DIM and size & (size - 1) == 0
    assert 2880 % tile.depth == 0 and 5760 % tile.depth == 0 and package.BLOCK_ROWS["triton"] % tile.rows == 0


def test_an_unknown_card_gets_the_smallest_tile():
    assert choose_tile(2, 75) == choose_tile(2, 86)
