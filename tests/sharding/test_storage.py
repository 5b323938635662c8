"""Parameters that are only held: cut over all devices wherever a dim allows it, never across blocks or through a layer's stack."""

import math

import jax
import pytest

from gptoss_jax.model import GptOssConfig, abstract_params, logical_axes
from gptoss_jax.sharding import storage, storage_shardings


@pytest.mark.parametrize("count", [8, 3, 7])
def test_layers_and_blocks_stay_whole(tiny_config, count, monkeypatch):
    devices = jax.devices()[:count]
    monkeypatch.setattr(storage.jax, "devices", lambda: devices)
    axes, shardings = logical_axes(tiny_config), storage_shardings(tiny_config)
    for name, leaf in abstract_params(tiny_config).items():
        shape = shardings[name].shard_shape(leaf.shape)
        assert axes[name][0] != "layers" or shape[0] == leaf.shape[0], name
        assert not name.endswith(("gate_up_proj", "down_proj")) or shape[-1] == leaf.shape[-1], name
    experts = {8: (1, 1, 128, 96), 3: (1, 8, 128, 96), 7: (1, 8, 128, 96)}[count]
    assert shardings["blocks.0.mlp.experts.gate_up_proj"].shard_shape((1, 8, 128, 96)) == experts


@pytest.mark.parametrize("config", [GptOssConfig.gpt_oss_20b(), GptOssConfig.gpt_oss_120b()])
def test_eight_devices_hold_an_eighth_of_a_release_each(config):
    leaves, shardings = abstract_params(config), storage_shardings(config)
    held = sum(math.prod(shardings[name].shard_shape(leaf.shape)) for name, leaf in leaves.items())
    assert held < 1.001 / 8 * sum(leaf.size for leaf in leaves.values())


def test_one_device_needs_no_layout(tiny_config, monkeypatch):
    monkeypatch.setattr(storage.jax, "devices", lambda: [None])
    assert storage_shardings(tiny_config) is None
