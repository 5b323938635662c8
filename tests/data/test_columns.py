"""Every known layout of columns becomes the same conversation; an unknown one is answered with the nearest."""

import pytest

from gptoss_jax.data import Source
from gptoss_jax.data.columns import to_conversation
from gptoss_jax.data.messages import BadRow, check_row

SYSTEM, USER, ANSWER = ({"role": role, "content": text} for role, text in (("system", "Be brief."), ("user", "Hi?"), ("assistant", "Hello.")))
THOUGHTFUL = {**ANSWER, "thinking": "A greeting."}
CASES = {
    "messages": ({"messages": [USER, ANSWER]}, [USER, ANSWER]),
    "conversations": (
        {"conversations": [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Hello."}]},
        [SYSTEM, USER, ANSWER],
    ),
    "conversations, blank system": (
        {"conversations": [{"from": "system", "value": ""}, {"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Hello."}]},
        [USER, ANSWER],
    ),
    "conversations, roles": ({"conversations": [USER, THOUGHTFUL]}, [USER, THOUGHTFUL]),
    "prompt/completion": ({"prompt": "Hi?", "completion": "Hello."}, [USER, ANSWER]),
    "prompt/completion, lists": ({"prompt": [SYSTEM, USER], "completion": [THOUGHTFUL]}, [SYSTEM, USER, THOUGHTFUL]),
    "instruction/output": ({"instruction": "Hi?", "input": "", "output": "Hello."}, [USER, ANSWER]),
    "instruction/output, input": (
        {"instruction": "Add.", "input": "2, 2", "output": "Hello.", "system": "Be brief."},
        [SYSTEM, {"role": "user", "content": "Add.\n\n2, 2"}, ANSWER],
    ),
    "user/final": (
        {"reasoning_language": "French", "developer": "Be brief.", "user": "Hi?", "analysis": "A greeting.", "final": "Hello."},
        [{"role": "system", "content": "reasoning language: French\n\nBe brief."}, USER, THOUGHTFUL],
    ),
    "instruct_response": (
        {"prompt": "Hi?", "category": 3, "category_text": "x", "instruct_response": "Hello.", "cot_response": "<think>No.</think>No."},
        [USER, ANSWER],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_known_layout_becomes_messages(name):
    row, messages = CASES[name]
    layout, converted = to_conversation(row)
    assert layout == name.partition(",")[0]
    assert check_row(converted)["messages"] == messages


def test_messages_come_before_the_flat_columns_of_multilingual_thinking():
    row = {"reasoning_language": "German", "developer": "d", "user": "u", "analysis": "a", "final": "f", "messages": [SYSTEM, USER, THOUGHTFUL]}
    assert to_conversation(row) == ("messages", row)


def test_null_columns_do_not_make_a_layout():
    assert to_conversation({"messages": None, "prompt": "Hi?", "completion": "Hello."})[1]["messages"] == [USER, ANSWER]


@pytest.mark.parametrize("tagged", ["<think>A greeting.</think>Hello.", "\n<think>\nA greeting.\n</think>\n\nHello."])
def test_the_response_with_thoughts_is_an_option_and_its_tags_are_split(tagged):
    row = {"prompt": "Hi?", "instruct_response": "No.", "cot_response": tagged, "category_text": "x"}
    assert to_conversation(row, response="cot") == ("cot_response", {"category_text": "x", "messages": [USER, THOUGHTFUL]})
    assert to_conversation({**row, "cot_response": "Hello."}, response="cot")[1]["messages"] == [USER, ANSWER]


def test_messages_keep_think_tags_as_text():
    tagged = {"role": "assistant", "content": "<think>x</think>y"}
    assert to_conversation({"messages": [USER, tagged]})[1]["messages"][1] == tagged


def test_columns_can_be_named():
    row = {"question": "Hi?", "answer": "Hello.", "why": "A greeting.", "style": "Be brief.", "id": 5, "messages": "not these"}
    columns = {"user": "question", "assistant": "answer", "thinking": "why", "system": "style"}
    layout, converted = to_conversation(row, columns)
    assert layout == "columns user=question, assistant=answer, thinking=why, system=style"
    assert converted["messages"] == [SYSTEM, USER, THOUGHTFUL] and converted["id"] == 5 and "question" not in converted
    assert to_conversation({"chat": [USER, ANSWER]}, {"messages": "chat"})[1] == {"messages": [USER, ANSWER]}


@pytest.mark.parametrize(
    ("row", "columns", "reason"),
    [
        ({"a": 1}, None, "no conversation in its columns (a); name them: columns: {user: ..., assistant: ...}"),
        ({}, None, "no conversation in its columns (none)"),
        ({"text": "x"}, None, "raw text has no roles"),
        ({"instruction": "x", "response": "y"}, None, 'nearest is the layout instruction/output, which lacks "output"'),
        ({"prompts": "x", "completions": "y"}, None, 'nearest is the layout prompt/completion, which lacks "prompt", "completion"'),
        ({"prompt": "x", "completion": 5}, None, 'column "completion" is of type int'),
        ({"prompt": ["x"], "completion": "y"}, None, 'column "prompt" is of type list'),
        ({"conversations": "x"}, None, '"conversations" is of type str'),
        ({"conversations": [{"from": "humann", "value": "x"}]}, None, 'conversations[0].from is "humann": did you mean "human"?'),
        ({"conversations": [{"from": "human"}]}, None, "conversations[0] must be an object with from and value"),
        ({"conversations": [{"from": "gpt", "value": None}]}, None, 'column "value" is null'),
        ({"questions": "x", "answer": "y"}, {"user": "question", "assistant": "answer"}, 'no column "question": did you mean "questions"?'),
        ([], None, "the row is of type list"),
    ],
)
def test_what_fits_no_layout_is_named(row, columns, reason):
    with pytest.raises(BadRow) as error:
        to_conversation(row, columns)
    assert reason in str(error.value)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"columns": {"user": "q"}}, "must name user and assistant"),
        ({"columns": {"usr": "q", "assistant": "a"}}, 'did you mean "user"'),
        ({"columns": {"messages": "m", "user": "q"}}, "names messages and others"),
        ({"weight": 0.0}, "weight = 0.0"),
        ({"weight": float("nan")}, "weight = nan"),
        ({"limit": 0}, "limit = 0"),
    ],
)
def test_a_source_refuses_what_means_nothing(values, reason):
    with pytest.raises(ValueError, match=reason):
        Source("x.jsonl", **values)


def test_the_language_of_a_flat_row_stays_for_the_language_task():
    row, _ = CASES["user/final"]
    assert to_conversation(row)[1]["reasoning_language"] == "French"
