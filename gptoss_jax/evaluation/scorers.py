"""What is asked of an answer: small rules (row, answer) -> Verdict.

    exact         the answer is the reference, character for character, and ends there (no generation is needed for that on a local model)
    contains      a text, or the text in a column, or the reference, stands in the answer
    regex         a pattern is found in the answer
    number        the last number of the answer is that of the reference or of a column
    language      a channel is written in a language (name, code, or the column that says which)
    refused       the answer refuses / not_refused: it does not
    loss          passes nothing: held-out loss and perplexity of the reference

Rules look at the final channel unless `channel` says otherwise. Functions of the user's: `gptoss_jax.evaluation.scorer_spec`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

from gptoss_jax.errors import RunError, UsageError
from gptoss_jax.evaluation.languages import code_of, identify
from gptoss_jax.evaluation.refusal import refusal_in

Channel = Literal["analysis", "commentary", "final"]
CHANNELS = ("analysis", "commentary", "final")
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")


class Verdict(NamedTuple):
    """Passed or not, and why not."""

    passed: bool
    reason: str = ""


class Scorer(Protocol):
    """`row` is that of the data file with its "messages"; `answer` has analysis, commentary, final (str) and stopped (bool)."""

    def __call__(self, row: Mapping[str, Any], answer: Any) -> Verdict: ...


def reference_of(row: Mapping[str, Any]) -> str:
    """The last assistant message. RunError when the row has none."""
    last = row["messages"][-1]
    if last["role"] != "assistant":
        raise RunError(f"the row {last['content'][:60]!r} has no reference answer, and the scorer needs one")
    return last["content"]


def _text(answer: Any, channel: Channel) -> str:
    return getattr(answer, channel)


def _missing(answer: Any, channel: Channel) -> Verdict | None:
    """The verdict on an answer without the channel."""
    if _text(answer, channel).strip():
        return None
    return Verdict(False, f"no {channel} channel" + ("" if answer.stopped else " before the answer was cut off"))


def _expected(row: Mapping[str, Any], column: str | None) -> str:
    if column is None:
        return reference_of(row)
    if column not in row:
        raise UsageError(f"no column {column!r} in the row; there are {', '.join(row)}")
    return str(row[column])


@dataclass(frozen=True)
class Exact:
    """The reference, character for character; with `normalize` but for case, spaces and a full stop at the end."""

    normalize: bool = False

    @property
    def teacher_forced(self) -> bool:
        """Whether one forward pass over the reference decides it."""
        return not self.normalize

    def __call__(self, row, answer):
        expected, found = reference_of(row), answer.final
        if self.normalize:
            expected, found = (" ".join(text.casefold().split()).rstrip(".") for text in (expected, found))
        if found != expected:
            return Verdict(False, f"not {expected[:80]!r}")
        thinking = row["messages"][-1].get("thinking") or ""
        if not self.normalize and answer.analysis != thinking:
            return Verdict(False, "the analysis channel differs from the reference")
        return Verdict(answer.stopped, "" if answer.stopped else "does not end after the reference")


EXACT = Exact()


@dataclass(frozen=True)
class Loss:
    """Held-out loss: nothing passes or fails."""

    teacher_forced = True

    def __call__(self, row, answer):
        raise UsageError("the scorer `loss` needs the model's own probabilities: evaluate a checkpoint, not an endpoint")


@dataclass(frozen=True)
class Contains:
    """One of the texts stands in the answer (`all`: each of them)."""

    text: str | list[str] | None = None
    column: str | None = None
    all: bool = False
    ignore_case: bool = True
    channel: Channel = "final"

    def __call__(self, row, answer):
        texts = [_expected(row, self.column)] if self.text is None else [self.text] if isinstance(self.text, str) else self.text
        fold = str.casefold if self.ignore_case else str
        absent = [text for text in texts if fold(text) not in fold(_text(answer, self.channel))]
        failed = absent if self.all or len(absent) == len(texts) else []
        return Verdict(not failed, f"does not contain {failed[0][:80]!r}" if failed else "")


@dataclass(frozen=True)
class Regex:
    """The pattern (Python's `re`) is found in the answer; with `full` it is the whole answer."""

    pattern: str
    full: bool = False
    channel: Channel = "final"

    def __post_init__(self):
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise UsageError(f"pattern {self.pattern!r}: {error}") from None

    def __call__(self, row, answer):
        text = _text(answer, self.channel)
        found = re.fullmatch(self.pattern, text.strip()) if self.full else re.search(self.pattern, text)
        return Verdict(bool(found), "" if found else f"no match of {self.pattern!r}")


@dataclass(frozen=True)
class Number:
    """The last number of the answer equals the last number of the reference (or of a column). Commas between digits are ignored."""

    column: str | None = None
    tolerance: float = 0.0
    channel: Channel = "final"

    def __call__(self, row, answer):
        wanted, found = (_last_number(text) for text in (_expected(row, self.column), _text(answer, self.channel)))
        if wanted is None:
            raise RunError(f"no number in the reference {_expected(row, self.column)[:60]!r}")
        if found is None:
            return Verdict(False, "no number in the answer")
        return Verdict(abs(found - wanted) <= self.tolerance, f"{found:g} instead of {wanted:g}")


def _last_number(text: str) -> float | None:
    found = _NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


@dataclass(frozen=True)
class Language:
    """A channel is written in the language `expect`: a column whose value names it, a name or code itself, or "reference": that of the reference's
    text in this channel.

    `candidates` restricts the choice, which makes short texts surer: name the languages that may occur.
    """

    expect: str
    channel: Channel = "final"
    candidates: tuple[str, ...] = ()

    def __post_init__(self):
        object.__setattr__(self, "candidates", tuple(code_of(name) for name in self.candidates))

    def __call__(self, row, answer):
        if missing := _missing(answer, self.channel):
            return missing
        wanted = self._wanted(row)
        found, probability = identify(_text(answer, self.channel), (*self.candidates, wanted) if self.candidates else ())
        return Verdict(found == wanted, "" if found == wanted else f"{self.channel} is {found} ({probability:.0%}), not {wanted}")

    def _wanted(self, row) -> str:
        if self.expect != "reference":
            return code_of(str(row.get(self.expect, self.expect)))
        expected = reference_of(row) if self.channel == "final" else row["messages"][-1].get("thinking")
        if not expected:
            raise RunError(f"the reference of {row['messages'][-2]['content'][:60]!r} has no {self.channel} channel")
        return identify(expected, self.candidates)[0]


@dataclass(frozen=True)
class Refused:
    """The answer refuses (rules: `gptoss_jax.evaluation.refusal`)."""

    channel: Channel = "final"

    def __call__(self, row, answer):
        if missing := _missing(answer, self.channel):
            return missing
        return Verdict(True) if refusal_in(_text(answer, self.channel)) else Verdict(False, "answered")


@dataclass(frozen=True)
class NotRefused:
    """The answer does not refuse. An empty answer fails too."""

    channel: Channel = "final"

    def __call__(self, row, answer):
        if missing := _missing(answer, self.channel):
            return missing
        phrase = refusal_in(_text(answer, self.channel))
        return Verdict(phrase is None, f"refused: {phrase!r}" if phrase else "")


SCORERS: dict[str, type] = {
    "exact": Exact, "contains": Contains, "regex": Regex, "number": Number, "language": Language, "refused": Refused, "not_refused": NotRefused,
    "loss": Loss,
}  # fmt: skip
