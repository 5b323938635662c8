"""The table covers the released models: their byte counts come out, and every parameter meets exactly its tensors."""

import math
from collections import Counter

import pytest

from gptoss_jax.checkpoint.export import _plan_shards
from gptoss_jax.checkpoint.hf_layout import Layout, all_pieces, expected_tensors
from gptoss_jax.checkpoint.safetensors_io import DTYPES
from gptoss_jax.model import GptOssConfig, abstract_params

# bytes of the tensors of the releases, from their architecture (facts of the model cards: 20.9B and 116.8B parameters)
SIZES = {
    "20b": {"mxfp4": 13_761_264_768, "bf16": 41_829_514_368},
    "120b": {"mxfp4": 65_248_815_744, "bf16": 233_658_313_344},
}
CONFIGS = {"20b": GptOssConfig.gpt_oss_20b(), "120b": GptOssConfig.gpt_oss_120b()}


@pytest.mark.parametrize("naming", ["hf", "openai"])
@pytest.mark.parametrize("experts", ["mxfp4", "bf16"])
@pytest.mark.parametrize("model", CONFIGS)
def test_released_sizes(model, experts, naming):
    specs = expected_tensors(CONFIGS[model], Layout(naming, experts)).values()
    assert sum(math.prod(spec.shape) * DTYPES[spec.dtypes[0]].itemsize for spec in specs) == SIZES[model][experts]


def test_number_of_tensors_per_layer():
    """17 in BF16, 19 in MXFP4, and three outside the layers."""
    for experts, count in (("bf16", 17), ("mxfp4", 19), ("nvfp4", 21)):
        keys = expected_tensors(CONFIGS["120b"], Layout("hf", experts))
        per_layer = Counter(key.split(".")[2] for key in keys if key.startswith("model.layers."))
        assert len(per_layer) == 36 and set(per_layer.values()) == {count} and len(keys) == 36 * count + 3


def test_released_names_and_shapes_of_the_experts():
    keys = expected_tensors(CONFIGS["20b"], Layout("hf", "mxfp4"))
    shapes = {key.removeprefix("model.layers.7.mlp.experts."): spec.shape for key, spec in keys.items() if "layers.7.mlp.experts" in key}
    assert shapes == {
        "gate_up_proj_blocks": (32, 5760, 90, 16),
        "gate_up_proj_scales": (32, 5760, 90),
        "gate_up_proj_bias": (32, 5760),
        "down_proj_blocks": (32, 2880, 90, 16),
        "down_proj_scales": (32, 2880, 90),
        "down_proj_bias": (32, 2880),
    }


@pytest.mark.parametrize("pattern", ["sf", "ssf", "sff", "ssssf", "s"])
def test_pieces_cover_every_parameter_once(pattern):
    """Any pattern of layers, with and without a tail: each layer of each stacked parameter is one piece, and keys do not repeat."""
    kinds = {"s": "sliding_attention", "f": "full_attention"}
    layers = 11
    config = GptOssConfig(num_hidden_layers=layers, layer_types=tuple(kinds[pattern[i % len(pattern)]] for i in range(layers)))
    pieces = list(all_pieces(config))
    assert len({piece.hf_key for piece in pieces}) == len(pieces) == 17 * layers + 3
    slots = Counter(piece.name for piece in pieces)
    for name, leaf in abstract_params(config).items():
        assert slots[name] == (leaf.shape[0] if name.startswith("blocks.") else 1)
    order = [piece.layer for piece in pieces]
    assert order[0] is None and order[-2:] == [None, None] and order[1:-2] == sorted(order[1:-2])


def test_shards_of_the_20b_stay_whole():
    shards = _plan_shards(CONFIGS["20b"], Layout("hf", "mxfp4"), 5_000_000_000)
    assert [shard.nbytes < 5e9 for shard in shards] == [True] * 3
    assert sum(shard.nbytes for shard in shards) == SIZES["20b"]["mxfp4"]
