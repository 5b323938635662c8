"""Slow, obvious MXFP4 and NVFP4, written from the format descriptions and sharing nothing with the package.

Two independent statements of the same definition: `*_block` in rational arithmetic, one Python number at a time, and `*_encode` in
float64 for whole arrays. float64 is enough there: a float32 divided by a power of two is exact, and a float32 divided by
scale * power of two either hits a midpoint exactly (then the quotient is exact) or misses it by more than 2**-26 relative.
Elements are found by comparing the distance to every grid value; equal distances go to the even index.
"""

from fractions import Fraction

import numpy as np

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# All finite E4M3FN magnitudes by byte: 0..7 are subnormal multiples of 2**-9, then eight per binade from 2**-6; 0x7F is NaN.
E4M3 = tuple(b * 2.0**-9 if b < 8 else (1 + (b % 8) / 8) * 2.0 ** (b // 8 - 7) for b in range(0x7F))


# ---- exact, one number at a time --------------------------------------------------------------------------------------------


def _nearest(value: Fraction, grid: tuple[float, ...]) -> int:
    """Index of the nearest grid value, ties to the even index."""
    distances = [abs(value - Fraction(g)) for g in grid]
    smallest = min(distances)
    candidates = [i for i, d in enumerate(distances) if d == smallest]
    return next((i for i in candidates if i % 2 == 0), candidates[0])


def _exponent(value: Fraction) -> int:
    """e with 2**e <= value < 2**(e+1), for value > 0."""
    e = value.numerator.bit_length() - value.denominator.bit_length()
    while Fraction(2) ** e > value:
        e -= 1
    while Fraction(2) ** (e + 1) <= value:
        e += 1
    return e


def _codes(values: list[Fraction], signs: list[int], scale: Fraction) -> list[int]:
    return [8 * sign + _nearest(abs(v) / scale, E2M1) for v, sign in zip(values, signs, strict=True)]


def mxfp4_block(block, rule: str) -> tuple[int, list[int]]:
    """(scale byte, 32 codes) of one finite block."""
    values = [Fraction(float(v)) for v in block]
    signs = [int(np.signbit(v)) for v in block]
    amax = max(abs(v) for v in values)
    if amax == 0:
        return 0, [8 * s for s in signs]
    e = _exponent(amax)
    m = amax / Fraction(2) ** e
    exponents = {
        "floor": [e - 2],
        "rceil": [e - 2 + (m > Fraction(3, 2))],
        "even": [e - 2 + (m >= Fraction(7, 4))],
        "mse": [e - 2, e - 1, e - 3],
    }[rule]
    exponents = [min(max(s, -127), 127) for s in exponents]

    def error(s):  # in units of 2**(e-12), |x| truncated to that unit
        unit = Fraction(2) ** (e - 12)
        scale = Fraction(2) ** s
        return sum((abs(v) // unit - Fraction(E2M1[_nearest(abs(v) / scale, E2M1)]) * scale / unit) ** 2 for v in values)

    s = min(exponents, key=error) if len(exponents) > 1 else exponents[0]  # min keeps the first of equals
    return s + 127, _codes(values, signs, Fraction(2) ** s)


def nvfp4_global_scale(amax: float) -> Fraction:
    """Smallest power of two >= amax/2688, at least 2**-115; 1 for a zero matrix."""
    if amax == 0:
        return Fraction(1)
    quotient = Fraction(float(amax)) / 2688
    e = _exponent(quotient)
    if Fraction(2) ** e < quotient:
        e += 1
    return Fraction(2) ** max(e, -115)


def nvfp4_block(block, global_scale: Fraction) -> tuple[int, list[int]]:
    """(E4M3 byte, 16 codes) of one finite block."""
    values = [Fraction(float(v)) for v in block]
    signs = [int(np.signbit(v)) for v in block]
    target = max(abs(v) for v in values) / (6 * global_scale)
    byte = _nearest(min(max(target, Fraction(2) ** -9), Fraction(448)), E4M3)
    return byte, _codes(values, signs, Fraction(E4M3[byte]) * global_scale)


# ---- float64, whole arrays --------------------------------------------------------------------------------------------------


def _nearest_array(a: np.ndarray, grid: tuple[float, ...]) -> np.ndarray:
    """Index of the nearest grid value for every a >= 0, ties to the even index, by visiting all of them."""
    best = np.zeros(a.shape, np.uint8)
    best_distance = np.abs(a - grid[0])
    for k in range(1, len(grid)):
        distance = np.abs(a - grid[k])
        closer = distance < best_distance
        if k % 2 == 0:
            closer |= distance == best_distance
        best[closer] = k
        np.minimum(distance, best_distance, out=best_distance)
    return best


def _sign_code(x: np.ndarray) -> np.ndarray:
    return np.where(np.signbit(x), 8, 0).astype(np.uint8)


def mxfp4_encode(x: np.ndarray, rule: str) -> tuple[np.ndarray, np.ndarray]:
    """(codes uint8 [*batch, n], scale bytes uint8 [*batch, n/32]). Non-finite blocks: byte 255, codes of magnitude 0."""
    with np.errstate(invalid="ignore"):  # signalling NaNs
        blocks = x.astype(np.float64).reshape(*x.shape[:-1], -1, 32)
    finite = np.isfinite(blocks).all(-1, keepdims=True)
    a = np.abs(np.where(finite, blocks, 0.0))
    amax = a.max(-1, keepdims=True)
    m, e = np.frexp(amax)  # amax = m * 2**e, 0.5 <= m < 1
    m, e = 2 * m, e - 1
    e = np.where(amax == 0, -1000, e)
    bumps = {"floor": [0 * e], "rceil": [m > 1.5], "even": [m >= 1.75], "mse": [0 * e, 0 * e + 1, 0 * e - 1]}[rule]
    best = None
    for bump in bumps:
        s = np.clip(e - 2 + bump, -127, 127)
        index = _nearest_array(np.ldexp(a, -s), E2M1)
        if len(bumps) == 1:
            best = (s, index)
            break
        units = np.floor(np.ldexp(a, 12 - e))
        error = ((units - np.ldexp(np.asarray(E2M1)[index], s + 12 - e)) ** 2).sum(-1, keepdims=True)
        if best is None:
            best, best_error = (s, index), error
        else:
            better = error < best_error
            best = (np.where(better, s, best[0]), np.where(better, index, best[1]))
            best_error = np.where(better, error, best_error)
    s, index = best
    codes = np.where(finite, index, 0).astype(np.uint8) | _sign_code(blocks)
    scales = np.where(finite, s + 127, 255)[..., 0].astype(np.uint8)
    return codes.reshape(x.shape), scales


def modelopt_mxfp4_encode(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The arithmetic of NVIDIA's converter in its own terms (float32, log2, exp2, strict comparisons), for finite [*batch, 32] blocks."""
    x = x.astype(np.float32)
    with np.errstate(divide="ignore", under="ignore"):
        amax = np.abs(x).max(-1, keepdims=True)
        scale_exp = np.ceil(np.maximum(np.log2(amax / np.float32(6)), np.float32(-127)))
        y = x / np.exp2(scale_exp)
    index = sum((np.abs(y) - np.float32(bound) > 0).astype(np.uint8) for bound in (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5))
    sign_bit = ((2 - np.sign(y)) // 2).astype(np.uint8)
    return sign_bit * 8 + index, (scale_exp + 127).astype(np.uint8)[..., 0]


def mxfp4_decode(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Exact values in float64; NaN for byte 255."""
    values = np.asarray(E2M1)[codes & 7] * np.where(codes & 8, -1.0, 1.0)
    scale = np.where(scales == 255, np.nan, np.ldexp(1.0, scales.astype(np.int64) - 127))
    return values * np.repeat(scale, 32, axis=-1)


def nvfp4_encode(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(codes [*batch, n], E4M3 bytes [*batch, n/16], float64 global scales x.shape[:-2]) with power-of-two global scales.

    The global scale comes from the finite elements; non-finite blocks get byte 0x7F and codes of magnitude 0.
    """
    with np.errstate(invalid="ignore"):  # signalling NaNs
        blocks = x.astype(np.float64).reshape(*x.shape[:-1], -1, 16)
    matrix_dims = tuple(range(max(blocks.ndim - 3, 0), blocks.ndim))
    amax = np.where(np.isfinite(blocks), np.abs(blocks), 0.0).max(matrix_dims)
    g = np.vectorize(lambda v: float(nvfp4_global_scale(v)), otypes=[np.float64])(amax)
    g_block = g.reshape(*g.shape, *[1] * (blocks.ndim - g.ndim))
    finite = np.isfinite(blocks).all(-1, keepdims=True)
    a = np.abs(np.where(finite, blocks, 0.0))
    byte = _nearest_array(np.clip(a.max(-1, keepdims=True) / (6 * g_block), 2.0**-9, 448.0), E4M3)
    index = _nearest_array(a / (np.asarray(E4M3)[byte] * g_block), E2M1)
    codes = np.where(finite, index, 0).astype(np.uint8) | _sign_code(blocks)
    return codes.reshape(x.shape), np.where(finite, byte, 0x7F)[..., 0].astype(np.uint8), g


def nvfp4_decode(codes: np.ndarray, scales: np.ndarray, global_scale: np.ndarray) -> np.ndarray:
    """Exact values in float64 (for power-of-two global scales); NaN for scale 0x7F."""
    values = np.asarray(E2M1)[codes & 7] * np.where(codes & 8, -1.0, 1.0)
    scale = np.asarray((*E4M3, np.nan))[scales]
    g = np.asarray(global_scale)
    return values * np.repeat(scale, 16, axis=-1) * g.reshape(*g.shape, *[1] * (codes.ndim - g.ndim))


def unpack(packed: np.ndarray) -> np.ndarray:
    """Codes in element order: byte j holds element 2j in bits 0..3 and element 2j+1 in bits 4..7."""
    codes = np.empty((*packed.shape[:-1], 2 * packed.shape[-1]), np.uint8)
    codes[..., 0::2] = packed % 16
    codes[..., 1::2] = packed // 16
    return codes
