"""Prefill and decoding with a cache give the logits of the whole forward pass, at every step, for rows of different lengths."""

import dataclasses
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptoss_jax.formats import Mxfp4, mxfp4
from gptoss_jax.model import GptOssConfig, abstract_params, compute_logits, forward
from gptoss_jax.model.cache import init_cache
from gptoss_jax.model.inference import decode_step, prefill, prepare_params
from gptoss_jax.quant import default_policy, make_expert_quant
from gptoss_jax.sharding import make_mesh, param_shardings, stacked_experts
from tests.support.params import lively_params

S, F = "sliding_attention", "full_attention"
PATTERNS = {"alternating_with_tail": (S, F, S), "irregular": (F, S, S, F)}
TOKENS, PROMPTS = 42, (1, 5, 7, 20)  # to six turns of a ring of 7; the prompts end before, in, at the end of and beyond the first window
ATOL = 1e-5  # times the largest logit


def with_pattern(config: GptOssConfig, kinds) -> GptOssConfig:
    return dataclasses.replace(config, num_hidden_layers=len(kinds), layer_types=kinds)


def whole(config, params, tokens, dtype, expert_quant=None):
    """Logits [B, T, V] of the forward pass."""
    run = lambda p: compute_logits(p, forward(config, p, tokens, dtype=dtype, expert_quant=expert_quant).hidden_BTD, dtype)
    return np.asarray(jax.jit(run)(params))


def step_by_step(config, ready, tokens, prompts, dtype, padding: int = 4, stacked=None) -> np.ndarray:
    """Logits [B, T, V] with a cache; NaN at the inner tokens of the prompts and where a longer row ended first."""
    rows, lengths = np.arange(len(prompts)), np.array(prompts)
    prompt = np.where(np.arange(lengths.max() + padding) < lengths[:, None], tokens[:, : lengths.max() + padding], 3)
    cache = init_cache(config, len(prompts), TOKENS + 2, dtype)
    logits, cache = jax.jit(partial(prefill, config, dtype=dtype, stacked=stacked))(ready, prompt, lengths, cache)
    step = jax.jit(partial(decode_step, config, dtype=dtype, stacked=stacked), donate_argnums=2)
    out = np.full((len(prompts), tokens.shape[1], config.vocab_size), np.nan, np.float32)
    while True:
        out[rows, lengths - 1] = logits
        if lengths.max() == tokens.shape[1]:
            return out
        logits, cache = step(ready, tokens[rows, lengths], cache)
        lengths = lengths + 1
        np.testing.assert_array_equal(cache.lengths_B, lengths)


def assert_close(got, want):
    seen = np.isfinite(got)
    assert seen[:, -5:].any() and np.abs(got - want)[seen].max() < ATOL * np.abs(want).max()


def random_tokens(config, rows):
    return np.random.default_rng(1).integers(0, config.vocab_size, (rows, TOKENS)).astype(np.int32)


@pytest.mark.parametrize("pattern", ["alternating_with_tail", pytest.param("irregular", marks=pytest.mark.slow)])
def test_cached_logits_equal_those_of_the_forward_pass(pattern, tiny_config):
    config = with_pattern(tiny_config, PATTERNS[pattern])
    params, tokens = lively_params(config), random_tokens(config, len(PROMPTS))
    want = whole(config, params, tokens, jnp.float32)
    got = step_by_step(config, prepare_params(params, jnp.float32), tokens, PROMPTS, jnp.float32)
    assert_close(got, want)
    assert np.isfinite(got).any(axis=(0, 2)).sum() == TOKENS


def test_a_single_row_takes_another_way_through_the_experts_to_the_same_logits(tiny_config):
    params, tokens = lively_params(tiny_config), random_tokens(tiny_config, 1)
    got = step_by_step(tiny_config, prepare_params(params, jnp.float32), tokens, (3,), jnp.float32)
    assert_close(got, whole(tiny_config, params, tokens, jnp.float32))


