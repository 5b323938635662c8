"""`gptoss-jax lab probe`: what a number format does to a model."""

from pathlib import Path
from typing import Annotated, Any, Literal

import tyro


def probe(
    model: Annotated[str, tyro.conf.Positional],
    data: Path | None = None,
    format: str = "mxfp4",
    estimators: tuple[str, ...] = (),
    probes: tuple[str, ...] = ("weights", "gradients", "descent", "smoothed", "routing", "export"),
    batches: int = 4,
    rows: int = 16,
    row_length: int = 128,
    seeds: int = 1,
    steps: tuple[float, ...] = (0.002, 0.01, 0.05),
    directions: tuple[str, ...] = ("gradient", "sign"),
    per_layer: bool = False,
    radius: float = 0.1,
    draws: int = 32,
    max_experts: int | None = None,
    only: str = "*",
    dtype: Literal["float32", "bfloat16"] = "float32",
    seed: int = 0,
    out: Path | None = None,
    json: bool = False,
) -> None:
    """What a number format does to the expert weights, gradients, routing and predictions of a model, layer by layer and expert by expert.

    Formats and estimators may carry options: mxfp4:scale_rule=even, dge:k=3:c=2. What the columns mean: gptoss_jax/lab/probes/*.py.

    Args:
        model: any checkpoint, or "nano".
        data: conversations (.jsonl, .json, .parquet); default for nano its development set. Without any, weights alone are looked at.
        format: number format of the expert weights.
        estimators: gradient estimators to compare, separated by spaces or commas; default all.
        probes: which to run.
        batches: different batches for the gradients; the other probes take the first.
        rows: of a batch.
        row-length: tokens of a row; longer conversations are cut.
        seeds: roundings of each batch by a format that rounds at random.
        steps: along each gradient, over the root mean square of the weights: what the rounded loss does, over what the gradient predicts (ρ).
        directions: gradient: along it; sign: all weights by the same amount, as Adam's first step.
        per-layer: also move each layer alone.
        radius: of the smoothed loss, likewise.
        draws: random directions of the smoothed loss.
        max-experts: of each matrix, for the statistics of weights; default all.
        only: pattern of the expert projections that gradients are taken of, as "*down_proj".
        dtype: of activations.
        seed: of rows, random directions and random rounding.
        out: directory for all rows, as .parquet and .jsonl.
        json: print the rows of the whole model and of layers as JSON instead of tables.
    """
    from rich.console import Console

    from gptoss_jax.checkpoint.source import NANO
    from gptoss_jax.formats import get_format
    from gptoss_jax.lab.probes.run import ProbeSettings, as_record, run_probes, write_found
    from gptoss_jax.quant.estimators import estimator_names, get_estimator

    fmt = _with_options(format, get_format)
    found_estimators = [_with_options(name, get_estimator) for names in estimators or estimator_names() for name in names.split(",") if name]
    settings = ProbeSettings(probes, batches, rows, row_length, seeds, steps, directions, per_layer, radius, draws, max_experts, only, dtype, seed)
    if data is None and model == "nano":
        data = NANO / "tasks" / "dev.jsonl"
    with Console(stderr=True).status("starting") as status:
        found = run_probes(model, fmt, found_estimators, data, settings, status.update)
    if out is not None:
        write_found(found, out, as_record(model, fmt, found_estimators, data, settings))
    if json:
        _print_json(found)
    else:
        _print_tables(found, out, data)


def _with_options(text: str, make: Any) -> Any:
    """`name:key=value:key=value` -> make(name, key=value, ...), values as YAML reads them."""
    import yaml

    from gptoss_jax.errors import UsageError

    name, *options = text.split(":")
    pairs = dict(option.partition("=")[::2] for option in options)
    try:
        return make(name, **{key: yaml.safe_load(value) for key, value in pairs.items()})
    except (TypeError, ValueError, yaml.YAMLError) as error:
        raise UsageError(f"{text}: {error}") from None


def _print_json(found: dict[str, list[dict[str, Any]]]) -> None:
    import json

    from gptoss_jax.lab.probes.rows import plain

    rows = {name: [row for row in rows if row["expert"] is None] for name, rows in found.items()}
    print(json.dumps({name: [{key: plain(value) for key, value in row.items()} for row in part] for name, part in rows.items()}, indent=1))


def _print_tables(found: dict[str, list[dict[str, Any]]], out: Path | None, data: Path | None) -> None:
    from rich.console import Console

    from gptoss_jax.lab.probes.tables import sentences, tables

    console = Console(width=150, highlight=False)
    for table in tables(found):
        console.print(table)
    for line in sentences(found):
        console.print(line, markup=False)
    if data is None:
        console.print("No conversations (--data): gradients, routing and export were not looked at.")
    if out is not None:
        console.print(f"All rows: {', '.join(f'{out}/{name}.parquet' for name in found)}, and the same as .jsonl", markup=False)
