"""Checkpoints in and out: Hugging Face and OpenAI safetensors directories to parameters and back, and the proof that both are the same model."""

from gptoss_jax.checkpoint.export import export_hf
from gptoss_jax.checkpoint.hashes import code_hashes
from gptoss_jax.checkpoint.load import load_params
from gptoss_jax.checkpoint.source import SourceCheckpoint, open_checkpoint
from gptoss_jax.checkpoint.verify import Report, verify_dir

__all__ = ["Report", "SourceCheckpoint", "code_hashes", "export_hf", "load_params", "open_checkpoint", "verify_dir"]
