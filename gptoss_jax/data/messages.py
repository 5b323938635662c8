"""What a conversation in the `messages` form must look like, and what to tell somebody whose row does not.

    {"messages": [{"role": "system", "content": "..."},                                 optional, first only; "developer" means the same
                  {"role": "user", "content": "..."},
                  {"role": "assistant", "thinking": "...",                              `thinking` is optional everywhere
                   "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}]},
                  {"role": "tool", "content": "..."},                                   result of the call before; any JSON value
                  {"role": "assistant", "thinking": "...", "content": "..."}],          last
     "tools": [{"type": "function", "function": {"name": "f", "description": "...", "parameters": {JSON schema}}}],
     "reasoning_effort": "low", "weight": 0.5}

`messages` alone is the schema of HuggingFaceH4/Multilingual-Thinking; everything else may be left out. Fields whose value is null count as absent.
`tools` may hold bare functions, and it and `arguments` may be JSON in a string (in Parquet they should be: a column of objects gives every
row the fields of all others). `weight` >= 0 multiplies the loss, of a row or of an assistant message; 0 keeps it as context. `channel: "commentary"`
marks what the assistant tells the user before a call. Other columns of a row are kept and ignored.
"""

import difflib
import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

from gptoss_jax.data.rendering import CONSTRAIN
from gptoss_jax.data.tool_text import functions_text, to_json

ROLES = ("system", "developer", "user", "assistant", "tool")
FIELDS = ("role", "content", "thinking", "tool_calls", "channel", "weight", "name", "tool_call_id")
ONLY_ASSISTANT = {"thinking": "thinks", "tool_calls": "calls tools", "channel": "chooses a channel", "weight": "is trained"}
OTHER_NAMES = {"reasoning_content": "thinking", "reasoning": "thinking", "function_call": "tool_calls", "from": "role", "value": "content"}
EFFORTS = ("low", "medium", "high")
CHANNEL_TAGS = ("<|channel|>analysis<|message|>", "<|channel|>final<|message|>")


class BadRow(ValueError):
    """The reason why a row is no conversation, naming the field."""


def _nearest(value: Any, valid: Iterable[str]) -> str:
    valid = list(valid)
    close = difflib.get_close_matches(str(value), valid, n=1)
    return f'did you mean "{close[0]}"?' if close else f"one of {', '.join(valid)}"


def _type(value: Any) -> str:
    return "null" if value is None else f"of type {type(value).__name__}"


def _clean(value: Any, field: str) -> Any:
    """`value`, once its JSON text is known to be text."""
    text = value if isinstance(value, str) else to_json(value)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadRow(f"{field} has half a surrogate pair at character {error.start}: not valid text") from None
    if "\0" in text:
        raise BadRow(f"{field} has a NUL at character {text.index(chr(0))}")
    return value


def _text(value: Any, field: str) -> str:
    if not isinstance(value, str):
        raise BadRow(f"{field} is {_type(value)}, it must be a string")
    for tag in CHANNEL_TAGS:
        if tag in value:
            raise BadRow(f'{field} holds "{tag}": give thoughts in "thinking" and the answer in "content", without harmony tags')
    return _clean(value, field)


