"""Good rows arrive as written, from every kind of source; a bad row is named with file, line, field and the nearest valid value."""

import json

import pyarrow as pa
import pyarrow.parquet
import pytest

from gptoss_jax.data import load_rows
from gptoss_jax.errors import CorruptError, UsageError

SYSTEM = {"role": "system", "content": "reasoning language: French"}
USER = {"role": "user", "content": "Grüße \U0001f408"}
ASSISTANT = {"role": "assistant", "thinking": "Hm.", "content": "Voilà."}
GOOD = {"messages": [SYSTEM, USER, ASSISTANT]}
COLUMNS = [{"role": m["role"], "content": m["content"], "thinking": m.get("thinking")} for m in GOOD["messages"]]


def write_lines(path, *lines):
    path.write_bytes(b"".join(line if isinstance(line, bytes) else json.dumps(line).encode() + b"\n" for line in lines))
    return path


def chat(*messages):
    return {"messages": list(messages)}


def test_jsonl(tmp_path):
    path = write_lines(tmp_path / "d.jsonl", b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\r\n", b"  \n", {**GOOD, "task": "A"})
    assert load_rows(path) == ([GOOD, {**GOOD, "task": "A"}], [])


def test_parquet_with_null_thinking(tmp_path):
    pyarrow.parquet.write_table(pa.Table.from_pylist([{"messages": COLUMNS}] * 3), tmp_path / "d.parquet")
    assert load_rows(tmp_path / "d.parquet").rows == [GOOD] * 3


def test_saved_datasets_directory_and_splits(tmp_path):
    datasets = pytest.importorskip("datasets")
    one = datasets.Dataset.from_list([{"messages": COLUMNS}] * 2)
    one.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict(train=one, test=one.select([0])).save_to_disk(str(tmp_path / "two"))
    assert load_rows(tmp_path / "one").rows == [GOOD] * 2
    assert load_rows(tmp_path / "two", split="test").rows == [GOOD]
    with pytest.raises(UsageError, match="splits train, test: choose one"):
        load_rows(tmp_path / "two")
    with pytest.raises(UsageError, match="there is no 'valid'"):
        load_rows(tmp_path / "two", split="valid")
    with pytest.raises(UsageError, match="without splits"):
        load_rows(tmp_path / "one", split="train")


BAD = {
    "role": (chat(USER, {**ASSISTANT, "role": "asistant"}), 'messages[1].role is "asistant": did you mean "assistant"?'),
    "no_role": (chat({"content": "x"}, ASSISTANT), "messages[0] has no role"),
    "field": (chat(USER, {"role": "assistant", "content": "x", "thinkng": "y"}), 'unknown field "thinkng": did you mean "thinking"?'),
    "number": (chat(USER, {"role": "assistant", "content": 5}), "messages[1].content is of type int, it must be a string"),
    "null": (chat(USER, {"role": "assistant", "content": None}), "messages[1].content is null"),
    "empty": (chat(USER, {"role": "assistant", "content": " "}), "messages[1].content is empty"),
    "no_answer": (chat(USER), 'messages[0].role is "user": the last message must be the assistant\'s'),
    "late_system": (chat(USER, SYSTEM, ASSISTANT), "only the first message may be system or developer"),
    "user_thinks": (chat({**USER, "thinking": "x"}, ASSISTANT), "only an assistant thinks"),
    "tool": (chat(USER, {"role": "tool", "content": "x"}, ASSISTANT), "there is no call before it"),
    "calls": (chat(USER, {"role": "assistant", "content": "", "tool_calls": [{"id": 1}]}), "tool_calls[0] has no function with a name"),
    "tags": (chat(USER, {"role": "assistant", "content": "<|channel|>final<|message|>x"}), "without harmony tags"),
    "surrogate": (chat(USER, {"role": "assistant", "content": "a\ud800"}), "half a surrogate pair at character 1"),
    "nul": (chat(USER, {"role": "assistant", "content": "a\0"}), "NUL at character 1"),
    "half_a_layout": ({"instruction": "x", "answer": "y"}, 'nearest is the layout instruction/output, which lacks "output"'),
    "other": ({"a": 1, "b": 2}, "no conversation in its columns (a, b); name them: columns: {user: ..., assistant: ...}"),
    "text": ({"text": "once upon a time"}, "raw text has no roles"),
    "empty_list": ({"messages": []}, "messages is empty"),
    "not_list": ({"messages": "x"}, "messages is of type str"),
    "not_object": ([1, 2], "the row is of type list"),
    "string": (chat("hello"), "messages[0] is of type str"),
    "cut": (b'{"messages": [\n', "not JSON"),
    "utf8": (b'{"messages": "\xff"}\n', "not UTF-8 at byte 14"),
    "twice": (b'{"messages": [], "messages": []}\n', '"messages" stands twice'),
    "deep": (b"[" * 200_000 + b"\n", "not usable JSON"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_line_is_named(tmp_path, name):
    bad, reason = BAD[name]
    path = write_lines(tmp_path / "d.jsonl", GOOD, bad, GOOD)
    with pytest.raises(CorruptError) as error:
        load_rows(path)
    assert str(error.value).splitlines()[0] == f"1 of 3 rows of {path} cannot be used:"
    assert f"{path}:2: " in str(error.value) and reason in str(error.value)
    assert load_rows(path, skip_bad_rows=True).rows == [GOOD, GOOD]
    assert len(load_rows(path, skip_bad_rows=True).problems) == 1


def test_many_bad_lines_are_counted_and_the_first_shown(tmp_path):
    path = write_lines(tmp_path / "d.jsonl", *[{"a": 1}] * 50, GOOD)
    with pytest.raises(CorruptError) as error:
        load_rows(path)
    lines = str(error.value).splitlines()
    assert lines[0].startswith("50 of 51 rows") and len(lines) == 22 and lines[-1].endswith("and 30 more")


def test_bad_parquet_rows_are_named(tmp_path):
    pyarrow.parquet.write_table(pa.Table.from_pylist([{"messages": COLUMNS}, {"messages": COLUMNS[:2]}]), tmp_path / "d.parquet")
    with pytest.raises(CorruptError, match=r"d\.parquet: row 2: messages\[1\]\.role"):
        load_rows(tmp_path / "d.parquet")


def test_unreadable_sources_get_one_clear_line(tmp_path):
    (tmp_path / "d.parquet").write_bytes(b"PAR1 no")
    (tmp_path / "empty.jsonl").write_bytes(b"\n")
    (tmp_path / "d.csv").write_text("a,b")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "state.json").write_text("{")
    (tmp_path / "nothing").mkdir()
    for name, kind, message in [
        ("d.parquet", CorruptError, "no readable Parquet file"),
        ("broken", CorruptError, "cannot be read as a saved data set"),
        ("empty.jsonl", UsageError, "has no rows"),
        ("d.csv", UsageError, "cannot tell what this is"),
        ("nothing", UsageError, "no directory saved by datasets"),
        ("missing.jsonl", UsageError, "no such file"),
    ]:
        with pytest.raises(kind, match=message) as error:
            load_rows(tmp_path / name)
        assert "\n" not in str(error.value)
