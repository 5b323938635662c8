"""The gpt-oss model in Flax NNX, written as if for one device."""

from gptoss_jax.model.config import GptOssConfig, RopeConfig
from gptoss_jax.model.moe import RouterStats, load_balancing_loss
from gptoss_jax.model.transformer import (
    GptOss,
    Output,
    Params,
    abstract_params,
    compute_logits,
    forward,
    init_params,
    logical_axes,
    num_params,
)

__all__ = [
    "GptOss",
    "GptOssConfig",
    "Output",
    "Params",
    "RopeConfig",
    "RouterStats",
    "abstract_params",
    "compute_logits",
    "forward",
    "init_params",
    "load_balancing_loss",
    "logical_axes",
    "num_params",
]
