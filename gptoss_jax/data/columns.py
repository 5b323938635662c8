"""Which columns of a row hold the conversation: one table of the layouts that public data sets use, and the way to name one's own.

    layout               columns                                   becomes
    messages             messages                                  itself (Multilingual-Thinking has it beside its flat columns)
    conversations        conversations: [{from, value}]            human/user, gpt/assistant, system -> messages (ShareGPT)
    instruct_response    prompt, instruct_response, cot_response   user, assistant (FalseReject); `response="cot"` takes cot_response instead
    prompt/completion    prompt, completion                        both strings (user, assistant), or both lists of messages, joined
    instruction/output   instruction, input (may be empty), output user: instruction, blank line, input; assistant: output (Alpaca)
    user/final           developer, user, analysis, final          as in Multilingual-Thinking, with its "reasoning language: ..." line
    columns: {...}       as named: user, assistant, system, thinking, or messages

In every layout but `messages`, a column `system` is the system text, and an answer of the form "<think>THOUGHTS</think>ANSWER" is split into
thinking and content (how FalseReject marks thoughts in cot_response is not documented; without the tags all of it is the answer). Messages are taken
as they are. An answer without thinking has no analysis channel: thoughts are neither invented nor trained to be empty. `data inspect` counts such
rows.
"""

import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, NamedTuple

from gptoss_jax.data.messages import BadRow

Row = dict[str, Any]
Response = Literal["instruct", "cot"]
COLUMN_ROLES = ("user", "assistant", "system", "thinking", "messages")
SHAREGPT_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_THINK = re.compile(r"\s*<think>(.*?)</think>\s*(.*)", re.DOTALL)


class Layout(NamedTuple):
    """`columns` are those that tell it from others; all that it uses are in `uses`."""

    name: str
    columns: tuple[str, ...]
    uses: tuple[str, ...]
    convert: Callable[[Row], list[Row]]


def _text(row: Row, column: str) -> str:
    value = row.get(column)
    if not isinstance(value, str):
        raise BadRow(f'column "{column}" is {"null" if value is None else f"of type {type(value).__name__}"}, it must be a string')
    return value


def _turns(row: Row, user: str, answer: str, thinking: str | None = None, system: str | None = None) -> list[Row]:
    """One question and one answer; null and blank system texts count as none."""
    messages = [{"role": "system", "content": _text(row, system)}] if system and not _blank(row.get(system)) else []
    split = _THINK.fullmatch(_text(row, answer))
    message = {"role": "assistant", "content": split[2] if split else row[answer]}
    if thinking and not _blank(row.get(thinking)):
        message["thinking"] = _text(row, thinking)
    elif split:
        message["thinking"] = split[1].strip()
    return [*messages, {"role": "user", "content": _text(row, user)}, message]


