"""Rows come out in one form, whatever their spelling; what is wrong with a row is said with the place and the way out."""

import json

import pytest

from gptoss_jax.data.messages import BadRow, check_row

USER = {"role": "user", "content": "What is 1 + 1?"}
FUNCTION = {"name": "add", "description": "Adds.", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}}
TOOL = {"type": "function", "function": FUNCTION}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
ASKS = {"role": "assistant", "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": "2"}
ANSWER = {"role": "assistant", "content": "2."}


def row(*messages, **fields):
    return {"messages": list(messages), **fields}


def test_all_spellings_of_tools_calls_and_results_come_out_alike():
    checked = check_row(row(USER, ASKS, RESULT, ANSWER, tools=[TOOL]))
    assert checked == row(USER, ASKS, {**RESULT, "name": "add"}, ANSWER, tools=[TOOL])
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    openai = {"role": "assistant", "content": None, "tool_calls": [call]}
    bare = {"role": "assistant", "channel": "commentary", "tool_calls": [{"name": "add", "arguments": {"a": 1}}]}
    result = {**RESULT, "tool_call_id": "c1", "name": "add", "thinking": None, "tool_calls": None}
    for asks, tools in ((openai, json.dumps([TOOL])), (bare, [FUNCTION]), (bare, [{**TOOL, "function": {**FUNCTION, "strict": None}}])):
        final = {**ANSWER, "channel": "final", "thinking": " ", "tool_calls": []}
        assert check_row(row(USER, asks, result, final, tools=tools, reasoning_effort=None, weight=None)) == checked


@pytest.mark.parametrize("content", ["", "text", {"a": [1, None]}, [], 0, False])
def test_a_result_is_any_json_value(content):
    assert check_row(row(USER, ASKS, {"role": "tool", "content": content}, ANSWER))["messages"][2]["content"] == content


def test_a_prompt_may_end_with_anybody():
    for messages in ([USER], [USER, ASKS, RESULT], [USER, ANSWER]):
        assert len(check_row(row(*messages), prompt=True)["messages"]) == len(messages)


def test_a_preamble_does_not_end_the_turn():
    preamble = {"role": "assistant", "channel": "commentary", "content": "I will add."}
    assert check_row(row(USER, preamble, ASKS, RESULT, preamble, RESULT, ANSWER))["messages"][1] == preamble


def test_other_columns_and_weights_are_kept():
    given = row(USER, {**ANSWER, "weight": 0.5}, weight=2, task="A", reasoning_effort="low")
    assert check_row(given) == given


def nested(depth):
    value = "x"
    for _ in range(depth):
        value = {"properties": {"a": value}, "type": "object"}
    return value


