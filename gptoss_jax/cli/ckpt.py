"""`gptoss-jax ckpt ls|show|verify`: the training checkpoints of a run."""

import json
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import tyro


def ls(run: Annotated[Path, tyro.conf.Positional], as_json: Annotated[bool, tyro.conf.arg(name="json")] = False) -> None:
    """Lists the checkpoints of a run: step, age, size on disk, quantization, and the losses recorded at the step.

    Args:
        run: run directory, or directory of checkpoints.
        as_json: print a list of objects instead of a table.
    """
    rows = [_summary(directory, step) for directory, step in _steps(run)]
    if as_json:
        print(json.dumps(rows))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("step", "written", "GB", "quantization", "loss", "eval loss", box=None)
    number = lambda value: "" if value is None else f"{value:.4f}"
    for row in rows:
        losses = number(row["loss"]), number(row["eval_loss"])
        table.add_row(str(row["step"]), row["written"], f"{row['bytes'] / 1e9:.2f}", row["quant"] or "", *losses)
    Console(highlight=False).print(table)


def show(checkpoint: Annotated[Path, tyro.conf.Positional], as_json: Annotated[bool, tyro.conf.arg(name="json")] = False) -> None:
    """Shows one checkpoint: model, settings it was trained with, quantizer, position in the data, and its parameters.

    Args:
        checkpoint: run directory (its latest step), directory of checkpoints, or one step of it.
        as_json: print all that is recorded, as one object.
    """
    from gptoss_jax.checkpoint import orbax_store
    from gptoss_jax.errors import UsageError
    from gptoss_jax.strict_yaml import dump_yaml

    found = orbax_store.locate(checkpoint)
    if found is None:
        raise UsageError(f"{checkpoint}: no training checkpoint there")
    directory, step = found
    meta = orbax_store.read_meta(directory, step)
    params = orbax_store.stored_params(directory, step)
    if as_json:
        shapes = {name: {"shape": list(x.shape), "dtype": str(x.dtype)} for name, x in params.items()}
        print(json.dumps({"step": step, **vars(meta), "params": shapes}))
        return
    from gptoss_jax.quant import QuantPolicy

    row = _summary(directory, step)
    count = sum(x.size for x in params.values())
    print(f"{directory / str(step)}: step {step}, written {row['written']}, {row['bytes'] / 1e9:.2f} GB")
    print(f"{len(params)} arrays, {count:,} parameters, {', '.join(sorted({str(x.dtype) for x in params.values()}))}; from {_source(meta.source)}")
    print(f"codes of {len(meta.code_hashes)} expert matrices are hashed" if meta.code_hashes else "not quantized: no code hashes")
    if meta.quant:
        print(QuantPolicy.from_dict(meta.quant).describe(params))
    if meta.data_state:
        print("next batch: " + ", ".join(f"{key} {value}" for key, value in meta.data_state.items() if key != "fingerprint"))
    if meta.run:
        print(f"\n{dump_yaml(dict(meta.run))}")
    for name, x in params.items():
        print(f"{name:<60} {x.dtype!s:<9} {'x'.join(map(str, x.shape))}")


def verify(checkpoint: Annotated[Path, tyro.conf.Positional]) -> int:
    """Reads every file of the checkpoints and compares it with its hash. Exit code 4 if one is damaged.

    Args:
        checkpoint: run directory or directory of checkpoints (all steps), or one step.
    """
    import sys

    from gptoss_jax.checkpoint import orbax_store
    from gptoss_jax.errors import CorruptError

    damaged = 0
    for directory, step in _steps(checkpoint):
        try:
            orbax_store.verify(directory, step)
            print(f"step {step}: whole")
        except CorruptError as error:
            print(f"step {step}: DAMAGED: {error}", file=sys.stderr)
            damaged += 1
    return CorruptError.exit_code if damaged else 0


def _steps(path: Path) -> Iterator[tuple[Path, int]]:
    """(directory, step) of all checkpoints at a path, or of the one that it is."""
    from gptoss_jax.checkpoint import orbax_store
    from gptoss_jax.errors import UsageError

    found = orbax_store.locate(path)
    if found is None:
        raise UsageError(f"{path}: no training checkpoint there")
    directory, step = found
    steps = [step] if path.resolve() == (directory / str(step)).resolve() else orbax_store.list_steps(directory)
    return ((directory, step) for step in steps)


def _summary(directory: Path, step: int) -> dict[str, Any]:
    from gptoss_jax.checkpoint import orbax_store

    place = orbax_store.step_dir(directory, step)
    meta = orbax_store.read_meta(directory, step)
    formats = sorted({rule["format"]["name"] for rule in meta.quant["rules"]}) if meta.quant else []
    metrics = _metrics(directory.parent / "metrics.jsonl", step)
    return {
        "step": step,
        "written": datetime.fromtimestamp(place.stat().st_mtime).strftime("%Y-%m-%d %H:%M"),
        "bytes": sum(file.stat().st_size for file in place.rglob("*") if file.is_file()),
        "quant": ", ".join(formats) or None,
        **{name: metrics.get(name) for name in ("loss", "eval_loss")},
    }


def _metrics(file: Path, step: int) -> dict[str, Any]:
    """What a run recorded at a step; nothing where there is no such file."""
    if not file.is_file():
        return {}
    records = (json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.endswith("}"))
    return next((record for record in records if record.get("step") == step), {})


def _source(source: Any) -> str:
    """Where the parameters came from, one model after the other."""
    names = []
    while source:
        names.append(f"step {source['step']} of {source['run']}" if "run" in source else str(source.get("path")))
        source = source.get("base")
    return ", from ".join(names) or "no recorded source"


COMMANDS = {"ls": ls, "show": show, "verify": verify}
