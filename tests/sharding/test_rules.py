"""The table of logical axes: what it lays out, and what it refuses by name."""


import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptoss_jax.errors import UsageError
from gptoss_jax.model import GptOssConfig, forward, init_params
from gptoss_jax.sharding import ShardingRules, batch_sharding, make_mesh, param_shardings
from gptoss_jax.sharding.rules import DEFAULT_TABLE


def test_indivisible_dimension_is_named_with_sizes_that_fit():
    with pytest.raises(UsageError, match=r"down_proj: dimension 'expert' of size 8 does not divide by fsdp = 3; it divides by \[1, 2\]"):
        param_shardings(tiny(), make_mesh(fsdp=3))


def test_cut_quantization_block_is_refused():
    rules = ShardingRules({**DEFAULT_TABLE, "expert": (), "expert_embed": ("fsdp",)})
    with pytest.raises(UsageError, match=r"gate_up_proj: 8 shards would cut quantization blocks \(90 blocks of 32\); use one of \[1, 2, 3, 5, 6\]"):
        param_shardings(GptOssConfig.gpt_oss_20b(), make_mesh(fsdp=8), rules)


def test_axis_used_twice_is_refused():
    rules = ShardingRules({**DEFAULT_TABLE, "expert_mlp": ("fsdp",)})
    with pytest.raises(UsageError, match="two dimensions"):
        param_shardings(GptOssConfig.gpt_oss_20b(), make_mesh(fsdp=8), rules)


def test_unknown_logical_axis_is_refused():
    table = {k: v for k, v in DEFAULT_TABLE.items() if k != "vocab"}
    with pytest.raises(UsageError, match="'vocab'"):
        param_shardings(tiny(), make_mesh(), ShardingRules(table))


def test_mesh_larger_than_the_machine_is_refused():
    with pytest.raises(UsageError, match="needs 64 devices, 8 are present"):
        make_mesh(fsdp=64)


def tiny():
    return GptOssConfig(
        vocab_size=160, hidden_size=96, intermediate_size=64, num_hidden_layers=2, num_local_experts=8, num_experts_per_tok=3,
        num_attention_heads=6, num_key_value_heads=2, head_dim=20, sliding_window=7,
    )  # fmt: skip


def test_sharded_forward_equals_one_device():
    config = tiny()
    params = init_params(config, jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (8, 24), 0, config.vocab_size)
    run = jax.jit(lambda p, t: forward(config, p, t, dtype=jnp.float32).hidden_BTD)
    mesh = make_mesh(data=2, fsdp=4)
    shardings = param_shardings(config, mesh)
    assert any(not s.is_fully_replicated for s in shardings.values())
    sharded = run(jax.device_put(params, shardings), jax.device_put(tokens, batch_sharding(mesh)))
    np.testing.assert_allclose(sharded, run(params, tokens), atol=2e-5)
