"""`gptoss-jax diagnose`: does a fine-tuned checkpoint need quantization-aware training?"""

import json
from pathlib import Path
from typing import Annotated, Literal

import tyro


def diagnose(
    checkpoint: Annotated[str, tyro.conf.Positional],
    base: str | None = None,
    data: Path | None = None,
    format: Literal["mxfp4", "nvfp4"] = "mxfp4",
    dtype: Literal["float32", "bfloat16"] = "float32",
    limit: int = 256,
    out: Path | None = None,
    plot: Path | None = None,
) -> None:
    """Says whether rounding a fine-tuned model to 4 bits would undo its fine-tuning: what rounding does to the expert weights, and what it costs
    on held-out conversations, all layers together and each alone.

    Args:
        checkpoint: SFT run, training checkpoint, HF directory or hub id.
        base: the model that it was fine-tuned from; default: what the checkpoint says.
        data: held-out conversations; default: those of the run (data.eval), for nano its development set. Without any, weights alone are compared.
        format: number format of the planned export.
        dtype: of activations, and of weights that are stored encoded.
        limit: conversations that are read at most (the first ones).
        out: also write all numbers as JSON.
        plot: also draw the layers as a PNG (needs matplotlib).
    """
    from rich.console import Console

    from gptoss_jax.formats import get_format
    from gptoss_jax.training.diagnose import diagnose as run
    from gptoss_jax.training.diagnose import plot_layers, table

    console = Console(width=150, highlight=False)
    progress = Console(stderr=True, highlight=False)
    with progress.status("comparing weights") as status:
        found = run(checkpoint, get_format(format), base=base, data=data, dtype=dtype, limit=limit, note=lambda text: status.update(text))
    console.print(table(found))
    console.print(found.describe(), markup=False)
    if out is not None:
        out.write_text(json.dumps(found.to_dict(), indent=1) + "\n", encoding="utf-8")
    if plot is not None and not plot_layers(found, plot):
        console.print(f"{plot} was not drawn: matplotlib is not installed (pip install 'gptoss_jax[plots]')", markup=False)