@pytest.mark.slow
def test_bfloat16_errs_no_more_than_the_forward_pass(tiny_config):
    """Both are judged by the float32 model of the same weights; routing flips make single logits meaningless."""
    params, tokens = lively_params(tiny_config, dtype=jnp.bfloat16), random_tokens(tiny_config, len(PROMPTS))
    exact = whole(tiny_config, params, tokens, jnp.float32)
    got = step_by_step(tiny_config, prepare_params(params, jnp.bfloat16), tokens, PROMPTS, jnp.bfloat16)
    seen = np.isfinite(got)
    theirs = np.median(np.abs(whole(tiny_config, params, tokens, jnp.bfloat16) - exact)[seen])
    assert np.median(np.abs(got - exact)[seen]) <= 1.1 * theirs


@pytest.mark.parametrize("fmt", ["mxfp4", "nvfp4"])
def test_quantizing_once_gives_the_weights_of_every_forward_pass_bit_for_bit(fmt, tiny_config):
    params, tokens = lively_params(tiny_config), random_tokens(tiny_config, 2)
    quant = make_expert_quant(default_policy(fmt), jnp.float32)
    ready = prepare_params(params, jnp.float32, quant)
    out = jax.jit(lambda p: forward(tiny_config, p, tokens, dtype=jnp.float32, expert_quant=quant, capture=True))(params)
    for name, (used, _) in out.captured.items():
        np.testing.assert_array_equal(ready[name], used, err_msg=name)
        assert not np.array_equal(used, params[name])
    assert all(ready[name] is value for name, value in params.items() if name not in out.captured), "nothing else is copied"


def test_weights_that_need_no_change_are_not_copied(tiny_config):
    params = lively_params(tiny_config)
    for quant in (None, make_expert_quant(None, jnp.float32)):
        ready = prepare_params(params, jnp.float32, quant)
        assert all(ready[name] is value for name, value in params.items())


@pytest.mark.slow
def test_experts_that_stay_packed_give_the_same_logits(tiny_config):
    params, tokens = lively_params(tiny_config), random_tokens(tiny_config, 3)
    fmt = Mxfp4()
    is_matrix = lambda name: name.endswith(("gate_up_proj", "down_proj"))
    packed = {name: fmt.encode(value) if is_matrix(name) else value for name, value in params.items()}
    decoded = {name: fmt.decode(value, jnp.float32) if is_matrix(name) else value for name, value in packed.items()}
    ready = prepare_params(packed, jnp.float32)
    assert sum(isinstance(value, mxfp4.Codes) for value in ready.values()) == 6
    assert_close(step_by_step(tiny_config, ready, tokens, (3, 9, 11), jnp.float32), whole(tiny_config, decoded, tokens, jnp.float32))


def test_rows_that_rest_are_not_disturbed(tiny_config):
    """A row that is not active while others go on continues as if nothing had happened."""
    params, tokens = prepare_params(lively_params(tiny_config), jnp.float32), random_tokens(tiny_config, 2)
    start = jax.jit(partial(prefill, tiny_config, dtype=jnp.float32))
    step = jax.jit(partial(decode_step, tiny_config, dtype=jnp.float32))
    lengths = np.array([9, 12])
    _, cache = start(params, tokens[:, :12], lengths, init_cache(tiny_config, 2, TOKENS, jnp.float32))
    want, _ = step(params, tokens[[0, 1], lengths], cache)
    for token in (5, 6, 7):
        _, cache = step(params, np.array([token, token], np.int32), cache, np.array([False, True]))
    np.testing.assert_array_equal(cache.lengths_B, [9, 15])
    got, _ = step(params, tokens[[0, 1], lengths], cache)
    np.testing.assert_allclose(got[0], want[0], atol=1e-6)


