"""The held-out conversations that a `data` section means, as rows: exactly those that a training run with it evaluates on."""

from typing import Any

from gptoss_jax.data import load_rows
from gptoss_jax.data.mixture import split_rows
from gptoss_jax.training.config import DataConfig


def held_out_rows(data: DataConfig) -> list[dict[str, Any]] | None:
    """The rows of `data.eval`, or the share of `data.train` that `eval_fraction` holds out; None where it has neither.

    Raises:
      UsageError, CorruptError: the sources cannot be read.
    """
    if data.eval is None and data.eval_fraction is None:
        return None
    sources = data.sources("eval" if data.eval is not None else "train")
    rows = [row for source in sources for row in load_rows(source, skip_bad_rows=data.skip_bad_rows).rows]
    if data.eval is not None:
        return rows
    return [rows[i] for i in split_rows(len(rows), data.eval_fraction, data.split_seed)[1]]
