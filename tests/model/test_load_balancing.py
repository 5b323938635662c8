"""The auxiliary loss equals transformers' on the same router logits, padding left out."""

import jax
import jax.numpy as jnp
import numpy as np
import torch
from transformers.models.gpt_oss.modeling_gpt_oss import load_balancing_loss_func

from gptoss_jax.model import RouterStats, load_balancing_loss

LAYERS, TOKENS, EXPERTS, TOP = 3, 17, 8, 3


def stats_of(logits_LSE, real_S):
    chosen = jax.nn.one_hot(jax.lax.top_k(logits_LSE, TOP)[1], EXPERTS).sum(-2)
    return RouterStats(
        jnp.einsum("s,lse->le", real_S, chosen), jnp.einsum("s,lse->le", real_S, jax.nn.softmax(logits_LSE)), jnp.full(LAYERS, real_S.sum())
    )


def test_equals_transformers_with_a_padding_mask():
    logits = np.random.default_rng(0).normal(size=(LAYERS, TOKENS, EXPERTS)).astype(np.float32)
    mask = (np.arange(TOKENS) < 12).astype(np.float32)
    theirs = load_balancing_loss_func(tuple(torch.tensor(logits)), EXPERTS, TOP, torch.tensor(mask)[None])
    np.testing.assert_allclose(load_balancing_loss(stats_of(jnp.asarray(logits), jnp.asarray(mask))), theirs.item(), rtol=1e-5)


def test_uniform_router_gives_k():
    uniform = RouterStats(jnp.full((1, EXPERTS), TOP * 10 / EXPERTS), jnp.full((1, EXPERTS), 10 / EXPERTS), jnp.full(1, 10.0))
    np.testing.assert_allclose(load_balancing_loss(uniform), TOP, rtol=1e-6)
