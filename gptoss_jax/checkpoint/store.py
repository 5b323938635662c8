"""The safetensors files of one directory as a single name -> tensor mapping, with the index checked against what the files really hold.

Clients disagree about a bad index: transformers follows `../elsewhere.safetensors`, llama.cpp wants the map to equal the files, the last of two
equal names wins in both. Here every disagreement is an error.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gptoss_jax.checkpoint.safetensors_io import SafetensorsFile, TensorInfo, load_json
from gptoss_jax.errors import CorruptError, UsageError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_JSON_BYTES = 64_000_000
CHUNK_BYTES = 64 << 20
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")


@dataclass(frozen=True)
class TensorStore:
    """All tensors of a directory. `infos[name]` says where one lies; `array(name)` is a read-only view of the mapped file, `read` copies a part."""

    directory: Path
    files: Mapping[str, SafetensorsFile]
    infos: Mapping[str, TensorInfo]
    index: Mapping[str, Any] | None

    def array(self, name: str) -> np.ndarray:
        return self.files[self.infos[name].file.name].array(name)

    def read(self, name: str, ranges: tuple[slice, ...]) -> np.ndarray:
        return self.files[self.infos[name].file.name].read(name, ranges)

    def chunks(self, name: str) -> Iterator[np.ndarray]:
        """A whole tensor as groups of rows of about 64 MiB, one after the other."""
        shape = self.infos[name].shape
        if not shape:
            yield self.read(name, ())
            return
        step = max(1, CHUNK_BYTES * shape[0] // max(1, self.infos[name].nbytes))
        for start in range(0, shape[0], step):
            yield self.read(name, (slice(start, min(start + step, shape[0])), *(slice(0, size) for size in shape[1:])))


def read_json(path: Path) -> Any:
    """Parses a JSON file of bounded size, without duplicate keys."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise CorruptError(f"{path}: larger than {MAX_JSON_BYTES} bytes")
        return load_json(path.read_bytes(), str(path))
    except OSError as error:
        raise CorruptError(f"{path}: cannot be read ({error.strerror})") from None


def open_store(directory: Path, *, any_name: bool = False) -> TensorStore:
    """Opens `model.safetensors`, or the shards of `model.safetensors.index.json`, or with `any_name` all *.safetensors (OpenAI's layout).

    Raises:
      CorruptError: a damaged file; an index that does not describe its files exactly; a tensor in two files.
      UsageError: no safetensors at all (a pickled checkpoint gets a hint).
    """
    index = None
    if (directory / INDEX).exists():
        if (directory / SINGLE).exists():
            raise CorruptError(f"{directory}: both {SINGLE} and {INDEX} are present, clients choose differently; remove one")
        index = _read_index(directory / INDEX)
        names = sorted(set(index["weight_map"].values()))
    elif (directory / SINGLE).exists():
        names = [SINGLE]
    else:
        names = sorted(path.name for path in directory.glob("*.safetensors"))
        if not names:
            raise UsageError(_nothing_to_read(directory))
        if not any_name:
            raise CorruptError(f"{directory}: {len(names)} safetensors files, but neither {SINGLE} nor {INDEX}")
    return _collect(directory, names, index)


def _collect(directory: Path, names: Iterable[str], index: Mapping[str, Any] | None) -> TensorStore:
    files = {name: SafetensorsFile(checked_path(directory, name)) for name in names}
    infos: dict[str, TensorInfo] = {}
    for file in files.values():
        for name, info in file.tensors.items():
            if name in infos:
                raise CorruptError(f"{directory}: tensor {name!r} is in both {infos[name].file.name} and {info.file.name}")
            infos[name] = info
    if index is not None:
        _check_index(directory / INDEX, index, infos)
    return TensorStore(directory, files, infos, index)


def _read_index(path: Path) -> dict[str, Any]:
    index = read_json(path)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(name, str) for name in weight_map.values()):
        raise CorruptError(f"{path}: weight_map must map tensor names to file names")
    if not isinstance(index.get("metadata", {}), dict):
        raise CorruptError(f"{path}: metadata must be an object")
    return index


def _check_index(path: Path, index: Mapping[str, Any], infos: Mapping[str, TensorInfo]) -> None:
    weight_map = index["weight_map"]
    problems = [f"{name!r} is in no file" for name in sorted(set(weight_map) - set(infos))]
    problems += [f"{name!r} of {infos[name].file.name} is not listed" for name in sorted(set(infos) - set(weight_map))]
    problems += [
        f"{name!r} lies in {infos[name].file.name}, not in {file}" for name, file in sorted(weight_map.items())
        if name in infos and infos[name].file.name != file
    ]  # fmt: skip
    total = index.get("metadata", {}).get("total_size")
    actual = sum(info.nbytes for info in infos.values())
    if total is not None and total != actual:
        problems.append(f"metadata.total_size is {total}, the tensors have {actual} bytes")
    if problems:
        raise CorruptError(f"{path}: " + "; ".join(problems))


def checked_path(directory: Path, name: str) -> Path:
    """The file `name` of `directory`, which must be a plain file name that does not lead out of it.

    A link may point inside the directory, or, for a snapshot of the Hugging Face cache (`models--x/snapshots/REVISION`), inside `models--x`.
    """
    if not name or name in (".", "..") or "/" in name or "\\" in name or "\0" in name:
        raise CorruptError(f"{directory}: {name!r} is not a plain file name")
    path = directory / name
    if not path.is_file():
        raise CorruptError(f"{directory}: file {name} is missing")
    root = directory.resolve()
    if root.parent.name == "snapshots" and (root.parent.parent / "blobs").is_dir():
        root = root.parent.parent
    if root not in path.resolve().parents:
        raise CorruptError(f"{path}: links to a file outside its directory")
    return path


def _nothing_to_read(directory: Path) -> str:
    pickles = sorted(path.name for path in directory.iterdir() if path.suffix in _PICKLES)
    if pickles:
        return f"{directory}: pickled weights ({pickles[0]}) can run code and are not read; convert them to safetensors first"
    if any((directory / "original").glob("*.safetensors")):
        return f"{directory}: no safetensors here; OpenAI's layout is in {directory / 'original'}"
    return f"{directory}: no safetensors files"
