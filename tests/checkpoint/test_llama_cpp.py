"""An MXFP4 export through llama.cpp's own converter: every tensor of the GGUF is that of the decoded model, and llama.cpp computes our logits.

The model is the one that comes with the package, with YaRN's correction range in whole dimensions, which is how llama.cpp computes it in any case.
"""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

from gptoss_jax.checkpoint import export_hf
from gptoss_jax.checkpoint.models import load_model
from gptoss_jax.cli import main
from gptoss_jax.formats import Mxfp4
from tests.support.llama_converter import convert
from tests.support.llama_server import llama_server

gguf = pytest.importorskip("gguf", reason="reading GGUF files needs the package gguf")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """{kind: (export, GGUF file, log)}: the codes, and what they decode to in BF16."""
    root, nano = tmp_path_factory.mktemp("llama"), load_model("nano", jnp.bfloat16)
    config = dataclasses.replace(nano.config, rope=dataclasses.replace(nano.config.rope, truncate=True))
    out = {}
    for kind, options in (("mxfp4", dict(format=Mxfp4())), ("bf16", dict(format="bf16", bake=Mxfp4()))):
        export = export_hf(root / kind, config, nano.params, source_dir=nano.directory, **options)
        out[kind] = export, root / f"{kind}.gguf", convert(export, root / f"{kind}.gguf")
    return out


def test_every_tensor_is_that_of_the_decoded_model(converted):
    from gguf.quants import dequantize

    read = lambda kind: {tensor.name: tensor for tensor in gguf.GGUFReader(converted[kind][1]).tensors}
    codes, decoded = read("mxfp4"), read("bf16")
    assert codes.keys() == decoded.keys() and "quantization MXFP4" in converted["mxfp4"][2]
    assert sum(tensor.tensor_type == gguf.GGMLQuantizationType.MXFP4 for tensor in codes.values()) == 3 * 4  # gate, up, down of four layers
    for name, tensor in codes.items():
        values, expected = (dequantize(t.data, t.tensor_type) for t in (tensor, decoded[name]))
        assert np.array_equal(values, expected), name


def test_llama_cpp_computes_our_logits(converted, tmp_path):
    """Its CPU kernels round activations to 8 bits and its cache is float16: thresholds, not equality."""
    pytest.importorskip("xllamacpp", reason="a llama.cpp server needs the package xllamacpp")
    pytest.importorskip("requests", reason="endpoints need the package requests")
    export, file, _ = converted["mxfp4"]
    with llama_server(file) as url:
        assert main(["compare", str(export), "--endpoint", url, "--limit", "20", "--out", str(tmp_path / "c.json")]) == 0
    found = json.loads((tmp_path / "c.json").read_text())
    assert found["kl_served"] < 0.01 and found["top1_agreement"] > 0.85
