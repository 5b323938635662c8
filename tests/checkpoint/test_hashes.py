"""The hash of a matrix is xxh3_128 over the plain bytes of its arrays; it says nothing about stacking or slicing."""

import numpy as np
import pytest
import xxhash

from gptoss_jax.checkpoint import code_hashes, hashes
from gptoss_jax.formats import mxfp4, nvfp4


def test_arrays_hash_as_their_bytes_one_after_the_other():
    first, second = np.arange(105, dtype=np.uint8).reshape(3, 5, 7), np.float32([1.5, -2])
    assert hashes.hash_arrays([first.T, second]) == xxhash.xxh3_128_hexdigest(first.T.tobytes() + second.tobytes())


@pytest.mark.parametrize("codec", [mxfp4, nvfp4])
def test_layers_hash_alone(codec, tiny_config):
    """`blocks.1` of a period of two is layer 1, `tail.0` layer 2; every byte of packed codes, scales and global scales counts."""
    rng = np.random.default_rng(0)
    codes = {
        "blocks.1.mlp.experts.down_proj": codec.encode(rng.normal(size=(1, 8, 96, 64)).astype(np.float32)),
        "tail.0.mlp.experts.down_proj": codec.encode(rng.normal(size=(8, 96, 64)).astype(np.float32)),
    }
    found = code_hashes(tiny_config, codes)
    assert found.keys() == {f"model.layers.{i}.mlp.experts.down_proj" for i in (1, 2)}
    tail = codes["tail.0.mlp.experts.down_proj"]
    assert found["model.layers.2.mlp.experts.down_proj"] == xxhash.xxh3_128_hexdigest(b"".join(np.asarray(part).tobytes() for part in tail))
    for field in tail._fields:
        part = np.asarray(getattr(tail, field))
        changed = part.copy().view(np.uint8)
        changed.reshape(-1)[-1] ^= 1
        other = code_hashes(tiny_config, {"tail.0.mlp.experts.down_proj": tail._replace(**{field: changed.view(part.dtype)})})
        assert other["model.layers.2.mlp.experts.down_proj"] != found["model.layers.2.mlp.experts.down_proj"]
