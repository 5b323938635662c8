"""NVFP4 with the exact global scale against the bytes that public implementations wrote."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from gptoss_jax.formats import nvfp4
from tests import golden
from tests.oracles import fp4

INPUTS = golden.load("inputs")
GOLDEN = golden.load("nvfp4")
FINITE = sorted(set(INPUTS) - {"nonfinite_f32"})
encode = jax.jit(nvfp4.encode, static_argnames="global_scale")


def codes_scales_global(case: str):
    x = INPUTS[case]
    q = jax.tree.map(np.asarray, encode(golden.padded_blocks(x, 16), global_scale="exact"))
    codes, scales = fp4.unpack(q.packed), q.scales.view(np.uint8)
    return codes.reshape(-1)[: x.size].reshape(x.shape), scales.reshape(-1)[: x.size // 16].reshape(*x.shape[:-1], -1), q.global_scale


@pytest.mark.parametrize("case", FINITE)
def test_exact_mode_writes_the_bytes_of_modelopt(case):
    codes, scales, g = codes_scales_global(case)
    np.testing.assert_array_equal(g, GOLDEN[f"{case}/modelopt_export/global_scale"][0])
    np.testing.assert_array_equal(scales, GOLDEN[f"{case}/modelopt_export/scales_e4m3"])
    np.testing.assert_array_equal(codes, fp4.unpack(GOLDEN[f"{case}/modelopt_export/blocks"]))


@pytest.mark.parametrize("case", ["normal_f32", "heavy_f32", "amax_edges_f32"])
def test_decode_equals_modelopts_fake_quantizer(case):
    w = nvfp4.decode(encode(INPUTS[case], global_scale="exact"), jnp.float32)
    np.testing.assert_array_equal(w, GOLDEN[f"{case}/modelopt_fakequant_static/fq"])


@pytest.mark.parametrize(
    ("producer", "case"),
    [
        (producer, case)
        for producer in ("torchao_two_level", "fouroversix_static_6")
        for case in golden.cases_of("nvfp4", producer)
        if case.split("_")[0] in ("normal", "heavy", "outlier", "uniform", "mixed")
    ],
)
def test_exact_mode_agrees_with_other_orders_of_the_divisions(producer, case):
    """torchao multiplies by reciprocals, fouroversix divides in another order: the same scales, and codes that differ at ties alone."""
    other_scales = GOLDEN.get(f"{case}/{producer}/scales_e4m3", GOLDEN.get(f"{case}/{producer}/scales"))
    codes, scales, g = codes_scales_global(case)
    np.testing.assert_array_equal(scales, other_scales)
    other_codes = fp4.unpack(GOLDEN[f"{case}/{producer}/blocks"])
    differ = (codes != other_codes) & ((codes | other_codes) & 7 != 0)
    assert differ.mean() <= 0.002
    step = np.repeat(scales.view(ml_dtypes.float8_e4m3fn).astype(np.float64), 16, axis=-1) * float(g)
    y = np.abs(INPUTS[case].astype(np.float64)) / step
    midpoints = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    assert (np.abs(y[differ][:, None] / midpoints - 1).min(-1) < 2.0**-22).all()
