"""`gptoss-jax init`: configs to start with."""

from pathlib import Path
from typing import Annotated, Literal

import tyro

EVAL_EVERY = 50
SFT = """\
# Fine-tuning of {model}, written by `gptoss-jax init`. Every setting: gptoss-jax sft --config {directory}/sft.yaml --print-config
#   gptoss-jax data inspect {train}                       what the data turn into
#   gptoss-jax sft --config {directory}/sft.yaml --dry-run      checks all but the weights
#   gptoss-jax sft --config {directory}/sft.yaml
# Planned for {plan}.
#   gptoss-jax plan --config {directory}/sft.yaml --device {device} --devices {devices}
model: {model}
output: {directory}/runs/sft
data:
  train: {train}  # .jsonl, .json, .parquet, a directory, or a hub name; one conversation a line: {{"messages": [...]}}
{evaluation}
  row_length: {row_length}  # tokens; conversations share a row
  too_long: error  # or truncate, drop
batch:
  rows: {rows}  # of one optimizer step, on all devices together
  accumulation: {accumulation}  # microbatches of a step: more take less memory and give the same result
epochs: 1  # or steps
optimizer:
  learning_rate: {sft_rate}{compact}
remat: {remat}  # computed again in the backward pass: layer (least memory), products, none
eval_every: {eval_every}  # steps
checkpoint_every: 200
mesh: {mesh}  # devices along each axis
"""
COMPACT_LINES = """
  first_moment: int8  # float32 state does not fit here: bfloat16 masters, 8-bit residual and first moment, factored second moment
  second_moment: factored
  master_residual: int8
master_dtype: bfloat16"""
QAT = """\
# Quantization-aware training in {format} after sft.yaml: the same data, the learning rate that NVIDIA's README advises, a fresh optimizer.
#   gptoss-jax qat --config {directory}/qat.yaml
#   gptoss-jax export {directory}/runs/qat {directory}/out --format {format}
#   gptoss-jax verify {directory}/out --against {directory}/runs/qat
#   gptoss-jax report {directory}/runs/sft {directory}/runs/qat
extends: sft.yaml
model: {directory}/runs/sft
output: {directory}/runs/qat
optimizer:
  learning_rate: {qat_rate}
quant:
  format: {format}
"""
RECIPE = """\
# Both stages and their comparison: original, fine-tuned, fine-tuned and rounded, QAT; each row is measured on its exported files.
#   gptoss-jax recipe {directory}/recipe.yaml
# The table has a column per task, a YAML file each: task.yaml is a first one, `gptoss-jax recipes ls` lists more to copy.
model: {model}
output: {directory}/runs/recipe
data:
  train: {train}
{evaluation}
  row_length: {row_length}
tasks:
  - {{file: task.yaml, title: answers as the reference}}
rows: [original, sft, sft_ptq, qat_{format}]
seeds: [0]  # with several the table has ranges
sft: {sft_stage}
qat: {qat_stage}
"""
TASK = """\
# A column of the recipe's table: the share of held-out conversations whose answer is that of the reference.
name: reference
scorer: exact
"""


def init(
    directory: Annotated[Path, tyro.conf.Positional],
    model: str = "openai/gpt-oss-20b",
    data: str = "train.jsonl",
    eval: str | None = None,
    device: str = "h200",
    devices: int = 8,
    row_length: int = 4096,
    format: Literal["mxfp4", "nvfp4"] = "mxfp4",
) -> None:
    """Writes sft.yaml, qat.yaml, recipe.yaml and task.yaml into a directory, with the layout that `gptoss-jax plan` finds for the hardware.

    Args:
        directory: where to; existing files are not overwritten.
        model: HF directory, hub id, or training checkpoint.
        data: conversations to train on.
        eval: held-out conversations; default a tenth of the data.
        device: a100, rtx4090, h100, h200, b200 or gb200.
        devices: how many.
        row_length: tokens of a row.
        format: of the quantization-aware training.
    """
    import yaml

    from gptoss_jax.errors import UsageError
    from gptoss_jax.training.plan import find_device
    from gptoss_jax.training.plan.start import COMPACT, QAT_RATE, SFT_RATE, start

    templates = {"sft.yaml": SFT, "qat.yaml": QAT, "recipe.yaml": RECIPE, "task.yaml": TASK}
    for name in templates:
        if (directory / name).exists():
            raise UsageError(f"{directory / name} exists already")
    found = start(model, find_device(device), devices, row_length)
    inline = lambda value: yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10_000).removesuffix("...\n").strip()
    stage = {"epochs": 1, "batch": {"rows": found.train.batch.rows, "accumulation": found.train.batch.accumulation}, "remat": found.train.remat}
    stage |= {"eval_every": EVAL_EVERY, "mesh": found.mesh} | (COMPACT if found.compact else {})
    of_rate = lambda rate: inline({**stage, "optimizer": {"learning_rate": rate, **stage.get("optimizer", {})}})
    sft_rate, qat_rate = found.rate(SFT_RATE), found.rate(QAT_RATE)
    words = {
        "model": inline(model), "directory": directory, "train": inline(data), "row_length": row_length, "format": format,
        "evaluation": f"  eval: {inline(eval)}" if eval else "  eval_fraction: 0.1  # held out of `train`; or eval: FILE",
        "plan": found.describe(), "device": device, "devices": devices, **stage["batch"], "sft_rate": sft_rate, "qat_rate": qat_rate,
        "compact": COMPACT_LINES * found.compact, "remat": found.train.remat, "eval_every": EVAL_EVERY, "mesh": inline(found.mesh),
        "sft_stage": of_rate(sft_rate), "qat_stage": of_rate(qat_rate),
    }  # fmt: skip
    directory.mkdir(parents=True, exist_ok=True)
    for name, template in templates.items():
        (directory / name).write_text(template.format(**words), encoding="utf-8")
        print(directory / name)
    print(f"planned for {found.describe()}\nnext: gptoss-jax sft --config {directory / 'sft.yaml'} --dry-run")
