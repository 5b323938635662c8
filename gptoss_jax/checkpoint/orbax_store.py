"""Training checkpoints: Orbax for the arrays, and around it what Orbax does not promise.

    DIR/12/arrays/{params,optimizer}/   Orbax (OCDBT); parameters can be restored alone
    DIR/12/meta.json                    model config, run config, data position, quantizer, hashes of the trained codes
    DIR/12/assets/                      tokenizer files and config.json of the model that the run started from
    DIR/12/manifest.json                size and xxh3_128 of every other file

A step is written under a temporary name and renamed when its manifest is complete, so a step that is listed is whole. Orbax 0.12 restores a file
with a flipped bit silently (16 of 16 tries) and casts silently to the dtype it is asked for; here the manifest is checked before every restore,
and shapes and dtypes must be equal. Saving is synchronous: an Orbax save that is still running when the process ends is lost with exit code 0.

Of many processes each writes, reads and hashes its share (DIR is on a file system that all see), so all call save, verify and restore; all else the
first does alone.
"""

import dataclasses
import json
import logging
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import xxhash
from jax.sharding import Sharding, SingleDeviceSharding
from orbax.checkpoint import v1 as ocp

from gptoss_jax.errors import CorruptError, RunError, UsageError
from gptoss_jax.sharding.distributed import is_first, on_each, on_first

ARRAYS, META, ASSETS, MANIFEST = "arrays", "meta.json", "assets", "manifest.json"
CHECKPOINTS = "checkpoints"  # name of DIR inside a run directory
LOCK = ".lock"  # beside it: held by the process that writes there
CHUNK_BYTES = 16 << 20


@dataclass(frozen=True)
class Meta:
    """What a checkpoint says about itself beside its arrays. All values are plain JSON."""

    model: Mapping[str, Any]  # config.json of the architecture
    run: Mapping[str, Any] | None = None  # resolved TrainConfig
    data_state: Mapping[str, Any] | None = None
    quant: Mapping[str, Any] | None = None  # QuantPolicy.to_dict()
    code_hashes: Mapping[str, str] | None = None  # per HF layer, from the compiled training program
    source: Mapping[str, Any] | None = None  # where the parameters came from


# ---- names ------------------------------------------------------------------------------------------------------------------


def list_steps(directory: str | Path) -> list[int]:
    """Committed steps, oldest first."""
    directory = Path(directory)
    return sorted(int(p.name) for p in directory.iterdir() if re.fullmatch(r"\d+", p.name) and p.is_dir()) if directory.is_dir() else []


def latest_step(directory: str | Path) -> int | None:
    return max(list_steps(directory), default=None)


def locate(path: str | Path) -> tuple[Path, int] | None:
    """(DIR, step) of a run directory, a checkpoint directory (both: the latest step) or one step; None where `path` is none of these."""
    path = Path(path)
    if (path / META).is_file() and (path / ARRAYS).is_dir() and path.name.isdigit():
        return path.parent, int(path.name)
    for directory in (path / CHECKPOINTS, path):
        step = latest_step(directory)
        if step is not None and (directory / str(step) / META).is_file():
            return directory, step
    return None


def step_dir(directory: str | Path, step: int) -> Path:
    """Directory of a committed step.

    Raises:
      UsageError: no such step.
    """
    path = Path(directory) / str(step)
    if not path.is_dir():
        raise UsageError(f"{directory}: no checkpoint of step {step}; present are {list_steps(directory) or 'none'}")
    return path


# ---- save -------------------------------------------------------------------------------------------------------------------


