"""Parameters -> a directory that other programs load: MXFP4 as in the release or in OpenAI's original layout, BF16, or NVFP4 in three layouts.

MXFP4 and NVFP4 encode the parameters as given, which must be the master weights that training quantized: a rounded copy would change codes.
A format with another rounding than training's (`Mxfp4(element_round="sr", seed=3)`) writes other weights than the trained ones, and says so in the
manifest; `verify` reproduces them from the seed.
Layers are encoded in groups of at most 128 MiB (in the dtype of the parameters), and a thread writes and hashes one group while the next is
encoded, so the host holds four of them. Everything goes to a hidden sibling directory, is synced, read back and verified, and only then renamed to
its final name; on failure the sibling is removed.

A parameter that is cut over devices is encoded where it lies, a layer at a time, and its codes come to the host by groups. Of many processes the
first writes. The others take part in the gathers of what is sharded, which every device then holds for a moment: one layer of one parameter,
encoded (265 MB of gate_up_proj codes in gpt-oss-20b) or in its own dtype.

Where blocks and scales of one projection lay in different shards, llama.cpp's converter would pair them with those of another projection
(silently where hidden and expert sizes are equal, as in the releases), so they stay together.
"""

import dataclasses
import functools
import importlib.metadata
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import xxhash

import gptoss_jax
from gptoss_jax.checkpoint.ahead import Tick, in_order
from gptoss_jax.checkpoint.card import CARD, model_card
from gptoss_jax.checkpoint.compare import encode_experts, expert_keys, shared_amax, through_format
from gptoss_jax.checkpoint.export_layout import export_layout
from gptoss_jax.checkpoint.hashes import bytes_of, hash_arrays, rows_to_host, take_rows, whole
from gptoss_jax.checkpoint.hf_config import MANIFEST, config_files, read_companions
from gptoss_jax.checkpoint.hf_layout import MXFP4_BLOCK, Layout, Piece, TensorSpec, all_pieces
from gptoss_jax.checkpoint.nvfp4_layouts import DialectWriter
from gptoss_jax.checkpoint.safetensors_io import DTYPES, SafetensorsWriter
from gptoss_jax.checkpoint.source import check_finite, check_scales
from gptoss_jax.checkpoint.staging import refuse_used, staged_directory, write_json
from gptoss_jax.checkpoint.store import INDEX, SINGLE
from gptoss_jax.checkpoint.verify import verify_dir
from gptoss_jax.errors import RunError, UsageError
from gptoss_jax.formats import Format, get_format
from gptoss_jax.model import GptOssConfig, Params, abstract_params
from gptoss_jax.quant import LoraWeight, merged_weight
from gptoss_jax.sharding.distributed import barrier, is_first, on_first

