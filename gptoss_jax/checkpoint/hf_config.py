"""What surrounds the tensors of an exported directory: config.json in the spelling of its layout, and the files carried along unchanged."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gptoss_jax
from gptoss_jax.checkpoint.hf_layout import Layout, expected_tensors
from gptoss_jax.checkpoint.store import read_json
from gptoss_jax.errors import CorruptError, UsageError
from gptoss_jax.formats import Format
from gptoss_jax.model import GptOssConfig

MANIFEST = "gptoss_jax_export.json"  # clients ignore JSON files that they do not know
# Only beside ModelOpt's own layout: TensorRT-LLM lets it win over config.json.
MODELOPT_CONFIG = "hf_quant_config.json"
OPENAI_DTYPES = "dtypes.json"  # beside OpenAI's config.json; TensorRT-LLM reads it
NVFP4_METHODS = {"own": "gptoss_jax_nvfp4", "modelopt": "modelopt", "compressed-tensors": "compressed-tensors"}
NOT_CONVERTED = ("model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head")
# the template of the release has 16 kB, its tokenizer.json 28 MB; nothing of these files is run here, and nothing larger is read
MAX_TEMPLATE_BYTES, MAX_COMPANION_BYTES = 1 << 20, 64 << 20
COMPANIONS = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "generation_config.json")
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")

# Keys of a source's config.json that say nothing about the forward pass but belong to the model.
_CARRIED = (*TOKEN_IDS, "initializer_range", "output_router_logits", "router_aux_loss_coef", "use_cache")
_RELEASE_IDS = {"eos_token_id": 200002, "pad_token_id": 199999}  # o200k_harmony: <|return|>, <|endoftext|>


_WEIGHTS = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}  # as ModelOpt and compressed-tensors both say it


def quantization_config(fmt: Format, layout: Layout) -> dict[str, Any]:
    """The `quantization_config` of an export: of MXFP4 exactly the release's, whatever the scale rule (readers need none)."""
    if fmt.name == "mxfp4":
        return {"modules_to_not_convert": list(NOT_CONVERTED), "quant_method": "mxfp4"}
    method = NVFP4_METHODS[layout.dialect]
    if layout.dialect == "own":
        return {"modules_to_not_convert": list(NOT_CONVERTED), "quant_method": method, "format": fmt.to_dict()}
    if layout.dialect == "modelopt":
        quantization = modelopt_config()["quantization"]
        groups = {"group_0": {"weights": _WEIGHTS, "targets": ["Linear"]}}
        return {
            "config_groups": groups, "ignore": quantization["exclude_modules"], "quant_algo": quantization["quant_algo"],
            "producer": modelopt_config()["producer"], "quant_method": method,
        }  # fmt: skip
    weights = {**_WEIGHTS, "strategy": "tensor_group", "symmetric": True, "scale_dtype": "torch.float8_e4m3fn"}
    name = "nvfp4-pack-quantized"
    return {
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "format": name}},
        "format": name, "ignore": ["re:.*self_attn.*", "re:.*router.*", "lm_head"], "quantization_status": "compressed", "quant_method": method,
    }  # fmt: skip


def modelopt_config() -> dict[str, Any]:
    """`hf_quant_config.json`: weights in NVFP4, activations as they are."""
    return {
        "producer": {"name": "gptoss_jax", "version": gptoss_jax.__version__},
        "quantization": {"quant_algo": "W4A16_NVFP4", "kv_cache_quant_algo": None, "group_size": 16, "exclude_modules": list(NOT_CONVERTED)},
    }


def config_files(
    config: GptOssConfig, fmt: Format | None, layout: Layout, source: Mapping[str, Any], token_ids: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """The JSON files of an export that describe the model, by name."""
    if layout.naming == "openai":
        kinds = {"packed": "FP4", "scales": "UE8"} if fmt else {}
        roles = {".blocks": "packed", ".scales": "scales"}
        dtypes = {key: kinds.get(roles.get(key[key.rfind(".") :]), "BF16") for key in expected_tensors(config, layout)}
        return {"config.json": openai_config(config), OPENAI_DTYPES: dtypes}
    out = {"config.json": hf_config(config, fmt, source, token_ids, layout)}
    return out | ({MODELOPT_CONFIG: modelopt_config()} if layout.dialect == "modelopt" else {})


def openai_config(config: GptOssConfig) -> dict[str, Any]:
    """config.json of OpenAI's original layout: exactly the fields of its reference's ModelConfig."""
    fields = ("num_hidden_layers", "vocab_size", "hidden_size", "intermediate_size", "swiglu_limit", "head_dim", "num_attention_heads",
              "num_key_value_heads", "sliding_window")  # fmt: skip
    rope = config.rope
    return {name: getattr(config, name) for name in fields} | {
        "num_experts": config.num_local_experts, "experts_per_token": config.num_experts_per_tok, "rope_theta": rope.rope_theta,
        "initial_context_length": rope.original_max_position_embeddings, "rope_scaling_factor": rope.factor, "rope_ntk_alpha": rope.beta_slow,
        "rope_ntk_beta": rope.beta_fast,
    }  # fmt: skip


def hf_config(
    config: GptOssConfig, fmt: Format | None, source: Mapping[str, Any], token_ids: Mapping[str, Any], layout: Layout | None = None
) -> dict[str, Any]:
    """config.json of an export.

    Token ids come from `token_ids`, else from the source's config.json, else they are the release's where the vocabulary holds them; otherwise
    they are null, because a reader's default (199999) would lie outside a small vocabulary.
    """
    unknown = sorted(set(token_ids) - set(TOKEN_IDS))
    if unknown:
        raise UsageError(f"token_ids: unknown keys {unknown}; known are {', '.join(TOKEN_IDS)}")
    defaults = {key: value if value < config.vocab_size else None for key, value in _RELEASE_IDS.items()}
    carried = {key: source[key] for key in _CARRIED if key in source}
    out = {**config.to_dict(), **defaults, **carried, **token_ids, "dtype": "bfloat16"}
    if fmt is not None:
        out["quantization_config"] = quantization_config(fmt, layout or Layout("hf", fmt.name))
    return dict(sorted(out.items()))


def check_companions(directory: Path) -> None:
    """Refuses companion files of a size that no tokenizer or template has, before anything reads them.

    Raises:
      CorruptError: naming the file.
    """
    for name in COMPANIONS:
        limit = MAX_TEMPLATE_BYTES if name.endswith(".jinja") else MAX_COMPANION_BYTES
        if (directory / name).is_file() and (size := (directory / name).stat().st_size) > limit:
            raise CorruptError(f"{directory / name}: has {size:,} bytes, more than the {limit:,} that are read")


def read_companions(source_dir: str | Path | None) -> tuple[dict[str, bytes], dict[str, Any]]:
    """The companion files that `source_dir` has, as bytes, and its parsed config.json ({} where there is none)."""
    if source_dir is None:
        return {}, {}
    source = Path(source_dir)
    if not source.is_dir():
        raise UsageError(f"{source}: no such directory to take tokenizer and config from")
    check_companions(source)
    files = {name: (source / name).read_bytes() for name in COMPANIONS if (source / name).is_file()}
    raw = read_json(source / "config.json") if (source / "config.json").is_file() else {}
    return files, raw
