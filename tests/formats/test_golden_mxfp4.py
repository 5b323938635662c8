"""MXFP4 against the bytes that public implementations wrote. What is left out, and why, stands in `tests/golden/README.md`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptoss_jax.formats import mxfp4
from tests import golden
from tests.oracles import fp4

INPUTS = golden.load("inputs")
CASES = sorted(INPUTS)
encode = jax.jit(mxfp4.encode, static_argnames=("scale_rule", "compat"))


def codes_and_scales(case: str, **options):
    x = INPUTS[case]
    q = jax.tree.map(np.asarray, encode(golden.padded_blocks(x, 32), **options))
    return fp4.unpack(q.packed).reshape(-1)[: x.size].reshape(x.shape), q.scales.reshape(-1)[: x.size // 32].reshape(*x.shape[:-1], -1)


def golden_codes_and_scales(case: str, producer: str):
    arrays = golden.load("mxfp4")
    return fp4.unpack(arrays[f"{case}/{producer}/blocks"]), arrays[f"{case}/{producer}/scales"]


def block_maxima(case: str) -> np.ndarray:
    x = INPUTS[case].astype(np.float64)
    return np.abs(x).reshape(*x.shape[:-1], -1, 32).max(-1)


def one_ulp_above_1_5(case: str) -> np.ndarray:
    """Blocks whose float32 maximum is the successor of 1.5 * 2**k, beside which a float32 log2 is blind."""
    bits = block_maxima(case).astype(np.float32).view(np.int32)
    return bits & 0x7FFFFF == 0x400001


@pytest.mark.parametrize(
    ("producer", "rule", "keeps_sign_of_zero", "case"),
    [
        (*row, case)
        for row in (
            ("torchao_floor", "floor", True),
            ("torchao_rceil", "rceil", True),
            ("torchao_even", "even", True),
            ("compressed_tensors", "even", False),
            ("fouroversix_static6", "rceil", False),
        )
        for case in golden.cases_of("mxfp4", row[0])
    ],
)
def test_bytes_equal_those_of_other_implementations(producer, rule, keeps_sign_of_zero, case):
    codes, scales = codes_and_scales(case, scale_rule=rule)
    golden_codes, golden_scales = golden_codes_and_scales(case, producer)
    compared = np.isfinite(block_maxima(case))
    if producer in ("torchao_floor", "torchao_rceil", "torchao_even", "fouroversix_static6"):
        compared &= (block_maxima(case) >= 2.0**-124) | (block_maxima(case) == 0)
    if producer == "torchao_rceil" and case == "amax_edges_f32":
        assert one_ulp_above_1_5(case).sum() == 2
        compared &= ~one_ulp_above_1_5(case)
    assert compared.mean() > (0.3 if case.startswith(("tiny", "nonfinite")) else 0.9)
    if not keeps_sign_of_zero:
        codes = np.where(codes == 8, 0, codes)
        golden_codes = np.where(golden_codes == 8, 0, golden_codes)
    np.testing.assert_array_equal(scales[compared], golden_scales[compared])
    elements = np.repeat(compared, 32, axis=-1)
    np.testing.assert_array_equal(codes[elements], golden_codes[elements])


@pytest.mark.parametrize("case", CASES)
def test_modelopt_mode_writes_the_bytes_of_nvidias_converter(case):
    codes, scales = codes_and_scales(case, compat="modelopt")
    golden_codes, golden_scales = golden_codes_and_scales(case, "modelopt_export")
    compared = np.isfinite(block_maxima(case))
    if case == "amax_edges_f32":
        differ = one_ulp_above_1_5(case)
        assert (golden_scales[differ] == scales[differ] - 1).all()  # its log2 does not see the ulp: one exponent lower, clipped
        compared &= ~differ
    np.testing.assert_array_equal(scales[compared], golden_scales[compared])
    elements = np.repeat(compared, 32, axis=-1)
    np.testing.assert_array_equal(codes[elements], golden_codes[elements])  # signs of zero included


def test_modelopt_mode_differs_from_rceil_in_ties_and_zeros_alone():
    x = INPUTS["normal_bf16"]
    codes, scales = codes_and_scales("normal_bf16", scale_rule="rceil")
    other_codes, other_scales = codes_and_scales("normal_bf16", compat="modelopt")
    np.testing.assert_array_equal(scales, other_scales)
    differ = ((codes & 7) | (other_codes & 7) != 0) & (codes != other_codes)
    y = np.abs(x.astype(np.float64)) / np.repeat(2.0 ** (scales.astype(int) - 127), 32, axis=-1)
    assert np.isin(y[differ], [0.75, 1.75, 3.5]).all() and 0.003 < differ.mean() < 0.006


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_decode_equals_transformers_in_the_layout_of_the_checkpoint(dtype):
    layout = golden.load("layout")
    blocks, scales = layout["decode/gate_up_proj_blocks"], layout["decode/gate_up_proj_scales"]
    w = mxfp4.decode(mxfp4.Codes(blocks.reshape(*blocks.shape[:2], -1), scales), {"f32": jnp.float32, "bf16": jnp.bfloat16}[dtype])
    expected = layout[f"decode/transformers_{dtype}"]  # [E, in, out]
    unsigned = {"f32": np.uint32, "bf16": np.uint16}[dtype]
    np.testing.assert_array_equal(np.asarray(w).swapaxes(1, 2).view(unsigned), np.ascontiguousarray(expected).view(unsigned))


def test_encode_equals_the_converters_in_the_layout_of_the_checkpoint():
    layout = golden.load("layout")
    w = np.ascontiguousarray(layout["encode/weight_bf16"].swapaxes(1, 2))  # [E, out, in]
    for producer, options in {
        "modelopt": {"compat": "modelopt"},
        "torchao_rceil": {"scale_rule": "rceil"},
        "torchao_floor": {"scale_rule": "floor"},
        "torchao_even": {"scale_rule": "even"},
    }.items():
        q = encode(w, **options)
        np.testing.assert_array_equal(np.asarray(q.packed).reshape(2, 64, 5, 16), layout[f"encode/{producer}_blocks"], err_msg=producer)
        np.testing.assert_array_equal(q.scales, layout[f"encode/{producer}_scales"], err_msg=producer)


@pytest.mark.parametrize("rule", ["rceil", "floor", "even"])
def test_requantizing_a_checkpoint_equals_torchao(rule):
    layout = golden.load("layout")
    w = np.ascontiguousarray(layout["decode/transformers_bf16"].swapaxes(1, 2))
    q = encode(w, scale_rule=rule)
    np.testing.assert_array_equal(np.asarray(q.packed).reshape(2, 64, 5, 16), layout[f"requant/torchao_{rule}_blocks"])
    np.testing.assert_array_equal(q.scales, layout[f"requant/torchao_{rule}_scales"])
    np.testing.assert_array_equal(mxfp4.decode(q), w)
