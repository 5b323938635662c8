"""Parameters -> a directory that inference engines load: MXFP4 as in the release, BF16, or NVFP4 (readable by this library alone).

MXFP4 and NVFP4 encode the parameters as given, which must be the master weights that training quantized: a rounded copy would change codes.
The model is written tensor by tensor, so the host holds one layer at a time. Everything goes to a hidden sibling directory, is synced, read
back and verified, and only then renamed to its final name; on failure the sibling is removed.

Where blocks and scales of one projection lay in different shards, llama.cpp's converter would pair them with those of another projection
(silently where hidden and expert sizes are equal, as in the releases), so they stay together.
"""

import dataclasses
import importlib.metadata
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

import gptoss_jax
from gptoss_jax.checkpoint.hashes import code_hashes, hash_arrays, to_host
from gptoss_jax.checkpoint.hf_layout import Layout, Piece, TensorSpec, all_pieces
from gptoss_jax.checkpoint.safetensors_io import DTYPE_NAMES, DTYPES, SafetensorsWriter
from gptoss_jax.checkpoint.source import FIRST_BAD_SCALE, NVFP4_METHOD, check_finite
from gptoss_jax.checkpoint.staging import staged_directory
from gptoss_jax.checkpoint.store import INDEX, SINGLE, read_json
from gptoss_jax.errors import CorruptError, RunError, UsageError
from gptoss_jax.formats import Format
from gptoss_jax.model import GptOssConfig, Params, abstract_params

MANIFEST = "gptoss_jax_export.json"
NOT_CONVERTED = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
# carried unchanged; what a source lacks is not invented
COMPANIONS = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "generation_config.json",
)  # fmt: skip
# keys of a source's config.json that describe its vocabulary or the release, not the arithmetic
_CARRIED = ("bos_token_id", "eos_token_id", "pad_token_id", "initializer_range", "output_router_logits", "router_aux_loss_coef", "use_cache")
_RELEASE_IDS = {"eos_token_id": 200002, "pad_token_id": 199999}  # o200k_harmony: <|return|>, <|endoftext|>


@dataclass(frozen=True)
class _Export:
    """What is written and how."""

    config: GptOssConfig
    params: Params
    format: Format | None  # None: BF16
    bake: Format | None  # BF16 of the values that this format decodes to

    @property
    def layout(self) -> Layout:
        return Layout("hf", self.format.name if self.format else "bf16")


def export_hf(
    out_dir: str | Path,
    config: GptOssConfig,
    params: Params,
    *,
    format: Format | str,
    source_dir: str | Path | None = None,
    max_shard_bytes: int = 5_000_000_000,
    provenance: Mapping[str, Any] | None = None,
    bake: Format | None = None,
    token_ids: Mapping[str, Any] | None = None,
) -> Path:
    """Writes a Hugging Face directory and verifies it before it gets its name.

    Args:
      params: master weights, float32 or bfloat16, on devices or as numpy.
      format: `Mxfp4(...)`, `Nvfp4(...)`, or "bf16".
      source_dir: directory whose tokenizer, chat template, generation config and token ids are carried along.
      provenance: stored in `gptoss_jax_export.json` (source revision, run, step).
      bake: with "bf16", write the values that this format decodes to: the model that QAT trained.
      token_ids: overrides for eos_token_id, pad_token_id, bos_token_id in config.json.

    Raises:
      UsageError: the target exists and is not an empty directory; parameters of another model; a format that makes no sense.
      CorruptError: NaN or infinite values, or an MXFP4 scale that bfloat16 cannot hold, with the tensor's name.
      RunError: no room, an unwritable place, or a failed verification.
    """
    from gptoss_jax.checkpoint.verify import verify_dir

    export = _Export(config, params, _checked_format(format, bake), bake)
    _check_params(config, params)
    companions, source_config = _read_companions(source_dir)
    shards = _plan_shards(export, max_shard_bytes)
    hf_config = _hf_config(export, source_config, token_ids or {})
    with staged_directory(Path(out_dir), _total_bytes(shards)) as staging:
        for name in companions:
            shutil.copyfile(Path(source_dir) / name, staging / name)
        tensors, codes = _write_shards(export, shards, staging)
        _write_json(staging / "config.json", hf_config)
        manifest = {
            "format": export.format.to_dict() if export.format else {"name": "bf16"},
            "bake": bake.to_dict() if bake else None,
            "provenance": dict(provenance or {}),
            "versions": {"gptoss_jax": gptoss_jax.__version__, **{name: importlib.metadata.version(name) for name in ("jax", "numpy")}},
            "files_xxh3_128": {name: hash_arrays([np.fromfile(staging / name, np.uint8)]) for name in sorted([*companions, "config.json"])},
            "codes_xxh3_128": codes,
            "tensors_xxh3_128": tensors,
        }
        _write_json(staging / MANIFEST, manifest)
        report = verify_dir(staging, against=codes or None)
        if not report.ok:
            raise RunError(f"{out_dir}: the written export fails its verification: {'; '.join(report.failures)}")
    return Path(out_dir)


