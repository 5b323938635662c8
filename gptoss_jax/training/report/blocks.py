"""What a report consists of, each part written once and shown both as HTML and as Markdown."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby
from pathlib import Path

from gptoss_jax import web_page
from gptoss_jax.training.recipe.table import Table, to_markdown

STYLE = """
body { max-width: 84em } .pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 34em), 1fr)); gap: 1.5em }
figure { margin: 0 } figcaption { font-weight: 600; margin-bottom: .3em } summary { cursor: pointer; margin: .4em 0 } h2 { margin-top: 2em }
td { overflow-wrap: anywhere }
"""


@dataclass(frozen=True)
class Heading:
    text: str

    def html(self) -> str:
        return f"<h2>{escape(self.text)}</h2>"

    def markdown(self, folder: Path) -> str:
        return f"## {self.text}"


@dataclass(frozen=True)
class Text:
    text: str
    warning: bool = False

    def html(self) -> str:
        return f"<p{' class=warn' * self.warning}>{escape(self.text)}</p>"

    def markdown(self, folder: Path) -> str:
        return f"**{self.text}**" if self.warning else self.text


@dataclass(frozen=True)
class Cells:
    """A table; `numbers`: all columns but the first stand to the right."""

    table: Table
    numbers: bool = True

    def html(self) -> str:
        legend = f"<p class=soft>{escape(self.table.legend)}</p>" if self.table.legend else ""
        return web_page.table(self.table.header, self.table.rows, self.numbers) + legend

    def markdown(self, folder: Path) -> str:
        return to_markdown(self.table) + f"\n{self.table.legend}".rstrip()


@dataclass(frozen=True)
class Figure:
    title: str
    file: Path

    def html(self) -> str:
        return f"<figure><figcaption>{escape(self.title)}</figcaption>{web_page.picture(self.title, self.file)}</figure>"

    def markdown(self, folder: Path) -> str:
        return f"![{self.title}]({self.file.relative_to(folder).as_posix()})"


@dataclass(frozen=True)
class Folded:
    """Long text under a line that opens it."""

    title: str
    text: str

    def html(self) -> str:
        return f"<details><summary>{escape(self.title)}</summary><pre>{escape(self.text)}</pre></details>"

    def markdown(self, folder: Path) -> str:
        indented = "\n".join(f"    {line}" for line in self.text.splitlines())
        return f"{self.title}:\n\n{indented}"


Block = Heading | Text | Cells | Figure | Folded


def to_html(title: str, blocks: Sequence[Block]) -> str:
    """The page; figures in a row stand beside each other."""
    body = [f"<h1>{escape(title)}</h1>"]
    for figures, group in groupby(blocks, lambda block: isinstance(block, Figure)):
        parts = [block.html() for block in group]
        body += ['<div class="pictures">', *parts, "</div>"] if figures else parts
    return web_page.document(title, body, STYLE)


def to_text(title: str, blocks: Sequence[Block], folder: Path) -> str:
    """Markdown for a file in `folder`, from where the figures are linked."""
    return "\n\n".join([f"# {title}", *(block.markdown(folder).strip("\n") for block in blocks)]) + "\n"
