"""`gptoss-jax demo` and `recipe`: the table of pass rates."""

import json
import time
from pathlib import Path
from typing import Annotated

import tyro


def demo(output: Path | None = None, seed: int = 0) -> None:
    """Runs the recipe live on gpt-oss-nano: upcast, SFT, QAT in MXFP4 and NVFP4, export, verify, pass rates of the exported files.

    A few minutes on two CPU cores. Under the live table stands the recorded result of the full recipe (more seeds, more rows).

    Args:
        output: directory of the run; default a new one under runs/.
        seed: of data order and of the training conversations.
    """
    from gptoss_jax.training.recipe.config import load_recipe
    from gptoss_jax.training.recipe.rows import DEMO_ROWS

    output = output or Path("runs") / time.strftime("demo-%Y%m%d-%H%M%S")
    start = time.monotonic()
    config = load_recipe(_nano_recipe(), output=output).model_copy(update={"rows": DEMO_ROWS, "seeds": (seed,)})
    _run(config)
    print(f"\nlive, seed {seed}, {time.monotonic() - start:.0f} s; files in {output}")
    _report(output)
    print("Unlike NVIDIA's, B loses nothing to rounding here: its answers are learned with a wide margin; A shows the loss and the recovery.")
    _print_recorded()


def recipe(
    config: Annotated[Path | None, tyro.conf.Positional] = None,
    overrides: Annotated[tuple[str, ...], tyro.conf.Positional] = (),
    /,
    output: Path | None = None,
    report: Path | None = None,
) -> None:
    """Runs all rows, variants and seeds of a recipe file, or goes on where an interrupted run stopped, and writes table, summary, picture and report.

    Where the file has a gate, exports that break it are moved to rejected/ and the exit code is 1.

    Args:
        config: YAML file; default the nano recipe.
        overrides: settings over those of the file, as data.train=mine.jsonl sft.optimizer.learning_rate=1e-5.
        output: directory of the run, over the one in the file.
        report: directory of a finished or interrupted run: only make its table and report again from results.json.
    """
    from gptoss_jax.training.recipe.config import load_recipe

    if config is not None and "=" in config.name:
        config, overrides = None, (str(config), *overrides)
    if report is None:
        recipe_config = load_recipe(config or _nano_recipe(), overrides, output)
        report = Path(recipe_config.output)
        _run(recipe_config)
    _report(report)


def _nano_recipe() -> Path:
    """The recipe that comes with the package."""
    from gptoss_jax.cli.recipes import shipped

    return shipped() / "nano_recipe.yaml"


def _run(config) -> None:
    """Runs the recipe; where its gate fails, the table is shown all the same."""
    from gptoss_jax.cli.processes import one_process
    from gptoss_jax.training.recipe.gate import GateFailed
    from gptoss_jax.training.recipe.run import Recipe

    one_process("a recipe", "sft, qat and export one after the other")
    try:
        Recipe(config).run()
    except GateFailed:
        _report(Path(config.output))
        raise


def _report(directory: Path) -> None:
    """Writes the report and prints its table."""
    from gptoss_jax.training.recipe.report import REPORT, write_report

    results, remarks = write_report(directory)
    print()
    _print_table(results)
    print(f"report: {directory / REPORT}")
    for remark in remarks:
        print(remark)


def _print_table(results) -> None:
    from rich.console import Console

    from gptoss_jax.training.recipe.table import make_table, to_rich

    table = make_table(results)
    console = Console(width=150, soft_wrap=False, highlight=False)
    console.print(to_rich(table))
    console.print(table.legend, markup=False)


def _print_recorded() -> None:
    """The committed result of the full recipe, told apart from live rows by its title."""
    from gptoss_jax.checkpoint.source import NANO
    from gptoss_jax.training.recipe.results import Results

    file = NANO / "recorded.json"
    if not file.is_file():
        return
    record = json.loads(file.read_text())
    print(f"\nrecorded {record['date']} at commit {record['commit']}: {record['command']}")
    _print_table(Results.model_validate({name: record[name] for name in ("tasks", "results")}))
