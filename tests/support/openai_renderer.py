"""Our rows for OpenAI's own renderer of the format (package openai-harmony), and how its text is known to differ from the release's chat template."""

import re

import openai_harmony as oh

from gptoss_jax.data.rendering import Piece, last_final, thought
from gptoss_jax.data.tool_text import to_json
from tests.support import release

KEEP_THOUGHTS = oh.RenderConversationConfig(auto_drop_analysis=False)


def plain_tools() -> list[dict]:
    """Schemas that both write alike but for the comma behind a default.

    Nested objects, descriptions of several lines, `nullable`, `oneOf`, arrays without items and objects without properties look different.
    """
    properties = {
        "city": {"type": "string", "description": "Name of a city"},
        "n": {"type": "integer", "default": 3},
        "exact": {"type": "boolean"},
        "unit": {"type": "string", "enum": ["c", "f"], "default": "c"},
        "days": {"type": "array", "items": {"type": "string"}},
        "note": {"type": ["string", "null"]},
    }
    weather = {"name": "tool_0", "description": "The weather.", "parameters": {"type": "object", "properties": properties, "required": ["city"]}}
    return [{"type": "function", "function": function} for function in (weather, {"name": "tool_1", "description": "Nothing."})]


def conversation_of(row: dict, *, prompt: bool) -> oh.Conversation:
    """The messages that are shown, i.e. without old thoughts."""
    system = oh.SystemContent.new().with_conversation_start_date(release.TODAY.isoformat())
    system = system.with_reasoning_effort(oh.ReasoningEffort(row.get("reasoning_effort", "medium").capitalize()))
    out, messages, developer = [oh.Message.from_role_and_content(oh.Role.SYSTEM, system)], row["messages"], oh.DeveloperContent.new()
    said = messages[0]["content"] if messages[0]["role"] in ("system", "developer") else ""
    developer = developer.with_instructions(said) if said else developer
    if row.get("tools"):
        developer = developer.with_function_tools([oh.ToolDescription.new(**tool["function"]) for tool in row["tools"]])
    if said or row.get("tools"):
        out.append(oh.Message.from_role_and_content(oh.Role.DEVELOPER, developer))
    answered = last_final(messages, len(messages) if prompt else len(messages) - 1)
    for i, message in enumerate(messages):
        if message["role"] == "user":
            out.append(oh.Message.from_role_and_content(oh.Role.USER, message["content"]))
        elif message["role"] == "tool":
            tool = oh.Author.new(oh.Role.TOOL, f"functions.{message['name']}")
            result = oh.Message.from_author_and_content(tool, to_json(message["content"]))
            out.append(result.with_channel("commentary").with_recipient("assistant"))
        elif message["role"] == "assistant":
            if thought(message) and i > answered:
                out.append(oh.Message.from_role_and_content(oh.Role.ASSISTANT, thought(message)).with_channel("analysis"))
            if message.get("tool_calls"):
                call = message["tool_calls"][0]["function"]
                written = oh.Message.from_role_and_content(oh.Role.ASSISTANT, to_json(call["arguments"])).with_channel("commentary")
                out.append(written.with_recipient(f"functions.{call['name']}").with_content_type(call.get("content_type", "json")))
            else:
                out.append(oh.Message.from_role_and_content(oh.Role.ASSISTANT, message["content"]).with_channel(message.get("channel", "final")))
    return oh.Conversation.from_messages(out)


def as_openai_writes(pieces: list[Piece]) -> list[Piece]:
    """Our pieces with the two differences of the developer message taken back.

    The template writes two line breaks behind instructions that no tools follow, and a comma behind the default of a parameter.
    """
    out = list(pieces)
    for i, piece in enumerate(out):
        if i and out[i - 2].text == "developer" and out[i - 1].text == "<|message|>":
            text = piece.text.removesuffix("\n\n") if "# Tools\n\n" not in piece.text else piece.text
            out[i] = piece._replace(text=re.sub(r"(// default: .*),\n", r"\1\n", text))
    return out
