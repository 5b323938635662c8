"""The line a person watches: `step 120/600 | loss 1.234 | gnorm 0.80 | lr 1.0e-05 | 12.3k tok/s | load 1.7 | ETA 0:42`. The load is that of the
busiest expert of any layer, 1 if all have the same.

On a terminal one live line is rewritten and evaluations stay above it; elsewhere (file, CI) plain lines are printed, at most one in 5 seconds.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

PLAIN_SECONDS = 5.0


def _count(x: float) -> str:
    return f"{x / 1e6:.1f}M" if x >= 1e6 else f"{x / 1e3:.1f}k" if x >= 1e3 else f"{x:.0f}"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def format_line(record: dict[str, Any], steps: int) -> str:
    """One line for a metrics record; the ETA counts the remaining steps at the present speed."""
    parts = [f"step {record['step']}/{steps}"]
    if "loss" in record:
        parts += [f"loss {record['loss']:.4f}", f"gnorm {record['grad_norm']:.2f}", f"lr {record['lr']:.1e}"]
        if record["tok_per_s"]:
            parts.append(f"{_count(record['tok_per_s'])} tok/s")
        loads = [load for load in record.get("router/load_max", ()) if load is not None]
        if loads:
            parts.append(f"load {max(loads):.1f}")
        if "eta_s" in record:
            parts.append(f"ETA {_duration(record['eta_s'])}")
    if "eval_loss" in record:
        parts.append(f"eval loss {record['eval_loss']:.4f}")
    parts += [f"{key.removeprefix('task/')} {value:.1%}" for key, value in record.items() if key.startswith("task/") and key.count("/") == 1]
    if record.get("router/dropped"):
        parts.append(f"DROPPED {record['router/dropped']} routed rows")
    if record.get("skipped"):
        parts.append("SKIPPED (not finite)")
    return " | ".join(parts)


class Progress:
    """Shows records as they come. Use as a context. `steps` may be set later, before the first record."""

    def __init__(self, steps: int = 0, console: Console | None = None):
        self.steps = steps
        self.console = console or Console(stderr=True, highlight=False)
        self._live = Live(console=self.console, auto_refresh=False, transient=False) if self.console.is_terminal else None
        self._last = 0.0

    def show(self, record: dict[str, Any]) -> None:
        line = format_line(record, self.steps)
        keep = any(key == "eval_loss" or key.startswith("task/") for key in record) or record.get("skipped") or record["step"] == self.steps
        if self._live is not None:
            if keep:
                self.note(line)
            else:
                self._live.update(Text(line), refresh=True)
        elif keep or time.monotonic() - self._last >= PLAIN_SECONDS:
            self._last = time.monotonic()
            self.note(line)

    def note(self, line: str) -> None:
        """A line that stays."""
        self.console.print(line, markup=False, soft_wrap=True)

    @contextmanager
    def reading(self) -> Iterator[Callable[[int, int], None]]:
        """A function to call with (conversations, tokens) while data are read: one line that is rewritten, on a terminal only."""
        if not self.console.is_terminal:
            yield lambda conversations, tokens: None
            return
        start = time.monotonic()
        with self.console.status("reading") as status:
            yield lambda conversations, tokens: status.update(
                f"reading: {_count(conversations)} conversations, {_count(tokens)} tokens, {_count(tokens / (time.monotonic() - start))} tok/s"
            )

    def __enter__(self) -> "Progress":
        if self._live is not None:
            self._live.__enter__()
        return self

    def __exit__(self, *error) -> None:
        if self._live is not None:
            self._live.__exit__(*error)
