"""Experts over mesh axes: loss, every gradient and every code are those of one device, and what travels are codes."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptoss_jax.errors import UsageError
from gptoss_jax.quant import default_policy, make_expert_quant
from gptoss_jax.sharding import ShardingRules, expert_parallel, make_mesh
from gptoss_jax.sharding.rules import DEFAULT_TABLE
from gptoss_jax.training.config import parse
from gptoss_jax.training.step import Shardings, abstract_state, init_state, make_capture_step, make_loss, make_train_step
from scripts.bench.batches import random_batch
from tests.support.params import lively_params

MESHES = [dict(expert=2), dict(expert=8), dict(fsdp=4), dict(data=2, fsdp=2, expert=2), dict(fsdp=2, expert=2, tensor=2), dict(tensor=2, data=2)]


@pytest.fixture(scope="module")
def setting(tiny_config):
    params = lively_params(tiny_config)
    # one expert is never chosen in the first layers, another by nearly all tokens
    for name in params:
        if name.endswith("router.bias"):
            params[name] = params[name].at[..., 2].add(-100.0).at[..., 5].add(5.0)
    return tiny_config, params, random_batch(tiny_config.vocab_size, rows=8, length=24, seed=3)


def gradients(config, params, batch, quant, shardings=None):
    train = parse({"compute_dtype": "float32"})
    expert_quant = make_expert_quant(default_policy("mxfp4"), jnp.float32) if quant else None
    loss = make_loss(config, train, expert_quant, distribute=shardings and shardings.distribute)
    run = jax.jit(jax.value_and_grad(lambda p, b: loss(p, {}, b, jnp.sum(b.loss_weights_BT), jnp.sum(b.segment_ids_BT > 0))[0]))
    if shardings:
        params, batch = jax.device_put(params, shardings.params), jax.device_put(batch, shardings.batch)
    with jax.default_matmul_precision("highest"):
        return jax.device_get(run(params, batch))


@pytest.mark.parametrize("quant", [False, True], ids=["sft", "qat"])
@pytest.mark.parametrize("sizes", MESHES, ids=lambda sizes: "-".join(f"{k}{v}" for k, v in sizes.items()))
def test_loss_and_gradients_equal_one_device(setting, sizes, quant):
    config, params, batch = setting
    loss, grads = gradients(config, params, batch, quant)
    sharded_loss, sharded = gradients(config, params, batch, quant, Shardings.on(config, make_mesh(**sizes)))
    np.testing.assert_allclose(sharded_loss, loss, rtol=1e-6)
    for name, grad in grads.items():
        scale = np.abs(grad).max()
        assert scale > 0, name
        # a router's gradient is a difference of large sums: its own rounding on one device is of this size
        tolerance = 5e-5 if ".router." in name else 1e-5
        np.testing.assert_allclose(sharded[name], grad, atol=tolerance * scale, rtol=0, err_msg=name)


def capture(config, params, batch, fmt, shardings=None):
    train = parse({"steps": 3, "compute_dtype": "bfloat16", "quant": {"format": fmt}})
    step = make_capture_step(config, train, make_expert_quant(default_policy(fmt), jnp.bfloat16), shardings)
    state = init_state(config, train, params, shardings)
    return jax.device_get(step(state, jax.device_put(batch, shardings.batch) if shardings else batch))


@pytest.mark.parametrize("fmt", ["mxfp4", "nvfp4"])
def test_codes_and_consumed_weights_equal_one_device_bit_for_bit(setting, fmt):
    config, params, batch = setting
    one = capture(config, params, batch, fmt)
    for sizes in (dict(fsdp=4, expert=2), dict(tensor=2, fsdp=2)):
        many = capture(config, params, batch, fmt, Shardings.on(config, make_mesh(**sizes)))
        jax.tree.map(np.testing.assert_array_equal, (many.codes, many.weights), (one.codes, one.weights))


def all_gathers(text):
    """(dtype, number of elements of the result) of every all-gather of a compiled program."""
    found = re.findall(r"= \(?(\w+)\[([\d,]*)\][^=]*? all-gather(?:-start)?\(", text)
    return [(dtype, int(np.prod([int(n) for n in dims.split(",") if n]))) for dtype, dims in found]


def test_codes_travel_and_weights_do_not(setting):
    """In the compiled QAT step over fsdp, what is gathered of the experts is uint8: half a byte per weight and a scale per 32."""
    config, _, _ = setting
    shardings = Shardings.on(config, make_mesh(fsdp=8))
    train = parse({"steps": 3, "compute_dtype": "bfloat16", "quant": {"format": "mxfp4"}})
    step = make_train_step(config, train, make_expert_quant(default_policy("mxfp4"), jnp.bfloat16), shardings)
    batch = jax.eval_shape(lambda: random_batch(config.vocab_size, rows=8, length=24))
    gathers = all_gathers(step.lower(abstract_state(config, train, shardings), batch).compile().as_text())
    up, down = (config.num_local_experts * config.hidden_size * config.intermediate_size * n for n in (2, 1))
    assert gathers and not [found for found in gathers if found[0] != "u8" and found[1] >= down], gathers
    sizes = sorted(size for dtype, size in gathers if dtype == "u8")
    assert set(sizes) == {up // 2, up // 32, down // 2, down // 32}


def test_rules_that_cut_an_expert_are_refused():
    with pytest.raises(UsageError, match="would cut an expert; the devices of these axes can serve as 'expert'"):
        expert_parallel(make_mesh(tensor=2), ShardingRules({**DEFAULT_TABLE, "expert": (), "expert_mlp": ("tensor",)}))
    with pytest.raises(UsageError, match="must come last"):
        expert_parallel(make_mesh(fsdp=2, expert=2), ShardingRules({**DEFAULT_TABLE, "expert": ("fsdp", "expert")}))
