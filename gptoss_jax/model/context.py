"""What every layer of one forward pass shares."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jaxtyping import Array, Bool, Float, Int

# expert_quant("gate_up_proj" | "down_proj", stored weight) -> (compute weight, the codes it was decoded from or None)
ExpertQuant = Callable[[str, Array], tuple[Array, Any]]


def plain_cast(dtype) -> ExpertQuant:
    """The cast to the compute dtype, without codes: SFT."""
    return lambda projection, stored: (stored.astype(dtype), None)


@dataclass(frozen=True)
class Context:
    """Per-row tables and the two choices that SFT and QAT differ in: where expert weights come from, and whether to hand them out.

    Generation sets the last two: which of the stacked expert weights are the layer's own, and how many tokens of each row the cache holds.
    """

    segment_ids_BT: Int[Array, "B T"]
    cos_BTC: Float[Array, "B T C"]
    sin_BTC: Float[Array, "B T C"]
    expert_quant: ExpertQuant
    capture: bool
    backend: str | None = None  # of attention and experts, see `gptoss_jax.ops.backend`
    layer: Int[Array, ""] | int | None = None
    lengths_B: Int[Array, "B"] | None = None

    @property
    def real_BT(self) -> Bool[Array, "B T"]:
        """Tokens that are not padding."""
        return self.segment_ids_BT > 0
