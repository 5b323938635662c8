"""Differentiable quantization: fake quantization, gradient estimators, and the policy that says which weights it covers."""

from gptoss_jax.quant.cells import Cells, cells_of
from gptoss_jax.quant.estimators import Estimator, Ste, estimator_from_dict, estimator_names, estimator_to_dict, get_estimator, register_estimator
from gptoss_jax.quant.expert_quant import ExpertQuant, activation_rounding, make_expert_quant, plain_cast, with_activations
from gptoss_jax.quant.fake_quant import fake_quant, fake_quant_with_codes
from gptoss_jax.quant.gather import Gather
from gptoss_jax.quant.lora import Adapted, LoraWeight, merged_weight
from gptoss_jax.quant.policy import QuantPolicy, default_policy
from gptoss_jax.quant.rotation import Hadamard, rotated_fake_quant
from gptoss_jax.quant.two_way import TwoWay

__all__ = [
    "Adapted", "Cells", "Estimator", "ExpertQuant", "Gather", "Hadamard", "LoraWeight", "QuantPolicy", "Ste", "TwoWay",
    "activation_rounding", "cells_of", "default_policy", "estimator_from_dict", "estimator_names", "estimator_to_dict", "fake_quant",
    "fake_quant_with_codes", "get_estimator", "make_expert_quant", "merged_weight", "plain_cast", "register_estimator",
    "rotated_fake_quant", "with_activations",
]  # fmt: skip
