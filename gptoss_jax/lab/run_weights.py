"""What rounding does to the weights of the last checkpoint of runs, as part of their report."""

from collections.abc import Callable, Sequence
from pathlib import Path

from gptoss_jax.formats import Format, Mxfp4
from gptoss_jax.lab.probes.rows import Row, write_rows
from gptoss_jax.lab.probes.weights import probe_weights
from gptoss_jax.training.recipe.table import Table
from gptoss_jax.training.report.blocks import Block, Cells, Figure, Heading
from gptoss_jax.training.report.runs import Run
from gptoss_jax.training.stage import number_format
from gptoss_jax.training.yaml_config import load_config

ROWS, PICTURE = "weights", "sqnr.png"


def weight_blocks(runs: Sequence[Run], out: Path, max_experts: int | None, tell: Callable[[str], None]) -> list[Block]:
    """Quantization error by layer as a table, by expert as heat maps; all rows go to `out` as weights-RUN.parquet and .jsonl.

    Every run is rounded to the format that it trains with, those without one to MXFP4.

    Raises:
      UsageError: a run without a checkpoint.
    """
    found: dict[str, list[Row]] = {}
    for run in runs:
        tell(run.name)
        fmt = format_of(run)
        found[f"{run.name}, {fmt.name}"] = rows = probe_weights(run.path, fmt, max_experts=max_experts, report=tell)
        write_rows(rows, out / f"{ROWS}-{run.name.replace('/', '-')}")
    blocks: list[Block] = [Heading("Quantization error of the weights"), Cells(_table(found))]
    try:
        from gptoss_jax.lab.probe_plots import sqnr
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        return blocks
    (out / "plots").mkdir(parents=True, exist_ok=True)
    return [*blocks, Figure("SQNR by layer and expert, dB", sqnr(found, out / "plots" / PICTURE))]


def format_of(run: Run) -> Format:
    quant = load_config(run.path / "config.yaml").quant if run.config else None
    return number_format(quant) if quant else Mxfp4()


def _table(found: dict[str, list[Row]]) -> Table:
    """SQNR of layers, and of the worst expert of each."""
    header, lines = [""], {}
    for name, rows in found.items():
        header += [name, "worst expert"]
        for row in (row for row in rows if row["expert"] is None):
            layer = row["layer"]
            experts = [r["sqnr_db"] for r in rows if r["expert"] is not None and layer in (None, r["layer"]) and r["sqnr_db"] is not None]
            cells = lines.setdefault("all layers" if layer is None else f"layer {layer}", {})
            cells[name] = [_decibel(row["sqnr_db"]), _decibel(min(experts, default=None))]
    body = [[title, *(cell for name in found for cell in cells.get(name, ["", ""]))] for title, cells in lines.items()]
    return Table(header, body, "SQNR in dB: 10 log10(sum x² / sum (Q(x) - x)²) over expert weights; exact: rounding changes nothing.")


def _decibel(value: float | None) -> str:
    return "exact" if value is None else f"{value:.2f}"
