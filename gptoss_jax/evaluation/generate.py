"""Text from a model: prompts in, the tokens that follow out, with a KV cache and many prompts at a time.

    prompts -> sorted by length -> batches -> prefill -> [decode, choose] x 16 on the device -> host collects -> ... until all rows stopped

Compiled programs are bounded: rows per batch are rounded up to a power of two, prompt and cache lengths to 2^n or 3 * 2^(n-1) from 16 on, so that
lengths up to 131,072 make 27 sizes, none more than half again of what is needed. One decode program serves all prompt lengths of a cache size.
Programs belong to config, dtype and shapes, not to a `Generator`: new weights of the same model, as during training, compile nothing.

Legend: B rows of a batch  T prompt tokens, padded  C tokens per trip to the device
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Int

from gptoss_jax.checkpoint.hashes import to_host
from gptoss_jax.data.harmony import HarmonyEncoder, render
from gptoss_jax.errors import UsageError
from gptoss_jax.evaluation.answers import STOP_TOKENS, Answer, parse_answer
from gptoss_jax.evaluation.sampling import GREEDY, Sampling, choose, row_keys
from gptoss_jax.model import GptOssConfig, Params
from gptoss_jax.model.cache import KVCache, init_cache
from gptoss_jax.model.inference import decode_step, prefill, prepare_params
from gptoss_jax.quant import ExpertQuant, activation_rounding
from gptoss_jax.sharding import stacked_experts

CHUNK = 16  # tokens per trip to the device, where nobody waits for the single one
SMALLEST = 16
NOTHING = -1  # in place of a token, where a row had stopped before
OnToken = Callable[[int, int], None]


def bucket(n: int) -> int:
    """The size that `n` is rounded up to: 16, 24, 32, 48, 64, 96, ..."""
    size = SMALLEST
    while size < n:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return size


class _How(NamedTuple):
    """What a compiled program is specialized for, besides shapes."""

    config: GptOssConfig
    dtype: Any
    backend: str | None
    sampling: Sampling  # with seed 0: keys are data
    activations: Callable[[jax.Array], jax.Array] | None
    stacked: Callable | None  # of experts that are cut over a mesh

    @property
    def numerics(self) -> dict[str, Any]:
        return {"dtype": self.dtype, "backend": self.backend, "activations": self.activations, "stacked": self.stacked}

    @property
    def precision(self) -> str:
        """float32 means float32 on a GPU too, whose default is TF32."""
        return "highest" if self.dtype == jnp.float32 else "default"


class _Rows(NamedTuple):
    """A batch between two trips. `token_B` was chosen and not yet read; `room_B` more tokens may follow it."""

    cache: KVCache
    token_B: Int[Array, "B"]
    done_B: Bool[Array, "B"]
    room_B: Int[Array, "B"]
    keys_B: Array


def _after(token_B, done_B, room_B, stops) -> tuple:
    """(done, room) once a token is chosen."""
    room_B = room_B - 1
    return done_B | jnp.isin(token_B, stops) | (room_B <= 0), room_B


@partial(jax.jit, static_argnums=(0, 1))
def _start(how: _How, cache_length: int, params, tokens_BT, lengths_B, room_B, keys_B, stops) -> _Rows:
    """Prefill, and the first token. Rows without room are padding."""
    with jax.default_matmul_precision(how.precision):
        cache = init_cache(how.config, tokens_BT.shape[0], cache_length, how.dtype)
        logits_BV, cache = prefill(how.config, params, tokens_BT, lengths_B, cache, **how.numerics)
    token_B = jnp.where(room_B > 0, choose(logits_BV, how.sampling, keys_B, lengths_B), NOTHING)
    return _Rows(cache, token_B, *_after(token_B, room_B <= 0, room_B, stops), keys_B)


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def _go_on(how: _How, params, rows: _Rows, stops, steps) -> tuple[_Rows, Int[Array, "B C"]]:
    """At most `steps` <= CHUNK more tokens of every row that has not stopped; ends early when all have."""

    def turn(carry):
        i, rows, out_BC = carry
        active_B = ~rows.done_B
        token_B = jnp.maximum(rows.token_B, 0)
        logits_BV, cache = decode_step(how.config, params, token_B, rows.cache, active_B, **how.numerics)
        token_B = jnp.where(active_B, choose(logits_BV, how.sampling, rows.keys_B, cache.lengths_B), NOTHING)
        done_B, room_B = _after(token_B, rows.done_B, rows.room_B, stops)
        return i + 1, _Rows(cache, token_B, done_B, room_B, rows.keys_B), lax.dynamic_update_index_in_dim(out_BC, token_B, i, axis=1)

    going = lambda carry: (carry[0] < steps) & ~carry[1].done_B.all()
    start = jnp.int32(0), rows, jnp.full((rows.token_B.shape[0], CHUNK), NOTHING, jnp.int32)
    with jax.default_matmul_precision(how.precision):
        _, rows, out_BC = lax.while_loop(going, turn, start)
    return rows, out_BC


class Generator:
    """Continues prompts.

    Args:
      params: of `load_model` or of training, on one device or sharded over several; compute weights are made of them once. Experts that are cut over
        devices stay there: each device computes those that it holds.
      dtype: of weights, activations and cache.
      expert_quant: `Model.expert_quant(dtype)`: a QAT checkpoint generates through its quantization. None only casts.
      backend: of attention and experts, "xla" or "triton"; None chooses by platform.
      batch_size: prompts at a time.
    """

    def __init__(
        self, config: GptOssConfig, params: Params, dtype=jnp.bfloat16, *, expert_quant: ExpertQuant | None = None, backend: str | None = None,
        batch_size: int = 32,
    ):  # fmt: skip
        if batch_size < 1:
            raise UsageError(f"batch_size = {batch_size} must be at least 1")
        self.config, self.dtype, self.backend, self.batch_size = config, jnp.dtype(dtype), backend, batch_size
        self.activations = activation_rounding(expert_quant)
        self.params: Mapping[str, Any] = prepare_params(params, self.dtype, expert_quant)
        self.stacked = stacked_experts(self.params)

    def generate(
        self,
        prompts: Sequence[np.ndarray],
        max_new_tokens: int,
        stop_ids: Sequence[int] = (),
        sampling: Sampling = GREEDY,
        on_token: OnToken | None = None,
    ) -> list[np.ndarray]:
        """The tokens that follow each prompt (int32 [n]), up to and including the first stop token.

        A row ends after `max_new_tokens`, or where prompt and answer fill the model's `max_position_embeddings`. `on_token(i, token)` is called for
        every token of prompt i as soon as it is chosen; without it the device is asked every 16 tokens.

        Raises:
          UsageError: no tokens to generate; a prompt that is empty, as long as the model's context, or has ids beyond the vocabulary.
        """
        self._check(prompts, max_new_tokens)
        how = _How(self.config, self.dtype, self.backend, dataclasses.replace(sampling, seed=0), self.activations, self.stacked)
        stops = np.array(sorted(set(stop_ids)), np.int32)
        results: list[list[int]] = [[] for _ in prompts]

        def collect(index, tokens_BC):
            for i, tokens in zip(index, tokens_BC.tolist()):
                for token in tokens:
                    if token != NOTHING:
                        results[i].append(token)
                        if on_token:
                            on_token(i, token)

        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        for start in range(0, len(order), self.batch_size):
            index = order[start : start + self.batch_size]
            rows = self._start(how, [prompts[i] for i in index], index, max_new_tokens, sampling.seed, stops)
            collect(index, to_host(rows.token_B)[:, None])
            while not to_host(rows.done_B).all():
                rows, tokens_BC = _go_on(how, self.params, rows, stops, 1 if on_token else CHUNK)
                collect(index, to_host(tokens_BC))
        return [np.array(tokens, np.int32) for tokens in results]

    def answer(
        self,
        conversations: Sequence[Sequence[dict[str, Any]]],
        tokenizer: Any,
        *,
        system: str | None = None,
        max_new_tokens: int = 512,
        sampling: Sampling = GREEDY,
    ) -> list[Answer]:
        """What the model answers to each conversation, a list of messages that ends with the user's."""
        encoded = HarmonyEncoder(tokenizer).encode([render(messages, system=system, prompt=True) for messages in conversations])
        tokens = self.generate([prompt.ids for prompt in encoded], max_new_tokens, stop_ids(tokenizer), sampling)
        return [parse_answer(row, tokenizer) for row in tokens]

    def _start(self, how: _How, prompts, index, max_new_tokens: int, seed: int, stops) -> _Rows:
        lengths = np.array([len(prompt) for prompt in prompts], np.int32)
        room = np.minimum(max_new_tokens, self.config.max_position_embeddings - lengths)
        count = 1 << (len(prompts) - 1).bit_length()
        tokens_BT = np.zeros((count, bucket(int(lengths.max()))), np.int32)
        for row, prompt in zip(tokens_BT, prompts):
            row[: len(prompt)] = prompt
        pad = lambda values, fill: np.pad(np.asarray(values, np.int32), (0, count - len(prompts)), constant_values=fill)
        length = bucket(int((lengths + room).max()))
        return _start(how, length, self.params, tokens_BT, pad(lengths, 1), pad(room, 0), row_keys(seed, pad(index, 0)), stops)

    def _check(self, prompts: Sequence[np.ndarray], max_new_tokens: int) -> None:
        if max_new_tokens < 1:
            raise UsageError(f"max_new_tokens = {max_new_tokens} must be at least 1")
        for i, prompt in enumerate(prompts):
            if not 0 < len(prompt) < self.config.max_position_embeddings:
                raise UsageError(f"prompt {i} has {len(prompt)} tokens; the model takes 1 to {self.config.max_position_embeddings - 1}")
            if min(prompt) < 0 or max(prompt) >= self.config.vocab_size:
                raise UsageError(f"prompt {i} has ids from {min(prompt)} to {max(prompt)}; the vocabulary has {self.config.vocab_size}")


def stop_ids(tokenizer: Any) -> list[int]:
    """Ids of the tokens that end an answer, as far as the tokenizer has them."""
    vocab = tokenizer.get_vocab()
    return [vocab[name] for name in STOP_TOKENS if name in vocab]
