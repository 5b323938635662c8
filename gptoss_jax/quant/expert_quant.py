"""The callable that the model applies to stored expert weights, at the place of the master -> compute cast."""

from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Any

import jax
from jaxtyping import Array, Float

from gptoss_jax.quant.fake_quant import fake_quant_with_codes
from gptoss_jax.quant.policy import QuantPolicy

# expert_quant(projection, stored weight [E, out, in]) -> (compute weight, codes it was decoded from; None where not quantized)
ExpertQuant = Callable[[str, Float[Array, "E out in"]], tuple[Float[Array, "E out in"], Any | None]]

PROJECTIONS = ("gate_up_proj", "down_proj")


def make_expert_quant(policy: QuantPolicy | None, compute_dtype) -> ExpertQuant:
    """Fake quantization of the experts by the policy, or only the cast to the compute dtype (policy None).

    Layers run in a scan, so one format serves a projection in all layers; a policy that tells layers apart, or that names other
    parameters than the expert projections, cannot be carried out and is refused.

    Raises:
      ValueError: a rule that does not cover an expert projection in every layer.
    """
    formats = dict.fromkeys(PROJECTIONS)
    if policy is not None:
        # "?" stands for any layer: a pattern that spells out a layer does not match it.
        names = {projection: f"?.mlp.experts.{projection}" for projection in PROJECTIONS}
        for pattern, _ in policy.rules:
            if not any(fnmatchcase(name, pattern) for name in names.values()):
                raise ValueError(f"quantization rule {pattern!r} does not cover an expert projection in every layer")
        formats = {projection: policy.format_of(name) for projection, name in names.items()}

    def expert_quant(projection, stored):
        fmt = formats[projection]
        if fmt is None:
            return stored.astype(compute_dtype), None
        with jax.named_scope(f"fake_quant_{projection}"):
            return fake_quant_with_codes(stored, fmt, dtype=compute_dtype)

    return expert_quant