def test_no_step_copies_the_experts_of_a_layer(tiny_config):
    """Only chosen matrices are taken out of the stack of all layers."""
    config = dataclasses.replace(tiny_config, num_hidden_layers=4, layer_types=(), num_local_experts=11, num_experts_per_tok=2)
    params = abstract_params(config)
    for rows in (1, 3):
        cache = jax.eval_shape(lambda rows=rows: init_cache(config, rows, 32, jnp.float32))
        step = jax.jit(partial(decode_step, config, dtype=jnp.float32), donate_argnums=2)
        text = step.lower(params, jax.ShapeDtypeStruct((rows,), jnp.int32), cache).compile().as_text()
        made = re.findall(r"= f32\[(?:\d+,)?11,(?:128,96|96,64)\]\S* ([\w-]+)\(", text)
        assert made and set(made) <= {"parameter", "get-tuple-element", "bitcast"}, made


@pytest.mark.parametrize("backend", ["xla", "triton"])
def test_steps_lower_for_cuda(backend, tiny_config):
    params = abstract_params(tiny_config, jnp.bfloat16)
    cache = jax.eval_shape(lambda: init_cache(tiny_config, 4, 32, jnp.bfloat16))
    cache = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16 if x.dtype == jnp.uint16 else x.dtype), cache)
    ints = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)
    for function, arguments in ((prefill, (params, ints(4, 16), ints(4), cache)), (decode_step, (params, ints(4), cache))):
        run = jax.jit(partial(function, tiny_config, dtype=jnp.bfloat16, backend=backend))
        text = run.trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
        assert ("grouped_matmul" in text) == (backend == "triton")


SLOW_MESHES = {"fsdp": 2, "tensor": 2, "data": 2}, {"expert": 4, "tensor": 2}
ON_MESHES = [{"expert": 4}, *(pytest.param(axes, marks=pytest.mark.slow) for axes in SLOW_MESHES)]


@pytest.mark.parametrize("axes", ON_MESHES, ids=str)
def test_sharded_parameters_give_the_logits_of_one_device(axes, tiny_config):
    params, tokens = lively_params(tiny_config), random_tokens(tiny_config, len(PROMPTS))
    shardings = param_shardings(tiny_config, make_mesh(**axes))
    sharded = prepare_params({name: jax.device_put(value, shardings[name]) for name, value in params.items()}, jnp.float32)
    got = step_by_step(tiny_config, sharded, tokens, PROMPTS, jnp.float32, stacked=stacked_experts(sharded))
    assert_close(got, whole(tiny_config, params, tokens, jnp.float32))


@pytest.mark.parametrize("fmt", [None, Mxfp4()], ids=["cast", "mxfp4"])
def test_ready_weights_lie_where_the_stored_ones_do(fmt, tiny_config):
    """Else generation would not find the experts of a device, and hold those of all."""
    config = dataclasses.replace(tiny_config, num_hidden_layers=2, layer_types=())
    shardings = param_shardings(config, make_mesh(expert=2, fsdp=2))
    params = jax.device_put(lively_params(config), shardings)
    ready = prepare_params(params, jnp.bfloat16, make_expert_quant(default_policy(fmt), jnp.bfloat16) if fmt else None)
    for name in params:
        if name.endswith(("gate_up_proj", "down_proj")):
            assert ready[name].sharding.is_equivalent_to(shardings[name], 4) and ready[name].dtype == jnp.uint16
    assert stacked_experts(ready) is stacked_experts(params) is not None


def test_on_a_mesh_experts_stay_where_they_are(tiny_config):
    config = dataclasses.replace(tiny_config, num_hidden_layers=2, layer_types=())
    shardings = param_shardings(config, make_mesh(expert=4))
    params = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=shardings[name]) for name, x in abstract_params(config).items()}
    for rows in (1, 3):
        cache = jax.eval_shape(lambda rows=rows: init_cache(config, rows, 32, jnp.float32))
        step = jax.jit(partial(decode_step, config, dtype=jnp.float32, stacked=stacked_experts(params)))
        text = step.lower(params, jax.ShapeDtypeStruct((rows,), jnp.int32), cache).compile().as_text()
        # a device has 2 of 8 experts, in a stack of one layer of each kind; nothing larger of their shape exists
        held = {tuple(map(int, dims.split(","))) for dims in re.findall(r"= f32\[((?:\d+,)*(?:128,96|96,64))\]", text)}
        assert held and max(np.prod(shape[:-2]) for shape in held) == 2, held
