"""Opening a checkpoint: which layout it has, whether its tensors are exactly those its config demands, and reading any slice of them."""

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

import gptoss_jax
from gptoss_jax.checkpoint.hf_config import NVFP4_METHODS
from gptoss_jax.checkpoint.hf_layout import MXFP4_BLOCK, NVFP4_BLOCK, Layout, Piece, TensorSpec, expected_tensors
from gptoss_jax.checkpoint.nvfp4_layouts import under_own_names
from gptoss_jax.checkpoint.store import TensorStore, open_store, read_json
from gptoss_jax.errors import CorruptError, UsageError
from gptoss_jax.formats import mxfp4, nvfp4
from gptoss_jax.model import GptOssConfig

_METHODS = {None: ("bf16", "own"), "mxfp4": ("mxfp4", "own")} | {method: ("nvfp4", dialect) for dialect, method in NVFP4_METHODS.items()}
# endings of tensor names that tell how experts are stored
_ENDINGS = {
    "_blocks": ("mxfp4", "own"), ".blocks": ("mxfp4", "own"), "_proj_packed": ("nvfp4", "own"), "_proj_weight_scale_2": ("nvfp4", "modelopt"),
    "_proj.weight_global_scale": ("nvfp4", "compressed-tensors"),
}  # fmt: skip
# From scale byte 253 on, code 6 exceeds bfloat16 (6 * 2**126 > 2**128); 255 is NaN in E8M0, which clients decode as 2**128.
FIRST_BAD_SCALE = 253
# the small model that comes with the package; every command takes it as "nano"
NANO = Path(gptoss_jax.__file__).parent / "nano"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_PATTERNS = ["*.safetensors", "*.json", "*.jinja", "*.txt"]
_FLOAT_BITS = {2: (np.uint16, 0x7FFF, 0x7F80), 4: (np.uint32, 0x7FFFFFFF, 0x7F800000)}  # bfloat16, float32: all but the sign, infinity
# OpenAI's config.json -> config.json of Hugging Face, with the defaults of gpt_oss/torch/model.py where they are no dimension
_OPENAI_KEYS = {"num_experts": "num_local_experts", "experts_per_token": "num_experts_per_tok"}
_OPENAI_DEFAULTS = {"swiglu_limit": 7.0, "initial_context_length": 4096, "rope_theta": 150000.0, "rope_scaling_factor": 32.0,
                    "rope_ntk_alpha": 1.0, "rope_ntk_beta": 32.0}  # fmt: skip


class EncodedSlice(NamedTuple):
    """Codes of a slice, widened to whole blocks; the wanted elements of the last dim are `trim`."""

    codes: mxfp4.Codes | nvfp4.Codes
    trim: slice

    def decode(self, dtype, device: jax.Device | None = None) -> jax.Array:
        """The values, decoded on `device`; only codes are moved there."""
        codes = jax.device_put(jax.tree.map(np.ascontiguousarray, self.codes), device)
        return decode_codes(codes, np.dtype(dtype), self.trim.start, self.trim.stop)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def decode_codes(codes: mxfp4.Codes | nvfp4.Codes, dtype: np.dtype, start: int, stop: int) -> jax.Array:
    """Elements `start` to `stop` (last dim) of the values."""
    decode = mxfp4.decode if isinstance(codes, mxfp4.Codes) else nvfp4.decode
    return decode(codes, dtype)[..., start:stop]