def _weight(value: Any, field: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not (math.isfinite(value) and value >= 0):
        raise BadRow(f"{field} is {value!r}, it must be a number of at least 0")
    return value


def _from_json(value: Any, field: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise BadRow(f"{field} is a string that is not JSON: {error}") from None


def _function_of(value: Any, field: str) -> dict[str, Any]:
    """The inner object of `{"type": "function", "function": {...}}`, without null fields; bare functions are accepted."""
    if not isinstance(value, Mapping):
        raise BadRow(f"{field} is {_type(value)}, it must be an object")
    kind = value.get("type", "function")
    if kind not in ("function", None):
        raise BadRow(f'{field}.type is "{kind}": only functions are supported')
    function = value.get("function", value)
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str) or not name or any(c.isspace() for c in name):
        raise BadRow(f"{field} has no function with a name" if name is None else f"{field}: {name!r} is no name of a function")
    return {key: item for key, item in function.items() if item is not None and key != "type"}


def _check_call(calls: Any, field: str) -> dict[str, Any]:
    if not isinstance(calls, list):
        raise BadRow(f"{field} is {_type(calls)}, it must be a list")
    if len(calls) != 1:
        raise BadRow(f"{field} has {len(calls)} calls: gpt-oss makes one at a time; give each a message of its own, followed by its result")
    function = _function_of(calls[0], f"{field}[0]")
    arguments = _from_json(function.get("arguments", {}), f"{field}[0].arguments")
    if not isinstance(arguments, Mapping):
        raise BadRow(f"{field}[0].arguments is {_type(arguments)}, it must be an object")
    checked = {"name": _clean(function["name"], f"{field}[0].name"), "arguments": _clean(arguments, f"{field}[0].arguments")}
    content_type = function.get("content_type", calls[0].get("content_type"))
    if content_type is not None:
        plain = _text(content_type, f"{field}[0].content_type").removeprefix(CONSTRAIN)
        if "<|" in plain or not content_type:
            raise BadRow(f'{field}[0].content_type is "{content_type}": it is a word like json, or {CONSTRAIN} and a word')
        checked["content_type"] = content_type
    return {"type": "function", "function": checked}


def _check_assistant(message: Mapping[str, Any], name: str) -> dict[str, Any]:
    checked: dict[str, Any] = {"role": "assistant"}
    if "thinking" in message:
        checked["thinking"] = _text(message["thinking"], f"{name}.thinking")
        if not checked["thinking"].strip():
            del checked["thinking"]
    if "weight" in message:
        checked["weight"] = _weight(message["weight"], f"{name}.weight")
    channel = message.get("channel", "commentary" if "tool_calls" in message else "final")
    if channel not in ("commentary", "final") or ("tool_calls" in message and channel == "final"):
        where = 'a call is in "commentary"' if "tool_calls" in message else 'give thoughts in "thinking"'
        raise BadRow(f'{name}.channel is "{channel}": it is "final" or, for what is said before a call, "commentary"; {where}')
    if "tool_calls" in message:
        content = _text(message.get("content", ""), f"{name}.content")
        if content.strip():
            if "thinking" in checked:
                raise BadRow(f"{name} has thinking, content and a call: the content of a call is its thought, so only one of them can be given")
            checked["content"] = content
        return {**checked, "tool_calls": [_check_call(message["tool_calls"], f"{name}.tool_calls")]}
    checked["content"] = _text(message.get("content"), f"{name}.content")
    if not checked["content"].strip():
        raise BadRow(f"{name}.content is empty")
    return {**checked, "channel": "commentary"} if channel == "commentary" else checked


def _check_message(message: Any, i: int, called: Mapping[str, Any] | None) -> dict[str, Any]:
    """`called`: the message with the newest call, if no answer came after it."""
    name = f"messages[{i}]"
    if not isinstance(message, Mapping):
        raise BadRow(f"{name} is of type {type(message).__name__}, it must be an object with role and content")
    message = {key: value for key, value in message.items() if value is not None and (value != [] or key == "content")}
    role = message.get("role")
    if role not in ROLES:
        raise BadRow(f"{name} has no role" if role is None else f'{name}.role is "{role}": {_nearest(role, ROLES)}')
    for key in message:
        if key not in FIELDS:
            meant = f'here it is called "{OTHER_NAMES[key]}"' if key in OTHER_NAMES else _nearest(key, FIELDS)
            raise BadRow(f'{name} has an unknown field "{key}": {meant}')
        if role != "assistant" and key in ONLY_ASSISTANT:
            raise BadRow(f'{name} has "{key}" and its role is "{role}": only an assistant {ONLY_ASSISTANT[key]}')
        if role != "tool" and key in ("name", "tool_call_id"):
            raise BadRow(f'{name} has "{key}" and its role is "{role}": it belongs to the result of a tool')
    if role in ("system", "developer") and i > 0:
        raise BadRow(f'{name}.role is "{role}": only the first message may be system or developer')
    if role == "assistant":
        return _check_assistant(message, name)
    if role == "tool":
        if called is None:
            raise BadRow(f'{name}.role is "tool": there is no call before it whose result it could be')
        tool = called["tool_calls"][0]["function"]["name"]
        if message.get("name", tool) != tool:
            raise BadRow(f'{name}.name is "{message["name"]}": the call before it is one of "{tool}"')
        if "content" not in message:
            raise BadRow(f"{name}.content is null")
        return {"role": "tool", "name": tool, "content": _clean(message["content"], f"{name}.content")}
    checked = {"role": role, "content": _text(message.get("content"), f"{name}.content")}
    if role == "user" and not checked["content"].strip():
        raise BadRow(f"{name}.content is empty")
    return checked


def _check_tools(tools: Any) -> list[dict[str, Any]]:
    tools = _from_json(tools, "tools")
    if not isinstance(tools, list):
        raise BadRow(f"tools is {_type(tools)}, it must be a list of functions")
    checked = [{"type": "function", "function": _function_of(tool, f"tools[{i}]")} for i, tool in enumerate(tools)]
    try:
        _clean(functions_text(checked), "tools")
    except BadRow:
        raise
    except ValueError as error:
        raise BadRow(str(error)) from None
    return checked


def check_row(row: Any, *, prompt: bool = False) -> dict[str, Any]:
    """The row with its fields in one form: no null fields, tools and calls as `{"type": "function", "function": {...}}`, results with the tool.

    `prompt`: the messages ask for an answer, so the last need not be the assistant's. Raises BadRow.
    """
    try:
        return _check_row(row, prompt)
    except RecursionError:
        raise BadRow("tools, arguments or results are nested too deeply") from None


def _check_row(row: Any, prompt: bool) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise BadRow(f"the row is of type {type(row).__name__}, it must be an object")
    messages = row.get("messages")
    if messages is None:
        raise BadRow(f"no \"messages\"; its fields are {', '.join(map(str, row)) or 'none'}")
    if not isinstance(messages, list) or not messages:
        raise BadRow("messages is empty" if messages == [] else f"messages is of type {type(messages).__name__}, it must be a list")
    checked, called = [], None
    for i, message in enumerate(messages):
        message = _check_message(message, i, called)
        if message["role"] == "assistant" and "channel" not in message:
            called = message if "tool_calls" in message else None
        checked.append(message)
    last, name = checked[-1], f"messages[{len(checked) - 1}]"
    if last["role"] != "assistant" and not prompt:
        raise BadRow(f'{name}.role is "{last["role"]}": the last message must be the assistant\'s, there is nothing to learn from otherwise')
    if "channel" in last and not prompt:
        raise BadRow(f'{name}.channel is "commentary": the model goes on with a call or an answer after it, and the row ends')
    out = {key: value for key, value in row.items() if key not in ("tools", "reasoning_effort", "weight") or value is not None}
    out["messages"] = checked
    if "tools" in out:
        out["tools"] = _check_tools(out["tools"])
    if "weight" in out:
        out["weight"] = _weight(out["weight"], "weight")
    if out.get("reasoning_effort", "low") not in EFFORTS:
        raise BadRow(f'reasoning_effort is "{out["reasoning_effort"]}": {_nearest(out["reasoning_effort"], EFFORTS)}')
    return out
