"""An inspection on the terminal: trained tokens in green where there is colour, between [[ and ]] elsewhere (a file, a pipe, NO_COLOR)."""

from rich.console import Console
from rich.text import Text

from gptoss_jax.data.inspection import InspectedSet, Inspection, Sample, runs, text_with_label
from gptoss_jax.data.sources import SHOWN_PROBLEMS

BAR = 40
MAX_TOKENS = 600  # of a sample; the HTML page shows more


def print_inspection(inspection: Inspection, console: Console) -> None:
    for s in inspection.sets:
        for line in s.report.describe():
            _line(console, line)
        for line in histogram_lines(s):
            _line(console, line)
        _line(console, "")
    for warning in inspection.warnings:
        _line(console, f"WARNING: {warning}", "yellow")
    for problem in inspection.problems[:SHOWN_PROBLEMS]:
        _line(console, f"  {problem}")
    if len(inspection.problems) > SHOWN_PROBLEMS:
        _line(console, f"  ... and {len(inspection.problems) - SHOWN_PROBLEMS} more: gptoss-jax data validate shows all")
    if any(s.samples for s in inspection.sets):
        coloured = _coloured(console)
        _line(console, f"\nsamples; trained tokens {'in green' if coloured else 'between [[ and ]]'}, special tokens as <|name|>")
    for s in inspection.sets:
        for sample in s.samples:
            print_sample(f"{s.report.name}: {sample.title}", sample, console)


def histogram_lines(s: InspectedSet) -> list[str]:
    """One bar per bin of document lengths."""
    width, most = len(f"{s.edges[-1]:,}"), max(1, s.counts.max(initial=1))
    bars = ["█" * -(-BAR * int(n) // int(most)) for n in s.counts]
    return [f"  {low:>{width},} - {high - 1:>{width},} |{bar:<{BAR}} {n:,}" for low, high, bar, n in zip(s.edges, s.edges[1:], bars, s.counts)]


def print_sample(title: str, sample: Sample, console: Console) -> None:
    end = min(len(sample.tokens), MAX_TOKENS)
    cut = end if sample.cut is None else min(sample.cut, end)
    body = _colour(sample.tokens[:cut]) if _coloured(console) else _bracketed(sample.tokens[:cut])
    if cut < end:
        body.append(f"\n--- the row ends here; {len(sample.tokens) - cut:,} tokens do not fit ---")
    elif end < len(sample.tokens):
        body.append(f"\n... {len(sample.tokens) - end:,} tokens more")
    _line(console, f"\n{title}", "bold")
    console.print(body, soft_wrap=True)


def _colour(tokens) -> Text:
    text = Text()
    for token in tokens:
        text.append(text_with_label(token), "bold green" if token.trained else "dim cyan" if token.special else "")
    return text


def _bracketed(tokens) -> Text:
    return Text("".join(f"[[{text}]]" if trained else text for text, trained in runs(tokens)))


def _coloured(console: Console) -> bool:
    return console.is_terminal and not console.no_color


def _line(console: Console, text: str, style: str = "") -> None:
    console.print(Text(text, style), soft_wrap=True)