GROUP_BYTES = 128 << 20
AHEAD = 3  # groups that are encoded and not yet written


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
    layout: str | None = None,
    tick: Tick | None = None,
) -> Path:
    """Writes a model directory and verifies it before it gets its name. With several processes all call this and return when it is there.

    Args:
      params: master weights, float32 or bfloat16, on devices (sharded in any way) or as numpy; a `LoraWeight` is merged as it is written.
      format: `Mxfp4(...)`, `Nvfp4(...)`, the name of one ("mxfp4", "nvfp4"), or "bf16". Stochastic rounding needs a seed, which the manifest records.
      source_dir: directory whose tokenizer, chat template, generation config and token ids are carried along.
      provenance: stored in `gptoss_jax_export.json` (source revision, run, step).
      bake: with "bf16", write the values that this format decodes to: the model that QAT trained.
      token_ids: eos_token_id, pad_token_id, bos_token_id for config.json, before those of `source_dir`.
      layout: "hf" or "openai" for MXFP4 and BF16, "own", "modelopt" or "compressed-tensors" for NVFP4; default: the first of them.
      tick: called on the first process with the bytes that are written, and those of the whole model.

    Raises:
      UsageError: the target exists and is not an empty directory; parameters of another model; a format that makes no
        sense, or that the layout cannot hold.
      CorruptError: NaN or infinite values, or an MXFP4 scale that bfloat16 cannot hold, with the tensor's name.
      RunError: no room, an unwritable place, or a failed verification.
    """
    fmt = _checked_format(format, bake)
    place = export_layout(config, fmt, layout)
    _check_params(config, params, fmt or bake)
    on_first(lambda: refuse_used(Path(out_dir)))
    if not is_first():
        for piece in all_pieces(config):
            if not _in_one_place(params[piece.name]):
                jax.block_until_ready(list(_stored_whole(piece, params[piece.name], fmt, bake).values()))
        barrier("export")
        return Path(out_dir)
    companions, source_config = read_companions(source_dir)
    described = config_files(config, fmt, place, source_config, token_ids or {})
    shards = _plan_shards(config, place, max_shard_bytes)
    with staged_directory(Path(out_dir), sum(shard.nbytes for shard in shards)) as staging:
        for name, content in companions.items():
            (staging / name).write_bytes(content)
        for name, content in described.items():
            write_json(staging / name, content)
        tensor_hashes, code_hashes = _write_shards(shards, config, params, fmt, bake, place, staging, tick)
        manifest = {
            "format": fmt.to_dict() if fmt else {"name": "bf16"},
            "bake": bake.to_dict() if bake else None,
            "layout": str(place),
            "provenance": dict(provenance or {}),
            "versions": {"gptoss_jax": gptoss_jax.__version__, "jax": importlib.metadata.version("jax")},
            "xxh3_128": {
                "files": {name: hash_arrays([np.fromfile(staging / name, np.uint8)]) for name in (*companions, *described)},
                "codes": code_hashes,
                "tensors": tensor_hashes,
            },
        }
        write_json(staging / MANIFEST, manifest)
        (staging / CARD).write_text(model_card(config, place, manifest), encoding="utf-8")
        report = verify_dir(staging)
        if not report.ok:
            raise RunError(f"{out_dir}: the written export fails its verification: {'; '.join(report.failures)}")
    barrier("export")
    return Path(out_dir)


def _checked_format(format: Format | str, bake: Format | None) -> Format | None:
    """The format of the experts, None for BF16."""
    if format == "bf16":
        if bake is not None and bake.export_problem:
            raise UsageError(f"bake: {bake} cannot be exported: {bake.export_problem}")
        return None
    try:
        fmt = get_format(format)
    except (ValueError, TypeError) as error:
        raise UsageError(f"format: {error}; 'bf16' is known too") from None
    if fmt.export_problem:
        raise UsageError(f"format: {fmt} cannot be exported: {fmt.export_problem}")
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
        block = MXFP4_BLOCK if getattr(fmt, "mxfp4_rule", None) else getattr(fmt, "block_size", 1)
        if getattr(config, name) % block:
            raise UsageError(f"config: {name} = {getattr(config, name)} is no multiple of {block}, the block size of {fmt.name}")


@dataclass
class _Shard:
    pieces: list[tuple[Piece, dict[str, TensorSpec]]] = dataclasses.field(default_factory=list)
    nbytes: int = 0


def _plan_shards(config: GptOssConfig, layout: Layout, max_bytes: int) -> list[_Shard]:
    """Pieces in file order, cut before `max_bytes`; all tensors of one piece, and all pieces of one tensor, share a shard."""
    shards, seen = [_Shard()], set()
    for piece in all_pieces(config):
        specs = piece.tensors(layout, config)
        # q, k and v of OpenAI's fused tensor follow each other: the first of them brings all its bytes
        size = sum(math.prod(spec.shape) * DTYPES[spec.dtypes[0]].itemsize for spec in specs.values() if spec.key not in seen)
        seen |= {spec.key for spec in specs.values()}
        if shards[-1].pieces and shards[-1].nbytes + size > max_bytes:
            shards.append(_Shard())
        shards[-1].pieces.append((piece, specs))
        shards[-1].nbytes += size
    return shards


