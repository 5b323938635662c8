"""What stands between the stored experts and those that the forward pass of an experiment computes with.

A quantizer sees whole stacked parameters, once per step and outside the scan over layers, and is free in both directions: it may train arrays of its
own (learned scales), draw noise, or anneal. `round` is its deployed form: hard, without noise and without a gradient; what is exported and measured.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax
from jax import lax
from jaxtyping import Array

from gptoss_jax.formats import Format, get_format
from gptoss_jax.quant import Estimator, TwoWay, fake_quant, get_estimator
from gptoss_jax.quant.estimators import estimator_to_dict
from gptoss_jax.quant.expert_quant import PROJECTIONS
from gptoss_jax.quant.policy import BACKWARD_WEIGHTS

Params = Mapping[str, Array]


@runtime_checkable
class Quantizer(Protocol):
    """Frozen and hashable: a static argument of the compiled step."""

    def init(self, params: Params) -> dict[str, Array]:
        """Arrays to train beside the parameters, `<param>.<what>`; none for most."""

    def __call__(self, params: Params, extra: Params, key: Array, step: Array) -> dict[str, Array]:
        """`params` with the expert projections as the training forward uses them, differentiable.

        Args:
          extra: what `init` made, as trained.
          key: of this step, for noise and stochastic rounding.
          step: int32, for annealing.
        """

    def round(self, params: Params, extra: Params) -> dict[str, Array]:
        """`params` with the expert projections as they are deployed."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values that say all about it."""


def expert_names(params: Params) -> list[str]:
    """The expert projections among these parameters, [L, E, out, in] each (without L where a layer stands alone)."""
    return [name for name in params if name.endswith(PROJECTIONS)]


@dataclass(frozen=True)
class Unquantized:
    """Computes with what is stored."""

    def init(self, params: Params) -> dict[str, Array]:
        return {}

    def __call__(self, params: Params, extra: Params, key: Array, step: Array) -> dict[str, Array]:
        return dict(params)

    def round(self, params: Params, extra: Params) -> dict[str, Array]:
        return dict(params)

    def to_dict(self) -> dict[str, Any]:
        return {"name": "unquantized"}


@dataclass(frozen=True)
class FakeQuant:
    """Any format with any estimator that holds no state. A stochastic format draws new bits for every step and array in training, and rounds to
    nearest when deployed."""

    format: Format
    estimator: Estimator
    # which weight the gradient of an expert's input goes through, see `quant.two_way`
    backward_weight: str = "quantized"

    @classmethod
    def of(cls, fmt: str | Format, estimator: str | Estimator = "ste", backward_weight: str = "quantized") -> "FakeQuant":
        return cls(get_format(fmt), get_estimator(estimator), backward_weight)

    def __post_init__(self):
        if self.backward_weight not in BACKWARD_WEIGHTS:
            raise ValueError(f"backward_weight = {self.backward_weight!r} is not {' or '.join(BACKWARD_WEIGHTS)}")

    def init(self, params: Params) -> dict[str, Array]:
        return {}

    def __call__(self, params: Params, extra: Params, key: Array, step: Array) -> dict[str, Array]:
        made = {}
        for number, name in enumerate(expert_names(params)):
            bits = jax.random.fold_in(key, number) if self.format.stochastic else None
            made[name] = fake_quant(params[name], self.format, self.estimator, key=bits)
            if self.backward_weight == "original":
                made[name] = TwoWay(made[name], lax.stop_gradient(params[name]))
        return {**params, **made}

    def round(self, params: Params, extra: Params) -> dict[str, Array]:
        fmt = to_nearest(self.format)
        return {**params, **{name: fmt.encode_decode(params[name], params[name].dtype)[0] for name in expert_names(params)}}

    def to_dict(self) -> dict[str, Any]:
        estimator = estimator_to_dict(self.estimator)
        return {"name": "fake_quant", "format": self.format.to_dict(), "estimator": estimator, "backward_weight": self.backward_weight}


def to_nearest(fmt: Format) -> Format:
    """The format with the rounding of deployed weights."""
    return dataclasses.replace(fmt, element_round="rne", seed=None) if fmt.stochastic else fmt
