"""Conversations to batches: harmony rendering and loss masks, sources, packing, resumable batches."""

from gptoss_jax.data.batches import BatchStream, one_pass, rows_hash, tokenizer_hash
from gptoss_jax.data.harmony import Encoded, HarmonyEncoder, encode_conversations, load_tokenizer, render, system_text, text_of
from gptoss_jax.data.packing import Batch, Packed, pack
from gptoss_jax.data.sources import Loaded, load_rows

__all__ = [
    "Batch", "BatchStream", "Encoded", "HarmonyEncoder", "Loaded", "Packed", "encode_conversations", "load_rows", "load_tokenizer", "one_pass",
    "pack", "render", "rows_hash", "system_text", "text_of", "tokenizer_hash",
]  # fmt: skip