def _write_shards(
    shards: list[_Shard],
    config: GptOssConfig,
    params: Params,
    fmt: Format | None,
    bake: Format | None,
    layout: Layout,
    directory: Path,
    tick: Tick | None,
) -> tuple[dict[str, str], dict[str, str]]:
    """Writes all shards and the index. Returns the hash of every tensor and of the codes of every quantized matrix."""
    hashes = _Hashes()
    weight_map: dict[str, str] = {}
    total, done, stored = sum(shard.nbytes for shard in shards), 0, 0
    for number, shard in enumerate(shards, 1):
        file = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        header = {spec.key: (spec.dtypes[0], spec.shape) for _, specs in shard.pieces for spec in specs.values()}
        own = layout.dialect == "own"
        with SafetensorsWriter(directory / file, header) if own else DialectWriter(directory / file, header, layout.dialect) as writer:
            groups = (
                (piece, specs, group) for piece, specs in shard.pieces
                for group in _groups(piece, params[piece.name], fmt, bake, layout, piece.stored_rows(layout, config))
            )  # fmt: skip
            for nbytes in in_order((partial(_write_group, writer, hashes, *group) for group in groups), threads=1, ahead=AHEAD):
                done += nbytes
                if tick:
                    tick(done, total)
        weight_map |= dict.fromkeys(writer.names, file)
        stored += writer.nbytes
    if len(shards) > 1:
        write_json(directory / INDEX, {"metadata": {"total_size": stored}, "weight_map": dict(sorted(weight_map.items()))})
    return hashes.tensors(), hashes.codes()


class _Group(NamedTuple):
    """Rows of the tensors of a piece, from `row` on, by role and in the order in which codes are hashed; the piece begins in its tensors at row
    `begin`."""

    row: int
    arrays: dict[str, np.ndarray]
    begin: int = 0


def _write_group(writer: SafetensorsWriter, hashes: "_Hashes", piece: Piece, specs: dict[str, TensorSpec], group: _Group) -> int:
    """Writes one group; returns its bytes. Groups of a piece come in order."""
    for role, spec in specs.items():
        array = group.arrays[role]
        array = array.reshape(len(array), *spec.shape[1:])
        writer.write(spec.key, array, group.begin + group.row)
        hashes.add(spec.key, piece.hf_key if "packed" in specs else None, role, array)
    return sum(array.nbytes for array in group.arrays.values())


class _Hashes:
    """xxh3_128 of tensors that come in groups of rows, and of the codes of matrices (`gptoss_jax.checkpoint.hashes`): packed codes first, so the
    scales wait (1/17 of a layer)."""

    def __init__(self):
        self._tensors: dict[str, Any] = {}
        self._codes: dict[str, Any] = {}
        self._waiting: dict[str, dict[str, list[np.ndarray]]] = {}

    def add(self, key: str, matrix: str | None, role: str, array: np.ndarray) -> None:
        self._tensors.setdefault(key, xxhash.xxh3_128()).update(bytes_of(array))
        if matrix is not None:
            if matrix not in self._codes:
                self._finish()
            state = self._codes.setdefault(matrix, xxhash.xxh3_128())
            if role == "packed":
                state.update(bytes_of(array))
            else:
                self._waiting.setdefault(matrix, {}).setdefault(role, []).append(array)

    def _finish(self) -> None:
        for matrix, roles in self._waiting.items():
            for array in (array for arrays in roles.values() for array in arrays):
                self._codes[matrix].update(bytes_of(array))
        self._waiting.clear()

    def tensors(self) -> dict[str, str]:
        return {key: state.hexdigest() for key, state in self._tensors.items()}

    def codes(self) -> dict[str, str]:
        self._finish()
        return {matrix: state.hexdigest() for matrix, state in self._codes.items()}


# ---- from parameters to what files hold ----------------------------------------------------------------------------------------


def _in_one_place(leaf: Any) -> bool:
    return not isinstance(leaf, jax.Array) or len(leaf.sharding.device_set) == 1