def save(
    directory: str | Path,
    step: int,
    params: Mapping[str, jax.Array],
    meta: Meta,
    optimizer: Any = None,
    *,
    assets: Iterable[Path] = (),
    keep: int | None = None,
) -> Path:
    """Writes and commits one step; afterwards removes all but the newest `keep` steps and what killed saves left.

    Args:
      optimizer: any pytree of arrays; None for parameters alone.
      assets: files that are copied along.

    Raises:
      UsageError: the step exists.
      RunError: it could not be written; earlier steps are untouched.
    """
    directory = Path(directory).absolute()
    final, temporary = directory / str(step), directory / f"{step}.tmp"
    trees = {"params": dict(params)} | ({"optimizer": optimizer} if optimizer is not None else {})
    files = tuple(assets)

    def begin():
        if final.exists():
            raise UsageError(f"{final} exists already")
        directory.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(directory)
        (temporary / ASSETS).mkdir(parents=True)

    def describe():
        for file in files:
            shutil.copyfile(file, temporary / ASSETS / Path(file).name)
        _write_json(temporary / META, dataclasses.asdict(meta))

    def commit():
        _write_json(temporary / MANIFEST, hashes)
        os.rename(temporary, final)
        _sync_dir(directory)

    try:
        on_first(begin)
        with _errors_once():
            ocp.save_checkpointables(temporary / ARRAYS, trees)
        on_first(describe)
        hashes = _hash_files(temporary)
        on_first(commit)
    except UsageError:
        raise
    except Exception as error:  # Orbax reports a full disk as ValueError
        if is_first():
            shutil.rmtree(temporary, ignore_errors=True)
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves(trees)) / 2**30
        free = shutil.disk_usage(directory).free / 2**30 if directory.is_dir() else float("nan")
        reason = str(error).splitlines()[0][:300] if str(error) else type(error).__name__
        if "No space left" not in reason and "No space left" in f"{error}{error.__cause__}":  # below 30 lines that describe the array
            reason = "No space left on device"
        room = f"{needed:.2f} GiB needed, {free:.2f} GiB free"
        failure = RunError(f"checkpoint of step {step} was not written to {directory} ({room}): {reason}")
        failure.everywhere = getattr(error, "everywhere", False)
        raise failure from error
    if is_first():
        for old in list_steps(directory)[: -keep if keep else 0]:
            # under a name that is no step: killed half-way, it must not be listed
            shutil.rmtree((directory / str(old)).rename(directory / f"{old}.tmp"))
    return final


@contextmanager
def _errors_once() -> Iterator[None]:
    """Orbax logs the traceback of an error in every thread that it passes, 460 lines for a full disk, and then raises it: that is enough."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def holds_only_leftovers(run: str | Path) -> bool:
    """Whether a directory has nothing but what a killed or failed first save left: no step, and no file of anybody else."""
    run = Path(run)
    if not run.is_dir() or run.is_symlink() or {path.name for path in run.iterdir()} - {CHECKPOINTS, LOCK}:
        return False
    checkpoints = run / CHECKPOINTS
    return not checkpoints.exists() or (checkpoints.is_dir() and all(_is_leftover(path) for path in checkpoints.iterdir()))


def quarantine(directory: str | Path, step: int) -> Path:
    """Takes a damaged step out of the list by renaming it, so that a run can write that step again."""
    source, target = step_dir(directory, step), Path(directory) / f"{step}.corrupt"
    shutil.rmtree(target, ignore_errors=True)
    return source.rename(target)


def _remove_leftovers(directory: Path) -> None:
    for path in directory.iterdir():
        if _is_leftover(path):
            shutil.rmtree(path)


def _is_leftover(path: Path) -> bool:
    return re.fullmatch(r"\d+\.tmp", path.name) is not None


def _write_json(path: Path, value: Any) -> None:
    with open(path, "w") as file:
        json.dump(value, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def _sync_dir(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


# ---- verify -----------------------------------------------------------------------------------------------------------------


def _hash_file(path: Path) -> dict[str, Any]:
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return {"bytes": path.stat().st_size, "xxh3_128": digest.hexdigest()}


def _hash_files(root: Path) -> dict[str, dict[str, Any]]:
    """Size and hash of all files. Of P processes each does every P-th, the largest first, so that shares are about equal."""

    def share():
        files = sorted((p for p in root.rglob("*") if p.is_file() and p != root / MANIFEST), key=lambda p: (-p.stat().st_size, str(p)))
        mine = files[jax.process_index() :: jax.process_count()]
        with ThreadPoolExecutor(8) as pool:  # xxhash and file reads release the GIL
            return {str(p.relative_to(root)): entry for p, entry in zip(mine, pool.map(_hash_file, mine), strict=True)}

    shares = on_each(share)
    return dict(sorted((name, entry) for of_process in shares for name, entry in of_process.items()))


def verify(directory: str | Path, step: int) -> None:
    """Compares every file of a step with its manifest. All processes call this, each reads its share, all hear the same.

    Raises:
      CorruptError: naming the step and every file that is missing, extra, or differs in size or hash.
    """
    root = step_dir(directory, step)
    expected, found = _read_json(root / MANIFEST, step), _hash_files(root)
    problems = [f"{name} is missing" for name in expected if name not in found]
    problems += [f"{name} is not in the manifest" for name in found if name not in expected]
    for name in expected.keys() & found.keys():
        if found[name] != expected[name]:
            sizes = found[name]["bytes"], expected[name]["bytes"]
            problems.append(f"{name} has {sizes[0]} bytes instead of {sizes[1]}" if sizes[0] != sizes[1] else f"{name} differs from its hash")
    if problems:
        error = CorruptError(f"checkpoint {root}: step {step} is damaged: {'; '.join(sorted(problems))}")
        error.everywhere = True
        raise error


def _read_json(path: Path, step: int) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CorruptError(f"checkpoint {path.parent}: step {step} is damaged: {path.name} cannot be read ({error})") from None


# ---- restore ----------------------------------------------------------------------------------------------------------------


def read_meta(directory: str | Path, step: int) -> Meta:
    """The metadata of a step (not verified)."""
    raw = _read_json(step_dir(directory, step) / META, step)
    names = {field.name for field in dataclasses.fields(Meta)}
    if not isinstance(raw, dict) or set(raw) != names:
        raise CorruptError(f"checkpoint {directory}: step {step}: {META} does not have the keys {sorted(names)}")
    return Meta(**raw)


def restore(
    directory: str | Path, step: int, params: Mapping[str, jax.ShapeDtypeStruct], optimizer: Any, *, verified: bool = False
) -> tuple[dict[str, jax.Array], Any]:
    """Verified parameters and optimizer of a step.

    Args:
      params, optimizer: abstract arrays, with shardings where they are not to lie on the first device.
      verified: the caller has just run `verify` on this step.

    Raises:
      CorruptError: damaged, or of other names, shapes or dtypes than asked for.
    """
    if not verified:
        verify(directory, step)
    loaded = _restore(directory, step, _stored(directory, step), {"params": dict(params), "optimizer": optimizer})
    return loaded["params"], loaded["optimizer"]


def restore_params(directory: str | Path, step: int, shardings: Mapping[str, Sharding] | None = None) -> dict[str, jax.Array]:
    """Verified parameters of a step in the dtype in which they are stored (the masters), without the optimizer."""
    verify(directory, step)
    stored = _stored(directory, step)
    place = shardings or dict.fromkeys(stored["params"])
    target = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place[name]) for name, leaf in stored["params"].items()}
    return _restore(directory, step, stored, {"params": target})["params"]


def restore_param(directory: str | Path, step: int, name: str) -> jax.Array:
    """One parameter of a step, on the first device; the others are not read. The caller has verified the step.

    Raises:
      CorruptError: the step holds no parameter of this name.
    """
    stored = _stored(directory, step)["params"]
    if name not in stored:
        raise CorruptError(f"checkpoint {directory}: step {step} holds no parameter {name}")
    first = SingleDeviceSharding(jax.local_devices()[0])
    wanted = jax.ShapeDtypeStruct(stored[name].shape, stored[name].dtype, sharding=first)
    target = {"params": {**dict.fromkeys(stored, ...), name: wanted}}  # `...` leaves a leaf out
    return ocp.load_checkpointables(step_dir(directory, step).absolute() / ARRAYS, target)["params"][name]


def stored_params(directory: str | Path, step: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of the parameters of a step, without reading them."""
    return {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in _stored(directory, step)["params"].items()}


