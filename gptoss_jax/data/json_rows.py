"""Rows of JSON files, each with its line: one object a line, or one array of objects."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gptoss_jax.data.messages import BadRow
from gptoss_jax.errors import CorruptError

# (file:line or file: row N, the row or the reason why there is none)
Rows = Iterator[tuple[str, Any]]
MAX_LINE_BYTES = 64 << 20


def _no_duplicate_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        keys = [key for key, _ in pairs]
        raise BadRow(f'the key "{next(key for key in keys if keys.count(key) > 1)}" stands twice in one object')
    return out


_DECODER = json.JSONDecoder(object_pairs_hook=_no_duplicate_keys)


def read_lines(path: Path) -> Rows:
    with path.open("rb") as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES):
            number += 1
            where = f"{path}:{number}"
            if len(line) == MAX_LINE_BYTES and not line.endswith(b"\n"):
                while (rest := file.readline(MAX_LINE_BYTES)) and not rest.endswith(b"\n"):
                    pass
                yield where, BadRow(f"the line is longer than {MAX_LINE_BYTES >> 20} MiB")
                continue
            line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if line.strip():
                yield where, _parse(line)


def _parse(line: bytes) -> Any:
    try:
        return _DECODER.decode(line.decode())
    except BadRow as bad:
        return bad
    except UnicodeDecodeError as error:
        return BadRow(f"not UTF-8 at byte {error.start}")
    except json.JSONDecodeError as error:
        return BadRow(f"not JSON: {error.msg} at column {error.colno}")
    except (RecursionError, ValueError) as error:
        return BadRow(f"not usable JSON: {error}")


def read_array(path: Path) -> Rows:
    """Element after element, so that each has its line; after one that is no JSON nothing can be read any more."""
    try:
        text = path.read_bytes().removeprefix(b"\xef\xbb\xbf").decode()
    except UnicodeDecodeError as error:
        raise CorruptError(f"{path}: not UTF-8 at byte {error.start}") from None
    try:
        at = _array_start(text)
    except (ValueError, RecursionError) as error:
        raise CorruptError(f'{path}: neither an array of rows nor an object with one under "data" ({error})') from None
    line, counted = 1, 0
    while text[at : at + 1] != "]":
        line, counted = line + text.count("\n", counted, at), at
        where = f"{path}:{line}"
        try:
            try:
                row, end = _DECODER.raw_decode(text, at)
            except BadRow as bad:
                row, end = bad, json.JSONDecoder().raw_decode(text, at)[1]
            yield where, row
            at = _blanks(text, end)
            if text[at : at + 1] == ",":
                at = _blanks(text, at + 1)
            elif text[at : at + 1] != "]":
                raise json.JSONDecodeError("expected a comma or the end of the array", text, at)
        except json.JSONDecodeError as error:
            yield f"{path}:{error.lineno}", BadRow(f"not JSON: {error.msg} at column {error.colno}; what follows is not read")
            return
        except (RecursionError, ValueError) as error:
            yield where, BadRow(f"not usable JSON: {error}; what follows is not read")
            return


def _blanks(text: str, at: int) -> int:
    return re.compile(r"[ \t\r\n]*").match(text, at).end()


def _array_start(text: str) -> int:
    """Where the first element (or the closing bracket) of the array of rows stands."""
    at = _blanks(text, 0)
    if text[at : at + 1] == "{":
        at = _blanks(text, at + 1)
        while True:
            key, at = _DECODER.raw_decode(text, at)
            at = _blanks(text, _blanks(text, at) + 1)  # over the colon
            if key == "data":
                break
            _, at = _DECODER.raw_decode(text, at)
            at = _blanks(text, _blanks(text, at) + 1)  # over the comma
    if text[at : at + 1] != "[":
        raise ValueError("it begins with " + (repr(text[at : at + 1]) if text[at:] else "nothing"))
    return _blanks(text, at + 1)
