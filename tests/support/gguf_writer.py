"""An MXFP4 export of ours as a GGUF file for llama.cpp: the same codes and scales in its order, the rest in float32, the tokenizer inside.

llama.cpp's block of 32 elements is one scale byte (E8M0, as ours) and 16 bytes whose low nibbles are elements 0-15 and whose high nibbles are
elements 16-31; in safetensors byte j holds the elements 2j (low) and 2j + 1 (high). Gate and up rows, interleaved in our files, are two tensors.

Legend: E experts  U=2F gate/up rows  C blocks of a row  Q=16 bytes of a block
"""

import json
from pathlib import Path

import gguf
import ml_dtypes  # noqa: F401  (numpy then knows bfloat16, which safetensors asks it for)
import numpy as np
from safetensors.numpy import load_file

PLAIN = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "post_attention_layernorm": "post_attention_norm", "mlp.router": "ffn_gate_inp",
}  # fmt: skip


def blocks_of(packed_EUCQ: np.ndarray, scales_EUC: np.ndarray) -> np.ndarray:
    """uint8 [E, U, C * 17] in llama.cpp's order from the packed codes and scale bytes of a safetensors file."""
    codes = np.stack([packed_EUCQ & 15, packed_EUCQ >> 4], axis=-1).reshape(*scales_EUC.shape, 32)  # element order
    halves = codes[..., :16] | codes[..., 16:] << 4
    return np.concatenate([scales_EUC[..., None], halves], axis=-1).reshape(*scales_EUC.shape[:2], -1)


def write_gguf(export: Path, target: Path) -> None:
    """Writes `target` from an MXFP4 directory with config.json, tokenizer.json and model.safetensors."""
    config = json.loads((export / "config.json").read_text())
    tensors = load_file(export / "model.safetensors")
    writer = gguf.GGUFWriter(target, "gpt-oss")
    rope = config["rope_scaling"]
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_expert_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_expert_count(config["num_local_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_sliding_window(config["sliding_window"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(rope["factor"])
    writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    writer.add_vocab_size(config["vocab_size"])
    _add_tokenizer(writer, export)

    def plain(name: str, key: str) -> None:
        writer.add_tensor(name, np.ascontiguousarray(tensors[key].astype(np.float32)))

    for name, key in (("token_embd", "model.embed_tokens"), ("output_norm", "model.norm"), ("output", "lm_head")):
        plain(f"{name}.weight", f"{key}.weight")
    for layer in range(config["num_hidden_layers"]):
        ours, theirs = f"model.layers.{layer}.", f"blk.{layer}."
        for key, name in PLAIN.items():
            for kind in ("weight", "bias"):
                if f"{ours}{key}.{kind}" in tensors:
                    plain(f"{theirs}{name}.{kind}", f"{ours}{key}.{kind}")
        plain(f"{theirs}attn_sinks.weight", f"{ours}self_attn.sinks")
        experts = f"{ours}mlp.experts."
        for key, name, rows in (("gate_up", "gate", slice(0, None, 2)), ("gate_up", "up", slice(1, None, 2)), ("down", "down", slice(None))):
            packed, scales = (tensors[f"{experts}{key}_proj_{kind}"][:, rows] for kind in ("blocks", "scales"))
            writer.add_tensor(f"{theirs}ffn_{name}_exps.weight", blocks_of(packed, scales), raw_dtype=gguf.GGMLQuantizationType.MXFP4)
            bias = tensors[f"{experts}{key}_proj_bias"][:, rows].astype(np.float32)
            writer.add_tensor(f"{theirs}ffn_{name}_exps.bias", np.ascontiguousarray(bias))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_tokenizer(writer: gguf.GGUFWriter, export: Path) -> None:
    """The byte-level BPE of tokenizer.json; special tokens as control tokens. Prompts are sent as ids, so the pre-tokenizer does not matter."""
    raw = json.loads((export / "tokenizer.json").read_text())
    special = {token["content"]: token["id"] for token in raw["added_tokens"]}
    ids = raw["model"]["vocab"] | special
    tokens = [token for token, _ in sorted(ids.items(), key=lambda item: item[1])]
    kinds = [gguf.TokenType.CONTROL if token in special else gguf.TokenType.NORMAL for token in tokens]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-4o")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in raw["model"]["merges"]])
    writer.add_bos_token_id(special["<|startoftext|>"])
    writer.add_eos_token_id(special["<|return|>"])
    writer.add_pad_token_id(special["<|endoftext|>"])
    writer.add_add_bos_token(False)
