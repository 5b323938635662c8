"""Inputs that visit every value and every threshold. Host arrays, ml_dtypes for bfloat16."""

import ml_dtypes
import numpy as np

BF16 = ml_dtypes.bfloat16


def bf16_beside_maxima(block_size: int, mantissas: tuple[int, ...], spread: tuple[int, ...] = (0,)) -> np.ndarray:
    """Every finite bfloat16 in blocks whose first element is a maximum 0..8 binades above it.

    Shape [M, rows, block_size]: one matrix per (exponent field, binades above, mantissa of the maximum, spread). A matrix holds the
    256 values of one exponent field, block_size - 1 per row, and in its last row alone a value `spread` binades above the maxima.
    Maxima beyond float32 are left out. mantissas: the 7 bits of the maxima.
    """
    matrices = []
    values_per_row = block_size - 1
    rows = -(-256 // values_per_row)
    for exponent in range(255):
        values = np.zeros(rows * values_per_row, np.uint16)
        values[:256] = [sign << 15 | exponent << 7 | mantissa for sign in (0, 1) for mantissa in range(128)]
        for above in range(9):
            for mantissa in mantissas:
                for far in spread:
                    if exponent + above + far > 254:
                        continue
                    matrix = np.zeros((rows + 1, block_size), np.uint16)
                    matrix[:rows, 1:] = values.reshape(rows, values_per_row)
                    matrix[:rows, 0] = (exponent + above) << 7 | mantissa
                    matrix[:rows:2, 0] |= 0x8000
                    matrix[rows, 0] = (exponent + above + far) << 7 | mantissa
                    matrices.append(matrix)
    return np.stack(matrices).view(BF16)


def f32_at_thresholds(block_maxima: np.ndarray, midpoints: np.ndarray, block_size: int) -> np.ndarray:
    """Blocks [maxima x 3, block_size]: the maximum at the given float32 value and 1 ulp beside, then the midpoints and 1 ulp beside them.

    block_maxima: [N] positive float32. midpoints: [N, K] positive float32 values with 3 * K < block_size.
    """
    ulps = np.array([0, 1, -1])
    maxima = (block_maxima.view(np.int32)[:, None] + ulps).astype(np.int32)
    beside = (midpoints.view(np.int32)[:, :, None] + ulps).reshape(len(midpoints), -1)
    blocks = np.zeros((*maxima.shape, block_size), np.int32)
    blocks[..., 0] = maxima
    blocks[..., 1 : 1 + beside.shape[-1]] = np.maximum(beside, 0)[:, None]
    blocks[..., 2::2] |= np.int32(-(2**31))
    return blocks.reshape(-1, block_size).view(np.float32)


def random_bits(shape: tuple[int, ...], seed: int, dtype=np.float32) -> np.ndarray:
    """Finite floats of all exponents alike, subnormals and both zeros included."""
    bits = np.random.default_rng(seed).integers(0, 2**32, shape, np.uint32)
    exponent = (bits >> 23) & 0xFF
    bits = np.where(exponent == 255, bits & 0x807FFFFF, bits)
    return bits.view(np.float32) if dtype == np.float32 else (bits >> 16).astype(np.uint16).view(BF16)
