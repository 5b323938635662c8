"""gpt-oss in JAX: BF16 fine-tuning, MXFP4/NVFP4 quantization-aware training, and export of exactly the trained 4-bit weights.

As a library: `from gptoss_jax import forward, fake_quant`, or the same names from their folders. PUBLIC is the list of what is meant to be used and
stays; a name is imported when it is first asked for, so the package itself needs nothing but Python.
"""

import importlib

__version__ = "0.1.0"

PUBLIC = {
    "formats": ("mxfp4", "nvfp4", "Mxfp4", "Nvfp4", "get_format"),
    "quant": ("fake_quant", "default_policy", "QuantPolicy", "make_expert_quant", "plain_cast"),
    "ops.cross_entropy": ("cross_entropy_sum",),
    "model": ("GptOssConfig", "forward", "compute_logits", "init_params", "abstract_params", "logical_axes", "load_balancing_loss"),
    "sharding": (
        "ShardingRules", "DEFAULT_RULES", "make_mesh", "param_shardings", "batch_sharding", "replicated", "distribution", "local_rows", "place_rows",
    ),
    "sharding.distributed": ("initialize", "is_first", "barrier"),
    "checkpoint": ("load_params", "open_checkpoint", "export_hf", "verify_dir", "code_hashes"),
    "data": ("Batch", "BatchStream", "load_rows", "load_tokenizer", "encode_conversations", "pack", "one_pass"),
    "training.config": ("TrainConfig",),
    "training.stage": ("run_stage",),
    "training.step": ("TrainState", "Shardings", "init_state", "make_train_step", "make_eval_step", "make_capture_step"),
}  # fmt: skip
_FOLDER = {name: folder for folder, names in PUBLIC.items() for name in names}

__all__ = ["PUBLIC", "__version__", *_FOLDER]


def __getattr__(name: str):
    if name not in _FOLDER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_FOLDER[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_FOLDER})
