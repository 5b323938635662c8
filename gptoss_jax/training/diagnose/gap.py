"""What rounding the experts costs on held-out conversations: all of them, and each layer alone.

The model is in memory once (gpt-oss-20b in bfloat16: 42 GB) and is rounded in place, layer by layer; the held-out set is run (layers + 2) times
through one compiled program.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from gptoss_jax.checkpoint.hf_layout import Piece, all_pieces
from gptoss_jax.checkpoint.models import load_model
from gptoss_jax.data import System
from gptoss_jax.evaluation import LocalSubject, score
from gptoss_jax.evaluation.predict import make_predict
from gptoss_jax.formats import Format
from gptoss_jax.model import GptOssConfig
from gptoss_jax.training.diagnose.weights import leaf_of


@dataclass(frozen=True)
class Gap:
    """Held-out loss in nats per trained token, as the weights are and rounded: all of them, and each layer alone. `exact`: share of answers whose
    every token is the most probable one."""

    loss: float
    rounded: float
    per_layer: tuple[float, ...]
    exact: float
    exact_rounded: float
    num_conversations: int

    @property
    def relative(self) -> float:
        """Increase of the loss by rounding, as a share of it."""
        return self.rounded / self.loss - 1


def loss_gap(
    sft: str | Path,
    fmt: Format,
    rows: list[dict[str, Any]],
    dtype: Any,
    *,
    system: System | None = None,
    note: Callable[[str], None] = lambda text: None,
) -> Gap:
    """The loss of a model and of its rounded copies on held-out conversations. `note` hears which layer is being measured."""
    dtype = jnp.dtype(dtype)
    model = load_model(sft, dtype)
    subject = LocalSubject(model, dtype=dtype, numerics="bf16")
    evaluation_set = subject.evaluation_set(rows, system)
    predict, params = make_predict(model.config, dtype, subject.expert_quant), dict(model.params)
    layers = list(_layers(model.config))
    with subject.precision():
        note("loss as the weights are")
        plain = score(predict(params), evaluation_set)
        per_layer = []
        for number, pieces in enumerate(layers, 1):
            note(f"loss with layer {number} of {len(layers)} rounded")
            kept = [leaf_of(params, piece) for piece in pieces]
            for piece, leaf in zip(pieces, kept):
                _put(params, piece, _round(leaf, fmt))
            per_layer.append(score(predict(params), evaluation_set).mean_loss())
            for piece, leaf in zip(pieces, kept):
                _put(params, piece, leaf)
        note("loss with all layers rounded")
        for piece in (piece for pieces in layers for piece in pieces):
            _put(params, piece, _round(leaf_of(params, piece), fmt))
        rounded = score(predict(params), evaluation_set)
    exact = float(plain.passed.mean()), float(rounded.passed.mean())
    return Gap(plain.mean_loss(), rounded.mean_loss(), tuple(per_layer), *exact, len(plain.rows))


def _layers(config: GptOssConfig) -> Iterator[list[Piece]]:
    """The expert matrices of each layer."""
    matrices = [piece for piece in all_pieces(config) if piece.row.matrix]
    return ([piece for piece in matrices if piece.layer == layer] for layer in range(config.num_hidden_layers))


@functools.partial(jax.jit, static_argnums=1)
def _round(w, fmt: Format):
    return fmt.decode(fmt.encode(w), w.dtype)


def _put(params: dict[str, jax.Array], piece: Piece, value: jax.Array) -> None:
    """Overwrites one layer's part of a parameter in place."""
    params[piece.name] = value if piece.slot is None else _write(params[piece.name], value, piece.slot)


@functools.partial(jax.jit, donate_argnums=0)
def _write(leaf, value, slot):
    return leaf.at[slot].set(value)
