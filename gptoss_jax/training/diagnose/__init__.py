"""Does a fine-tuned model need quantization-aware training, or is rounding it enough? `diagnose` compares weights, measures loss, and says so."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from gptoss_jax.checkpoint import orbax_store
from gptoss_jax.checkpoint.hf_config import MANIFEST
from gptoss_jax.checkpoint.source import NANO, open_checkpoint
from gptoss_jax.checkpoint.store import read_json
from gptoss_jax.data import load_rows
from gptoss_jax.errors import UsageError
from gptoss_jax.formats import Format
from gptoss_jax.training.config import DataConfig, parse
from gptoss_jax.training.diagnose.gap import Gap, loss_gap
from gptoss_jax.training.diagnose.report import Diagnosis, plot_layers, table
from gptoss_jax.training.diagnose.weights import Change, weight_changes
from gptoss_jax.training.held_out import held_out_rows
from gptoss_jax.training.stage import data_pipeline

__all__ = ["Change", "Diagnosis", "Gap", "diagnose", "loss_gap", "plot_layers", "recorded_base", "table", "weight_changes"]


def diagnose(
    checkpoint: str | Path,
    fmt: Format,
    *,
    base: str | None = None,
    data: str | Path | None = None,
    dtype: Any = "float32",
    limit: int = 256,
    note: Callable[[str], None] = lambda text: None,
) -> Diagnosis:
    """Compares the expert weights of a fine-tuned model with those of its base, and its held-out loss with that of its rounded copies.

    Args:
      base: default: what the checkpoint says it was trained from.
      data: held-out conversations; default: the run's own (`data.eval` or `data.eval_fraction`), or nano's development set where the base is nano.
      limit: conversations at most, spread evenly over the file.

    Raises:
      UsageError: no base or no data at the given place; models of different shape.
      CorruptError: damaged files.
    """
    run, quant = _record(checkpoint)
    base = base or recorded_base(checkpoint)
    settings = parse(run).data if run else DataConfig()
    if data is not None:
        rows, name = load_rows(data).rows, str(data)
    elif (rows := held_out_rows(settings)) is not None:
        name = "the run's held-out set"
    elif Path(base).name == NANO.name:
        rows, name = load_rows(NANO / "tasks" / "dev.jsonl").rows, "nano's development set"
    else:
        rows, name = [], None
    rows = rows[:: -(-len(rows) // limit)] if rows else rows
    note("comparing weights")
    changes = weight_changes(checkpoint, base, fmt)
    gap = loss_gap(checkpoint, fmt, rows, dtype, system=data_pipeline(settings, None).system, note=note) if rows else None
    trained_for = ", ".join(sorted({rule["format"]["name"] for rule in quant["rules"]})) if quant else None
    return Diagnosis(str(checkpoint), str(base), fmt.name, changes, gap, name, trained_for)


def _record(checkpoint: str | Path) -> tuple[Any, Any]:
    """(resolved run config, quantization policy) of a training checkpoint; None, None for files of other kinds."""
    found = orbax_store.locate(checkpoint)
    if found is None:
        return None, None
    meta = orbax_store.read_meta(*found)
    return meta.run, meta.quant


def recorded_base(checkpoint: str | Path) -> str:
    """The model that a checkpoint says it was trained from.

    Raises:
      UsageError: it does not say, or that model is not where it was.
    """
    if orbax_store.locate(checkpoint) is not None:
        recorded = (_record(checkpoint)[0] or {}).get("model")
    else:
        manifest = open_checkpoint(checkpoint).path / MANIFEST
        recorded = ((read_json(manifest).get("provenance") or {}).get("base") or {}).get("path") if manifest.is_file() else None
    if recorded is None:
        raise UsageError(f"{checkpoint} does not say which model it was trained from: give --base")
    try:
        if orbax_store.locate(recorded) is None:
            open_checkpoint(recorded)
    except UsageError as error:
        raise UsageError(f"{checkpoint} was trained from {recorded!r}, which cannot be opened ({error}): give --base") from None
    return recorded
