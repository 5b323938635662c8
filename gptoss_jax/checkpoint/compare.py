"""Are the weights of a checkpoint those of another checkpoint, of parameters in memory, or of code hashes from training? Value for value."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from gptoss_jax.checkpoint.hashes import hash_arrays, to_host
from gptoss_jax.checkpoint.hf_layout import Piece, all_pieces
from gptoss_jax.checkpoint.load import PIECE_BYTES
from gptoss_jax.checkpoint.safetensors_io import DTYPES
from gptoss_jax.checkpoint.source import EncodedSlice, SourceCheckpoint
from gptoss_jax.errors import CorruptError
from gptoss_jax.formats import Format, nvfp4
from gptoss_jax.formats.noise import matrix_keys
from gptoss_jax.model import Params

BF16 = DTYPES["BF16"]


def stored_code_hashes(source: SourceCheckpoint) -> dict[str, str]:
    """`hashes.code_hashes` of the files: per quantized matrix, under its HF name."""
    out = {}
    for piece in all_pieces(source.config):
        specs = piece.tensors(source.layout, source.config)
        if "packed" in specs:
            out[piece.hf_key] = hash_arrays(part for spec in specs.values() for part in source.store.chunks(spec.key))
    return out


def hash_differences(found: Mapping[str, str], expected: Mapping[str, str], what: str) -> Iterator[str]:
    """Names in one of the two only, and names whose hashes differ."""
    for name in sorted(found.keys() | expected.keys()):
        if name not in found:
            yield f"{what} of {name!r}: expected, but not in the files"
        elif name not in expected:
            yield f"{what} of {name!r}: in the files, but not expected"
        elif found[name] != expected[name]:
            yield f"{what} of {name!r} differ: {found[name]} in the files, expected {expected[name]}"


def value_differences(source: SourceCheckpoint, against: SourceCheckpoint | Params, fmt: Format | None) -> Iterator[str]:
    """Tensors whose values differ.

    Args:
      against: another checkpoint of the same shape, or parameters (master weights).
      fmt: what the experts of `source` went through; those of `against` are sent through it too, unless they are stored encoded likewise.
        On values that already lie on the format's grid that changes nothing.
    """
    if isinstance(against, SourceCheckpoint) and against.config != source.config:
        yield f"the models differ in shape or constants: {source.config} here, {against.config} in {against.path}"
        return
    for piece in all_pieces(source.config):
        count, worst, expected_of = 0, 0.0, _expecting(source, against, piece, fmt)
        for ranges in _row_groups(piece):
            try:
                found, expected = _values(source, piece, ranges), expected_of(ranges)
            except CorruptError as error:
                yield str(error)
                break
            expected = expected.astype(found.dtype)  # float32 masters are stored as bfloat16, rounded to nearest even
            differ = found != expected
            if differ.any():
                count += int(differ.sum())
                worst = max(worst, float(np.abs(found[differ].astype(np.float64) - expected[differ].astype(np.float64)).max()))
        if count:
            yield f"{piece.hf_key!r}: {count} of {np.prod(piece.shape)} values differ, by up to {worst:.3g}"


def _expecting(
    source: SourceCheckpoint, against: SourceCheckpoint | Params, piece: Piece, fmt: Format | None
) -> Callable[[tuple[slice, ...]], np.ndarray]:
    """What a slice of the piece must be."""
    if isinstance(against, SourceCheckpoint):
        plain = functools.partial(_values, against, piece)
        through = fmt if against.layout.experts != source.layout.experts else None
    else:
        leaf, through = against[piece.name], fmt
        whole = leaf if piece.slot is None else leaf[piece.slot]
        plain = whole.__getitem__
    if not piece.row.matrix or through is None:
        return lambda ranges: to_host(plain(ranges))

    @functools.cache
    def amax():
        return shared_amax(through, map(plain, _row_groups(piece)))

    def expected(ranges):
        return to_host(through_format(plain(ranges), through, expert_keys(through, piece, ranges[0].start, ranges[0].stop), amax()))

    return expected


def _values(source: SourceCheckpoint, piece: Piece, ranges) -> np.ndarray:
    found = source.read(piece, ranges)
    return np.asarray(found.decode(BF16)) if isinstance(found, EncodedSlice) else found


def _row_groups(piece: Piece) -> Iterator[tuple[slice, ...]]:
    """The piece cut along its first dim (experts, rows) to groups of `PIECE_BYTES` in bfloat16."""
    rest = tuple(slice(0, size) for size in piece.shape[1:])
    step = max(1, PIECE_BYTES // (2 * int(np.prod(piece.shape[1:]))))
    for start in range(0, piece.shape[0], step):
        yield slice(start, min(start + step, piece.shape[0])), *rest


def expert_keys(fmt: Format, piece: Piece, start: int, stop: int) -> np.ndarray | None:
    """Keys of the stochastic rounding of some experts of a piece: from the seed of the format, the tensor's name in the files and the index of the
    expert, so that any cut of a model has the same bytes. None for other formats."""
    return matrix_keys(fmt.seed, piece.hf_key, range(start, stop)) if fmt.stochastic else None


def shared_amax(fmt: Format, groups: Iterable[Any]) -> np.float32 | None:
    """The maximum from which all experts of a projection take one global scale; None where each has its own. `groups`: all experts, cut."""
    if not fmt.needs_all_experts:
        return None
    return max(to_host(nvfp4.tensor_amax(group)).max() for group in groups)


def encode_experts(values: Any, fmt: Format, key: Any = None, amax: Any = None) -> Any:
    """The codes of some experts of a projection, equal to those of all of them together; `amax` as `shared_amax` says."""
    if amax is None:
        return fmt.encode(values, key)
    return dataclasses.replace(fmt, tensor_amax="given").encode(values, key, amax)


@functools.partial(jax.jit, static_argnums=1)
def through_format(values: Any, fmt: Format, key: Any = None, amax: Any = None) -> jax.Array:
    """What a model computes with after its weights were stored in `fmt`, in bfloat16; arguments as of `encode_experts`."""
    return fmt.decode(encode_experts(values, fmt, key, amax), jax.numpy.bfloat16)
