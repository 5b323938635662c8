"""How an element goes to one of its two neighbours on the grid.

    rne      the nearest, ties to the even index; what training and every default uses (each codec has its own faster code for it)
    away     the nearest, ties away from zero
    sr       stochastic: up with a probability equal to the position in the cell, from independent bits: E[result] = value
    dither   the same probability, from bits spread evenly along each row (`noise.dither_bits`): among neighbours that lie alike in their cells as
             many go up as should. Of weights without such likeness it is as noisy as sr (row sums of gaussian weights: 0.156 against 0.158; with
             a mean of 2.5 standard deviations: 0.29 against 0.38)

The position has 32 bits, exact for every float32 unless it is below 2**-8 of the first cell: a mean over keys has no bias (under 2**-32 of a
step there; NVFP4, whose scales are no powers of two, takes the position of the float32 quotient, off by up to 2**-22). What lies above the
largest magnitude of the format is clipped to it under every mode, so only scales that never clip (`rceil`; NVFP4 with `scale_round="up"`) make
stochastic rounding unbiased. Rounding is by magnitude, the sign stays.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32

from gptoss_jax.formats.minifloat import Element, cell
from gptoss_jax.formats.noise import Key, as_words, dither_bits, random_bits

STOCHASTIC = {"sr": random_bits, "dither": dither_bits}
ELEMENT_ROUNDS = ("rne", "away", *STOCHASTIC)

_HALF = np.uint32(1 << 31)


def check_element_round(element_round: str) -> None:
    """Raises ValueError for an unknown mode."""
    if element_round not in ELEMENT_ROUNDS:
        raise ValueError(f"unknown element rounding {element_round!r}; known are {', '.join(ELEMENT_ROUNDS)}")


def checked_key(element_round: str, key: jax.Array | None) -> Key | None:
    """The words of the key of a stochastic mode, None for the others.

    Raises:
      TypeError: a stochastic mode without a key, another with one, or something that is no key.
    """
    if (key is not None) != (element_round in STOCHASTIC):
        raise TypeError(f"element rounding {element_round!r} needs {'a key' if key is None else 'no key'}")
    return None if key is None else as_words(key)


def rounded_index(bits: Int32[Array, "*s"], element: Element, element_round: str, key: Key | None) -> Int32[Array, "*s"]:
    """Index of the magnitude to which the float32 with these bits goes; see `minifloat.cell`. For noise the array counts as rows of blocks
    [*rows, C, Q]: the same bits as for [*rows, C*Q]."""
    index, position = cell(bits, element)
    if element_round in STOCHASTIC:
        noise = STOCHASTIC[element_round](key, (*bits.shape[:-2], bits.shape[-2] * bits.shape[-1]))
        is_up = noise.reshape(bits.shape) < position
    elif element_round == "away":
        is_up = position >= _HALF
    else:
        is_up = (position > _HALF) | ((position == _HALF) & (index % 2 == 1))
    return jnp.minimum(index + is_up, element.max_index)
