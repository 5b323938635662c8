"""Conversations to batches: harmony rendering and loss masks, sources, packing, resumable batches."""

from gptoss_jax.data.batches import BatchStream, one_pass, rows_hash, tokenizer_hash
from gptoss_jax.data.documents import Documents, DocumentsBuilder
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
from gptoss_jax.data.pipeline import Pipeline, training_and_held_out
from gptoss_jax.data.report import SetReport, report, shared_warning
from gptoss_jax.data.sources import Loaded, Source, load_rows

__all__ = [
    "Batch", "BatchStream", "Documents", "DocumentsBuilder", "Encoded", "HarmonyEncoder", "Loaded", "Packed", "Pipeline", "SetReport", "Source",
    "System", "encode_conversations", "encode_examples", "load_rows", "load_tokenizer", "one_pass", "pack", "render", "report", "rows_hash",
    "shared_warning", "text_of", "tokenizer_hash", "training_and_held_out", "training_examples",
]  # fmt: skip