DEEP = {"properties": {"a": {"type": "object", "properties": ["b"]}}}
BAD = {
    "other_name": (row(USER, {**ANSWER, "reasoning_content": "x"}), 'unknown field "reasoning_content": here it is called "thinking"'),
    "result_first": (row(USER, RESULT, ANSWER), "messages[1].role is \"tool\": there is no call before it"),
    "result_after_answer": (row(USER, ASKS, RESULT, ANSWER, RESULT, ANSWER), "messages[4].role is \"tool\": there is no call before it"),
    "result_of_another": (row(USER, ASKS, {**RESULT, "name": "sub"}, ANSWER), 'messages[2].name is "sub": the call before it is one of "add"'),
    "no_result": (row(USER, ASKS, {"role": "tool"}, ANSWER), "messages[2].content is null"),
    "two_calls": (row(USER, {**ASKS, "tool_calls": [CALL, CALL]}), "messages[1].tool_calls has 2 calls: gpt-oss makes one at a time"),
    "calls_object": (row(USER, {**ASKS, "tool_calls": CALL}), "messages[1].tool_calls is of type dict, it must be a list"),
    "call_string": (row(USER, {**ASKS, "tool_calls": ["add"]}), "messages[1].tool_calls[0] is of type str, it must be an object"),
    "call_kind": (row(USER, {**ASKS, "tool_calls": [{"type": "web", "name": "x"}]}), 'tool_calls[0].type is "web": only functions'),
    "call_name": (row(USER, {**ASKS, "tool_calls": [{"name": "a b"}]}), "tool_calls[0]: 'a b' is no name of a function"),
    "arguments": (row(USER, {**ASKS, "tool_calls": [{"name": "f", "arguments": "{a: 1}"}]}), "arguments is a string that is not JSON"),
    "arguments_list": (row(USER, {**ASKS, "tool_calls": [{"name": "f", "arguments": "[1]"}]}), "arguments is of type list, it must be an object"),
    "arguments_nul": (row(USER, {**ASKS, "tool_calls": [{"name": "f", "arguments": {"a": "\ud800"}}]}), "half a surrogate pair"),
    "content_type": (row(USER, {**ASKS, "tool_calls": [{"name": "f", "content_type": "<|end|>"}]}), 'content_type is "<|end|>"'),
    "two_thoughts": (row(USER, {**ASKS, "thinking": "x", "content": "y"}), "messages[1] has thinking, content and a call"),
    "call_in_final": (row(USER, {**ASKS, "channel": "final"}), 'messages[1].channel is "final"'),
    "analysis_channel": (row(USER, {**ANSWER, "channel": "analysis"}), 'messages[1].channel is "analysis"'),
    "user_channel": (row({**USER, "channel": "final"}, ANSWER), 'has "channel" and its role is "user": only an assistant chooses a channel'),
    "user_calls": (row({**USER, "tool_calls": [CALL]}, ANSWER), "only an assistant calls tools"),
    "user_weight": (row({**USER, "weight": 1}, ANSWER), "only an assistant is trained"),
    "user_name": (row({**USER, "name": "Jo"}, ANSWER), 'messages[0] has "name" and its role is "user"'),
    "preamble_last": (row(USER, {**ANSWER, "channel": "commentary"}), 'messages[1].channel is "commentary": the model goes on'),
    "tool_last": (row(USER, ASKS, RESULT), 'messages[2].role is "tool": the last message must be the assistant\'s'),
    "weight": (row(USER, {**ANSWER, "weight": -1}), "messages[1].weight is -1, it must be a number of at least 0"),
    "weight_bool": (row(USER, ANSWER, weight=True), "weight is True, it must be a number"),
    "weight_nan": (row(USER, ANSWER, weight=float("nan")), "weight is nan"),
    "effort": (row(USER, ANSWER, reasoning_effort="hi"), 'reasoning_effort is "hi": did you mean "high"?'),
    "tools_object": (row(USER, ANSWER, tools=TOOL), "tools is of type dict, it must be a list of functions"),
    "tools_text": (row(USER, ANSWER, tools="add"), "tools is a string that is not JSON"),
    "tool_without_name": (row(USER, ANSWER, tools=[{"type": "function"}]), "tools[0] has no function with a name"),
    "no_description": (row(USER, ANSWER, tools=[TOOL, {"name": "f"}]), "tools[1].function.description is missing"),
    "properties": (row(USER, ANSWER, tools=[{**FUNCTION, "parameters": DEEP}]), "parameters.properties.a.properties is of type list"),
    "required": (row(USER, ANSWER, tools=[{**FUNCTION, "parameters": {**FUNCTION["parameters"], "required": True}}]), "required is of type bool"),
    "enum": (row(USER, ANSWER, tools=[{**FUNCTION, "parameters": {"properties": {"a": {"type": "string", "enum": "x"}}}}]), "a.enum is of type str"),
    "deep_tool": (row(USER, ANSWER, tools=[{**FUNCTION, "parameters": nested(20_000)}]), "nested too deeply"),
    "deep_result": (row(USER, ASKS, {"role": "tool", "content": nested(20_000)}, ANSWER), "nested too deeply"),
    "tool_nul": (row(USER, ANSWER, tools=[{**FUNCTION, "description": "a\0"}]), "tools has a NUL"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_named(name):
    bad, reason = BAD[name]
    with pytest.raises(BadRow) as error:
        check_row(bad)
    assert reason in str(error.value) and "\n" not in str(error.value)
