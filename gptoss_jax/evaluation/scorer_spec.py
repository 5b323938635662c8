"""From the `scorer:` of a task file to a scorer: a rule with its options, or a Python function of the user's.

    def check(row, answer):            # row: the dict of the data file; answer: .analysis, .commentary, .final (str), .stopped (bool)
        return answer.final.count("!") == 0, "shouts"               # bool, or (bool, reason)

The function runs in this process with all its rights: use files that you trust, as you would any script.
"""

import dataclasses
import difflib
import importlib.util
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptoss_jax.errors import RunError, UsageError
from gptoss_jax.evaluation.scorers import CHANNELS, SCORERS, Scorer, Verdict


@dataclass(frozen=True)
class Function:
    """A function of the user's; an exception in it is reported with the row that it came from."""

    name: str
    function: Callable[[Mapping[str, Any], Any], Any]

    def __call__(self, row, answer):
        try:
            result = self.function(row, answer)
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            prompt = next((m["content"] for m in reversed(row["messages"]) if m["role"] == "user"), "")
            reason = f"{type(error).__name__}: {error} ({Path(place.filename).name}:{place.lineno})"
            raise RunError(f"scorer {self.name}: {reason} at the row {prompt[:60]!r}") from error
        passed, reason = result if isinstance(result, tuple) else (result, "")
        if not isinstance(passed, bool | int) or not isinstance(reason, str):
            raise RunError(f"scorer {self.name}: it returned {result!r}; give True or False, or (True or False, reason)")
        return Verdict(bool(passed), "" if passed else reason)


def make_scorer(spec: str | Mapping[str, Any], folder: Path = Path()) -> Scorer:
    """A scorer from its name, or from {name: ..., options}, or {function: FILE.py:NAME} with the file beside `folder`.

    Raises:
      UsageError: unknown name or option, or an option of a wrong type.
    """
    options = {"name": spec} if isinstance(spec, str) else dict(spec)
    if "function" in options:
        return _load_function(str(options["function"]), folder)
    name = options.pop("name", None)
    if name not in SCORERS:
        raise UsageError(f"unknown scorer {name!r}; {nearest(str(name), SCORERS)}")
    kind = SCORERS[name]
    fields = {f.name: f for f in dataclasses.fields(kind)}
    for key, value in options.items():
        if key not in fields:
            raise UsageError(f"scorer {name} has no option {key!r}; {nearest(key, fields)}")
        if key == "channel" and value not in CHANNELS:
            raise UsageError(f"channel {value!r}: {nearest(str(value), CHANNELS)}")
        kinds = (list, str) if key in ("candidates", "text") else _plain_types(fields[key].type)
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise UsageError(f"scorer {name}: {key} = {value!r} is of type {type(value).__name__}")
    missing = [key for key, f in fields.items() if f.default is dataclasses.MISSING and key not in options]
    if missing:
        raise UsageError(f"scorer {name} needs {missing[0]!r}")
    return kind(**options)


def _plain_types(annotation: Any) -> tuple[type, ...]:
    """The types that YAML may give for an option."""
    text = str(annotation)
    return tuple(kind for kind, word in ((str, "str"), (str, "Literal"), (bool, "bool"), (int, "float"), (float, "float")) if word in text)


def _load_function(spec: str, folder: Path) -> Function:
    file, sign, name = spec.rpartition(":")
    path = folder / file
    if not sign or path.suffix != ".py" or not path.is_file():
        raise UsageError(f"function {spec!r}: give FILE.py:NAME, with the file beside the task file")
    module_spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:
        raise UsageError(f"{path} cannot be imported: {type(error).__name__}: {error}") from None
    function = getattr(module, name, None)
    if not callable(function):
        raise UsageError(f"{path} has no function {name!r}; {nearest(name, [key for key in vars(module) if not key.startswith('_')])}")
    return Function(f"{file}:{name}", function)


def nearest(name: str, known: Iterable[str]) -> str:
    """What to say of an unknown name: the nearest known one, or the first 20 of all."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known[:20])}"
