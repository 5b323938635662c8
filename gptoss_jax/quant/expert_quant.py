"""The callable that the model applies to stored expert weights, at the place of the master -> compute cast."""

from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import jax
from jax import lax
from jaxtyping import Array, Float

from gptoss_jax.quant.estimators import Ste
from gptoss_jax.quant.fake_quant import fake_quant_with_codes
from gptoss_jax.quant.gather import Gather, cast_and_gather
from gptoss_jax.quant.lora import Adapted, LoraWeight, quantized, unquantized
from gptoss_jax.quant.policy import QuantPolicy
from gptoss_jax.quant.two_way import TwoWay

# expert_quant(projection, stored weight [E, out, in], gather) -> (compute weight, codes it was decoded from; None where not quantized).
# With `gather`, inside a `jax.shard_map`, stored weight and codes are a shard and the compute weight is whole. A `LoraWeight` gives `Adapted`.
ExpertQuant = Callable[[str, Float[Array, "E out in"] | LoraWeight, Gather | None], tuple[Float[Array, "G out in"] | TwoWay | Adapted, Any | None]]


@dataclass(frozen=True)
class RoundsActivations:
    """An `ExpertQuant` under which the inputs of both expert products are rounded too; a plain function leaves them as they are."""

    weights: ExpertQuant
    activations: Callable[[Array], Array]

    def __call__(self, projection, stored, gather=None):
        return self.weights(projection, stored, gather)


def activation_rounding(expert_quant: ExpertQuant | None) -> Callable[[Array], Array] | None:
    """What the inputs of expert products go through, None where that is nothing."""
    return expert_quant.activations if isinstance(expert_quant, RoundsActivations) else None


def with_activations(weights: ExpertQuant, activations: Callable[[Array], Array] | None) -> ExpertQuant:
    """`weights` under this rounding of inputs, if there is any."""
    return weights if activations is None else RoundsActivations(weights, activations)


PROJECTIONS = ("gate_up_proj", "down_proj")


def plain_cast(dtype) -> ExpertQuant:
    """The cast to the compute dtype, without codes: SFT."""

    def cast(projection, stored, gather=None):
        if isinstance(stored, LoraWeight):
            return unquantized(stored, dtype), None
        return jax.tree.map(lambda x: cast_and_gather(x, dtype, gather) if gather else x.astype(dtype), stored), None

    return cast


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
        if isinstance(stored, LoraWeight):
            if policy.estimator != Ste() or policy.backward_weight != "quantized":
                raise ValueError(f"adapters are trained straight-through, not with {policy.estimator}, backward_weight {policy.backward_weight}")
            with jax.named_scope(f"fake_quant_{projection}"):
                return quantized(stored, fmt, compute_dtype)
        with jax.named_scope(f"fake_quant_{projection}"):
            weight, codes = fake_quant_with_codes(stored, fmt, policy.estimator, dtype=compute_dtype, gather=gather)
        if policy.backward_weight == "original":
            weight = TwoWay(weight, plain_cast(compute_dtype)(projection, lax.stop_gradient(stored), gather)[0])
        return weight, codes

    return with_activations(expert_quant, policy.rounded_activations if policy and policy.activations else None)
