"""Our text is the text of the release's chat template, character by character, for conversations of every shape."""

import random

import jinja2
import pytest

from gptoss_jax.data import System, render, text_of
from gptoss_jax.errors import UsageError
from tests.support import conversations, release

SYSTEM = System(release.TODAY)


@pytest.fixture(scope="module")
def template():
    return release.chat_template()


@pytest.fixture(autouse=True)
def pinned(monkeypatch):
    release.pin_date(monkeypatch)


def ours(row, *, system=SYSTEM, prompt=False):
    return text_of(render(row["messages"], tools=row.get("tools"), reasoning_effort=row.get("reasoning_effort"), system=system, prompt=prompt))


@pytest.mark.parametrize("prompt", [False, True])
def test_random_conversations_have_the_templates_text(tokenizer, template, prompt):
    for seed in range(300):
        row = conversations.conversation(random.Random(seed))
        assert ours(row, prompt=prompt) == release.apply(tokenizer, template, row, prompt=prompt), seed


def test_prompts_of_unfinished_conversations_have_the_templates_text(tokenizer, template):
    for seed in range(150):
        row = conversations.conversation(random.Random(seed))
        for k in range(1, len(row["messages"])):
            part = {**row, "messages": row["messages"][:k]}
            assert ours(part, prompt=True) == release.apply(tokenizer, template, part, prompt=True), (seed, k)


@pytest.mark.parametrize("builtin", [("browser",), ("python",), ("python", "browser")])
def test_built_in_tools_and_identity_have_the_templates_text(tokenizer, template, builtin):
    row = conversations.conversation(random.Random(1))
    system = System(release.TODAY, builtin_tools=builtin, model_identity="You are a test.")
    expected = release.apply(tokenizer, template, row, builtin_tools=list(builtin), model_identity="You are a test.")
    assert ours(row, system=system) == expected


def test_a_tool_loop_reads_as_in_the_template():
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": "ü"}}}
    messages = [
        {"role": "user", "content": "1 + ü?"},
        {"role": "assistant", "thinking": "Ask.", "tool_calls": [call]},
        {"role": "tool", "name": "add", "content": "1ü"},
    ]
    open_loop = (
        "<|start|>user<|message|>1 + ü?<|end|><|start|>assistant<|channel|>analysis<|message|>Ask.<|end|>"
        '<|start|>assistant to=functions.add<|channel|>commentary json<|message|>{"a": 1, "b": "ü"}<|call|>'
        '<|start|>functions.add to=assistant<|channel|>commentary<|message|>"1ü"<|end|>'
    )
    assert text_of(render(messages, prompt=True)) == open_loop + "<|start|>assistant"
    answered = text_of(render([*messages, {"role": "assistant", "content": "1ü."}]))
    assert answered == open_loop.replace("<|start|>assistant<|channel|>analysis<|message|>Ask.<|end|>", "") + (
        "<|start|>assistant<|channel|>final<|message|>1ü.<|return|>"
    )


def test_reasoning_effort_of_a_row_needs_the_system_message():
    assert "Reasoning: high\n" in ours({"messages": [{"role": "user", "content": "x"}], "reasoning_effort": "high"})
    for system in (None, "You are a test."):
        with pytest.raises(UsageError, match='reasoning_effort "high"'):
            render([{"role": "user", "content": "x"}], reasoning_effort="high", system=system)
    with pytest.raises(UsageError, match="'excel' is none of browser, python"):
        System(release.TODAY, builtin_tools=("excel",))


@pytest.mark.parametrize(
    "function",
    [
        {"name": "f"},
        {"name": "f", "description": "d", "parameters": {"properties": {"a": {"type": "string", "enum": ["x"], "default": None}}}},
        {"name": "f", "description": "d", "parameters": {"properties": {"a": {"oneOf": [{}], "default": 3}}}},
        {"name": "f", "description": "d", "parameters": {"properties": {"a": {"description": 5}}}},
    ],
)
def test_tools_that_the_template_cannot_write_are_refused(tokenizer, template, function):
    row = {"messages": [{"role": "user", "content": "x"}], "tools": [{"type": "function", "function": function}]}
    with pytest.raises((jinja2.UndefinedError, TypeError)):
        release.apply(tokenizer, template, row)
    with pytest.raises(ValueError, match=r"tools\[0\]\.function\..*: the release's chat template cannot write this tool"):
        ours(row)
