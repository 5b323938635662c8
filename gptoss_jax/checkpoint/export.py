"""Parameters -> a directory that inference engines load: MXFP4 as in the release, BF16, or NVFP4 (readable by this library alone).

MXFP4 and NVFP4 encode the parameters as given, which must be the master weights that training quantized: a rounded copy would change codes.
The model is written tensor by tensor, so the host holds one layer at a time. Everything goes to a hidden sibling directory, is synced, read
back and verified, and only then renamed to its final name; on failure the sibling is removed.

Of many processes the first writes. The others take part in the gathers of what is sharded, which every device then holds for a moment: one layer of
one parameter, encoded (265 MB of gate_up_proj codes in gpt-oss-20b) or in its own dtype.

Where blocks and scales of one projection lay in different shards, llama.cpp's converter would pair them with those of another projection
(silently where hidden and expert sizes are equal, as in the releases), so they stay together.
"""

import dataclasses
import functools
import importlib.metadata
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

import gptoss_jax
from gptoss_jax.checkpoint.compare import through_format
from gptoss_jax.checkpoint.hashes import hash_arrays, to_host, whole
from gptoss_jax.checkpoint.hf_config import MANIFEST, hf_config, read_companions
from gptoss_jax.checkpoint.hf_layout import Layout, Piece, TensorSpec, all_pieces
from gptoss_jax.checkpoint.safetensors_io import DTYPES, SafetensorsWriter
from gptoss_jax.checkpoint.source import check_finite, check_scales
from gptoss_jax.checkpoint.staging import refuse_used, staged_directory, write_json
from gptoss_jax.checkpoint.store import INDEX, SINGLE
from gptoss_jax.checkpoint.verify import verify_dir
from gptoss_jax.errors import RunError, UsageError
from gptoss_jax.formats import Format, get_format
from gptoss_jax.model import GptOssConfig, Params, abstract_params
from gptoss_jax.sharding.distributed import barrier, is_first, on_first


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
    """Writes a Hugging Face directory and verifies it before it gets its name. With several processes all call this and return when it is there.

    Args:
      params: master weights, float32 or bfloat16, on devices (sharded in any way) or as numpy.
      format: `Mxfp4(...)`, `Nvfp4(...)`, the name of one ("mxfp4", "nvfp4"), or "bf16".
      source_dir: directory whose tokenizer, chat template, generation config and token ids are carried along.
      provenance: stored in `gptoss_jax_export.json` (source revision, run, step).
      bake: with "bf16", write the values that this format decodes to: the model that QAT trained.
      token_ids: eos_token_id, pad_token_id, bos_token_id for config.json, before those of `source_dir`.

    Raises:
      UsageError: the target exists and is not an empty directory; parameters of another model; a format that makes no sense.
      CorruptError: NaN or infinite values, or an MXFP4 scale that bfloat16 cannot hold, with the tensor's name.
      RunError: no room, an unwritable place, or a failed verification.
    """
    fmt = _checked_format(format, bake)
    _check_params(config, params, fmt or bake)
    on_first(lambda: refuse_used(Path(out_dir)))
    if not is_first():
        for piece in all_pieces(config):
            jax.block_until_ready([whole(part) for part in _stored(piece, params[piece.name], fmt, bake).values()])
        barrier("export")
        return Path(out_dir)
    companions, source_config = read_companions(source_dir)
    config_json = hf_config(config, fmt, source_config, token_ids or {})
    shards = _plan_shards(config, fmt, max_shard_bytes)
    with staged_directory(Path(out_dir), sum(shard.nbytes for shard in shards)) as staging:
        for name, content in companions.items():
            (staging / name).write_bytes(content)
        write_json(staging / "config.json", config_json)
        tensor_hashes, code_hashes = _write_shards(shards, params, fmt, bake, staging)
        write_json(
            staging / MANIFEST,
            {
                "format": fmt.to_dict() if fmt else {"name": "bf16"},
                "bake": bake.to_dict() if bake else None,
                "provenance": dict(provenance or {}),
                "versions": {"gptoss_jax": gptoss_jax.__version__, "jax": importlib.metadata.version("jax")},
                "xxh3_128": {
                    "files": {name: hash_arrays([np.fromfile(staging / name, np.uint8)]) for name in (*companions, "config.json")},
                    "codes": code_hashes,
                    "tensors": tensor_hashes,
                },
            },
        )
        report = verify_dir(staging)
        if not report.ok:
            raise RunError(f"{out_dir}: the written export fails its verification: {'; '.join(report.failures)}")
    barrier("export")
    return Path(out_dir)


