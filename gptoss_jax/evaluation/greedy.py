"""Greedy decoding by running the whole prefix again for every token: slow, obvious, the oracle of everything faster."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from gptoss_jax.data.harmony import HarmonyEncoder, render
from gptoss_jax.data.packing import Batch
from gptoss_jax.evaluation.pass_rate import Predict


def greedy_decode(predict: Predict, prompts: Sequence[np.ndarray], row_length: int, stop_ids: Sequence[int]) -> list[np.ndarray]:
    """The tokens that follow each prompt (int32 [n]), up to and including the first stop token, or as many as fit into `row_length`.

    All prompts run as one batch [len(prompts), row_length], so `predict` is compiled once.
    """
    tokens_BT = np.zeros((len(prompts), row_length), np.int32)
    lengths = np.array([len(prompt) for prompt in prompts])
    for row, prompt in zip(tokens_BT, prompts):
        row[: len(prompt)] = prompt
    starts, stopped = lengths.copy(), np.zeros(len(prompts), bool)
    positions_BT = np.broadcast_to(np.arange(row_length, dtype=np.int32), tokens_BT.shape)
    while not (stopped | (lengths == row_length)).all():
        segment_ids_BT = (positions_BT < lengths[:, None]).astype(np.int32)
        batch = Batch(tokens_BT, np.zeros_like(tokens_BT), np.zeros(tokens_BT.shape, np.float32), segment_ids_BT, positions_BT)
        next_BT = np.asarray(predict(batch).tokens_BT)
        for i in np.flatnonzero(~stopped & (lengths < row_length)):
            token = next_BT[i, lengths[i] - 1]
            tokens_BT[i, lengths[i]] = token
            lengths[i] += 1
            stopped[i] = token in stop_ids
    return [row[start:length].copy() for row, start, length in zip(tokens_BT, starts, lengths)]


def answer(
    predict: Predict, conversations: Sequence[list[dict[str, Any]]], tokenizer: Any, row_length: int, *, system: str | None = None
) -> list[str]:
    """What the model writes after each conversation (messages that end with the user's), special tokens included."""
    prompts = HarmonyEncoder(tokenizer).encode([render(messages, system=system, prompt=True) for messages in conversations])
    stops = tokenizer.convert_tokens_to_ids(["<|return|>", "<|call|>", "<|endoftext|>"])
    tokens = greedy_decode(predict, [prompt.ids for prompt in prompts], row_length, stops)
    return tokenizer.batch_decode(tokens, skip_special_tokens=False)