def _stored(directory: str | Path, step: int) -> dict[str, Any]:
    """Trees of shapes and dtypes that a step holds."""
    return ocp.checkpointables_metadata(step_dir(directory, step).absolute() / ARRAYS).metadata


def _restore(directory: str | Path, step: int, stored: dict[str, Any], target: dict[str, Any]) -> dict[str, Any]:
    for tree, leaves in target.items():
        if tree not in stored:
            raise CorruptError(f"checkpoint {directory}: step {step} holds no {tree}")
        _check_equal(f"checkpoint {directory}: step {step}", _by_path(leaves), _by_path(stored[tree]))
    first = SingleDeviceSharding(jax.local_devices()[0])
    placed = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding or first), target)
    return ocp.load_checkpointables(step_dir(directory, step).absolute() / ARRAYS, placed)


def _by_path(tree: Any) -> dict[str, Any]:
    """Leaves by path. Orbax describes a NamedTuple by a dict of its fields and other sequences by lists, so keys are compared as text."""
    key = lambda part: str(getattr(part, "key", getattr(part, "name", getattr(part, "idx", part))))
    return {"/".join(map(key, path)): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def _check_equal(where: str, wanted: Mapping[str, Any], stored: Mapping[str, Any]) -> None:
    problems = [f"{name} is missing" for name in wanted if name not in stored] + [f"{name} is unexpected" for name in stored if name not in wanted]
    for name in wanted.keys() & stored.keys():
        asked, held = wanted[name], stored[name]
        if (tuple(asked.shape), asked.dtype) != (tuple(held.shape), held.dtype):
            problems.append(f"{name} is {held.dtype}{list(held.shape)}, expected {asked.dtype}{list(asked.shape)}")
    if problems:
        rest = f"; and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise CorruptError(f"{where} does not fit: {'; '.join(sorted(problems)[:10])}{rest}")
