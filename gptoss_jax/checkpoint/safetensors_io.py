"""Reading and writing one safetensors file: strict header, memory-mapped tensors, streamed writing.

Format (huggingface/safetensors `tensor.rs`): 8 bytes little-endian header length, a JSON object `{name: {dtype, shape, data_offsets}}` with an
optional `__metadata__` of strings, then the payload, which the offsets cover exactly. The reader is our own for three reasons: the numpy reader
of the library knows no F8 dtype, accepts duplicate JSON keys (the last one wins), and copies; the writer is our own because the library's
writes a non-contiguous array wrongly (safetensors 0.8.0), leaves orphans when killed, and wants every tensor of a shard in memory at once.
"""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from gptoss_jax.errors import CorruptError

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library; the header of the 120b release is below 1 MB
MAX_DIMS = 8
DTYPES = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "F32": np.dtype(np.float32),
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F64": np.dtype(np.float64),
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def load_json(text: str | bytes, where: str) -> Any:
    """Parses JSON in which no object may name a key twice.

    Raises:
      CorruptError: naming `where`.
    """

    def unique(pairs):
        out = dict(pairs)
        if len(out) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))
            raise CorruptError(f"{where}: key {twice!r} appears twice")
        return out

    try:
        return json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise CorruptError(f"{where}: not valid JSON ({str(error)[:120]})") from None


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: `begin` and `end` are byte positions in `file`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int
    file: Path

    @property
    def nbytes(self) -> int:
        return self.end - self.begin


class SafetensorsFile:
    """A validated safetensors file. `tensors` maps names to `TensorInfo`; `array(name)` is a read-only view of the mapped file."""

    def __init__(self, path: Path):
        self.path = path
        self.tensors, self.metadata = _read_header(path)

    @cached_property
    def _bytes(self) -> np.memmap:
        return np.memmap(self.path, np.uint8, mode="r")

    def array(self, name: str) -> np.ndarray:
        """Memory-mapped view, of the stored shape and dtype; nothing is read before it is indexed."""
        info = self.tensors[name]
        return np.asarray(self._bytes[info.begin : info.end]).view(DTYPES[info.dtype]).reshape(info.shape)


def _read_header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(8)
            length = int.from_bytes(head, "little")
            if len(head) < 8:
                raise CorruptError(f"{path}: truncated, {size} bytes are no safetensors file")
            if length > MAX_HEADER_BYTES or 8 + length > size:
                raise CorruptError(f"{path}: truncated or not safetensors, the header claims {length} of {size} bytes")
            text = file.read(length)
    except OSError as error:
        raise CorruptError(f"{path}: cannot be read ({error.strerror})") from None
    header = load_json(text, f"{path}: header")
    if not isinstance(header, dict):
        raise CorruptError(f"{path}: the header is no JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CorruptError(f"{path}: __metadata__ must map strings to strings")
    tensors = {name: _tensor_info(path, name, raw, base=8 + length) for name, raw in header.items()}
    position = 8 + length
    for info in sorted(tensors.values(), key=lambda info: (info.begin, info.end)):
        if info.begin != position:
            raise CorruptError(f"{path}: {'overlap' if info.begin < position else 'hole'} in the payload before tensor {info.name!r}")
        position = info.end
    if position != size:
        problem = f"truncated, {position - size} bytes are missing" if position > size else f"{size - position} bytes follow the last tensor"
        raise CorruptError(f"{path}: {problem}")
    return tensors, metadata


def _tensor_info(path: Path, name: str, raw: Any, base: int) -> TensorInfo:
    where = f"{path}: tensor {name!r}"
    if not isinstance(raw, dict) or set(raw) != {"dtype", "shape", "data_offsets"}:
        raise CorruptError(f"{where}: entry must have dtype, shape and data_offsets")
    if not isinstance(raw["dtype"], str) or raw["dtype"] not in DTYPES:
        raise CorruptError(f"{where}: unknown dtype {raw['dtype']!r}")
    shape, offsets = raw["shape"], raw["data_offsets"]
    if not _naturals(shape) or len(shape) > MAX_DIMS:
        raise CorruptError(f"{where}: shape {shape!r} is not a list of at most {MAX_DIMS} sizes")
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CorruptError(f"{where}: data_offsets {offsets!r} are not an ascending pair")
    span, need = offsets[1] - offsets[0], math.prod(shape) * DTYPES[raw["dtype"]].itemsize
    if span != need:
        raise CorruptError(f"{where}: {raw['dtype']} {shape} needs {need} bytes, data_offsets span {span}")
    return TensorInfo(name, raw["dtype"], tuple(shape), base + offsets[0], base + offsets[1], path)


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


class SafetensorsWriter:
    """Writes one file whose tensors arrive one at a time, in any order.

    `with SafetensorsWriter(path, {name: (dtype name, shape)}) as writer: writer.write(name, array)`. The order in the file is that of the
    library (descending item size, then name). Leaving the block checks that all tensors came, and syncs the file to disk.
    """

    def __init__(self, path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]]):
        self.path = path
        self._todo = dict(tensors)
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        position = 0
        for name in sorted(tensors, key=lambda name: (-DTYPES[tensors[name][0]].itemsize, name)):
            dtype, shape = tensors[name]
            end = position + math.prod(shape) * DTYPES[dtype].itemsize
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
            position = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._base = 8 + len(text)
        self._begin = {name: self._base + header[name]["data_offsets"][0] for name in tensors}
        self._file = path.open("xb")
        self._file.write(len(text).to_bytes(8, "little") + text)

    def write(self, name: str, array: np.ndarray) -> None:
        dtype, shape = self._todo.pop(name)
        if array.dtype != DTYPES[dtype] or array.shape != shape:
            raise ValueError(f"{name}: {array.dtype} {array.shape} given, {dtype} {shape} announced")
        self._file.seek(self._begin[name])
        self._file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)

    def __enter__(self) -> "SafetensorsWriter":
        return self

    def __exit__(self, kind, *_) -> None:
        try:
            if kind is None:
                if self._todo:
                    raise ValueError(f"{self.path}: never written: {sorted(self._todo)}")
                self._file.flush()
                os.fsync(self._file.fileno())
        finally:
            self._file.close()
