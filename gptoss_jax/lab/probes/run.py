"""All probes of one model, and where their rows go: a file a probe, and `probe.json` with the settings."""

import dataclasses
import importlib.metadata
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import gptoss_jax
from gptoss_jax.checkpoint.models import load_model
from gptoss_jax.data import Batch, Source, load_tokenizer
from gptoss_jax.data.pipeline import Selected
from gptoss_jax.errors import UsageError
from gptoss_jax.formats import Format
from gptoss_jax.lab.probes.deployed import export_gap
from gptoss_jax.lab.probes.descent import DIRECTIONS, STEPS, probe_descent, probe_smoothed
from gptoss_jax.lab.probes.gradients import named_quantizers, probe_gradients
from gptoss_jax.lab.probes.routing import probe_routing
from gptoss_jax.lab.probes.rows import Row, write_rows
from gptoss_jax.lab.probes.weights import probe_weights
from gptoss_jax.model import abstract_params
from gptoss_jax.quant import Estimator, default_policy
from gptoss_jax.training.config import DataConfig
from gptoss_jax.training.stage import data_pipeline, look_at

PROBES = ("weights", "gradients", "descent", "smoothed", "routing", "export")
Found = dict[str, list[Row]]


@dataclass(frozen=True)
class ProbeSettings:
    """What to measure, on how much.

    Attributes:
      batches, rows, row_length: of the gradients; the other probes look at the first batch.
      seeds: roundings of each batch by a stochastic format.
      steps, directions, per_layer: of descent.
      radius, draws: of the smoothed loss.
      max_experts: of each matrix, for the statistics of weights; None is all.
      only: pattern of the expert projections that gradients are taken of.
    """

    probes: tuple[str, ...] = PROBES
    batches: int = 4
    rows: int = 16
    row_length: int = 128
    seeds: int = 1
    steps: tuple[float, ...] = STEPS
    directions: tuple[str, ...] = DIRECTIONS
    per_layer: bool = False
    radius: float = 0.1
    draws: int = 32
    max_experts: int | None = None
    only: str = "*"
    dtype: str = "float32"
    seed: int = 0

    def __post_init__(self):
        for what, names, known in (("probe", self.probes, PROBES), ("direction", self.directions, DIRECTIONS)):
            if unknown := [name for name in names if name not in known]:
                raise UsageError(f"unknown {what} {unknown[0]!r}; known are {', '.join(known)}")
        for name, least in (("batches", 1), ("rows", 1), ("row_length", 2), ("seeds", 1), ("draws", 2)):
            if getattr(self, name) < least:
                raise UsageError(f"{name} = {getattr(self, name)} must be at least {least}")


def load_batches(data: str | Path, tokenizer: Any, count: int, rows: int, row_length: int, seed: int = 0) -> list[Batch]:
    """Batches of different rows, taken at random from the packed conversations of a file; longer ones are cut.

    Raises:
      UsageError: not enough rows. CorruptError: bad conversations.
    """
    pipeline = data_pipeline(DataConfig(row_length=row_length, too_long="truncate"), tokenizer)
    corpus = pipeline.tokenize([Source(str(data))])
    packed = pipeline.pack(str(data), Selected(corpus, np.arange(len(corpus.source_of)))).rows
    available = len(packed.tokens_BT)
    if available < count * rows:
        raise UsageError(f"{data} makes {available} rows of {row_length} tokens; {count} batches of {rows} rows need {count * rows}")
    order = np.random.default_rng(seed).permutation(available)[: count * rows].reshape(count, rows)
    return [Batch(*(array[np.sort(chosen)] for array in packed)) for chosen in order]


def run_probes(
    model: str | Path,
    fmt: Format,
    estimators: Sequence[str | Estimator],
    data: str | Path | None,
    settings: ProbeSettings = ProbeSettings(),
    report: Callable[[str], None] = lambda text: None,
) -> Found:
    """Rows by probe. Without data only the statistics of the weights; formats that cannot be exported have no rows of "export".

    Raises:
      UsageError, CorruptError: model, data or format that cannot be used, or not together.
    """
    found: Found = {}
    config = look_at(str(model))[0]
    try:
        default_policy(fmt).match(abstract_params(config))
    except ValueError as error:
        raise UsageError(f"{model}: {error}") from None
    if "weights" in settings.probes:
        report("reading weights")
        found["weights"] = probe_weights(model, fmt, max_experts=settings.max_experts, seed=settings.seed, report=report)
    if data is None or not set(settings.probes) - {"weights"}:
        return found
    report("loading the model")
    loaded = load_model(model, jnp.float32)
    batches = load_batches(data, load_tokenizer(loaded.directory), settings.batches, settings.rows, settings.row_length, settings.seed)
    at = (loaded.config, loaded.params)
    options = dict(seed=settings.seed, dtype=settings.dtype, only=settings.only, report=report)
    if "gradients" in settings.probes:
        found["gradients"] = probe_gradients(*at, batches, fmt, estimators, seeds=settings.seeds if fmt.stochastic else 1, **options)
    if "descent" in settings.probes:
        moving = dict(steps=settings.steps, directions=settings.directions, per_layer=settings.per_layer)
        found["descent"] = probe_descent(*at, batches[0], fmt, estimators, **moving, **options)
    if "smoothed" in settings.probes:
        smoothing = dict(radius=settings.radius, draws=settings.draws)
        found["smoothed"] = probe_smoothed(*at, batches[0], fmt, estimators, **smoothing, **options)
    if "routing" in settings.probes:
        report("routing")
        found["routing"] = probe_routing(*at, batches[0], fmt, dtype=settings.dtype)
    if "export" in settings.probes and fmt.export_problem is None:
        report("exporting")
        found["export"] = [export_gap(*at, batches[0], fmt, dtype=settings.dtype)]
    return found


def write_found(found: Found, directory: str | Path, settings: dict[str, Any]) -> None:
    """PROBE.parquet and PROBE.jsonl for each, and `probe.json`: settings and versions."""
    for name, rows in found.items():
        write_rows(rows, Path(directory) / name)
    versions = {"gptoss_jax": gptoss_jax.__version__, "jax": importlib.metadata.version("jax")}
    record = {**settings, "backend": jax.default_backend(), "versions": versions}
    (Path(directory) / "probe.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def as_record(model: str | Path, fmt: Format, estimators: Sequence[Any], data: Any, settings: ProbeSettings) -> dict[str, Any]:
    """Settings as plain values."""
    return {
        "model": str(model), "format": fmt.to_dict(), "estimators": list(named_quantizers(fmt, estimators)),
        "data": None if data is None else str(data), **dataclasses.asdict(settings),
    }  # fmt: skip