def _checked_format(format: Format | str, bake: Format | None) -> Format | None:
    """The format of the experts, None for BF16."""
    if format == "bf16":
        return None
    try:
        fmt = get_format(format)
    except (ValueError, TypeError) as error:
        raise UsageError(f"format: {error}; 'bf16' is known too") from None
    if bake is not None:
        raise UsageError(f"bake is for BF16 exports; an {fmt.name} export holds the codes themselves")
    return fmt


def _check_params(config: GptOssConfig, params: Params, fmt: Format | None) -> None:
    expected = abstract_params(config)
    problems = [f"missing {name}" for name in expected if name not in params] + [f"unknown {name}" for name in params if name not in expected]
    problems += [
        f"{name} has shape {tuple(params[name].shape)}, expected {leaf.shape}" for name, leaf in expected.items()
        if name in params and tuple(params[name].shape) != leaf.shape
    ]  # fmt: skip
    if problems:
        raise UsageError("parameters do not fit the config: " + "; ".join(problems))
    for name in ("hidden_size", "intermediate_size"):
        if fmt is not None and getattr(config, name) % fmt.block_size:
            raise UsageError(f"config: {name} = {getattr(config, name)} is no multiple of {fmt.block_size}, the block size of {fmt.name}")


@dataclass
class _Shard:
    pieces: list[tuple[Piece, dict[str, TensorSpec]]] = dataclasses.field(default_factory=list)
    nbytes: int = 0


def _plan_shards(config: GptOssConfig, fmt: Format | None, max_bytes: int) -> list[_Shard]:
    """Pieces in file order, cut before `max_bytes`; all tensors of one piece share a shard."""
    layout = Layout("hf", fmt.name if fmt else "bf16")
    shards = [_Shard()]
    for piece in all_pieces(config):
        specs = piece.tensors(layout, config)
        size = sum(math.prod(spec.shape) * DTYPES[spec.dtypes[0]].itemsize for spec in specs.values())
        if shards[-1].pieces and shards[-1].nbytes + size > max_bytes:
            shards.append(_Shard())
        shards[-1].pieces.append((piece, specs))
        shards[-1].nbytes += size
    return shards


def _write_shards(
    shards: list[_Shard], params: Params, fmt: Format | None, bake: Format | None, directory: Path
) -> tuple[dict[str, str], dict[str, str]]:
    """Writes all shards and the index. Returns the hash of every tensor and of the codes of every quantized matrix."""
    tensor_hashes: dict[str, str] = {}
    code_hashes: dict[str, str] = {}
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        header = {spec.key: (spec.dtypes[0], spec.shape) for _, specs in shard.pieces for spec in specs.values()}
        with SafetensorsWriter(directory / file, header) as writer:
            for piece, specs in shard.pieces:
                arrays = _stored_arrays(piece, params[piece.name], fmt, bake)
                for role, spec in specs.items():
                    array = arrays[role].reshape(spec.shape)
                    writer.write(spec.key, array)
                    tensor_hashes[spec.key] = hash_arrays([array])
                if "packed" in specs:
                    code_hashes[piece.hf_key] = hash_arrays(arrays.values())
        weight_map |= dict.fromkeys(header, file)
    if len(shards) > 1:
        total = sum(shard.nbytes for shard in shards)
        write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})
    return tensor_hashes, code_hashes


def _stored(piece: Piece, leaf: Any, fmt: Format | None, bake: Format | None) -> dict[str, Any]:
    """What the files hold of one piece, where its parameter lies, by role and in the order in which codes are hashed."""
    values = leaf if piece.slot is None else leaf[piece.slot]
    if piece.row.matrix and fmt:
        return _encode(values, fmt)._asdict()
    return {"plain": through_format(values, bake) if piece.row.matrix and bake else values}


def _stored_arrays(piece: Piece, leaf: Any, fmt: Format | None, bake: Format | None) -> dict[str, np.ndarray]:
    """The same on this host, checked, as it is written."""
    where = f"export: tensor {piece.hf_key!r}"
    arrays = {role: to_host(part) for role, part in _stored(piece, leaf, fmt, bake).items()}
    if "plain" not in arrays:
        check_scales(arrays["scales"], where)
        return arrays
    # numpy rounds float32 to nearest even and, unlike XLA on a CPU, keeps subnormal numbers
    array = arrays["plain"].astype(DTYPES["BF16"])
    check_finite(array, where)
    return {"plain": np.ascontiguousarray(array.swapaxes(1, 2) if piece.row.matrix else array)}


@functools.partial(jax.jit, static_argnums=1)
def _encode(values, fmt: Format):
    return fmt.encode(values)
