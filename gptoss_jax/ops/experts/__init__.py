"""The experts of one layer: each token through the experts chosen for it, results weighted and summed.

    out[s] = sum_a weights[s, a] * (down[e] @ swiglu(gate_up[e] @ x[s] + bias_up[e]) + bias_down[e]),   e = experts[s, a]

`composed` is the chain dispatch -> grouped matmul -> SwiGLU -> grouped matmul -> combine, each step an operation of its own over all rows; with
Triton kernels it is what runs on a GPU. `fused` does the chain piece by piece in XLA, so that on a CPU the rows of a piece stay in the cache. Both
give the same numbers and the same gradients.

Legend: S tokens  A experts per token  D hidden  E experts  F expert hidden  U=2F gate/up interleaved
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gptoss_jax.ops.backend import resolve_backend
from gptoss_jax.ops.experts.composed import expert_mlp_composed
from gptoss_jax.ops.experts.fused import expert_mlp_fused
from gptoss_jax.ops.grouped_matmul import block_rows, group_rows
from gptoss_jax.ops.remat import product
from gptoss_jax.quant.lora import Adapted
from gptoss_jax.quant.two_way import TwoWay, forward_weight


def expert_mlp_counted(
    x_SD: Float[Array, "S D"],
    experts_SA: Int[Array, "S A"],
    weights_SA: Float[Array, "S A"],
    w_gate_up_EUD: Float[Array, "E U D"] | TwoWay | Adapted,
    bias_up_EU: Float[Array, "E U"],
    w_down_EDF: Float[Array, "E D F"] | TwoWay | Adapted,
    bias_down_ED: Float[Array, "E D"],
    *,
    limit: float,
    backend: str | None = None,
    activations: Callable[[Array], Array] | None = None,
) -> tuple[Float[Array, "S D"], Int[Array, ""]]:
    """The experts, and the number of routed rows that lie in blocks in use: all whose expert is here, for nothing is dropped.

    Work is done for routed rows only. Products accumulate in float32; differentiable in x, weights and all four parameters.

    Args:
      limit: clamp of the SwiGLU.
      backend: "xla" or "triton"; None chooses by platform.
      activations: what both products' inputs go through, fake quantization of rows for instance; it, weights with two ways and adapters run composed.
    """
    backend = resolve_backend(backend)
    groups = product(group_rows(experts_SA, forward_weight(w_gate_up_EUD).shape[0], block_rows(backend)))
    is_plain = not any(isinstance(w, TwoWay | Adapted) for w in (w_gate_up_EUD, w_down_EDF))
    run = expert_mlp_fused if backend == "xla" and is_plain else expert_mlp_composed
    if activations is not None:
        run = partial(expert_mlp_composed, activations=activations)
    out_SD = run(x_SD, weights_SA, w_gate_up_EUD, bias_up_EU, w_down_EDF, bias_down_ED, groups, limit, backend)
    is_row_GM = groups.assignment_P.reshape(-1, groups.block_rows) < experts_SA.size
    return out_SD, jnp.sum(is_row_GM & (jnp.arange(len(is_row_GM)) < groups.num_blocks)[:, None], dtype=jnp.int32)


def expert_mlp(*arrays: Any, **options: Any) -> Float[Array, "S D"]:
    """`expert_mlp_counted` without the count."""
    return expert_mlp_counted(*arrays, **options)[0]


__all__ = ["expert_mlp", "expert_mlp_counted"]
