"""A model so small that a training step compiles in seconds, and batches that need no tokenizer."""

import jax
import numpy as np

from gptoss_jax.data import Batch
from gptoss_jax.model import GptOssConfig, init_params
from gptoss_jax.model.config import SLIDING, RopeConfig
from gptoss_jax.training.config import TrainConfig, parse

# all dimensions different, one repeated layer type so that a single body compiles, experts in whole blocks of 32
CONFIG = GptOssConfig(
    vocab_size=48,
    hidden_size=64,
    intermediate_size=32,
    num_hidden_layers=2,
    num_local_experts=4,
    num_experts_per_tok=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=10,
    sliding_window=5,
    layer_types=(SLIDING, SLIDING),
    max_position_embeddings=64,
    rope=RopeConfig(original_max_position_embeddings=32, factor=2.0),
)
ROWS, LENGTH = 8, 16


def make_params(seed: int = 0, dtype=np.float32):
    """Random values everywhere: zeros in biases and sinks would hide mistakes."""
    params = init_params(CONFIG, jax.random.key(seed), dtype)
    rng = np.random.default_rng(seed)
    return {name: (p + 0.05 * rng.standard_normal(p.shape)).astype(dtype) for name, p in params.items()}


def make_train(**changes) -> TrainConfig:
    """One setting for most tests, so that they share compiled programs. It does not clip: Adam's first moment then shows the gradient itself."""
    raw = {
        "steps": 7, "batch": {"rows": ROWS}, "data": {"row_length": LENGTH}, "compute_dtype": "float32", "clip": 1e9,
        "optimizer": {"learning_rate": 1e-3},
    }  # fmt: skip
    return parse({**raw, **changes})


def pack(rows: list[list[tuple[np.ndarray, np.ndarray]]], length: int = LENGTH) -> Batch:
    """Rows of documents (token ids [n+1], loss weights [n]) as a batch; the rest of a row is padding."""
    batch = Batch(*(np.zeros((len(rows), length), dtype) for dtype in (np.int32, np.int32, np.float32, np.int32, np.int32)))
    for r, documents in enumerate(rows):
        start = 0
        for number, (ids, weights) in enumerate(documents, 1):
            part = (r, slice(start, start + len(weights)))
            batch.tokens_BT[part], batch.targets_BT[part] = ids[:-1], ids[1:]
            batch.loss_weights_BT[part], batch.segment_ids_BT[part] = weights, number
            batch.positions_BT[part] = np.arange(len(weights))
            start += len(weights)
    return batch


def document(rng: np.random.Generator, length: int) -> tuple[np.ndarray, np.ndarray]:
    ids = rng.integers(0, CONFIG.vocab_size, length + 1)
    weights = (rng.random(length) < 0.6).astype(np.float32)
    return ids, weights


class Batches:
    """Endless random batches that follow from the index alone. `poison` are indices whose loss is infinite; `on_next` is called with the index."""

    def __init__(self, seed: int = 0, poison=(), on_next=lambda index: None):
        self.seed, self.index, self.poison, self.on_next = seed, 0, set(poison), on_next

    def __next__(self) -> Batch:
        self.on_next(self.index)
        rng = np.random.default_rng((self.seed, self.index))
        batch = pack([[document(rng, LENGTH - 6), document(rng, 4)] for _ in range(ROWS)])
        if self.index in self.poison:
            batch.loss_weights_BT[0, 0] = np.inf
        self.index += 1
        return batch

    def state(self):
        return {"index": self.index, "seed": self.seed}

    def restore(self, state):
        assert state["seed"] == self.seed
        self.index = state["index"]


def bits(tree) -> dict[str, bytes]:
    """Exact content of a tree of arrays, for comparison."""
    return {jax.tree_util.keystr(path): np.asarray(leaf).tobytes() for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


