"""Tiny checkpoints of every layout, written with torch and the safetensors library: nothing here uses the code under test.

All dimensions differ (hidden 96, expert hidden 64, q 120, kv 40, ...), so no transposed or exchanged tensor fits by chance.
"""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

V, D, F, N, K, H, E, L = 160, 96, 64, 6, 2, 20, 8, 3
CONFIG = {
    "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "vocab_size": V, "hidden_size": D, "intermediate_size": F,
    "num_hidden_layers": L, "num_local_experts": E, "num_experts_per_tok": 3, "experts_per_token": 3, "num_attention_heads": N,
    "num_key_value_heads": K, "head_dim": H, "sliding_window": 7, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "max_position_embeddings": 256, "initial_context_length": 64, "rms_norm_eps": 1e-5, "swiglu_limit": 7.0, "attention_bias": True,
    "attention_dropout": 0.0, "hidden_act": "silu", "tie_word_embeddings": False, "rope_theta": 150000,
    "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
                     "original_max_position_embeddings": 64},
    "eos_token_id": 2, "pad_token_id": 1, "router_aux_loss_coef": 0.9, "output_router_logits": False, "initializer_range": 0.02, "use_cache": True,
}  # fmt: skip
QUANTIZATION = {
    "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"],
    "quant_method": "mxfp4",
}
OPENAI_CONFIG = {
    "num_hidden_layers": L, "num_experts": E, "experts_per_token": 3, "vocab_size": V, "hidden_size": D, "intermediate_size": F,
    "swiglu_limit": 7.0, "head_dim": H, "num_attention_heads": N, "num_key_value_heads": K, "sliding_window": 7, "initial_context_length": 64,
    "rope_theta": 150000, "rope_scaling_factor": 4.0, "rope_ntk_alpha": 1.0, "rope_ntk_beta": 32.0,
}  # fmt: skip
MATRICES = {"gate_up_proj": (2 * F, D), "down_proj": (D, F)}
_OPENAI_NAMES = {
    "input_layernorm.weight": "attn.norm.scale", "self_attn.o_proj.weight": "attn.out.weight", "self_attn.o_proj.bias": "attn.out.bias",
    "self_attn.sinks": "attn.sinks", "post_attention_layernorm.weight": "mlp.norm.scale", "mlp.router.weight": "mlp.gate.weight",
    "mlp.router.bias": "mlp.gate.bias", "mlp.experts.gate_up_proj_blocks": "mlp.mlp1_weight.blocks",
    "mlp.experts.gate_up_proj_scales": "mlp.mlp1_weight.scales", "mlp.experts.gate_up_proj_bias": "mlp.mlp1_bias",
    "mlp.experts.down_proj_blocks": "mlp.mlp2_weight.blocks", "mlp.experts.down_proj_scales": "mlp.mlp2_weight.scales",
    "mlp.experts.down_proj_bias": "mlp.mlp2_bias",
}  # fmt: skip


def mxfp4_tensors(seed=0) -> dict[str, torch.Tensor]:
    """The model in HF's MXFP4 layout: random BF16 everywhere, random codes, scales of weights of size 2^-2 to 2^-10."""
    rng = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(shape, generator=rng).to(torch.bfloat16)
    byte = lambda low, high, *shape: torch.randint(low, high, shape, generator=rng).to(torch.uint8)
    out = {"model.embed_tokens.weight": normal(V, D), "model.norm.weight": normal(D), "lm_head.weight": normal(V, D)}
    for layer in range(L):
        shapes = {
            "input_layernorm.weight": (D,), "post_attention_layernorm.weight": (D,), "self_attn.sinks": (N,),
            "self_attn.q_proj.weight": (N * H, D), "self_attn.k_proj.weight": (K * H, D), "self_attn.v_proj.weight": (K * H, D),
            "self_attn.q_proj.bias": (N * H,), "self_attn.k_proj.bias": (K * H,), "self_attn.v_proj.bias": (K * H,),
            "self_attn.o_proj.weight": (D, N * H), "self_attn.o_proj.bias": (D,), "mlp.router.weight": (E, D), "mlp.router.bias": (E,),
            "mlp.experts.gate_up_proj_bias": (E, 2 * F), "mlp.experts.down_proj_bias": (E, D),
        }  # fmt: skip
        out |= {f"model.layers.{layer}.{name}": normal(*shape) for name, shape in shapes.items()}
        for name, (rows, width) in MATRICES.items():
            out[f"model.layers.{layer}.mlp.experts.{name}_blocks"] = byte(0, 256, E, rows, width // 32, 16)
            out[f"model.layers.{layer}.mlp.experts.{name}_scales"] = byte(117, 126, E, rows, width // 32)
    return out


def bf16_tensors(mxfp4: dict[str, torch.Tensor], dtype=torch.bfloat16) -> dict[str, torch.Tensor]:
    """The same model in HF's BF16 layout, dequantized by transformers."""
    out = {key: value.to(dtype) if value.is_floating_point() else value for key, value in mxfp4.items()}
    for key in [key for key in out if key.endswith("_blocks")]:
        blocks, scales = out.pop(key), out.pop(key.replace("_blocks", "_scales"))
        out[key.removesuffix("_blocks")] = convert_moe_packed_tensors(blocks, scales, dtype=dtype).contiguous()
    return out


def openai_tensors(mxfp4: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same model in OpenAI's original layout: renamed, q|k|v fused along rows."""
    out = {"embedding.weight": mxfp4["model.embed_tokens.weight"], "norm.scale": mxfp4["model.norm.weight"]}
    out["unembedding.weight"] = mxfp4["lm_head.weight"]
    for layer in range(L):
        prefix = f"model.layers.{layer}."
        out |= {f"block.{layer}.{new}": mxfp4[prefix + old] for old, new in _OPENAI_NAMES.items()}
        for kind in ("weight", "bias"):
            out[f"block.{layer}.attn.qkv.{kind}"] = torch.cat([mxfp4[f"{prefix}self_attn.{x}_proj.{kind}"] for x in "qkv"])
    return out


def write(directory: Path, tensors: dict[str, torch.Tensor], config: dict, shards=1, pattern="model-{:05d}-of-{:05d}.safetensors") -> Path:
    """A directory of one file, or of `shards` files and an index; tensors in name order, cut by count."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(tensors, directory / "model.safetensors", {"format": "pt"})
        return directory
    weight_map = {}
    for number, names in enumerate(np.array_split(sorted(tensors), shards), 1):
        file = pattern.format(number, shards)
        save_file({str(name): tensors[name] for name in names}, directory / file, {"format": "pt"})
        weight_map |= {str(name): file for name in names}
    total = sum(t.numel() * t.element_size() for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def expected_params(mxfp4: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """What loading must give, in float32, by our names (period 2, one repeat, a tail of one layer): values dequantized by transformers."""
    named = {}
    for key, value in bf16_tensors(mxfp4, torch.float32).items():
        array = value.numpy()
        if key.endswith(("experts.gate_up_proj", "experts.down_proj")):
            array = array.swapaxes(1, 2)
        if key.startswith("model.layers."):
            layer, _, rest = key.removeprefix("model.layers.").partition(".")
            name, stacked = {"0": ("blocks.0.", True), "1": ("blocks.1.", True), "2": ("tail.0.", False)}[layer]
            named[name + rest] = array[None] if stacked else array
        else:
            named[key.removeprefix("model.")] = array
    return named
