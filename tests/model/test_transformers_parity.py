"""Module by module and whole, values and gradients, against transformers' GptOss in float32."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from gptoss_jax.model import GptOssConfig, compute_logits, forward
from gptoss_jax.model.context import Context
from gptoss_jax.model.rope import rope_tables
from gptoss_jax.model.transformer import GptOss
from gptoss_jax.model.weights import fill_state
from gptoss_jax.ops.cross_entropy import cross_entropy_sum
from tests.support.params import lively_params
from tests.support.torch_model import hf_gradients, hf_model, to_hf

LENGTH = 41  # longer than five windows of 7, not a multiple of it
LOGITS_ATOL = 1e-4
GRAD_RTOL = 1e-4  # relative norm per parameter
NORM_SCALES = (1.0, 1e-3)  # at 1e-3 the mean square is 1e-6, below eps

S, F = "sliding_attention", "full_attention"
PATTERNS = {"alternating_odd": (S, F, S), "all_full": (F, F), "irregular": (F, S, S, F), "one_layer": (S,)}


def with_pattern(config: GptOssConfig, kinds) -> GptOssConfig:
    return dataclasses.replace(config, num_hidden_layers=len(kinds), layer_types=kinds)


def tokens_of(config, batch=2, length=LENGTH, seed=3):
    return np.random.default_rng(seed).integers(0, config.vocab_size, (batch, length)).astype(np.int32)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_logits_and_every_gradient_match_transformers(tiny_config, pattern):
    config = with_pattern(tiny_config, PATTERNS[pattern])
    params = lively_params(config)
    tokens = tokens_of(config)
    targets, weights = np.roll(tokens, -1, axis=1), np.ones(tokens.shape, np.float32)

    @jax.jit
    def ours(params):
        def loss(params):
            hidden = forward(config, params, tokens, dtype=jnp.float32).hidden_BTD
            return cross_entropy_sum(hidden, params["lm_head.weight"], targets, weights, jnp.float32), hidden

        (value, hidden), grads = jax.value_and_grad(loss, has_aux=True)(params)
        return value, compute_logits(params, hidden), grads

    loss, logits, grads = ours(params)
    model = hf_model(config, params)
    theirs = model(torch.tensor(tokens).long()).logits
    np.testing.assert_allclose(logits, theirs.detach().numpy(), atol=LOGITS_ATOL, rtol=0)

    their_loss = torch.nn.functional.cross_entropy(theirs.flatten(0, 1), torch.tensor(targets).long().flatten(), reduction="sum")
    their_loss.backward()
    assert abs(float(loss) - their_loss.item()) < 1e-5 * their_loss.item()
    theirs_by_key, ours_by_key = hf_gradients(model), to_hf(grads, config)
    assert set(theirs_by_key) == set(ours_by_key)
    for key, grad in ours_by_key.items():
        error = torch.linalg.norm(grad - theirs_by_key[key]) / (torch.linalg.norm(theirs_by_key[key]) + 1e-8)
        assert error < GRAD_RTOL, (key, float(error))
        assert torch.linalg.norm(theirs_by_key[key]) > 0, f"{key} has no gradient: the test would not see a mistake"


def test_bf16_errs_no_more_than_torch(tiny_config):
    """Both BF16 models start from the same BF16 weights and are judged by the float32 model of those weights.

    Routing flips make single logits meaningless, so the median error over all logits is compared.
    """
    params = {name: value.astype(jnp.bfloat16) for name, value in lively_params(tiny_config).items()}
    tokens = tokens_of(tiny_config, batch=8)
    out = jax.jit(lambda p: compute_logits(p, forward(tiny_config, p, tokens, dtype=jnp.bfloat16).hidden_BTD, jnp.bfloat16))(params)
    exact_model = hf_model(tiny_config, params)
    with torch.no_grad():
        exact = exact_model(torch.tensor(tokens).long()).logits.numpy()
        theirs = exact_model.bfloat16()(torch.tensor(tokens).long()).logits.float().numpy()
    ours_error, their_error = np.median(np.abs(np.asarray(out) - exact)), np.median(np.abs(theirs - exact))
    assert ours_error <= their_error, (ours_error, their_error)


def test_each_module_matches_transformers(tiny_config):
    """RMSNorm, rotary tables, attention (both kinds), router, experts: each alone, on the same input, for every layer."""
    config = tiny_config
    params = lively_params(config)
    model = hf_model(config, params)
    hidden = np.random.default_rng(0).normal(size=(2, LENGTH, config.hidden_size)).astype(np.float32)
    positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), (2, LENGTH))
    cos, sin = rope_tables(jnp.asarray(positions), config.rope, config.head_dim)
    context = Context(jnp.ones((2, LENGTH), jnp.int32), cos, sin, lambda name, w, gather: (w, None), False)
    graph, state = nnx.split(GptOss(config, rngs=nnx.Rngs(0)))
    ours = nnx.merge(graph, fill_state(state, params))
    x = torch.tensor(hidden)
    their_cos, their_sin = model.model.rotary_emb(x, torch.tensor(positions).long())
    np.testing.assert_allclose(cos, their_cos.numpy(), atol=1e-6)
    np.testing.assert_allclose(sin, their_sin.numpy(), atol=1e-6)

    @partial(jax.jit, static_argnums=0)
    def modules(block_graph, block_state, x_BTD):
        block = nnx.merge(block_graph, block_state)
        norms = [block.input_layernorm(x_BTD * scale) for scale in NORM_SCALES]
        experts, scores = (x_BTA.reshape(2 * LENGTH, -1) for x_BTA in block.mlp.router(x_BTD, jnp.ones(x_BTD.shape[:2]))[:2])
        return norms, block.self_attn(x_BTD, context), experts, scores, block.mlp(x_BTD, context)[0]

    for layer, theirs in enumerate(model.model.layers):
        block_graph, block_state = nnx.split((ours.blocks if layer < 2 else ours.tail)[layer % 2])
        if layer < 2:
            block_state = jax.tree.map(lambda a: a[0], block_state)
        norms, attention, experts, scores, moe = modules(block_graph, block_state, jnp.asarray(hidden))
        with torch.no_grad():
            for scale, norm in zip(NORM_SCALES, norms):
                np.testing.assert_allclose(norm, theirs.input_layernorm(x * scale).numpy(), atol=1e-5)
            index = torch.arange(LENGTH)
            see = index[None] <= index[:, None]
            if theirs.self_attn.sliding_window is not None:
                see &= index[:, None] - index[None] < config.sliding_window
            mask = torch.where(see, 0.0, torch.finfo(torch.float32).min)[None, None]
            their_attention = theirs.self_attn(x, position_embeddings=(their_cos, their_sin), attention_mask=mask)[0].numpy()
            np.testing.assert_allclose(attention, their_attention, atol=1e-5)
            _, their_scores, their_experts = theirs.mlp.router(x.reshape(-1, config.hidden_size))
            np.testing.assert_array_equal(experts, their_experts.numpy())
            np.testing.assert_allclose(scores, their_scores.numpy(), atol=1e-5)
            their_moe = theirs.mlp(x)
            np.testing.assert_allclose(moe, (their_moe[0] if isinstance(their_moe, tuple) else their_moe).numpy(), atol=5e-5)