def _blank(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def _messages(row: Row) -> list[Row]:
    return row["messages"]


def _conversations(row: Row) -> list[Row]:
    items = row["conversations"]
    if not isinstance(items, list):
        raise BadRow(f'column "conversations" is of type {type(items).__name__}, it must be a list')
    messages = []
    for i, item in enumerate(items):
        if isinstance(item, dict) and "role" in item:  # a list of messages under another name
            messages.append(item)
            continue
        if not isinstance(item, dict) or not {"from", "value"} <= item.keys():
            raise BadRow(f"conversations[{i}] must be an object with from and value")
        if item["from"] not in SHAREGPT_ROLES:
            raise BadRow(f'conversations[{i}].from is "{item["from"]}": {_nearest(item["from"], SHAREGPT_ROLES)}')
        if item["from"] == "system" and _blank(item["value"]):
            continue
        messages.append({"role": SHAREGPT_ROLES[item["from"]], "content": _text(item, "value")})
    return messages


def _prompt_completion(row: Row) -> list[Row]:
    if isinstance(row["prompt"], list) and isinstance(row["completion"], list):
        return [*row["prompt"], *row["completion"]]
    return _turns(row, "prompt", "completion", system="system")


def _instruction(row: Row) -> list[Row]:
    extra = "" if _blank(row.get("input")) else "\n\n" + _text(row, "input")
    return _turns({**row, "instruction": _text(row, "instruction") + extra}, "instruction", "output", system="system")


def _multilingual(row: Row) -> list[Row]:
    language = "" if _blank(row.get("reasoning_language")) else f"reasoning language: {_text(row, 'reasoning_language')}\n\n"
    developer = "" if _blank(row.get("developer")) else _text(row, "developer")
    return _turns({**row, "system": (language + developer).strip()}, "user", "final", "analysis", "system")


LAYOUTS = (
    Layout("messages", ("messages",), ("messages",), _messages),
    Layout("conversations", ("conversations",), ("conversations",), _conversations),
    Layout(
        "instruct_response", ("prompt", "instruct_response"), ("prompt", "instruct_response", "cot_response"),
        lambda row: _turns(row, "prompt", "instruct_response", system="system"),
    ),
    Layout("prompt/completion", ("prompt", "completion"), ("prompt", "completion", "system"), _prompt_completion),
    Layout("instruction/output", ("instruction", "output"), ("instruction", "input", "output", "system"), _instruction),
    Layout("user/final", ("user", "final"), ("user", "final", "analysis", "developer"), _multilingual),
)  # fmt: skip
COT = Layout(
    "cot_response", ("prompt", "cot_response"), ("prompt", "instruct_response", "cot_response"),
    lambda row: _turns(row, "prompt", "cot_response", system="system"),
)  # fmt: skip


def check_columns(columns: Mapping[str, str]) -> None:
    """Refuses a naming of columns that cannot give a conversation. Raises ValueError."""
    for role in columns:
        if role not in COLUMN_ROLES:
            raise ValueError(f"columns has an unknown key {role!r}: {_nearest(role, COLUMN_ROLES)}")
    if "messages" in columns and len(columns) > 1:
        raise ValueError("columns names messages and others: messages hold the whole conversation")
    if "messages" not in columns and not {"user", "assistant"} <= columns.keys():
        raise ValueError(f"columns must name user and assistant (or messages), not only {', '.join(columns) or 'nothing'}")


def named(columns: Mapping[str, str]) -> Layout:
    """The layout of columns that the user named."""
    if "messages" in columns:
        convert = lambda row: row[columns["messages"]]
    else:
        convert = lambda row: _turns(row, columns["user"], columns["assistant"], columns.get("thinking"), columns.get("system"))
    needed = tuple(columns[role] for role in ("messages", "user", "assistant") if role in columns)
    return Layout("columns " + ", ".join(f"{role}={column}" for role, column in columns.items()), needed, tuple(columns.values()), convert)


def to_conversation(row: Any, columns: Mapping[str, str] | None = None, response: Response = "instruct") -> tuple[str, Row]:
    """(name of the layout, the row with its conversation under "messages" in place of the columns it came from).

    Raises BadRow when no layout fits, naming the columns found and the nearest layout. The messages themselves are not checked here.
    """
    if not isinstance(row, dict):
        raise BadRow(f"the row is of type {type(row).__name__}, it must be an object")
    present = {key for key, value in row.items() if value is not None}
    if columns is not None:
        layout = named(columns)
        absent = [column for column in layout.columns if column not in row]
        if absent:
            raise BadRow(f'no column "{absent[0]}": {_nearest(absent[0], row)}')
    else:
        layouts = LAYOUTS if response == "instruct" else (COT, *LAYOUTS)
        layout = next((layout for layout in layouts if present.issuperset(layout.columns)), None)
        if layout is None:
            raise BadRow(_unknown(row))
    rest = {key: value for key, value in row.items() if key not in layout.uses}
    return layout.name, {**rest, "messages": layout.convert(row)}


def _nearest(value: Any, valid: Iterable[str]) -> str:
    valid = [str(name) for name in valid]
    close = difflib.get_close_matches(str(value), valid, n=1)
    return f'did you mean "{close[0]}"?' if close else f"there are {', '.join(valid) or 'none'}"


def _unknown(row: Row) -> str:
    """What the row has, and the layout that it comes closest to."""
    keys = [str(key) for key in row]
    found = f"no conversation in its columns ({', '.join(keys) or 'none'})"
    if "text" in row:
        return f"{found}: raw text has no roles, split it into messages"
    close = lambda column: bool(difflib.get_close_matches(column, keys, n=1, cutoff=0.8))
    score = {layout: sum(2 * (column in keys) + close(column) for column in layout.columns) / len(layout.columns) for layout in LAYOUTS}
    best = max(LAYOUTS, key=score.__getitem__)
    if not score[best]:
        return f"{found}; name them: columns: {{user: ..., assistant: ...}}"
    missing = ", ".join(f'"{column}"' for column in best.columns if row.get(column) is None)
    return f"{found}; nearest is the layout {best.name}, which lacks {missing}; or name them: columns: {{user: ..., assistant: ...}}"
