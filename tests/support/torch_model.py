"""transformers' GptOss as the counterpart of ours, filled with our weights by a mapping written here, independent of the library's table."""

import re

import numpy as np
import torch
from transformers import GptOssConfig as HfConfig
from transformers import GptOssForCausalLM

torch.set_num_threads(1)


def hf_config(config) -> HfConfig:
    raw = config.to_dict()
    raw.pop("architectures"), raw.pop("model_type")
    raw = {k: v for k, v in raw.items() if k not in ("experts_per_token", "initial_context_length", "rope_scaling", "rope_theta")}
    rope = {"rope_type": "yarn", "rope_theta": config.rope.rope_theta, "factor": config.rope.factor, "beta_fast": config.rope.beta_fast,
            "beta_slow": config.rope.beta_slow, "truncate": config.rope.truncate,
            "original_max_position_embeddings": config.rope.original_max_position_embeddings}  # fmt: skip
    return HfConfig(**raw, rope_parameters=rope, attn_implementation="eager", experts_implementation="eager", pad_token_id=None)


def hf_key_of(name: str, config):
    """Our name -> [(HF key, index into our stacked array)]."""
    part, _, rest = name.partition(".")
    if part not in ("blocks", "tail"):
        return [((name if part == "lm_head" else "model." + name), ())]
    j, _, rest = rest.partition(".")
    if part == "tail":
        return [(f"model.layers.{config.repeats * config.period + int(j)}.{rest}", ())]
    return [(f"model.layers.{i * config.period + int(j)}.{rest}", (i,)) for i in range(config.repeats)]


def to_hf(named: dict, config) -> dict:
    """Arrays by our names -> tensors by HF names (expert projections transposed to [E, in, out])."""
    out = {}
    for name, value in named.items():
        for key, index in hf_key_of(name, config):
            array = np.asarray(value, np.float32)[index]
            if re.search(r"experts\.(gate_up|down)_proj$", key):
                array = array.swapaxes(1, 2)
            out[key] = torch.tensor(np.ascontiguousarray(array))
    return out


def hf_model(config, params) -> GptOssForCausalLM:
    """transformers' model in float32 with exactly our weights (strict)."""
    model = GptOssForCausalLM(hf_config(config)).float()
    model.load_state_dict(to_hf(params, config), strict=True)
    return model.eval()


def hf_gradients(model) -> dict:
    return {name: parameter.grad for name, parameter in model.named_parameters()}
