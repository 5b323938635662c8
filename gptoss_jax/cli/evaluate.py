"""`gptoss-jax eval`: pass rates and loss of any checkpoint."""

import json
from pathlib import Path
from typing import Annotated, Literal

import tyro


def evaluate(
    checkpoint: Annotated[str, tyro.conf.Positional],
    split: Literal["dev", "final"] = "dev",
    data: Path | None = None,
    dtype: Literal["float32", "bfloat16"] = "float32",
    row_length: int = 128,
    failures: int = 3,
    out: Path | None = None,
) -> None:
    """Exact-match pass rates on the nano tasks, or on conversations of your own; loss per trained token.

    A row passes when greedy decoding would give exactly its answer. A QAT checkpoint is evaluated through its quantization.

    Args:
        checkpoint: HF directory, OpenAI's original layout, training checkpoint, hub id, or "nano".
        split: which of the two files of the nano tasks; settings are chosen on dev.
        data: JSONL or Parquet of conversations instead; a column "task" groups them.
        dtype: of weights and activations.
        row_length: tokens of a packed row.
        failures: failing rows to show per task.
        out: also write the result as JSON.
    """
    import jax.numpy as jnp

    from gptoss_jax.checkpoint.models import load_model
    from gptoss_jax.checkpoint.source import NANO
    from gptoss_jax.data.harmony import load_tokenizer
    from gptoss_jax.data.sources import load_rows
    from gptoss_jax.evaluation.pass_rate import make_evaluation_set, score
    from gptoss_jax.evaluation.predict import make_predict

    model = load_model(checkpoint, jnp.dtype(dtype))
    rows = load_rows(data or NANO / "tasks" / f"{split}.jsonl").rows
    evaluation_set = make_evaluation_set(rows, load_tokenizer(model.directory), row_length, 16)
    predict = make_predict(model.config, jnp.dtype(dtype), model.expert_quant(jnp.dtype(dtype)))
    scores = score(predict(model.params), evaluation_set)
    result = {}
    for task in dict.fromkeys(row.get("task", "all") for row in rows):
        part = scores.select(task=task) if any("task" in row for row in rows) else scores
        rate = part.pass_rate()
        result[task] = {"passed": rate.passed, "total": rate.total, "low": rate.low, "high": rate.high, "loss": part.mean_loss()}
        print(f"{task:<8} {rate}  ({rate.passed} of {rate.total}), loss {part.mean_loss():.4f}")
        for row in part.failures(failures):
            print(f"    failed: {row['messages'][-2]['content']!r} -> {row['messages'][-1]['content']!r}")
    print(f"loss over all {int(scores.num_trained.sum())} trained tokens: {scores.mean_loss():.4f}")
    if out is not None:
        out.write_text(json.dumps({"checkpoint": str(checkpoint), "tasks": result, "loss": scores.mean_loss()}, indent=1) + "\n")
