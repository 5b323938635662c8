"""The Triton grouped matmul: programs lowered for CUDA, tiles against the cards, packed weights. Its numbers: test_grouped_matmul.py."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptoss_jax.formats import mxfp4
from gptoss_jax.ops import grouped_matmul as package
from gptoss_jax.ops.grouped_matmul import RowGroups, group_rows, mxfp4_triton, triton
from gptoss_jax.ops.grouped_matmul.tiles import SHARED_BYTES, TILES, Tile, choose_tile
from tests.ops.routing import routing
from tests.ops.test_grouped_matmul import TINY, A, E, M, S, operands
from tests.support.cuda import TRITON_TARGETS, lower_with_programs


@pytest.mark.parametrize("row_tiles, block_rows", [(1, 32), (16, 16), (37, 32), (37, 16)])
def test_every_tile_has_one_program(row_tiles, block_rows):
    static = triton.Product(TINY, block_rows, row_tiles, inputs=20, outputs=38, outputs_first=True, has_bias=False, load_weight=triton.load_weight)
    programs = jnp.arange(row_tiles * 3, dtype=jnp.int32)
    rows, cols = jax.vmap(static.row_and_col_tile)(programs)
    assert sorted(zip(rows.tolist(), cols.tolist())) == [(r, c) for r in range(row_tiles) for c in range(3)]


def test_blocks_and_types_that_the_kernels_cannot_take_are_refused():
    groups = group_rows(routing("random", S, E, A), E, 24)
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
    groups = group_rows(routing("random", S, E, A), E, M)
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
    groups = group_rows(routing("random", S, E, A), E, M)
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
        text, programs = lower_with_programs(function, *arguments)
        assert any(target in text for target in TRITON_TARGETS)
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
        text, programs = lower_with_programs(function, *arguments)
        assert any(target in text for target in TRITON_TARGETS)
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
