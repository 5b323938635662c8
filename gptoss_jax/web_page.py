"""Pages of HTML in one file that needs nothing else: style and pictures inside, text escaped, light and dark by the reader's setting.

Used by every report of this package; what only one of them needs it adds to `STYLE` itself.
"""

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path

STYLE = """
:root { color-scheme: light dark; --text: #1b1f24; --page: #ffffff; --soft: #5a6470; --line: #d4d9df; --on: #cdeccf; --edge: #1a7f37; --bar: #3b7dd8;
  --warn: #8a5a00 }
@media (prefers-color-scheme: dark) { :root { --text: #e4e8ec; --page: #14181d; --soft: #9aa5b1; --line: #333b44; --on: #1d4527; --edge: #57c96f;
  --bar: #6ea8f0; --warn: #e6b450 } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--text); background: var(--page); max-width: 62em; margin: 2em auto; padding: 0 1em }
table { border-collapse: collapse } td, th { padding: .2em 1em .2em 0; text-align: left; border-bottom: 1px solid var(--line) }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font: 13px/1.7 ui-monospace, monospace; border: 1px solid var(--line); border-radius: 6px;
  padding: .8em }
img { max-width: 100%; background: #fff; border-radius: 6px } .warn { color: var(--warn) } .soft { color: var(--soft) }
"""


def document(title: str, body: Sequence[str], style: str = "") -> str:
    """The whole page. `body` is HTML, `title` is text, `style` comes after `STYLE`."""
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(title)}</title><style>{STYLE}{style}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n' + "\n".join(body) + "\n</body></html>\n"


def table(header: Sequence[str], rows: Sequence[Sequence[str]], numbers: bool = True) -> str:
    """Cells are text; all but the first column stand to the right if they are numbers."""
    mark = lambda i: " class=n" * (numbers and i > 0)
    line = lambda cells, tag: "<tr>" + "".join(f"<{tag}{mark(i)}>{escape(cell)}</{tag}>" for i, cell in enumerate(cells)) + "</tr>"
    return "\n".join(["<table>", *([line(header, "th")] if header else []), *(line(cells, "td") for cells in rows), "</table>"])


def picture(title: str, file: Path) -> str:
    """A PNG, inside the page."""
    data = base64.b64encode(file.read_bytes()).decode()
    return f'<img alt="{escape(title)}" src="data:image/png;base64,{data}">'