def _checked_format(format: Format | str, bake: Format | None) -> Format | None:
    if isinstance(format, Format):
        if bake is not None:
            raise UsageError(f"bake is for BF16 exports; the {format.name} export holds the codes themselves")
        return format
    if format != "bf16":
        raise UsageError(f"format must be a Format object or 'bf16', not {format!r}")
    return None


def _check_params(config: GptOssConfig, params: Params) -> None:
    expected = abstract_params(config)
    problems = [f"missing {name}" for name in expected if name not in params] + [f"unknown {name}" for name in params if name not in expected]
    problems += [
        f"{name} has shape {tuple(params[name].shape)}, expected {leaf.shape}" for name, leaf in expected.items()
        if name in params and tuple(params[name].shape) != leaf.shape
    ]  # fmt: skip
    if problems:
        raise UsageError("parameters do not fit the config: " + "; ".join(problems))


# ---- tensors ----------------------------------------------------------------------------------------------------------------


@dataclass
class _Shard:
    pieces: list[tuple[Piece, dict[str, TensorSpec]]] = dataclasses.field(default_factory=list)
    nbytes: int = 0


def _nbytes(spec: TensorSpec) -> int:
    return math.prod(spec.shape) * DTYPES[spec.dtypes[0]].itemsize


def _total_bytes(shards: list[_Shard]) -> int:
    return sum(shard.nbytes for shard in shards)


def _plan_shards(export: _Export, max_bytes: int) -> list[_Shard]:
    """Pieces in file order, cut before `max_bytes`; all tensors of one piece share a shard."""
    shards = [_Shard()]
    for piece in all_pieces(export.config):
        specs = piece.tensors(export.layout, export.config)
        size = sum(map(_nbytes, specs.values()))
        if shards[-1].pieces and shards[-1].nbytes + size > max_bytes:
            shards.append(_Shard())
        shards[-1].pieces.append((piece, specs))
        shards[-1].nbytes += size
    return shards


def _write_shards(export: _Export, shards: list[_Shard], directory: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Writes all shards and the index. Returns the hash of every tensor and of every quantized matrix."""
    tensor_hashes: dict[str, str] = {}
    codes: dict[str, str] = {}
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        header = {spec.key: (spec.dtypes[0], spec.shape) for _, specs in shard.pieces for spec in specs.values()}
        with SafetensorsWriter(directory / file, header) as writer:
            for piece, specs in shard.pieces:
                arrays = _encode_piece(export, piece)
                for role, spec in specs.items():
                    array = arrays[role].reshape(spec.shape)
                    writer.write(spec.key, array)
                    tensor_hashes[spec.key] = hash_arrays([array])
                if "packed" in arrays:
                    codes[piece.hf_key] = hash_arrays(arrays.values())
        weight_map |= dict.fromkeys(header, file)
    if len(shards) > 1:
        _write_json(directory / INDEX, {"metadata": {"total_size": _total_bytes(shards)}, "weight_map": dict(sorted(weight_map.items()))})
    return tensor_hashes, codes


def _encode_piece(export: _Export, piece: Piece) -> dict[str, np.ndarray]:
    """The tensors to store for one piece, by role and in hashing order."""
    leaf = export.params[piece.name]
    values = leaf if piece.slot is None else leaf[piece.slot]
    if piece.row.matrix and export.format:
        codes = _encode(values, export.format)
        arrays = {role: to_host(part) for role, part in codes._asdict().items()}
        _check_scales(piece.hf_key, arrays["scales"])
        return arrays
    if piece.row.matrix and export.bake:
        values = _decode(_encode(values, export.bake), export.bake)
    # numpy rounds float32 to bfloat16 to nearest even and, unlike XLA on a CPU, keeps subnormal numbers
    array = to_host(values).astype(DTYPES["BF16"])
    check_finite(array, f"export: tensor {piece.hf_key!r}")
    return {"plain": np.ascontiguousarray(array.swapaxes(1, 2) if piece.row.matrix else array)}
