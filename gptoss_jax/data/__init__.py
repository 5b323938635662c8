"""Conversations to batches: harmony rendering and loss masks, sources, packing, resumable batches."""

from gptoss_jax.data.batches import BatchStream, one_pass, rows_hash, tokenizer_hash
from gptoss_jax.data.harmony import (
    Encoded,
    HarmonyEncoder,
    System,
    encode_conversations,
    encode_examples,
    load_tokenizer,
    render,
    text_of,
    training_examples,
)
from gptoss_jax.data.packing import Batch, Packed, pack
from gptoss_jax.data.sources import Loaded, load_rows

__all__ = [
    "Batch", "BatchStream", "Encoded", "HarmonyEncoder", "Loaded", "Packed", "System", "encode_conversations", "encode_examples", "load_rows",
    "load_tokenizer", "one_pass", "pack", "render", "rows_hash", "text_of", "tokenizer_hash", "training_examples",
]  # fmt: skip