def _stored(piece: Piece, values: Any, fmt: Format | None, bake: Format | None, row: int = 0, amax: Any = None) -> dict[str, Any]:
    """What the files hold of the rows of a piece from `row` on, where these rows lie; `amax` as of `encode_experts`."""
    quantizer = fmt or bake
    if not piece.row.matrix or not quantizer:
        return {"plain": values}
    key = expert_keys(quantizer, piece, row, row + len(values))
    return _encode(values, fmt, key, amax)._asdict() if fmt else {"plain": through_format(values, bake, key, amax)}


def _stored_whole(piece: Piece, leaf: jax.Array, fmt: Format | None, bake: Format | None) -> dict[str, Any]:
    """The same of a piece that is cut over devices; where they belong to several processes, every device gets all of it."""
    return {role: whole(part) for role, part in _stored(piece, leaf if piece.slot is None else leaf[piece.slot], fmt, bake).items()}


def _groups(piece: Piece, leaf: Any, fmt: Format | None, bake: Format | None, layout: Layout, begin: int) -> Iterator[_Group]:
    """All of a piece on this host, checked, as it is written from row `begin` of its tensors on."""
    where, rows = f"export: tensor {piece.hf_key!r}", piece.shape[0]
    step = max(1, GROUP_BYTES // (math.prod(piece.shape[1:]) * leaf.dtype.itemsize))
    groups = [(row, min(step, rows - row)) for row in range(0, rows, step)]
    cut, amax = None if _in_one_place(leaf) else _stored_whole(piece, leaf, fmt, bake), None
    if cut is None and piece.row.matrix and (fmt or bake):
        amax = shared_amax(fmt or bake, (_rows(piece, leaf, *group) for group in groups))
    for row, count in groups:
        if cut is not None:
            arrays = {role: rows_to_host(part, row, row + count) for role, part in cut.items()}
        else:
            arrays = {role: np.asarray(part) for role, part in _stored(piece, _rows(piece, leaf, row, count), fmt, bake, row, amax).items()}
        if "plain" in arrays:
            arrays = {"plain": _checked_plain(arrays["plain"], where, layout.transposed and piece.row.matrix)}
        else:
            check_scales(arrays["scales"], where)
        yield _Group(row, arrays, begin)


def _rows(piece: Piece, leaf: Any, row: int, count: int) -> Any:
    """Rows of a piece of a leaf that lies in one place; adapters are merged."""
    if isinstance(leaf, LoraWeight):
        return _merged_rows(piece, leaf, row, count)
    if isinstance(leaf, jax.Array):
        return take_rows(leaf, piece.slot, row, count)
    return (leaf if piece.slot is None else leaf[piece.slot])[row : row + count]


def _checked_plain(values: np.ndarray, where: str, is_transposed: bool) -> np.ndarray:
    # numpy rounds float32 to nearest even and, unlike XLA on a CPU, keeps subnormal numbers
    array = values.astype(DTYPES["BF16"])
    check_finite(array, where)
    return np.ascontiguousarray(array.swapaxes(1, 2) if is_transposed else array)


_merged = jax.jit(merged_weight)


def _merged_rows(piece: Piece, leaf: LoraWeight, row: int, count: int) -> jax.Array:
    """Experts, or rows of a matrix, `row` to `row + count` of a layer, merged."""
    take = partial(take_rows, slot=piece.slot, start=row, count=count)
    base, b = jax.tree.map(lambda x: take(x), (leaf.base, leaf.b))
    if leaf.a is None:
        return _merged(LoraWeight(base, None, None))
    a = take(leaf.a) if piece.row.matrix else take_rows(leaf.a, piece.slot, 0, leaf.a.shape[-2])
    return _merged(LoraWeight(base, a, b, leaf.scale))


@functools.partial(jax.jit, static_argnums=1)
def _encode(values, fmt: Format, key, amax):
    return encode_experts(values, fmt, key, amax)
