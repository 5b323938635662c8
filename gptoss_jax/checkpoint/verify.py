"""Does a checkpoint directory hold what every client demands, undamaged, and the weights that it should hold?"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gptoss_jax.checkpoint.ahead import in_order
from gptoss_jax.checkpoint.compare import hash_differences, stored_code_hashes, value_differences
from gptoss_jax.checkpoint.conformance import DEMANDS, Note
from gptoss_jax.checkpoint.hashes import hash_arrays
from gptoss_jax.checkpoint.hf_config import COMPANIONS, MANIFEST
from gptoss_jax.checkpoint.source import SourceCheckpoint, open_checkpoint, open_unchecked, tensor_problems
from gptoss_jax.checkpoint.store import checked_path, read_json
from gptoss_jax.errors import CorruptError
from gptoss_jax.formats import Format, Mxfp4, Nvfp4, format_from_dict
from gptoss_jax.model import Params

HASH_THREADS = 4
Against = str | Path | SourceCheckpoint | Mapping[str, str] | Params


@dataclass(frozen=True)
class Check:
    """Outcome of one check. `problems` fail the report, `notes` do not; without either, `skipped` says that nothing was to be checked."""

    title: str
    clients: str
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    skipped: bool = False

    @property
    def status(self) -> str:
        if self.problems:
            return "FAIL"
        if self.skipped:
            return "-"
        return "note" if self.notes else "ok"


@dataclass(frozen=True)
class Report:
    """All checks of one directory; prints as a table."""

    directory: Path
    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        return not self.failures

    @property
    def failures(self) -> list[str]:
        return [f"{check.title}: {problem}" for check in self.checks for problem in check.problems]

    def __str__(self) -> str:
        width = max(len(check.title) for check in self.checks)
        lines = [f"{self.directory}: " + ("conforms" if self.ok else f"{len(self.failures)} problems")]
        for check in self.checks:
            lines.append(f"  {check.status:<4}  {check.title:<{width}}  {check.clients}")
            lines += [f"        {text}" for text in (*check.problems, *check.notes)]
        return "\n".join(lines)


def verify_dir(directory: str | Path, against: Against | None = None) -> Report:
    """Runs the conformance checks, the hashes of the export manifest, and the comparison with `against`.

    Args:
      against: the model that the directory must hold: a checkpoint directory, parameters (master weights, encoded here as the directory's
        format says), or code hashes computed by training ({"model.layers.0.mlp.experts.gate_up_proj": hex}).

    Raises:
      UsageError: `directory` or `against` is no model directory. Anything wrong inside `directory` is reported instead.
    """
    directory = Path(directory)
    try:
        source = open_unchecked(directory)
    except CorruptError as error:
        return Report(directory, (Check("0 readable files", "all", (str(error),)),))
    checks = [Check("0 readable files", "all")]
    checks += [_run(demand.title, demand.clients, lambda d=demand: d.find(source), not demand.applies(source)) for demand in DEMANDS]
    if tensor_problems(source):
        return Report(directory, tuple(checks))  # values of a wrong set of tensors cannot be compared
    manifest = directory / MANIFEST
    checks.append(_run("10 weights as expected", "this library", lambda: _compare(source, against), against is None))
    checks.append(_run("11 hashes as written", "this library", lambda: _compare_manifest(source), not manifest.is_file()))
    return Report(directory, tuple(checks))


def _run(title: str, clients: str, find: Callable[[], Iterable[str]], skip: bool) -> Check:
    if skip:
        return Check(title, clients, skipped=True)
    try:
        found = list(find())
    except CorruptError as error:
        found = [str(error)]
    return Check(title, clients, tuple(f for f in found if not isinstance(f, Note)), tuple(f for f in found if isinstance(f, Note)))


def _compare(source: SourceCheckpoint, against: Against) -> Iterable[str]:
    if isinstance(against, str | Path):
        against = open_checkpoint(against)
    if isinstance(against, SourceCheckpoint):
        yield from _companion_differences(source.path, against.path)
    elif all(isinstance(value, str) for value in against.values()):
        yield from hash_differences(stored_code_hashes(source), against, "codes")
        return
    yield from value_differences(source, against, _format_of(source))


def _companion_differences(directory: Path, origin: Path) -> Iterable[str]:
    for name in COMPANIONS:
        if (origin / name).is_file() and (not (directory / name).is_file() or (directory / name).read_bytes() != (origin / name).read_bytes()):
            yield f"{name} is not that of {origin}"


def _format_of(source: SourceCheckpoint) -> Format | None:
    """The format that the experts went through: as the manifest says; of foreign directories MXFP4 by the default scale rule."""
    manifest = _manifest(source)
    recorded = manifest.get("bake") or manifest.get("format")
    if recorded and recorded.get("name") != "bf16":
        try:
            fmt = format_from_dict(recorded)
        except ValueError as error:
            raise CorruptError(f"{source.path / MANIFEST}: {error}") from None
        if fmt.export_problem:
            raise CorruptError(f"{source.path / MANIFEST}: {fmt} cannot have been exported: {fmt.export_problem}")
        return fmt
    return {"mxfp4": Mxfp4(), "nvfp4": Nvfp4(), "bf16": None}[source.layout.experts]


def _manifest(source: SourceCheckpoint) -> dict[str, Any]:
    path = source.path / MANIFEST
    return read_json(path) if path.is_file() else {}


def _compare_manifest(source: SourceCheckpoint) -> Iterable[str]:
    recorded = _manifest(source).get("xxh3_128", {})
    if set(recorded) != {"files", "codes", "tensors"}:
        raise CorruptError(f"{source.path / MANIFEST}: xxh3_128 must hold files, codes and tensors")
    keys = list(source.store.infos)
    hashes = in_order((lambda key=key: hash_arrays(source.store.chunks(key)) for key in keys), threads=HASH_THREADS, ahead=2 * HASH_THREADS)
    tensors = dict(zip(keys, hashes))
    yield from hash_differences(tensors, recorded["tensors"], "bytes")
    present = [name for name in recorded["files"] if (source.path / name).is_file()]
    files = {name: hash_arrays([np.fromfile(checked_path(source.path, name), np.uint8)]) for name in present}
    yield from hash_differences(files, recorded["files"], "bytes")
    yield from hash_differences(stored_code_hashes(source), recorded["codes"], "codes")
