"""NVFP4 experts in the layouts of other programs, read and written under the names of our own.

    own                 `..._packed` U8 [E, out, in/2]   `..._scales` F8_E4M3 [E, out, in/16]   `..._global_scale` F32 [E]
    modelopt            the unified export of NVIDIA's Model-Optimizer: transposed, one global scale per projection
                        `gate_up_proj` U8 [E, in/2, out]   `gate_up_proj_weight_scale` [E, in/16, out]   `gate_up_proj_weight_scale_2` F32 []
    compressed-tensors  `nvfp4-pack-quantized` as llm-compressor writes gpt-oss: a module per expert, gate and up apart
                        `{e}.gate_proj.weight_packed` U8 [F, in/2]   `.weight_scale` [F, in/16]   `.weight_global_scale` F32 [1]   `.bias` [F]
                        where the global scale is the reciprocal of ours

Codes and block scales are the same bytes in all three. `OwnNames` shows the tensors of a directory under our names, `DialectWriter` takes them under
our names, so nothing else knows of this: loading, hashes and verification are those of the own layout.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from gptoss_jax.checkpoint.hf_layout import TensorSpec
from gptoss_jax.checkpoint.safetensors_io import DTYPES, SafetensorsWriter, TensorInfo
from gptoss_jax.checkpoint.store import TensorStore

Dialect = Literal["own", "modelopt", "compressed-tensors"]
_OWN_NAME = re.compile(r"(.*\.mlp\.experts\.)(gate_up_proj|down_proj)_(packed|scales|global_scale|bias)")
_MODELOPT = {"packed": "", "scales": "_weight_scale", "global_scale": "_weight_scale_2"}
_COMPRESSED = {"packed": "weight_packed", "scales": "weight_scale", "global_scale": "weight_global_scale", "bias": "bias"}
_LINEARS = {"gate_up_proj": {"gate_proj": slice(0, None, 2), "up_proj": slice(1, None, 2)}, "down_proj": {"down_proj": slice(0, None, 1)}}


class Part(NamedTuple):
    """A stored tensor that holds one of our tensors, or a part of it: all experts with the last two dims swapped; the number that all experts
    share; or, of one expert, those `rows`, or the reciprocal of its number."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    expert: int | None = None
    rows: slice | None = None


def parts_of(spec: TensorSpec, dialect: Dialect) -> tuple[Part, ...]:
    """The stored tensors of one of our tensors; none where it is stored as it is."""
    found = _OWN_NAME.fullmatch(spec.key)
    if dialect == "own" or found is None:
        return ()
    prefix, projection, role = found.groups()
    dtype, shape = spec.dtypes[0], spec.shape
    if dialect == "modelopt":
        if role == "bias":
            return ()
        return (Part(prefix + projection + _MODELOPT[role], dtype, () if len(shape) == 1 else (shape[0], *shape[:0:-1])),)
    return tuple(
        Part(f"{prefix}{expert}.{linear}.{_COMPRESSED[role]}", dtype, _expert_shape(shape, rows), expert, rows)
        for expert in range(shape[0])
        for linear, rows in _LINEARS[projection].items()
    )


def _expert_shape(shape: tuple[int, ...], rows: slice) -> tuple[int, ...]:
    return (1,) if len(shape) == 1 else (len(range(*rows.indices(shape[1]))), *shape[2:])


# ---- reading ------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OwnNames(TensorStore):
    """The tensors of `under` by our names. What belongs to none of ours keeps its name, and one of which something is missing is missing."""

    under: TensorStore
    parts: Mapping[str, tuple[Part, ...]]

    def array(self, name: str) -> np.ndarray:
        return self.read(name, tuple(slice(0, size) for size in self.infos[name].shape))

    def read(self, name: str, ranges: tuple[slice, ...]) -> np.ndarray:
        parts = self.parts.get(name)
        if not parts:
            return self.under.read(name, ranges)
        info, experts = self.infos[name], ranges[0]
        if parts[0].expert is None and len(info.shape) == 1:
            return np.full(experts.stop - experts.start, self.under.read(parts[0].key, ()))
        if parts[0].expert is None:
            return self.under.read(parts[0].key, (experts, ranges[2], ranges[1])).swapaxes(1, 2)
        out = np.empty([part.stop - part.start for part in ranges], DTYPES[info.dtype])
        for part in parts:
            if experts.start <= part.expert < experts.stop:
                self._read_expert(out[part.expert - experts.start : part.expert - experts.start + 1], part, ranges[1:])
        return out

    def _read_expert(self, out: np.ndarray, part: Part, ranges: tuple[slice, ...]) -> None:
        """Fills `out`, one expert of a range of ours, from the rows that this part holds."""
        if not ranges:
            with np.errstate(divide="ignore"):  # infinity is refused where values are checked
                out[:] = 1 / self.under.read(part.key, (slice(0, 1),))
            return
        first, step = part.rows.start, part.rows.step
        begin, end = (max(0, -(-(border - first) // step)) for border in (ranges[0].start, ranges[0].stop))
        if begin < end:
            out[0, first + begin * step - ranges[0].start :: step] = self.under.read(part.key, (slice(begin, end), *ranges[1:]))


def under_own_names(store: TensorStore, expected: Mapping[str, TensorSpec], dialect: Dialect) -> TensorStore:
    """`store` as the own layout, whose tensors are `expected`."""
    parts = {name: found for name, spec in expected.items() if (found := parts_of(spec, dialect))}
    if not parts:
        return store
    infos = dict(store.infos)
    for name, found in parts.items():
        stored = [store.infos.get(part.key) for part in found]
        if any(info is None or info.shape != part.shape for info, part in zip(stored, found)) or len({info.dtype for info in stored}) > 1:
            continue
        for part in found:
            infos.pop(part.key, None)
        shape, first = expected[name].shape, stored[0]
        infos[name] = TensorInfo(name, first.dtype, shape, 0, int(np.prod(shape)) * DTYPES[first.dtype].itemsize, first.file)
    return OwnNames(store.directory, store.files, infos, store.index, store, parts)


# ---- writing ------------------------------------------------------------------------------------------------------------------


class DialectWriter(SafetensorsWriter):
    """A file of the stored tensors, which takes ours."""

    def __init__(self, path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]], dialect: Dialect):
        self._shared: dict[str, np.ndarray] = {}
        self._parts = {name: parts_of(TensorSpec(name, (dtype,), shape), dialect) for name, (dtype, shape) in tensors.items()}
        header = {name: entry for name, entry in tensors.items() if not self._parts[name]}
        super().__init__(path, header | {part.key: (part.dtype, part.shape) for parts in self._parts.values() for part in parts})

    def write(self, name: str, array: np.ndarray, row: int = 0) -> None:
        """Raises ValueError where experts that share a number do not have the same one."""
        parts = self._parts[name]
        if not parts:
            return super().write(name, array, row)
        for part in parts:
            if part.expert is not None:
                if row <= part.expert < row + len(array):
                    values = array[part.expert - row]
                    super().write(part.key, values[part.rows] if values.ndim else (1 / values).reshape(1).astype(array.dtype))
            elif part.shape:
                super().write(part.key, array.swapaxes(1, 2), row)
            else:
                if (array != array[0]).any() or (row and array[0] != self._shared[name]):
                    raise ValueError(f"{name}: the experts have different numbers, {part.key} holds one")
                if not row:
                    self._shared[name] = array[0]
                    super().write(part.key, array[0].reshape(()))
