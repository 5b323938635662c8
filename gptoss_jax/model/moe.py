"""Mixture of experts: top-k routing and clamped SwiGLU experts. Dropless; work is done for routed rows only.

    p = softmax over the k largest of (x @ router.T + bias)          no normalisation over the other experts
    h = x @ gate_up[e].T + bias;  gate = h[0::2], up = h[1::2]        interleaved
    act = gate' * sigmoid(1.702 gate') * (up' + 1),  gate' = min(gate, 7),  up' = clip(up, -7, 7)
    y = sum_e p_e * (act @ down[e].T + bias)                          the bias is weighted too

The router runs in float32, experts in the dtype of x with float32 accumulation.

Legend: S tokens  D hidden  E experts  A experts per token  F expert hidden  U=2F gate/up interleaved
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from gptoss_jax.model.config import GptOssConfig
from gptoss_jax.model.context import Context
from gptoss_jax.model.weights import weight
from gptoss_jax.ops.experts import expert_mlp
from gptoss_jax.ops.remat import product
from gptoss_jax.ops.top_k import top_k
from gptoss_jax.precision import wide
from gptoss_jax.quant import ExpertQuant, Gather
from gptoss_jax.quant.gather import cast_and_gather


class RouterStats(NamedTuple):
    """Routing of the non-padding tokens; leading dims (layers) may be stacked."""

    assignments_E: Float[Array, "*L E"]
    probability_E: Float[Array, "*L E"]
    num_tokens: Float[Array, "*L"]


def load_balancing_loss(stats: RouterStats) -> Float[Array, ""]:
    """Switch-style auxiliary loss over all layers together, `E * sum_e f_e * P_e` (as transformers' `load_balancing_loss_func`).

    f_e is the mean number of assignments and P_e the mean full-softmax probability per token; a uniform router gives k.
    """
    tokens = jnp.maximum(jnp.sum(stats.num_tokens), 1.0)
    experts = stats.assignments_E.shape[-1]
    fraction_E = jnp.sum(stats.assignments_E.reshape(-1, experts), axis=0) / tokens
    mean_probability_E = jnp.sum(stats.probability_E.reshape(-1, experts), axis=0) / tokens
    return experts * jnp.sum(lax.stop_gradient(fraction_E) * mean_probability_E)


class Router(nnx.Module):
    def __init__(self, config: GptOssConfig, *, rngs, dtype, layers: int | None):
        self.config = config
        self.weight = weight(rngs, (config.num_local_experts, config.hidden_size), ("router", "embed"), layers=layers, dtype=dtype)
        self.bias = weight(rngs, (config.num_local_experts,), ("router",), layers=layers, dtype=dtype, init="zeros")

    def __call__(self, x_SD: Float[Array, "S D"], real_S) -> tuple[Int[Array, "S A"], Float[Array, "S A"], RouterStats]:
        """Chosen experts, their weights, statistics over the tokens where `real_S`."""
        x_SD, w_ED, bias_E = (x.astype(wide(x_SD.dtype)) for x in (x_SD, self.weight[...], self.bias[...]))
        logits_SE = jnp.einsum("sd,ed->se", x_SD, w_ED) + bias_E
        top_SA, experts_SA = top_k(logits_SE, self.config.num_experts_per_tok)
        real_S = real_S.astype(x_SD.dtype)
        chosen_SE = jnp.sum(jax.nn.one_hot(experts_SA, self.config.num_local_experts, dtype=x_SD.dtype), axis=1)
        stats = RouterStats(real_S @ chosen_SE, real_S @ jax.nn.softmax(logits_SE, axis=-1), jnp.sum(real_S))
        return experts_SA, jax.nn.softmax(top_SA, axis=-1), stats


class StoredExperts(NamedTuple):
    """The parameters of the experts of a layer, or the shard of them that a device holds."""

    gate_up_EUD: Float[Array, "E U D"]
    gate_up_bias_EU: Float[Array, "E U"]
    down_EDF: Float[Array, "E D F"]
    down_bias_ED: Float[Array, "E D"]


def run_experts(
    x_BTD: Float[Array, "B T D"],
    experts_BTA: Int[Array, "B T A"],
    weights_BTA: Float[Array, "B T A"],
    stored: StoredExperts,
    *,
    expert_quant: ExpertQuant,
    limit: float,
    backend: str | None,
    gather: Gather | None = None,
) -> tuple[Float[Array, "B T D"], dict[str, tuple[Array, Any]]]:
    """The weighted sum of the chosen experts, and what `expert_quant` returned for each projection.

    Args:
      gather: `stored` is a shard (inside a `jax.shard_map`), and is made whole over these mesh axes. `experts_BTA` counts the experts that are
        whole then; their number stands for one that is elsewhere (see `group_rows`).
    """
    stored_weights = {"gate_up_proj": stored.gate_up_EUD, "down_proj": stored.down_EDF}
    captured = {name: expert_quant(name, weight, gather) for name, weight in stored_weights.items()}
    whole = (lambda bias: cast_and_gather(bias, bias.dtype, gather)) if gather else lambda bias: bias
    flat = lambda x: x.reshape(-1, x.shape[-1])
    out_SD = expert_mlp(
        flat(x_BTD), flat(experts_BTA), flat(weights_BTA), captured["gate_up_proj"][0], whole(stored.gate_up_bias_EU),
        captured["down_proj"][0], whole(stored.down_bias_ED), limit=limit, backend=backend,
    )  # fmt: skip
    return out_SD.reshape(x_BTD.shape), captured


class Experts(nnx.Module):
    """All experts of a layer. `gate_up_proj` [E, U, D] and `down_proj` [E, D, F] are the weights that get quantized."""

    def __init__(self, config: GptOssConfig, *, rngs, dtype, layers: int | None):
        self.limit = config.swiglu_limit
        experts, hidden, width = config.num_local_experts, config.hidden_size, config.intermediate_size
        make = dict(layers=layers, dtype=dtype)
        self.gate_up_proj = weight(rngs, (experts, 2 * width, hidden), ("expert", "expert_mlp", "expert_embed"), **make)
        self.gate_up_proj_bias = weight(rngs, (experts, 2 * width), ("expert", "expert_mlp"), init="zeros", **make)
        self.down_proj = weight(rngs, (experts, hidden, width), ("expert", "expert_embed", "expert_mlp"), **make)
        self.down_proj_bias = weight(rngs, (experts, hidden), ("expert", "expert_embed"), init="zeros", **make)

    def __call__(self, x_BTD, experts_BTA, weights_BTA, context: Context) -> tuple[Float[Array, "B T D"], dict]:
        """The weighted sum of the chosen experts, and what `expert_quant` returned for each projection."""
        stored = StoredExperts(self.gate_up_proj[...], self.gate_up_proj_bias[...], self.down_proj[...], self.down_proj_bias[...])
        run = partial(run_experts, expert_quant=context.expert_quant, limit=self.limit, backend=context.backend)
        if context.distribute is not None:
            run = context.distribute.experts(run, context.capture)
        return run(x_BTD, experts_BTA, weights_BTA, stored)


class Moe(nnx.Module):
    def __init__(self, config: GptOssConfig, *, rngs, dtype, layers: int | None):
        self.router = Router(config, rngs=rngs, dtype=dtype, layers=layers)
        self.experts = Experts(config, rngs=rngs, dtype=dtype, layers=layers)

    @jax.named_scope("moe")
    def __call__(self, x_BTD: Float[Array, "B T D"], context: Context) -> tuple[Float[Array, "B T D"], RouterStats, dict]:
        experts_SA, weights_SA, stats = product(self.router(x_BTD.reshape(-1, x_BTD.shape[-1]), context.real_BT.reshape(-1)))
        rows = lambda x_SA: x_SA.reshape(*x_BTD.shape[:2], -1)
        y_BTD, captured = self.experts(x_BTD, rows(experts_SA), rows(weights_SA), context)
        return y_BTD, stats, captured
