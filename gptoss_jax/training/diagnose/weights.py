"""What rounding to a 4-bit format does to the expert weights of a fine-tuned model, beside what fine-tuning did to them.

With w an expert weight of the fine-tuned model, b the same weight of its base and Q(x) = decode(encode(x)):

    delta = w - b           what fine-tuning did
    error = Q(w) - w        what rounding does to it
    codes changed           share of weights with Q(w) != Q(b): those whose 4-bit value fine-tuning moves at all
    pull-back               cosine between error and -delta: 1 where rounding undoes fine-tuning, 0 where it points nowhere in particular
    error / delta           |error| / |delta| (Frobenius)
    kept                    <Q(w) - b, delta> / |delta|^2 = 1 - pull-back * error/delta: share of fine-tuning that rounding leaves in place

A base that lies on the format's grid, as the releases do, has b = Q(b); where fine-tuning moves a weight by less than half a grid step, rounding puts
it back: error = -delta. It is this direction of the error that does harm; on a model of 2 M parameters errors of the same size with random signs cost
nothing. Weights are read, rounded and summed expert by expert. On 2 CPU cores that takes 8.5 ns
per weight (measured on [4, 5760, 2880] in bfloat16), for all 19.1e9 expert weights of gpt-oss-20b 162 s, so at most `MAX_EXPERTS` of each matrix are
looked at: shares over millions of weights need no more.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gptoss_jax.checkpoint import orbax_store
from gptoss_jax.checkpoint.hf_layout import Piece, all_pieces
from gptoss_jax.checkpoint.source import EncodedSlice, open_checkpoint
from gptoss_jax.errors import UsageError
from gptoss_jax.formats import Format
from gptoss_jax.model import GptOssConfig

Read = Callable[[Piece, tuple[slice, ...]], Any]
MAX_EXPERTS = 16
Changes = Mapping[tuple[int, str], "Change"]


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


def total(changes: Iterable[Change]) -> Change:
    first, *rest = changes
    return sum(rest, first)


def weight_changes(sft: str | Path, base: str | Path, fmt: Format, max_experts: int = MAX_EXPERTS) -> dict[tuple[int, str], Change]:
    """(layer, projection) -> what fine-tuning and rounding did to it, seen on at most `max_experts` experts, spread evenly.

    Raises:
      UsageError: the two are no models of one shape.
      CorruptError: one of them is damaged.
    """
    (config, slices), (base_config, base_slices) = expert_slices(sft, max_experts), expert_slices(base, max_experts)
    if config != base_config:
        raise UsageError(f"{sft} and {base} are models of different shape")
    changes: dict[tuple[int, str], list[Change]] = {}
    for ours, theirs in zip(slices, base_slices):
        changes.setdefault((ours.layer, ours.projection), []).append(_change(ours.read(), theirs.read(), fmt))
    return {key: total(changes[key]) for key in sorted(changes, key=lambda key: key[0])}


class ExpertSlice(NamedTuple):
    """One expert of one projection. `read()` gives its weights [1, out, in] as stored, decoded to float32 where they are codes."""

    layer: int
    projection: str
    expert: int
    read: Callable[[], jax.Array]


def expert_slices(path: str | Path, limit: int | None = None) -> tuple[GptOssConfig, Iterator[ExpertSlice]]:
    """Architecture, and every expert of every projection of a checkpoint, parameter by parameter (layers that are stacked in one follow each other);
    of each matrix at most `limit`, spread evenly.

    Files are mapped and read slice by slice. Of a training checkpoint one parameter at a time is in memory.

    Raises:
      UsageError, CorruptError: nothing readable there, or damaged.
    """
    config, read = _open(path)
    by_parameter: dict[str, list[Piece]] = {}
    for piece in all_pieces(config):
        if piece.row.matrix:
            by_parameter.setdefault(piece.name, []).append(piece)

    def slices():
        for piece in (piece for pieces in by_parameter.values() for piece in pieces):
            for ranges in _single_experts(piece, limit):
                projection = piece.row.path.rpartition(".")[2]
                yield ExpertSlice(piece.layer, projection, ranges[0].start, functools.partial(read, piece, ranges))

    return config, slices()


def _single_experts(piece: Piece, limit: int | None) -> Iterator[tuple[slice, ...]]:
    """Ranges of one expert each: all of them, or `limit` spread evenly."""
    experts, rows, width = piece.shape
    count = experts if limit is None else min(experts, limit)
    for i in range(count):
        expert = i * experts // count
        yield slice(expert, expert + 1), slice(0, rows), slice(0, width)


def _open(path: str | Path) -> tuple[GptOssConfig, Read]:
    """Architecture and a reader of slices: files are mapped and decoded slice by slice; of a training checkpoint the parameter last read is kept."""
    found = orbax_store.locate(path)
    if found is None:
        source = open_checkpoint(path)

        def read(piece, ranges):
            found = source.read(piece, ranges)
            return found.decode(jnp.float32) if isinstance(found, EncodedSlice) else jnp.asarray(found)

        return source.config, read
    orbax_store.verify(*found)
    parameter = functools.lru_cache(maxsize=1)(lambda name: orbax_store.restore_param(*found, name))
    config = GptOssConfig.from_dict(orbax_store.read_meta(*found).model)
    return config, lambda piece, ranges: leaf_of({piece.name: parameter(piece.name)}, piece)[ranges]


def leaf_of(params: Mapping[str, jax.Array], piece: Piece) -> jax.Array:
    return params[piece.name] if piece.slot is None else params[piece.name][piece.slot]


def _change(w: jax.Array, b: jax.Array, fmt: Format) -> Change:
    return Change(w.size, *(float(value) for value in _sums(w, b, fmt)))


@functools.partial(jax.jit, static_argnums=2)
def _sums(w, b, fmt: Format):
    rounded, rounded_base = (fmt.decode(fmt.encode(x), jnp.float32) for x in (w, b))
    w, b = w.astype(jnp.float32), b.astype(jnp.float32)
    delta, error = w - b, rounded - w
    return jnp.sum(rounded != rounded_base), jnp.sum(delta * delta), jnp.sum(error * error), -jnp.sum(error * delta)
