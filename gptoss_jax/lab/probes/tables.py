"""What a person reads of the rows of all probes: layers, estimators, and the model in a few lines."""

from collections.abc import Iterable, Mapping, Sequence

from rich.table import Table
from rich.text import Text

from gptoss_jax.lab.probes.descent import AT_W
from gptoss_jax.lab.probes.rows import Row


def tables(found: Mapping[str, Sequence[Row]]) -> list[Table]:
    """Those that the rows suffice for."""
    made = []
    if "weights" in found:
        made.append(_layers(found["weights"], found.get("routing", ())))
    if any(name in found for name in ("gradients", "descent", "smoothed")):
        made.append(_estimators(found))
    if "gradients" in found:
        made.append(_cosines(found["gradients"]))
    return made


def sentences(found: Mapping[str, Sequence[Row]]) -> list[str]:
    """The model as a whole."""
    lines = []
    if "weights" in found and not found["weights"][0]["error2"]:
        lines.append("All weights lie on the grid of this format: rounding changes nothing.")
    if "routing" in found:
        row = found["routing"][0]
        lines.append(
            f"Loss {_number(row['loss'])}, rounded {_number(row['quantized_loss'])}; KL to the unrounded model {_number(row['kl'], '.3g')} nats "
            f"per token, same most probable token at {_number(row['top1_agreement'], '.2%')}."
        )
    for row in found.get("export", ()):
        lines.append(
            f"Exported and loaded again: loss {_number(row['exported_loss'], '.6f')}, gap to the fake-quantized model {row['gap']:g}, "
            f"{row['differing_weights']} expert weights differ."
        )
    return lines


def _layers(weights: Sequence[Row], routing: Sequence[Row]) -> Table:
    flips = {row["layer"]: row for row in routing}
    columns = ["", "SQNR dB", "worst expert", "clipped", "zero", "ties", "near edge", "changed"]
    columns += ["choices moved", "hidden error"] if routing else []
    table = _table(columns)
    for row in (row for row in weights if row["expert"] is None):
        layer = row["layer"]
        experts = [r["sqnr_db"] for r in weights if r["expert"] is not None and layer in (None, r["layer"]) and r["sqnr_db"] is not None]
        cells = [_number(row["sqnr_db"], ".2f", "exact"), _number(min(experts, default=None), ".2f", "exact")]
        cells += [_number(row[name], ".2%") for name in ("clipped", "zero", "tie", "near_edge", "changed")]
        if routing:
            there = flips.get(layer, {})
            cells += [_number(there.get("moved"), ".2%"), _number(there.get("hidden_error"), ".3g")]
        table.add_row(_place(layer), *cells, end_section=layer is None)
    return table


def _estimators(found: Mapping[str, Sequence[Row]]) -> Table:
    """A line for every estimator; `ρ 0.01` is the realised descent along the gradient, `ρ ±0.01` along its signs."""
    whole = {name: [row for row in rows if row["layer"] is None] for name, rows in found.items()}
    names = [name for name in dict.fromkeys(row["estimator"] for rows in whole.values() for row in rows if "estimator" in row) if name != AT_W]
    # (label in the table, estimator, forward pass of the descent)
    lines = [(AT_W + ", no rounding", AT_W, "full"), (AT_W, AT_W, "quantized")] if "descent" in found or "smoothed" in found else []
    lines += [(name, name, "quantized") for name in names]
    moves = list(dict.fromkeys((row["direction"], row["step"]) for row in whole.get("descent", ())))
    against = [row for row in whole.get("gradients", ()) if row["reference"] == "full"]
    columns = ["estimator"] + (["cosine", "norm ratio", "bias²", "variance"] if against else [])
    columns += [f"ρ {'±' * (direction == 'sign')}{step:g}" for direction, step in moves] + (["smoothed", "error"] if "smoothed" in found else [])
    table = _table(columns)
    for label, name, forward in lines:
        cells = []
        if against:
            row = _first(against, estimator=name)
            cells += [_number(row.get(key), ".3g") for key in ("cosine", "norm_ratio", "bias2", "variance_batches")]
        along = [_first(whole["descent"], estimator=name, step=step, direction=direction, forward=forward) for direction, step in moves]
        cells += [_number(row.get("ratio"), ".2f") for row in along]
        if "smoothed" in found:
            row = _first(whole["smoothed"], estimator=name) if forward == "quantized" else {}
            cells += [_number(row.get("ratio"), ".2f"), _number(row.get("ratio_error"), ".2g")]
        table.add_row(Text(label), *cells, end_section=label == AT_W)
    return table


def _cosines(gradients: Sequence[Row]) -> Table:
    """Cosine to the gradient at w, layer by layer; estimators side by side."""
    rows = [row for row in gradients if row["reference"] == "full" and row["expert"] is None]
    names = list(dict.fromkeys(row["estimator"] for row in rows))
    table = _table(["cosine to the gradient at w", *names])
    for layer in dict.fromkeys(row["layer"] for row in rows):
        cells = [_number(_first(rows, estimator=name, layer=layer).get("cosine"), ".3f") for name in names]
        table.add_row(_place(layer), *cells, end_section=layer is None)
    return table


def _table(columns: Iterable[str]) -> Table:
    table = Table(pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(Text(column), justify="right" if number else "left")
    return table


def _first(rows: Iterable[Row], **labels) -> Row:
    return next((row for row in rows if all(row[name] == value for name, value in labels.items())), {})


def _place(layer: int | None) -> str:
    return "all" if layer is None else f"layer {layer}"


def _number(value: float | None, form: str = ".4f", missing: str = "-") -> str:
    return missing if value is None else format(value, form)
