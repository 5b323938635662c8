"""What a conversation in the `messages` form must look like, and what to tell somebody whose row does not.

    {"messages": [{"role": "system", "content": "..."},                                 optional, first only; "developer" means the same
                  {"role": "user", "content": "..."},
                  {"role": "assistant", "thinking": "...", "content": "..."}]}          last; `thinking` optional

This is the schema of HuggingFaceH4/Multilingual-Thinking. Fields whose value is null count as absent. Other columns of a row are kept and ignored.
"""

import difflib
from collections.abc import Iterable
from typing import Any

ROLES = ("system", "developer", "user", "assistant")
FIELDS = ("role", "content", "thinking")
CHANNEL_TAGS = ("<|channel|>analysis<|message|>", "<|channel|>final<|message|>")
OTHER_SCHEMAS = {
    "conversations": "rename it; its items need role/content instead of from/value",
    "prompt": "make it a user message, and the completion an assistant message",
    "instruction": "make it a user message, and the output an assistant message",
    "text": "raw text has no roles; split it into messages",
}


class BadRow(ValueError):
    """The reason why a row is no conversation, naming the field."""


def _nearest(value: Any, valid: Iterable[str]) -> str:
    valid = list(valid)
    close = difflib.get_close_matches(str(value), valid, n=1)
    return f'did you mean "{close[0]}"?' if close else f"one of {', '.join(valid)}"


def _text(value: Any, field: str) -> str:
    if not isinstance(value, str):
        raise BadRow(f"{field} is {'null' if value is None else f'of type {type(value).__name__}'}, it must be a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BadRow(f"{field} has half a surrogate pair at character {error.start}: not valid text") from None
    if "\0" in value:
        raise BadRow(f"{field} has a NUL at character {value.index(chr(0))}")
    for tag in CHANNEL_TAGS:
        if tag in value:
            raise BadRow(f'{field} holds "{tag}": give thoughts in "thinking" and the answer in "content", without harmony tags')
    return value


def _check_message(message: Any, i: int, last: bool) -> dict[str, str]:
    name = f"messages[{i}]"
    if not isinstance(message, dict):
        raise BadRow(f"{name} is of type {type(message).__name__}, it must be an object with role and content")
    message = {key: value for key, value in message.items() if value is not None and value != []}
    role = message.get("role")
    if role == "tool" or "tool_calls" in message:
        raise BadRow(f"{name} is about a tool call: conversations with tools are not supported")
    if role not in ROLES:
        raise BadRow(f"{name} has no role" if role is None else f'{name}.role is "{role}": {_nearest(role, ROLES)}')
    for key in message:
        if key not in FIELDS:
            raise BadRow(f'{name} has an unknown field "{key}": {_nearest(key, FIELDS)}')
    if role in ("system", "developer") and i > 0:
        raise BadRow(f'{name}.role is "{role}": only the first message may be system or developer')
    if "thinking" in message and role != "assistant":
        raise BadRow(f'{name} has "thinking" and its role is "{role}": only an assistant thinks')
    checked = {"role": role, "content": _text(message.get("content"), f"{name}.content")}
    if role in ("user", "assistant") and not checked["content"].strip():
        raise BadRow(f"{name}.content is empty")
    if "thinking" in message:
        checked["thinking"] = _text(message["thinking"], f"{name}.thinking")
        if not checked["thinking"].strip():
            del checked["thinking"]
    if last and role != "assistant":
        raise BadRow(f'{name}.role is "{role}": the last message must be the assistant\'s, there is nothing to learn from otherwise')
    return checked


def check_row(row: Any) -> dict[str, Any]:
    """The row with its messages cleaned (no null fields). Raises BadRow."""
    if not isinstance(row, dict):
        raise BadRow(f"the row is of type {type(row).__name__}, it must be an object")
    messages = row.get("messages")
    if messages is None:
        hints = [f'it has "{key}": {hint}' for key, hint in OTHER_SCHEMAS.items() if key in row]
        raise BadRow('no "messages"; ' + (hints[0] if hints else f"its fields are {', '.join(map(str, row)) or 'none'}"))
    if not isinstance(messages, list) or not messages:
        raise BadRow("messages is empty" if messages == [] else f"messages is of type {type(messages).__name__}, it must be a list")
    checked = [_check_message(message, i, i == len(messages) - 1) for i, message in enumerate(messages)]
    return {**row, "messages": checked}
