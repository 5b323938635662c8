"""`gptoss-jax report`: a page about runs."""

from pathlib import Path
from typing import Annotated

import tyro


def report(
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional],
    out: Path | None = None,
    weights: bool = False,
    max_experts: int | None = None,
) -> None:
    """Writes report.html (one file with everything inside), report.md with plots/, and metrics.csv; prints the table of final values.

    Curves of all metrics, pass rates, load and, on request, quantization error of every expert, steps left out, samples, settings and environment.
    Several runs are drawn over each other, and of their settings the page shows what differs. Works beside a run that goes on.

    Args:
        runs: run directories, or directories that hold some, as that of a recipe.
        out: directory of the report; default RUN/report of a single run, ./report of several.
        weights: also round the expert weights of the last checkpoints to the format of each run (MXFP4 where it has none) and show the error.
        max_experts: of each matrix, for --weights; default all.
    """
    from rich.console import Console

    from gptoss_jax.errors import UsageError
    from gptoss_jax.training.recipe.table import to_rich
    from gptoss_jax.training.report.page import write_report
    from gptoss_jax.training.report.runs import read_runs
    from gptoss_jax.training.run_dir import REPORT

    if not runs:
        raise UsageError("give one or more run directories, as `gptoss-jax report runs/sft runs/qat`")
    found = read_runs(runs)
    out = out or (found[0].path if len(found) == 1 else Path(".")) / REPORT
    blocks = []
    if weights:
        from gptoss_jax.lab.run_weights import weight_blocks

        with Console(stderr=True).status("reading weights") as status:
            blocks = weight_blocks(found, out, max_experts, status.update)
    table, lines = write_report(found, out, blocks)
    Console(width=max(100, 40 + 24 * len(found)), highlight=False).print(to_rich(table))
    print("\n".join(lines))
