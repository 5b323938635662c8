"""The table of a recipe: its cells are made once, for terminal, Markdown and README alike."""

from collections.abc import Callable
from typing import NamedTuple

from rich.table import Table as RichTable
from rich.text import Text

from gptoss_jax.training.recipe.results import Measured, Results, Spread, kl_spread, loss_spread, pass_spread
from gptoss_jax.training.recipe.rows import NVIDIA_20B

LEGEND = (
    "Pass rates in %, every row measured on its exported files, loaded again. (a-b): range over seeds around their mean; [a-b]: 95 % interval of one "
    "seed. Loss in nats per trained token of the held-out conversations."
)
KL_LEGEND = "KL: from the original to the row, nats per trained token of the guard conversations."
NVIDIA_LEGEND = "NVIDIA 20b: gpt-oss-20b in NVIDIA's recipe; other data and another model, for orientation."


class Table(NamedTuple):
    header: list[str]
    rows: list[list[str]]
    legend: str


def cell(spread: Spread | None, digits: int) -> str:
    """`82.4 (80.0-85.8)` over seeds, `80.0 [76.3-83.3]` for one, the mean alone where there is no spread, nothing where nothing was measured."""
    if spread is None:
        return ""
    mean, low, high = (f"{value:.{digits}f}" for value in spread[:3])
    if low == high:
        return mean
    return f"{mean} ({low}-{high})" if spread.of_seeds else f"{mean} [{low}-{high}]"


def make_table(results: Results) -> Table:
    """All cells as text. Columns of KL and of NVIDIA's numbers are there only where the recipe has them."""
    with_kl = any(measured.kl is not None for measured in results.results)
    references = [column.nvidia for column in results.tasks.values() if column.nvidia]
    columns: list[tuple[str, Callable[[list[Measured]], str]]] = [("", lambda seeds: results.label(seeds[0]))]
    columns += [(column.title, lambda seeds, task=task: cell(pass_spread(seeds, task), 1)) for task, column in results.tasks.items()]
    columns.append(("validation loss", lambda seeds: cell(loss_spread(seeds), 4)))
    if with_kl:
        columns.append(("KL to original", lambda seeds: cell(kl_spread(seeds), 4)))
    if references:
        columns.append(("NVIDIA 20b", lambda seeds: " / ".join(str(NVIDIA_20B[task].get(seeds[0].row, "")) for task in references).strip(" /")))
    legend = [LEGEND] + [KL_LEGEND] * with_kl + [NVIDIA_LEGEND] * bool(references)
    return Table([title for title, _ in columns], [[make(seeds) for _, make in columns] for seeds in results.lines], " ".join(legend))


def to_markdown(table: Table) -> str:
    """A GitHub table; bars in titles are escaped."""
    line = lambda cells: "| " + " | ".join(text.replace("|", "\\|") for text in cells) + " |"
    return "\n".join([line(table.header), "|" + "---|" * len(table.header), *map(line, table.rows)]) + "\n"


def to_rich(table: Table) -> RichTable:
    """For the terminal."""
    out = RichTable(pad_edge=False)
    for title in table.header:
        out.add_column(title, justify="left" if not title else "right")
    for row in table.rows:
        out.add_row(*map(Text, row))  # not as markup, which brackets would be
    return out
