"""What a quantized block is made of, for whoever studies rounding: elements on the grid of their type, and the scale they are multiplied with."""

from typing import NamedTuple

from jaxtyping import Array, Float32


class Parts(NamedTuple):
    """value = elements * scale. An element is one of plus or minus `Format.magnitudes`; NaN scale where the block is not finite.

    The float32 product is the decoded value, bit for bit, except where XLA flushes it to zero (values or scales under 2**-126: MXFP4 byte 0).
    """

    elements: Float32[Array, "*batch C Q"]
    scale: Float32[Array, "*batch C 1"]
