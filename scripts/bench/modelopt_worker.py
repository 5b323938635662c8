"""NVIDIA's converters (`nvidia-modelopt`) for `codec.py`. Runs in an environment that has modelopt and torch; imports nothing of this project."""

import hashlib
import importlib.metadata
import sys
from pathlib import Path

import numpy as np
import torch
from modelopt.torch.quantization.qtensor import MXFP4QTensor, NVFP4QTensor

sys.path.insert(0, str(Path(__file__).resolve().parent))
from turns import least_seconds, serve

_weights: dict[tuple, torch.Tensor] = {}


def answer(what: str, shape: list[int], seed: int, repeats: int) -> dict:
    """Seconds of one conversion of bfloat16 gaussian weights, and the hash of the packed codes."""
    key = (*shape, seed)
    if key not in _weights:
        _weights.clear()
        values = np.random.default_rng(seed).standard_normal(shape, np.float32) * np.float32(0.02)
        _weights[key] = torch.from_numpy(values).bfloat16()
    convert = {"mxfp4": lambda w: MXFP4QTensor.quantize(w, 32), "nvfp4": lambda w: NVFP4QTensor.quantize(w, 16)}[what]
    weights, result = _weights[key], None

    def run():
        nonlocal result
        result = convert(weights)

    with torch.inference_mode():
        seconds = least_seconds(run, repeats)
    packed = result[0]._quantized_data.contiguous().view(torch.uint8).numpy()
    digest = hashlib.sha256(packed.tobytes()).hexdigest()
    return {"seconds": seconds, "sha256": digest, "threads": torch.get_num_threads(), "modelopt": importlib.metadata.version("nvidia-modelopt")}


if __name__ == "__main__":
    serve(answer)
