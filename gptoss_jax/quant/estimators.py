"""Gradient estimators: how the gradient of the quantized weight passes to the stored weight.

An estimator is a small frozen object with a name and two methods. `residual(x)` says what the backward pass needs of the input (an empty
tuple: nothing is kept), `backward(residual, grad)` returns dL/dx for grad = dL/dw. The forward pass belongs to the format alone.
"""

import difflib
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

from jaxtyping import Array, Float


@runtime_checkable
class Estimator(Protocol):
    """What `fake_quant` needs of an estimator. Must be hashable: it is a static argument of the custom_vjp."""

    name: ClassVar[str]

    def residual(self, x: Float[Array, "*shape"]) -> Any:
        """What the backward pass keeps of the input, a pytree."""

    def backward(self, residual: Any, grad: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """dL/dx from dL/dw."""


@dataclass(frozen=True)
class Ste:
    """Straight-through: dL/dx = dL/dw, scales taken as constants. Keeps nothing. What NVIDIA's recipe uses (`pass_through_bwd`)."""

    name: ClassVar[str] = "ste"

    def residual(self, x):
        return ()

    def backward(self, residual, grad):
        return grad


_ESTIMATORS: dict[str, type] = {cls.name: cls for cls in (Ste,)}


def get_estimator(estimator: str | Estimator) -> Estimator:
    """The estimator itself, or the default object of its name.

    Raises:
      ValueError: unknown name.
      TypeError: neither a name nor an estimator.
    """
    if isinstance(estimator, str):
        if estimator not in _ESTIMATORS:
            near = difflib.get_close_matches(estimator, _ESTIMATORS, n=1, cutoff=0.0)
            raise ValueError(f"unknown estimator {estimator!r}; nearest is {near[0]!r}, known are {', '.join(_ESTIMATORS)}")
        return _ESTIMATORS[estimator]()
    if isinstance(estimator, Estimator):
        return estimator
    raise TypeError(f"an estimator is a name or an Estimator object, not {estimator!r}")
