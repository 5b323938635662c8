"""The released sizes through abstract evaluation: parameter counts, layer plans, a dry import on eight devices."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from gptoss_jax.errors import CorruptError
from gptoss_jax.model import GptOssConfig, abstract_params, forward, logical_axes, num_params
from gptoss_jax.sharding import abstract_sharded_params, make_mesh

RELEASES = {"20b": (GptOssConfig.gpt_oss_20b(), 20_914_757_184), "120b": (GptOssConfig.gpt_oss_120b(), 116_829_156_672)}


@pytest.mark.parametrize("name", RELEASES)
def test_parameter_counts_are_the_released_ones(name):
    config, count = RELEASES[name]
    assert num_params(config) == count
    assert config.period == 2 and config.num_tail_layers == 0
    assert {n: len(a) for n, a in logical_axes(config).items()} == {n: len(s.shape) for n, s in abstract_params(config).items()}


@pytest.mark.parametrize("name", RELEASES)
def test_forward_of_the_released_shapes_traces_without_weights(name):
    config, _ = RELEASES[name]
    tokens = jax.ShapeDtypeStruct((2, 300), jnp.int32)
    out = jax.eval_shape(lambda p, t: forward(config, p, t), abstract_params(config, jnp.bfloat16), tokens)
    assert out.hidden_BTD.shape == (2, 300, 2880) and out.hidden_BTD.dtype == jnp.bfloat16
    assert out.router.assignments_E.shape == (config.num_hidden_layers, config.num_local_experts)


@pytest.mark.parametrize("name", RELEASES)
def test_dry_import_lays_every_parameter_out_on_eight_devices(name):
    config, count = RELEASES[name]
    params = abstract_sharded_params(config, make_mesh(fsdp=8), jnp.bfloat16)
    per_device = sum(jnp.prod(jnp.array(leaf.sharding.shard_shape(leaf.shape), jnp.float32)) for leaf in params.values())
    assert count / 8 <= per_device < 1.1 * count / 8  # vocabulary rows and biases of attention are replicated, the rest is cut in eight


@pytest.mark.parametrize(
    "kinds,period,repeats,tail",
    [("sfsf", 2, 2, 0), ("sfs", 2, 1, 1), ("ffff", 1, 4, 0), ("s", 1, 1, 0), ("fssf", 3, 1, 1), ("ssff", 4, 1, 0), ("sssfsssfs", 4, 2, 1)],
)
def test_smallest_repeating_period(kinds, period, repeats, tail):
    names = tuple({"s": "sliding_attention", "f": "full_attention"}[k] for k in kinds)
    config = GptOssConfig(num_hidden_layers=len(kinds), layer_types=names)
    assert (config.period, config.repeats, config.num_tail_layers) == (period, repeats, tail)


def test_config_round_trips_through_both_rope_spellings():
    config = GptOssConfig.gpt_oss_20b()
    raw = config.to_dict()
    assert GptOssConfig.from_dict(raw) == config
    assert raw["rope_scaling"]["truncate"] is False
    new_style = {k: v for k, v in raw.items() if k not in ("rope_scaling", "rope_theta")}
    new_style["rope_parameters"] = {**raw["rope_scaling"], "rope_theta": raw["rope_theta"]}
    assert GptOssConfig.from_dict(new_style) == config


@pytest.mark.parametrize(
    "change,message",
    [
        ({"model_type": "llama"}, "model_type"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"num_key_value_heads": 7}, "multiple"),
        ({"layer_types": ["full_attention"]}, "layer_types has 1 entries"),
        ({"layer_types": ["linear"] * 24}, "unknown layer_types"),
        ({"sliding_windows": 3}, "unknown keys"),
        ({"head_dim": "64"}, "positive integer"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2}}, "rope_type"),
        ({"rope_scaling": None}, "YaRN"),
    ],
)
def test_foreign_configs_are_refused_with_the_key(change, message):
    with pytest.raises(CorruptError, match=message):
        GptOssConfig.from_dict({**GptOssConfig.gpt_oss_20b().to_dict(), **change})


def test_missing_key_is_named():
    raw = GptOssConfig.gpt_oss_20b().to_dict()
    del raw["head_dim"]
    with pytest.raises(CorruptError, match="head_dim"):
        GptOssConfig.from_dict(raw)


def test_config_is_a_static_argument():
    assert hash(GptOssConfig()) == hash(GptOssConfig.gpt_oss_20b()) != hash(dataclasses.replace(GptOssConfig(), head_dim=32))
