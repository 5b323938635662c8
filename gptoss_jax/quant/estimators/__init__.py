"""Gradient estimators: how the gradient of the quantized weight passes to the stored weight. A new one is a dataclass and a decorator:

    @register_estimator
    @dataclass(frozen=True)
    class Half:
        name, needs_input, linear = "half", False, True         (as ClassVars)

        def backward(self, cells, grad):
            return 0.5 * grad
"""

from gptoss_jax.quant.estimators.registry import (
    Estimator,
    estimator_from_dict,
    estimator_names,
    estimator_to_dict,
    get_estimator,
    register_estimator,
)
from gptoss_jax.quant.estimators.zoo import Dge, Ewgs, SoftRound, Ste, SteClip, SteScale, Trust

__all__ = [
    "Dge", "Estimator", "Ewgs", "SoftRound", "Ste", "SteClip", "SteScale", "Trust",
    "estimator_from_dict", "estimator_names", "estimator_to_dict", "get_estimator", "register_estimator",
]  # fmt: skip
