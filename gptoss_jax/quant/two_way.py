"""A weight that computes one way and passes gradients another.

    y = x @ forward.T        dx = dy @ backward        dforward = dy.T @ x, dbackward = 0

Training through fake quantization differentiates the quantized product, so `dx = dy @ w_q`. NVIDIA's Transformer Engine can take the original weight
instead (`backward_override="high_precision"`). The gradient of the weight is the same either way.
"""

from typing import Any, NamedTuple

from jaxtyping import Array, Float

from gptoss_jax.quant.lora import Adapted


class TwoWay(NamedTuple):
    """Accepted by `ops.experts` and `ops.grouped_matmul` in place of a weight [E, out, in]; both parts of one shape and dtype."""

    forward: Float[Array, "*shape"]
    backward: Float[Array, "*shape"]


def forward_weight(weight: Any) -> Any:
    """The part that computes."""
    if isinstance(weight, Adapted):
        return weight.weight
    return weight.forward if isinstance(weight, TwoWay) else weight
