"""Arrays of `README.md`, as numpy with ml_dtypes."""

from functools import cache
from pathlib import Path

import ml_dtypes  # noqa: F401  registers bfloat16 with numpy, which safetensors asks for
import numpy as np
from safetensors.numpy import load_file


@cache
def load(name: str) -> dict[str, np.ndarray]:
    """All arrays of `<name>.safetensors`."""
    return load_file(Path(__file__).parent / f"{name}.safetensors")


def cases_of(name: str, producer: str) -> list[str]:
    """Input cases for which the file holds the producer's output."""
    return sorted({key.split("/")[0] for key in load(name) if key.split("/")[1] == producer})


def padded_blocks(x: np.ndarray, block_size: int) -> np.ndarray:
    """[4096 / block_size, block_size]: the blocks of x and then zeros, one shape for all cases so that encoders compile once."""
    padded = np.zeros(4096, x.dtype)
    padded[: x.size] = x.reshape(-1)
    return padded.reshape(-1, block_size)
