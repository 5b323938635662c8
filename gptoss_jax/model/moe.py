"""Mixture of experts: top-k routing and clamped SwiGLU experts. Dropless; work is done for routed rows only.

    p = softmax over the k largest of (x @ router.T + bias)          no normalisation over the other experts
    h = x @ gate_up[e].T + bias;  gate = h[0::2], up = h[1::2]        interleaved
    act = gate' * sigmoid(1.702 gate') * (up' + 1),  gate' = min(gate, 7),  up' = clip(up, -7, 7)
    y = sum_e p_e * (act @ down[e].T + bias)                          the bias is weighted too

The router runs in float32, experts in the dtype of x with float32 accumulation.

Legend: S tokens  D hidden  E experts  A experts per token  F expert hidden  U=2F gate/up interleaved
"""

from collections.abc import Callable
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
from gptoss_jax.ops.experts import expert_mlp_counted
from gptoss_jax.ops.experts.inference import expert_mlp_inference
from gptoss_jax.ops.remat import product
from gptoss_jax.ops.top_k import top_k
from gptoss_jax.precision import wide
from gptoss_jax.quant import ExpertQuant, Gather, activation_rounding
from gptoss_jax.quant.gather import cast_and_gather
from gptoss_jax.quant.two_way import forward_weight


class RouterStats(NamedTuple):
    """Sums over tokens, so that parts of a batch add up; leading dims (layers) may be stacked. The first three leave padding out.

    `num_dropped` is counted where experts compute: routed rows, of padding too, less those that lie in a block of rows that some device computes.
    """

    assignments_E: Float[Array, "*L E"]
    probability_E: Float[Array, "*L E"]
    num_tokens: Float[Array, "*L"]
    num_dropped: Float[Array, "*L"] | float = 0.0


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

    def __call__(self, x_BTD: Float[Array, "B T D"], real_BT) -> tuple[Int[Array, "B T A"], Float[Array, "B T A"], RouterStats]:
        """Chosen experts, their weights, statistics over the tokens where `real_BT`.

        B and T stay apart: where a mesh cuts both, an array of all tokens in one dim has no layout, and the compiler makes it whole.
        """
        x_BTD, w_ED, bias_E = (x.astype(wide(x_BTD.dtype)) for x in (x_BTD, self.weight[...], self.bias[...]))
        logits_BTE = jnp.einsum("btd,ed->bte", x_BTD, w_ED) + bias_E
        top_BTA, experts_BTA = top_k(logits_BTE, self.config.num_experts_per_tok)
        real_BT = real_BT.astype(x_BTD.dtype)
        chosen_BTE = jnp.sum(jax.nn.one_hot(experts_BTA, self.config.num_local_experts, dtype=x_BTD.dtype), axis=2)
        over_tokens = lambda x_BTE: jnp.einsum("bt,bte->e", real_BT, x_BTE)
        stats = RouterStats(over_tokens(chosen_BTE), over_tokens(jax.nn.softmax(logits_BTE, axis=-1)), jnp.sum(real_BT))
        return experts_BTA, jax.nn.softmax(top_BTA, axis=-1), stats


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
) -> tuple[Float[Array, "B T D"], Int[Array, "1"], dict[str, tuple[Array, Any]]]:
    """The weighted sum of the chosen experts, the number of routed rows computed here, and what `expert_quant` returned for each projection.

    Args:
      gather: `stored` is a shard (inside a `jax.shard_map`), and is made whole over these mesh axes. `experts_BTA` counts the experts that are
        whole then; their number stands for one that is elsewhere (see `group_rows`).
    """
    stored_weights = {"gate_up_proj": stored.gate_up_EUD, "down_proj": stored.down_EDF}
    captured = {name: expert_quant(name, weight, gather) for name, weight in stored_weights.items()}
    whole = (lambda bias: cast_and_gather(bias, bias.dtype, gather)) if gather else lambda bias: bias
    flat = lambda x: x.reshape(-1, x.shape[-1])
    out_SD, num_rows = expert_mlp_counted(
        flat(x_BTD), flat(experts_BTA), flat(weights_BTA), captured["gate_up_proj"][0], whole(stored.gate_up_bias_EU),
        captured["down_proj"][0], whole(stored.down_bias_ED), limit=limit, backend=backend, activations=activation_rounding(expert_quant),
    )  # fmt: skip
    captured = {name: (forward_weight(weight), codes) for name, (weight, codes) in captured.items()}
    return out_SD.reshape(x_BTD.shape), num_rows[None], captured


def run_stacked_experts(
    x_BTD: Float[Array, "B T D"],
    experts_BTA: Int[Array, "B T A"],
    weights_BTA: Float[Array, "B T A"],
    stored: StoredExperts,
    layer: Int[Array, ""] | int,
    *,
    limit: float,
    backend: str | None,
    activations: Callable[[Array], Array] | None = None,
    elsewhere: bool = False,
) -> Float[Array, "B T D"]:
    """The same for generation: without gradients, from the ready compute weights (`inference.prepare_params`) of one layer among stacked ones.

    Args:
      stored: with a leading dim of layers, or without.
      elsewhere: it is a shard (inside a `jax.shard_map`); `experts_BTA` counts the experts of the shard as for `run_experts`.
    """
    flat = lambda weights, dims: jax.tree.map(lambda x: x.reshape(-1, *x.shape[x.ndim - dims :]), weights)
    num_experts = stored.down_bias_ED.shape[-2]
    out_SD = expert_mlp_inference(
        *(flat(x, 1) for x in (x_BTD, experts_BTA, weights_BTA)), *(flat(weights, dims) for weights, dims in zip(stored, (2, 1, 2, 1))),
        first=layer * num_experts, num_experts=num_experts, limit=limit, backend=backend, activations=activations,
        elsewhere=elsewhere,
    )  # fmt: skip
    return out_SD.reshape(x_BTD.shape)


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

    def __call__(self, x_BTD, experts_BTA, weights_BTA, context: Context) -> tuple[Float[Array, "B T D"], Int[Array, "devices"] | None, dict]:
        """The weighted sum of the chosen experts, the routed rows that each device computed, and what `expert_quant` returned for each projection.
        In generation the first alone."""
        variables = self.gate_up_proj, self.gate_up_proj_bias, self.down_proj, self.down_proj_bias
        # a weight may be no array: packed codes in generation, `TwoWay` in training with `cast_at: step`
        stored = StoredExperts(*(variable.get_value() for variable in variables))
        if context.layer is not None:
            run = partial(
                run_stacked_experts, limit=self.limit, backend=context.backend, activations=activation_rounding(context.expert_quant)
            )
            if context.stacked is not None:
                run = context.stacked(run)
            return run(x_BTD, experts_BTA, weights_BTA, stored, context.layer), None, {}
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
        experts_BTA, weights_BTA, stats = product(self.router(x_BTD, context.real_BT))
        y_BTD, num_rows, captured = self.experts(x_BTD, experts_BTA, weights_BTA, context)
        if num_rows is not None:
            stats = stats._replace(num_dropped=(experts_BTA.size - jnp.sum(num_rows)).astype(stats.num_tokens.dtype))
        return y_BTD, stats, captured
