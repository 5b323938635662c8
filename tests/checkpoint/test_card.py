"""README.md of an export says what it holds and how to serve it, and only what holds for its layout."""

import json

import pytest

from gptoss_jax.checkpoint import export_hf
from gptoss_jax.checkpoint.card import fingerprint
from gptoss_jax.formats import Mxfp4, Nvfp4
from tests.support.params import lively_params

SERVERS = ("trtllm-serve DIR", "vllm serve DIR", "sglang.launch_server --model DIR", "convert_hf_to_gguf.py DIR", 'from_pretrained("DIR")')


@pytest.fixture(scope="module")
def card_params(tiny_config):
    return lively_params(tiny_config, seed=9)


@pytest.fixture
def card(tiny_config, card_params, tmp_path):
    def write(fmt, **options):
        out = export_hf(tmp_path / "out", tiny_config, card_params, format=fmt, provenance={"run": "qat", "step": 7}, **options)
        return (out / "README.md").read_text(), json.loads((out / "gptoss_jax_export.json").read_text())

    return write


def test_an_mxfp4_export_names_five_programs_and_its_rounding(card):
    text, manifest = card(Mxfp4("even"))
    assert all(command in text for command in SERVERS) and "OVERRIDE_QUANT_ALGO=W4A16_MXFP4" in text and "`truncate`" in text
    assert "MXFP4 (scale_rule even)" in text and '"step": 7' in text and fingerprint(manifest["xxh3_128"]["tensors"]) in text


def test_a_baked_export_says_what_its_values_are(card):
    text, _ = card("bf16", bake=Mxfp4())
    assert "MXFP4 (scale_rule rceil) decodes to" in text and "OVERRIDE_QUANT_ALGO" not in text and all(command in text for command in SERVERS)


def test_openais_layout_names_only_who_reads_it(card):
    text, _ = card(Mxfp4(), layout="openai")
    assert "gpt_oss.generate" in text and "trtllm-serve DIR" in text and "vllm serve" not in text and "llama" not in text


@pytest.mark.parametrize("layout", ["own", "modelopt", "compressed-tensors"])
def test_an_nvfp4_export_promises_nothing(card, layout):
    text, _ = card(Nvfp4(per_expert=False), layout=layout)
    assert "No inference engine is known to load NVFP4 gpt-oss today" in text and not any(command in text for command in SERVERS)
    assert {"own": "This library alone", "modelopt": "NVFP4QTensor", "compressed-tensors": "nvfp4-pack-quantized"}[layout] in text


def test_the_fingerprint_does_not_depend_on_the_order():
    assert fingerprint({"a": "1", "b": "2"}) == fingerprint({"b": "2", "a": "1"}) != fingerprint({"a": "2", "b": "1"})
