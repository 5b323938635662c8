"""Conversations in the `messages` form -> harmony text, character by character what the release's chat template writes.

    <|start|>system<|message|>...<|end|>                                        `System`, a text of your own, or none (nano)
    <|start|>developer<|message|># Instructions\\n\\nTEXT\\n\\n# Tools\\n\\n...<|end|>    a leading message of role "developer" or "system"; tools
    <|start|>user<|message|>TEXT<|end|>
    <|start|>assistant<|channel|>analysis<|message|>THINKING<|end|>              thoughts: see below
    <|start|>assistant to=functions.NAME<|channel|>commentary json<|message|>{"a": 1}<|call|>
    <|start|>functions.NAME to=assistant<|channel|>commentary<|message|>RESULT AS JSON<|end|>
    <|start|>assistant<|channel|>final<|message|>TEXT<|return|>                  an earlier one ends with <|end|>

(no line breaks between messages). Thoughts of an answer are not shown later; thoughts of a tool call stay until an answer follows, since the model
goes on thinking when the result arrives. A message without `thinking` has no analysis message. The `content` of a message with a tool call is its
thought, as in the template.

Beyond the template, in the form of OpenAI's own renderer: an assistant message with `channel: commentary` and no call is a preamble, said to the user
before a call, `<|start|>assistant<|channel|>commentary<|message|>TEXT<|end|>`. (`content_type: "<|constrain|>json"` of a call writes the special
token where the default is the plain word `json`; the template knows it too.)
"""

import datetime
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from gptoss_jax.data.tool_text import BUILTIN_TOOLS, builtin_tools_text, functions_text, to_json
from gptoss_jax.errors import UsageError

SPECIAL_TOKENS = (
    "<|startoftext|>", "<|endoftext|>", "<|return|>", "<|constrain|>", "<|channel|>", "<|start|>", "<|end|>", "<|message|>", "<|call|>",
    "<|endofprompt|>",
)  # fmt: skip
CONSTRAIN = "<|constrain|>"
Channel = Literal["analysis", "commentary", "final"]
Message = Mapping[str, Any]


class Piece(NamedTuple):
    """A stretch of the text: one special token, or text between two of them."""

    text: str
    special: bool = False
    channel: Channel | None = None  # of the message which the model writes with this piece; None: it is given to the model
    weight: float = 0.0  # of the loss on each of its tokens
    label: str | None = None  # the special token that the model is trained to write in this place, where it is another one


@dataclass(frozen=True)
class System:
    """The release's system message. The date is an argument: the template's own is the day on which it runs."""

    date: datetime.date
    reasoning_effort: str = "medium"
    builtin_tools: tuple[str, ...] = ()  # "browser", "python"
    model_identity: str = "You are ChatGPT, a large language model trained by OpenAI."

    def __post_init__(self):
        for name in self.builtin_tools:
            if name not in BUILTIN_TOOLS:
                raise UsageError(f"builtin_tools: {name!r} is none of {', '.join(BUILTIN_TOOLS)}")

    def text(self, *, functions: bool = False, reasoning_effort: str | None = None) -> str:
        """`functions`: the developer message declares some. `reasoning_effort` of the row goes before the one of the system message."""
        return (
            f"{self.model_identity}\nKnowledge cutoff: 2024-06\nCurrent date: {self.date.isoformat()}\n\n"
            f"Reasoning: {reasoning_effort or self.reasoning_effort}\n\n{builtin_tools_text(self.builtin_tools)}"
            "# Valid channels: analysis, commentary, final. Channel must be included for every message."
            + ("\nCalls to these tools must go to the commentary channel: 'functions'." if functions else "")
        )


def is_final(message: Message) -> bool:
    """An answer to the user: it ends the model's turn, and the thoughts before it are dropped from then on."""
    return message["role"] == "assistant" and not message.get("tool_calls") and message.get("channel") != "commentary"


def is_preamble(message: Message) -> bool:
    """Said to the user before a call, by a model that goes on writing."""
    return message["role"] == "assistant" and not message.get("tool_calls") and message.get("channel") == "commentary"


def thought(message: Message) -> str | None:
    return message.get("thinking") or (message.get("content") if message.get("tool_calls") else None)


def written_channels(message: Message) -> set[Channel]:
    """The channels of what the model writes for an assistant message."""
    return {"final" if is_final(message) else "commentary", *(["analysis"] if thought(message) else [])}


def _special(name: str, channel: Channel | None = None) -> Piece:
    return Piece(name, True, channel)


def _given(header: str, text: str, channel: str | None = None) -> list[Piece]:
    pieces = [_special("<|start|>"), Piece(header)]
    if channel:
        pieces += [_special("<|channel|>"), Piece(channel)]
    return [*pieces, _special("<|message|>"), *([Piece(text)] if text else []), _special("<|end|>")]


