"""`gptoss-jax demo` and `recipe`: the table of pass rates."""

import json
import statistics
import time
from pathlib import Path
from typing import Annotated, Any

import tyro


def demo(output: Path | None = None, seed: int = 0) -> None:
    """Runs the recipe live on gpt-oss-nano: upcast, SFT, QAT in MXFP4 and NVFP4, export, verify, pass rates of the exported files.

    A few minutes on two CPU cores. Under the live table stands the recorded result of the full recipe (more seeds, more rows).

    Args:
        output: directory of the run; default a new one under runs/.
        seed: of data order and of the training conversations.
    """
    from gptoss_jax.training.recipe import DEMO_ROWS

    output = output or Path("runs") / time.strftime("demo-%Y%m%d-%H%M%S")
    start = time.monotonic()
    config = _load(None, output).model_copy(update={"rows": DEMO_ROWS, "seeds": (seed,)})
    measured = _run(config)
    print(f"\nlive, seed {seed}, {time.monotonic() - start:.0f} s; files in {output}")
    _print_table(measured)
    _print_recorded()


def recipe(
    config: Annotated[Path | None, tyro.conf.Positional] = None,
    output: Path | None = None,
) -> None:
    """Runs all rows and seeds of a recipe file; goes on where an interrupted run stopped.

    Args:
        config: YAML file; default the nano recipe.
        output: directory of the run, over the one in the file.
    """
    recipe_config = _load(config, output)
    measured = _run(recipe_config)
    print(f"\n{len(recipe_config.seeds)} seeds; {recipe_config.evaluation} evaluation set; {recipe_config.output}/results.json")
    _print_table(measured)


def _load(path: Path | None, output: Path | None):
    """The recipe of a file; the nano recipe comes with the package."""
    from pydantic import ValidationError

    import gptoss_jax
    from gptoss_jax.errors import UsageError
    from gptoss_jax.training.recipe import RecipeConfig
    from gptoss_jax.training.yaml_config import read_yaml

    if path is None:
        package = Path(gptoss_jax.__file__).parent
        path = next(p for p in (package / "configs", package.parent / "configs") if p.is_dir()) / "nano_recipe.yaml"
    values = read_yaml(path) | ({"output": str(output)} if output else {})
    try:
        return RecipeConfig.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        raise UsageError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def _run(config) -> list[Any]:
    from gptoss_jax.cli.processes import one_process

    one_process("a recipe", "sft, qat and export one after the other")
    from gptoss_jax.training.recipe import Recipe

    return Recipe(config).run()


def _print_table(measured: list[Any]) -> None:
    """One line per row: pass rates as mean over seeds, with the interval of a single seed, or the range over several."""
    from rich.console import Console
    from rich.table import Table

    from gptoss_jax.training.recipe import ROWS

    table = Table(title=None, pad_edge=False)
    for column in ("", "A language", "B answered", "H refused", "English kept", "loss", "NVIDIA 20b"):
        table.add_column(column, justify="left" if not column else "right")
    for name in dict.fromkeys(m.row for m in measured):
        seeds = [m for m in measured if m.row == name]
        cells = [_cell(seeds, task) for task in ("A", "B", "H", "Eng")]
        losses = [m.loss for m in seeds]
        loss = f"{statistics.mean(losses):.4f}" + (f" ± {statistics.stdev(losses):.4f}" if len(losses) > 1 else "")
        table.add_row(ROWS[name].label, *cells, loss, ROWS[name].nvidia)
    Console(width=150).print(table)
    print("pass rates in % (95 % interval; over several seeds: mean and range). A: answer in the language asked for; B: harmless request answered;")
    print("H: harmful request still refused; English kept: default answer unchanged. NVIDIA: multilingual / over-refusal of gpt-oss-20b.")
    print("Unlike there, B loses nothing to rounding here: its answers are learned with a wide margin; A shows the loss and the recovery.")


def _cell(seeds: list[Any], task: str) -> str:
    rates = [100 * m.rate(task) for m in seeds]
    if len(rates) == 1:
        _, _, low, high = seeds[0].pass_rates[task]
        return f"{rates[0]:.1f} [{100 * low:.0f}-{100 * high:.0f}]"
    return f"{statistics.mean(rates):.1f} [{min(rates):.1f}-{max(rates):.1f}]"


def _print_recorded() -> None:
    """The committed result of the full recipe, told apart from live rows by its title."""
    from gptoss_jax.checkpoint.source import NANO
    from gptoss_jax.training.recipe import Measured

    file = NANO / "recorded.json"
    if not file.is_file():
        return
    record = json.loads(file.read_text())
    print(f"\nrecorded {record['date']} at commit {record['commit']}: {record['command']}")
    _print_table([Measured.model_validate(entry) for entry in record["results"]])
