"""What every layer of one forward pass shares."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from jaxtyping import Array, Bool, Float, Int

from gptoss_jax.quant import ExpertQuant


class Distribute(NamedTuple):
    """How the parts of the model that mix tokens or weights of several devices run on a mesh; all keep arguments and results.

    `attention(run, window)` for `run(q, k, v, sinks, segment_ids, keys=None)`; `experts(run, capture)` for `run_experts`, whose captured weights
    come out on request only; `loss(run)` for `run(hidden, w, targets, weights, *teacher, gathers=(), vocab=())`; `embedding(weight, tokens, dtype)`.
    """

    attention: Callable[[Callable, int | None], Callable]
    experts: Callable[[Callable, bool], Callable]
    loss: Callable[[Callable], Callable]
    embedding: Callable


@dataclass(frozen=True)
class Context:
    """Per-row tables and the two choices that SFT and QAT differ in: where expert weights come from, and whether to hand them out.

    Generation sets the last three: which of the stacked expert weights are the layer's own, how many tokens of each row the cache holds, and on a
    mesh `stacked(run)`, which does with shards of experts what `run_stacked_experts` does with all.
    """

    segment_ids_BT: Int[Array, "B T"]
    cos_BTC: Float[Array, "B T C"]
    sin_BTC: Float[Array, "B T C"]
    expert_quant: ExpertQuant
    capture: bool
    backend: str | None = None  # of attention and experts, see `gptoss_jax.ops.backend`
    distribute: Distribute | None = None  # on a mesh; None is one device
    layer: Int[Array, ""] | int | None = None
    lengths_B: Int[Array, "B"] | None = None
    stacked: Callable[[Callable], Callable] | None = None

    @property
    def real_BT(self) -> Bool[Array, "B T"]:
        """Tokens that are not padding."""
        return self.segment_ids_BT > 0
