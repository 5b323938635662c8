"""Does a fine-tuned model need quantization-aware training, or is rounding it enough?

With w an expert weight of the fine-tuned model, b the same weight of its base and Q(x) = decode(encode(x)):

    delta = w - b           what fine-tuning did
    error = Q(w) - w        what rounding does to it
    codes changed           share of weights with Q(w) != Q(b): those whose 4-bit value fine-tuning moves at all
    pull-back               cosine between error and -delta: 1 where rounding undoes fine-tuning, 0 where it points nowhere in particular
    error / delta           |error| / |delta| (Frobenius)
    kept                    <Q(w) - b, delta> / |delta|^2 = 1 - pull-back * error/delta: share of fine-tuning that rounding leaves in place

A base that lies on the format's grid, as the releases do, has b = Q(b); where fine-tuning moves a weight by less than half a grid step, rounding puts
it back, error = -delta. It is this direction of the error that does harm: errors of the same size with random signs cost nothing on small models.

Loss gap: loss on held-out conversations with all experts rounded minus loss as they are; per layer with that layer alone rounded. Weights are read
and compared in pieces of at most 128 MiB; for the loss the model is in memory once (gpt-oss-20b in bfloat16: 42 GB), rounded in place layer by
layer, and the held-out set is run (layers + 2) times.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from gptoss_jax.checkpoint import orbax_store
from gptoss_jax.checkpoint.compare import row_groups
from gptoss_jax.checkpoint.hf_config import MANIFEST
from gptoss_jax.checkpoint.hf_layout import Piece, all_pieces
from gptoss_jax.checkpoint.models import load_model
from gptoss_jax.checkpoint.source import EncodedSlice, open_checkpoint
from gptoss_jax.checkpoint.store import read_json
from gptoss_jax.errors import UsageError
from gptoss_jax.evaluation import EvaluationSet, score
from gptoss_jax.evaluation.predict import make_predict
from gptoss_jax.formats import Format
from gptoss_jax.model import GptOssConfig

Read = Callable[[Piece, tuple[slice, ...]], Any]


@dataclass(frozen=True)
class Change:
    """Sums over some expert weights; changes of several matrices add up."""

    weights: float
    changed: float
    delta2: float
    error2: float
    product: float  # <error, -delta>

    def __add__(self, other: "Change") -> "Change":
        return Change(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))

    @property
    def codes_changed(self) -> float:
        return self.changed / self.weights

    @property
    def pull_back(self) -> float:
        return self.product / (self.delta2 * self.error2) ** 0.5 if self.delta2 and self.error2 else 0.0

    @property
    def error_ratio(self) -> float:
        return (self.error2 / self.delta2) ** 0.5 if self.delta2 else float("inf") if self.error2 else 0.0

    @property
    def kept(self) -> float:
        return 1 - self.product / self.delta2 if self.delta2 else 1.0

    def to_dict(self) -> dict[str, float]:
        return {name: getattr(self, name) for name in ("codes_changed", "pull_back", "error_ratio", "kept")}


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


def weight_changes(sft: str | Path, base: str | Path, fmt: Format) -> dict[tuple[int, str], Change]:
    """(layer, projection) -> what fine-tuning and rounding did to it.

    Raises:
      UsageError: the two are no models of one shape.
      CorruptError: one of them is damaged.
    """
    (config, read), (base_config, read_base) = _open(sft), _open(base)
    if config != base_config:
        raise UsageError(f"{sft} and {base} are models of different shape")
    changes = {}
    for piece in all_pieces(config):
        if piece.row.matrix:
            parts = [_change(read(piece, ranges), read_base(piece, ranges), fmt) for ranges in row_groups(piece)]
            changes[piece.layer, piece.row.path.rpartition(".")[2]] = sum(parts[1:], parts[0])
    return changes


def _open(path: str | Path) -> tuple[GptOssConfig, Read]:
    """Architecture and a reader of slices: files are mapped and decoded slice by slice, a training checkpoint's masters are loaded."""
    if orbax_store.locate(path) is None:
        source = open_checkpoint(path)

        def read(piece, ranges):
            found = source.read(piece, ranges)
            return found.decode(jnp.bfloat16) if isinstance(found, EncodedSlice) else jnp.asarray(found)

        return source.config, read
    model = load_model(path, jnp.float32)
    return model.config, lambda piece, ranges: _leaf(model.params, piece)[ranges]


def _leaf(params: Mapping[str, jax.Array], piece: Piece) -> jax.Array:
    return params[piece.name] if piece.slot is None else params[piece.name][piece.slot]


def _change(w: jax.Array, b: jax.Array, fmt: Format) -> Change:
    return Change(w.size, *(float(value) for value in _sums(w, b, fmt)))


@functools.partial(jax.jit, static_argnums=2)
def _sums(w, b, fmt: Format):
    rounded, rounded_base = (fmt.decode(fmt.encode(x), jnp.float32) for x in (w, b))
    w, b = w.astype(jnp.float32), b.astype(jnp.float32)
    delta, error = w - b, rounded - w
    return jnp.sum(rounded != rounded_base), jnp.sum(delta * delta), jnp.sum(error * error), -jnp.sum(error * delta)


def loss_gap(sft: str | Path, fmt: Format, evaluation_set: EvaluationSet, dtype: Any, note: Callable[[str], None] = lambda text: None) -> Gap:
    """The loss of a model and of its rounded copies on held-out conversations. `note` hears which layer is being measured."""
    model = load_model(sft, dtype)
    predict, params = make_predict(model.config, jnp.dtype(dtype)), dict(model.params)
    layers = list(_layers(model.config))
    plain = score(predict(params), evaluation_set)
    per_layer = []
    for number, pieces in enumerate(layers):
        note(f"layer {number + 1} of {len(layers)}")
        kept = [_leaf(params, piece) for piece in pieces]
        for piece, leaf in zip(pieces, kept):
            _put(params, piece, _round(leaf, fmt))
        per_layer.append(score(predict(params), evaluation_set).mean_loss())
        for piece, leaf in zip(pieces, kept):
            _put(params, piece, leaf)
    for piece in (piece for pieces in layers for piece in pieces):
        _put(params, piece, _round(_leaf(params, piece), fmt))
    rounded = score(predict(params), evaluation_set)
    return Gap(
        plain.mean_loss(), rounded.mean_loss(), tuple(per_layer), float(plain.passed.mean()), float(rounded.passed.mean()), len(plain.rows)
    )  # fmt: skip


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


def recorded_base(sft: str | Path) -> str:
    """The model that a checkpoint says it was trained from.

    Raises:
      UsageError: it does not say, or that model is not where it was.
    """
    found = orbax_store.locate(sft)
    if found is not None:
        recorded = (orbax_store.read_meta(*found).run or {}).get("model")
    else:
        manifest = open_checkpoint(sft).path / MANIFEST
        recorded = ((read_json(manifest).get("provenance") or {}).get("base") or {}).get("path") if manifest.is_file() else None
    if recorded is None:
        raise UsageError(f"{sft} does not say which model it was trained from: give --base")
    try:
        if orbax_store.locate(recorded) is None:
            open_checkpoint(recorded)
    except UsageError as error:
        raise UsageError(f"{sft} was trained from {recorded!r}, which cannot be opened ({error}): give --base") from None
    return recorded


def total(changes: Iterable[Change]) -> Change:
    first, *rest = changes
    return sum(rest, first)