def _written(channel: Channel, text: str, stop: str, recipient: str = "", content_type: str = "") -> list[Piece]:
    """What the model writes of one message, after `<|start|>assistant`."""
    pieces = [Piece(recipient, False, channel)] if recipient else []
    pieces.append(_special("<|channel|>", channel))
    if content_type.startswith(CONSTRAIN):
        pieces += [Piece(f"{channel} ", False, channel), _special(CONSTRAIN, channel)]
        pieces += [Piece(content_type[len(CONSTRAIN) :], False, channel)] if content_type != CONSTRAIN else []
    else:
        pieces.append(Piece(f"{channel} {content_type}" if content_type else channel, False, channel))
    pieces.append(_special("<|message|>", channel))
    if text:
        pieces.append(Piece(text, False, channel))
    return [*pieces, _special(stop, channel)]


def assistant_start(channel: Channel | None = None) -> list[Piece]:
    """The header that asks for an answer; with a channel, written by the model itself between two messages of one turn."""
    return [_special("<|start|>", channel), Piece("assistant", False, channel)]


def written_by_model(message: Message, *, with_thought: bool = True) -> list[Piece]:
    """All that the model writes for an assistant message, from behind `<|start|>assistant` to its stop token."""
    calls = message.get("tool_calls")
    if calls:
        call = calls[0]["function"]
        pieces = _written(
            "commentary", to_json(call["arguments"]), "<|call|>", f" to=functions.{call['name']}", call.get("content_type", "json")
        )
    elif is_preamble(message):
        pieces = _written("commentary", message["content"], "<|end|>")
    else:
        pieces = _written("final", message["content"], "<|return|>")
    thoughts = thought(message) if with_thought else None
    if thoughts:
        pieces = [*_written("analysis", thoughts, "<|end|>"), *assistant_start(pieces[0].channel), *pieces]
    return pieces


def opening(row: Mapping[str, Any], system: System | str | None) -> tuple[list[Piece], Sequence[Message]]:
    """System and developer message of a row, and its messages after them.

    Raises UsageError when the row asks for a reasoning effort and there is no `System` to say it.
    """
    messages, tools, effort = row["messages"], row.get("tools"), row.get("reasoning_effort")
    if isinstance(system, System):
        system = system.text(functions=bool(tools), reasoning_effort=effort)
    elif effort:
        raise UsageError(f'a row has reasoning_effort "{effort}", which stands in the system message of the release: give it a date')
    pieces = _given("system", system) if system else []
    developer = ""
    if messages and messages[0]["role"] in ("developer", "system"):
        developer = f"# Instructions\n\n{messages[0]['content']}\n\n" if messages[0]["content"] else ""
        messages = messages[1:]
    if tools:
        developer += functions_text(tools)
    return pieces + (_given("developer", developer) if developer else []), messages


def last_final(messages: Sequence[Message], stop: int) -> int:
    """Index of the last answer before `stop`, -1 if there is none: what was thought up to there is no longer shown."""
    return next((i for i in range(stop - 1, -1, -1) if is_final(messages[i])), -1)


def past_message(message: Message, *, with_thought: bool) -> list[Piece]:
    """A message as the model reads it later."""
    if message["role"] == "user":
        return _given("user", message["content"])
    if message["role"] == "tool":
        return _given(f"functions.{message['name']} to=assistant", to_json(message["content"]), "commentary")
    pieces = [*assistant_start(), *(piece._replace(channel=None) for piece in written_by_model(message, with_thought=with_thought))]
    if is_final(message):
        pieces[-1] = _special("<|end|>")
    return pieces


def past(messages: Sequence[Message], start: int, stop: int, answered: int | None = None) -> list[Piece]:
    """messages[start:stop] as they are shown to the model that writes message `stop`. Thoughts are kept behind the last answer, `answered`."""
    answered = last_final(messages, stop) if answered is None else answered
    return [piece for i in range(start, stop) for piece in past_message(messages[i], with_thought=i > answered)]


def render(
    messages: Sequence[Message],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    reasoning_effort: str | None = None,
    system: System | str | None = None,
    prompt: bool = False,
) -> list[Piece]:
    """The pieces of a conversation, as the chat template writes it. With `prompt` it ends with the `<|start|>assistant` that asks for an answer.

    `messages` and `tools` must have the form that `messages.check_row` returns.
    """
    pieces, messages = opening({"messages": messages, "tools": tools, "reasoning_effort": reasoning_effort}, system)
    last = len(messages) - 1
    if prompt or not messages or messages[last]["role"] != "assistant":
        return pieces + past(messages, 0, last + 1) + (assistant_start() if prompt else [])
    answered = last_final(messages, last + 1)  # the template drops the thoughts of calls as soon as any answer follows, even the last message
    return pieces + past(messages, 0, last, answered) + assistant_start() + written_by_model(messages[last])


def text_of(pieces: Iterable[Piece]) -> str:
    return "".join(piece.text for piece in pieces)