@dataclass(frozen=True)
class SourceCheckpoint:
    """An opened checkpoint whose tensors have the names, shapes and dtypes that `config` demands. Values are checked when read."""

    path: Path
    layout: Layout
    config: GptOssConfig
    raw_config: Mapping[str, Any]
    store: TensorStore
    revision: str | None = None  # commit of the hub repository, if it came from there

    def read(self, piece: Piece, ranges: tuple[slice, ...]) -> np.ndarray | EncodedSlice:
        """A slice of one piece in our element order ([out, in], [E, out, in]): stored values, or codes. Nothing else is read.

        Raises:
          CorruptError: a non-finite value or a scale that bfloat16 cannot hold, with tensor and file.
        """
        specs = piece.tensors(self.layout, self.config)
        if "plain" in specs:
            return self._read_plain(piece, specs["plain"], ranges)
        block = MXFP4_BLOCK if self.layout.experts == "mxfp4" else NVFP4_BLOCK
        *outer, last = ranges
        begin, end = last.start // block, -(-last.stop // block)
        trim = slice(last.start - begin * block, last.stop - begin * block)
        scales = self._checked_scales(specs["scales"], (*outer, slice(begin, end)))
        if self.layout.experts == "mxfp4":  # stored as [..., blocks, bytes of a block]
            packed = self.store.read(specs["packed"].key, (*outer, slice(begin, end), slice(0, block // 2)))
            return EncodedSlice(mxfp4.Codes(packed.reshape(*packed.shape[:-2], -1), scales), trim)
        packed = self.store.read(specs["packed"].key, (*outer, slice(begin * block // 2, end * block // 2)))
        global_scale = self.store.read(specs["global_scale"].key, ranges[:1])
        check_finite(global_scale, self.where(specs["global_scale"].key))
        return EncodedSlice(nvfp4.Codes(packed, scales, global_scale), trim)

    def _read_plain(self, piece: Piece, spec: TensorSpec, ranges: tuple[slice, ...]) -> np.ndarray:
        offset = piece.stored_rows(self.layout, self.config)
        ranges = (slice(ranges[0].start + offset, ranges[0].stop + offset), *ranges[1:])
        swapped = piece.row.matrix and self.layout.transposed
        values = self.store.read(spec.key, (ranges[0], ranges[2], ranges[1]) if swapped else ranges)
        check_finite(values, self.where(spec.key))
        return values.swapaxes(-1, -2) if swapped else values

    def _checked_scales(self, spec: TensorSpec, ranges: tuple[slice, ...]) -> np.ndarray:
        scales = self.store.read(spec.key, ranges)
        check_scales(scales, self.where(spec.key))
        return scales

    def where(self, key: str) -> str:
        return f"{self.store.infos[key].file}: tensor {key!r}"


def check_finite(values: np.ndarray, where: str) -> None:
    """Refuses NaN and infinity in bfloat16 or float32: as integers, their magnitudes are the largest."""
    unsigned, magnitude, infinity = _FLOAT_BITS[values.dtype.itemsize]
    if values.size and (values.view(unsigned) & magnitude).max() >= infinity:
        raise CorruptError(f"{where} holds a NaN or infinite value")


def check_scales(scales: np.ndarray, where: str) -> None:
    """Refuses block scales (E8M0 bytes as uint8, or E4M3) that are NaN or, times the largest code, exceed bfloat16."""
    if scales.dtype == np.uint8:
        if scales.size and scales.max() >= FIRST_BAD_SCALE:
            reason = "the mark of a NaN or infinite block" if scales.max() == 255 else f"from {FIRST_BAD_SCALE} on values exceed bfloat16"
            raise CorruptError(f"{where} holds scale byte {scales.max()} ({reason})")
    elif ((scales.view(np.uint8) & 0x7F) == 0x7F).any():
        raise CorruptError(f"{where} holds a NaN scale (the mark of a NaN or infinite block)")


def open_checkpoint(path: str | Path) -> SourceCheckpoint:
    """Opens an HF directory (MXFP4 or BF16), OpenAI's original layout, an NVFP4 export in any of its layouts, a hub id ("openai/gpt-oss-20b"), or
    "nano", the model that comes with the package.

    Headers and config are read and checked, no weights.

    Raises:
      UsageError: no such directory, no config.json, pickled weights, an unreachable hub.
      CorruptError: damaged files, or tensors that are missing, extra, misshapen or of a wrong dtype (all of them listed).
    """
    source = open_unchecked(path)
    problems = tensor_problems(source)
    if problems:
        raise CorruptError(f"{source.path}: {len(problems)} tensors do not fit ({source.layout}): " + "; ".join(problems))
    return source


def open_unchecked(path: str | Path) -> SourceCheckpoint:
    """`open_checkpoint` without the comparison of tensors and config, for `verify`, which reports instead of raising."""
    directory, revision = _resolve(path)
    if not (directory / "config.json").is_file():
        raise UsageError(f"{directory}: no config.json, so this is no model directory")
    raw = read_json(directory / "config.json")
    if not isinstance(raw, dict):
        raise CorruptError(f"{directory / 'config.json'}: not a JSON object")
    is_openai = "model_type" not in raw and "num_experts" in raw
    store = open_store(directory, any_name=is_openai)
    try:
        config = GptOssConfig.from_dict(_from_openai(raw) if is_openai else raw)
    except (CorruptError, TypeError, ValueError) as error:  # a value of a wrong type fails where it is used
        raise CorruptError(f"{directory / 'config.json'}: {error}") from None
    layout = _find_layout(directory, raw, store, "openai" if is_openai else "hf")
    if layout.dialect != "own":
        store = under_own_names(store, expected_tensors(config, layout), layout.dialect)
    return SourceCheckpoint(directory, layout, config, raw, store, revision)


def tensor_problems(source: SourceCheckpoint) -> list[str]:
    """What is missing, extra, misshapen or of a dtype that loading refuses."""
    return [*shape_problems(source), *dtype_problems(source)]


def shape_problems(source: SourceCheckpoint) -> list[str]:
    """Missing, extra and misshapen tensors, one entry each."""
    expected, infos = expected_tensors(source.config, source.layout), source.store.infos
    problems = [f"missing {key!r} {list(expected[key].shape)}" for key in expected if key not in infos]
    problems += [f"extra {key!r} {list(infos[key].shape)} in {infos[key].file.name}" for key in sorted(infos) if key not in expected]
    return problems + [
        f"{key!r} in {infos[key].file.name} has shape {list(infos[key].shape)}, expected {list(spec.shape)}"
        for key, spec in expected.items()
        if key in infos and infos[key].shape != spec.shape
    ]


def dtype_problems(source: SourceCheckpoint, *, as_released: bool = False) -> list[str]:
    """Tensors of a wrong dtype. Loading also takes float32 for bfloat16; `as_released` does not."""
    infos, problems = source.store.infos, []
    for key, spec in expected_tensors(source.config, source.layout).items():
        allowed = spec.dtypes[:1] if as_released else spec.dtypes
        if key in infos and infos[key].dtype not in allowed:
            problems.append(f"{key!r} in {infos[key].file.name} has dtype {infos[key].dtype}, expected {' or '.join(allowed)}")
    return problems


def _find_layout(directory: Path, raw: Mapping[str, Any], store: TensorStore, naming: str) -> Layout:
    """The tensors say how the experts are stored; an HF config must say the same, or clients would load something else."""
    stored, dialect = next((found for ending, found in _ENDINGS.items() if any(key.endswith(ending) for key in store.infos)), ("bf16", "own"))
    if naming == "hf":
        quantization = raw.get("quantization_config") or {}
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        if method not in _METHODS:
            known = ", ".join(map(repr, list(_METHODS)[1:]))
            raise CorruptError(f"{directory / 'config.json'}: quant_method {method!r} is not supported (known: {known})")
        if _METHODS[method] != (stored, dialect):
            name = stored.upper() if dialect == "own" else f"{stored.upper()} as {dialect} stores them"
            raise CorruptError(f"{directory / 'config.json'}: quant_method {method!r}, but the tensors hold experts in {name}")
    return Layout(naming, stored, dialect)


def _from_openai(raw: Mapping[str, Any]) -> dict[str, Any]:
    raw = {**_OPENAI_DEFAULTS, **raw}
    context, factor = raw.pop("initial_context_length"), raw.pop("rope_scaling_factor")
    rope = {
        "rope_type": "yarn", "factor": factor, "beta_slow": raw.pop("rope_ntk_alpha"), "beta_fast": raw.pop("rope_ntk_beta"),
        "truncate": False, "original_max_position_embeddings": context,
    }  # fmt: skip
    renamed = {_OPENAI_KEYS.get(key, key): value for key, value in raw.items()}
    return {**renamed, "max_position_embeddings": int(context * factor), "rope_scaling": rope}


def _resolve(path: str | Path) -> tuple[Path, str | None]:
    """Local directory and hub revision of a path or hub id."""
    directory = Path(path)
    if directory.is_dir():
        return directory, None
    if directory.exists():
        raise UsageError(f"{path}: is a file; give the directory of the checkpoint")
    if str(path) == "nano":
        return NANO, None
    if not isinstance(path, str) or not _HUB_ID.fullmatch(path):
        raise UsageError(f"{path}: no such directory")
    import huggingface_hub

    try:
        # the repositories of OpenAI carry the weights three times; only the top level is wanted
        snapshot = huggingface_hub.snapshot_download(path, allow_patterns=_HUB_PATTERNS, ignore_patterns=["original/*", "metal/*"])
    except Exception as error:  # many kinds: offline mode, no route, no such repository, gated
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise UsageError(f"{path}: no such directory, and the Hugging Face hub does not deliver it ({reason})") from None
    return Path(snapshot), Path(snapshot).name
