"""What a recipe measured, as it lies in `results.json`: enough to make the table again without training."""

import os
from pathlib import Path
from typing import NamedTuple

from pydantic import ConfigDict, ValidationError

from gptoss_jax.errors import CorruptError, UsageError
from gptoss_jax.training.config import Section
from gptoss_jax.training.recipe.rows import ROWS, NvidiaTask, RowName

RESULTS = "results.json"


class Column(Section):
    """A task of the table."""

    title: str
    # the task of NVIDIA's table that stands for the same question
    nvidia: NvidiaTask | None = None


class Measured(Section):
    """One row of one seed and variant. A row that several variants share is there once, under the first of them; the original is of none ("").

    Attributes:
      pass_rates: passed, total and a 95 % interval of the rate, per task.
      loss: nats per trained token of the held-out conversations.
      steps_trained: optimizer steps since the base.
      kl: mean KL(base || row) in nats per trained token of the guard conversations; None without them.
    """

    model_config = ConfigDict(ser_json_inf_nan="constants", allow_inf_nan=True)  # a loss that is not finite stays what it is

    row: RowName
    seed: int
    variant: str = ""
    pass_rates: dict[str, tuple[int, int, float, float]]
    loss: float
    steps_trained: int
    kl: float | None = None

    def rate(self, task: str) -> float:
        return self.pass_rates[task][0] / self.pass_rates[task][1]

    @property
    def key(self) -> tuple[str, str, int]:
        return self.row, self.variant, self.seed


class Spread(NamedTuple):
    """A mean with its extremes: over seeds, or of one seed's 95 % interval (`of_seeds` False). A loss of one seed has no spread."""

    mean: float
    low: float
    high: float
    of_seeds: bool


class Results(Section):
    """All that a recipe measured, in the order of its table."""

    model_config = ConfigDict(ser_json_inf_nan="constants")

    tasks: dict[str, Column]
    results: tuple[Measured, ...]

    @property
    def lines(self) -> list[list[Measured]]:
        """The seeds of every (row, variant)."""
        lines: dict[tuple[str, str], list[Measured]] = {}
        for measured in self.results:
            lines.setdefault((measured.row, measured.variant), []).append(measured)
        return list(lines.values())

    def label(self, measured: Measured) -> str:
        """Of a line: the variant is named where the row has several."""
        variants = {other.variant for other in self.results if other.row == measured.row}
        return ROWS[measured.row].label + (f", {measured.variant}" if len(variants) > 1 else "")


def pass_spread(seeds: list[Measured], task: str) -> Spread:
    """Pass rate in %."""
    rates = [100 * measured.rate(task) for measured in seeds]
    if len(rates) == 1:
        _, _, low, high = seeds[0].pass_rates[task]
        return Spread(rates[0], 100 * low, 100 * high, False)
    return _over(rates)


def loss_spread(seeds: list[Measured]) -> Spread:
    return _over([measured.loss for measured in seeds])


def kl_spread(seeds: list[Measured]) -> Spread | None:
    """None where a seed has no KL."""
    values = [measured.kl for measured in seeds if measured.kl is not None]
    return _over(values) if len(values) == len(seeds) else None


def _over(values: list[float]) -> Spread:
    return Spread(sum(values) / len(values), min(values), max(values), len(values) > 1)


def read_results(directory: str | Path) -> Results:
    """`results.json` of a recipe's directory.

    Raises:
      UsageError: there is none.
      CorruptError: it is not what a recipe writes.
    """
    file = Path(directory) / RESULTS
    if not file.is_file():
        raise UsageError(f"{directory}: no {RESULTS}, so this is no directory of a recipe")
    try:
        return Results.model_validate_json(file.read_text(encoding="utf-8"))
    except (ValidationError, UnicodeDecodeError) as error:
        first = error.errors()[0] if isinstance(error, ValidationError) else {"loc": (), "msg": "not UTF-8"}
        raise CorruptError(f"{file}: {'.'.join(map(str, first['loc'])) or 'the file'}: {first['msg']}") from None


def write_atomic(file: Path, text: str) -> None:
    """The file has its old content or the new one, whatever interrupts."""
    temporary = file.with_name(f".{file.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, file)
