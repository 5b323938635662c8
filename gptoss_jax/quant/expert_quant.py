"""The callable that the model applies to stored expert weights, at the place of the master -> compute cast."""

from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Any

import jax
from jaxtyping import Array, Float

from gptoss_jax.quant.fake_quant import fake_quant_with_codes
from gptoss_jax.quant.gather import Gather, cast_and_gather
from gptoss_jax.quant.policy import QuantPolicy

# expert_quant(projection, stored weight [E, out, in], gather) -> (compute weight, codes it was decoded from; None where not quantized).
# With `gather`, inside a `jax.shard_map`, the stored weight and the codes are a shard and the compute weight is whole.
ExpertQuant = Callable[[str, Float[Array, "E out in"], Gather | None], tuple[Float[Array, "G out in"], Any | None]]

PROJECTIONS = ("gate_up_proj", "down_proj")


def plain_cast(dtype) -> ExpertQuant:
    """The cast to the compute dtype, without codes: SFT."""
    return lambda projection, stored, gather=None: (cast_and_gather(stored, dtype, gather) if gather else stored.astype(dtype), None)


def make_expert_quant(policy: QuantPolicy | None, compute_dtype) -> ExpertQuant:
    """Fake quantization of the experts by the policy, or only the cast to the compute dtype (policy None).

    Layers run in a scan, so one format serves a projection in all layers; a policy that tells layers apart, or that names other
    parameters than the expert projections, cannot be carried out and is refused.

    Raises:
      ValueError: a rule that does not cover an expert projection in every layer; a format that rounds stochastically, or that no file can hold.
    """
    formats = dict.fromkeys(PROJECTIONS)
    if policy is not None:
        # "?" stands for any layer: a pattern that spells out a layer does not match it.
        names = {projection: f"?.mlp.experts.{projection}" for projection in PROJECTIONS}
        for pattern, _ in policy.rules:
            if not any(fnmatchcase(name, pattern) for name in names.values()):
                raise ValueError(f"quantization rule {pattern!r} does not cover an expert projection in every layer")
        formats = {projection: policy.format_of(name) for projection, name in names.items()}
        for fmt in dict.fromkeys(formats.values()):
            if fmt is not None and (fmt.stochastic or fmt.export_problem):
                problem = fmt.export_problem or f"element_round={fmt.element_round!r} gives other weights every time"
                raise ValueError(f"{fmt}: QAT trains the weights that an export holds, but {problem}")

    def expert_quant(projection, stored, gather=None):
        fmt = formats[projection]
        if fmt is None:
            return plain_cast(compute_dtype)(projection, stored, gather)
        with jax.named_scope(f"fake_quant_{projection}"):
            return fake_quant_with_codes(stored, fmt, policy.estimator, dtype=compute_dtype, gather=gather)

    return expert_quant
