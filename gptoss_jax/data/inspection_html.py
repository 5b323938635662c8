"""An inspection as one HTML page: counts, a drawn histogram, and samples token by token."""

from html import escape

from gptoss_jax.data.inspection import InspectedSet, Inspection, Sample, Shown
from gptoss_jax.data.report import QUANTILES, SetReport
from gptoss_jax.web_page import document

MAX_TOKENS = 5000  # of a sample
WIDTH, HEIGHT, MARGIN = 720, 200, 28

STYLE = """
.on { background: var(--on); border-bottom: 2px solid var(--edge) } .special { color: var(--soft); font-weight: 600 }
.on.special { color: inherit } .out { opacity: .45; text-decoration: line-through }
svg text { fill: var(--soft); font: 11px system-ui, sans-serif } svg rect { fill: var(--bar) } svg line { stroke: var(--line) }
"""


def page(inspection: Inspection, title: str) -> str:
    """The whole document."""
    parts = [f"<h1>{escape(title)}</h1>"]
    if inspection.warnings:
        parts.append('<ul class="warn">' + "".join(f"<li>{escape(warning)}</li>" for warning in inspection.warnings) + "</ul>")
    for s in inspection.sets:
        parts += [f"<h2>{escape(s.report.name)}</h2>", _table(s.report), "<h3>Tokens of a document</h3>", _histogram(s)]
        parts.append('<h3>Samples</h3><p>Hover over a token for its id; <span class="on">trained tokens</span> are marked.</p>' if s.samples else "")
        parts += [_sample(sample) for sample in s.samples]
    if inspection.problems:
        parts.append("<h2>Rows that cannot be used</h2><pre>" + escape("\n".join(inspection.problems)) + "</pre>")
    return document(title, parts, STYLE)


def _table(r: SetReport) -> str:
    channels = ", ".join(f"{name} {n:,}" for name, n in r.trained_by_channel.items())
    rows = [
        ("conversations in an epoch", f"{r.conversations:,}"),
        ("documents", f"{r.documents:,}"),
        ("tokens", f"{r.tokens:,}"),
        ("trained tokens", f"{r.trained:,} ({r.trained_share:.1%})"),
        ("by channel", channels or "none"),
        ("length: shortest, " + ", ".join(QUANTILES) + ", longest", ", ".join(f"{n:,}" for n in (r.shortest, *r.quantiles.values(), r.longest))),
        (f"longer than a row of {r.row_length:,}", f"{r.num_longer:,} ({r.too_long})"),
        ("answers that lose their end", f"{r.num_cut_answers:,}"),
        ("documents without a trained token", f"{r.num_untrained:,}"),
        ("repeated conversations", f"{r.num_duplicates:,}"),
        ("rows", f"{r.rows:,}, filled to {r.fill:.1%}"),
    ]
    rows += [(source.path, source.describe().removeprefix(f"{source.path}: ")) for source in r.sources]
    return "<table>" + "".join(f'<tr><th>{escape(name)}</th><td class="n">{escape(value)}</td></tr>' for name, value in rows) + "</table>"


def _histogram(s: InspectedSet) -> str:
    bins, most = len(s.counts), max(1, int(s.counts.max(initial=1)))
    step, room = (WIDTH - 2 * MARGIN) / bins, HEIGHT - 2 * MARGIN
    bars = []
    for i, (low, high, n) in enumerate(zip(s.edges, s.edges[1:], s.counts)):
        height = room * int(n) / most
        bars.append(
            f'<rect x="{MARGIN + i * step:.1f}" y="{HEIGHT - MARGIN - height:.1f}" width="{max(1, step - 2):.1f}" height="{height:.1f}">'
            f"<title>{low:,} to {high - 1:,} tokens: {n:,} documents</title></rect>"
        )
    ticks = "".join(
        f'<text x="{MARGIN + i * step:.1f}" y="{HEIGHT - 10}" text-anchor="middle">{s.edges[i]:,}</text>'
        for i in range(0, bins + 1, max(1, bins // 8))
    )
    base = f'<line x1="{MARGIN}" y1="{HEIGHT - MARGIN}" x2="{WIDTH - MARGIN}" y2="{HEIGHT - MARGIN}"/>'
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="100%" role="img" aria-label="histogram of document lengths">{"".join(bars)}{base}{ticks}'
        f'<text x="{MARGIN}" y="14">documents, at most {most:,} in a bin</text></svg>'
    )


def _sample(sample: Sample) -> str:
    shown = sample.tokens[:MAX_TOKENS]
    spans = "".join(_span(token, sample.cut is not None and i >= sample.cut) for i, token in enumerate(shown))
    more = f"\n... {len(sample.tokens) - len(shown):,} tokens more" if len(shown) < len(sample.tokens) else ""
    return f"<h4>{escape(sample.title)}</h4><pre>{spans}{more}</pre>"


def _span(token: Shown, out: bool) -> str:
    names = [name for name, holds in (("on", token.trained), ("special", token.special), ("out", out)) if holds]
    label = "" if token.label is None else escape(f", learns {token.label}")
    title = " ".join(map(str, token.ids)) + label + (", does not fit into the row" if out else "")
    marks = ' class="' + " ".join(names) + '"' if names else ""
    return f'<span{marks} title="{title}">{escape(token.text)}</span>'
