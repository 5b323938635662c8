"""What surrounds the tensors of an exported directory: config.json in the released spelling, and the files carried along unchanged."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gptoss_jax.checkpoint.store import read_json
from gptoss_jax.errors import UsageError
from gptoss_jax.formats import Format
from gptoss_jax.model import GptOssConfig

MANIFEST = "gptoss_jax_export.json"  # clients ignore JSON files that they do not know
# Never write one: TensorRT-LLM lets it win over config.json.
MODELOPT_CONFIG = "hf_quant_config.json"
NVFP4_METHOD = "gptoss_jax_nvfp4"
NOT_CONVERTED = ("model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head")
COMPANIONS = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "generation_config.json")
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")

# Keys of a source's config.json that say nothing about the forward pass but belong to the model.
_CARRIED = (*TOKEN_IDS, "initializer_range", "output_router_logits", "router_aux_loss_coef", "use_cache")
_RELEASE_IDS = {"eos_token_id": 200002, "pad_token_id": 199999}  # o200k_harmony: <|return|>, <|endoftext|>


def quantization_config(fmt: Format) -> dict[str, Any]:
    """The `quantization_config` of an export: of MXFP4 exactly the release's, whatever the scale rule (readers need none)."""
    if fmt.name == "mxfp4":
        return {"modules_to_not_convert": list(NOT_CONVERTED), "quant_method": "mxfp4"}
    return {"modules_to_not_convert": list(NOT_CONVERTED), "quant_method": NVFP4_METHOD, "format": fmt.to_dict()}


def hf_config(config: GptOssConfig, fmt: Format | None, source: Mapping[str, Any], token_ids: Mapping[str, Any]) -> dict[str, Any]:
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
        out["quantization_config"] = quantization_config(fmt)
    return dict(sorted(out.items()))


def read_companions(source_dir: str | Path | None) -> tuple[dict[str, bytes], dict[str, Any]]:
    """The companion files that `source_dir` has, as bytes, and its parsed config.json ({} where there is none)."""
    if source_dir is None:
        return {}, {}
    source = Path(source_dir)
    if not source.is_dir():
        raise UsageError(f"{source}: no such directory to take tokenizer and config from")
    files = {name: (source / name).read_bytes() for name in COMPANIONS if (source / name).is_file()}
    raw = read_json(source / "config.json") if (source / "config.json").is_file() else {}
    return files, raw
