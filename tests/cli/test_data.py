"""`data inspect` and `data validate` from outside: counts, samples with trained tokens marked, a page that needs nothing else, and exit codes."""

import html.parser
import json
import re

import pytest

from gptoss_jax.cli import main

GOOD = [
    {"messages": [{"role": "user", "content": f"What is {i}?"}, {"role": "assistant", "thinking": "Easy.", "content": f"<b>{i}</b> & \x1b[31m"}]}
    for i in range(5)
]
PLAIN = {"instruction": "Say hi.", "input": "", "output": "hi"}


@pytest.fixture
def file(tmp_path):
    return write(tmp_path / "d.jsonl", [*GOOD, PLAIN])


def write(path, rows):
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_data_alone_lists_both_commands(capsys):
    assert main(["data"]) == 0
    out = capsys.readouterr().out
    assert re.findall(r"gptoss-jax data (\w+)", out) == ["inspect", "validate"]


@pytest.mark.parametrize("command", ["inspect", "validate"])
def test_both_have_help_that_explains_their_options(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["data", command, "--help"])
    assert stop.value.code == 0 and "ROLE" not in (text := capsys.readouterr().out) and "--columns" in text and len(text.splitlines()) < 40


def test_inspect_counts_and_marks_trained_tokens_with_brackets(file, capsys):
    assert main(["data", "inspect", file, "--samples", "2", "--row-length", "64"]) == 0
    out = capsys.readouterr().out
    assert "6 conversations (messages: 5, instruction/output: 1)" in out and "1 without thinking" in out
    assert (
        "<|start|>user<|message|>What is 0?<|end|><|start|>assistant[[<|channel|>analysis<|message|>Easy.<|end|>"
        "<|start|>assistant<|channel|>final<|message|><b>0</b> & \\x1b[31m<|return|>]]"
    ) in out and "\x1b" not in out
    assert re.search(r"\d+ - \d+ \|█+ +\d", out) and "filled to" in out


def test_inspect_colours_trained_tokens_on_a_terminal_unless_told_not_to(file, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert main(["data", "inspect", file, "--samples", "1"]) == 0
    out = capsys.readouterr().out
    assert "\x1b[1;32m<|channel|>" in out and "[[" not in out
    monkeypatch.setenv("NO_COLOR", "1")
    assert main(["data", "inspect", file, "--samples", "1"]) == 0
    out = capsys.readouterr().out
    assert "[[<|channel|>" in out and "\x1b[1;32m" not in out


def test_inspect_says_where_the_model_learns_another_token_than_the_one_in_its_context(tmp_path, capsys):
    turns = [{"role": role, "content": text} for text in "abcd" for role in ("user", "assistant")]
    assert main(["data", "inspect", write(tmp_path / "d.jsonl", [{"messages": turns}])]) == 0
    out = capsys.readouterr().out
    assert out.count("a<|end|> (learns <|return|>)]]<|start|>user") == 1 and out.count("(learns") == 3
    assert "[[<|channel|>final<|message|>d<|return|>]]" in out


def test_inspect_prints_json(file, capsys):
    assert main(["data", "inspect", file, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    (train,) = found["sets"]
    assert train["conversations"] == 6 == sum(train["histogram"]["documents"]) and found["problems"] == [] and found["warnings"] == []
    assert train["trained"] == sum(train["trained_by_channel"].values()) and 0 < train["fill"] < 1


class Page(html.parser.HTMLParser):
    """Checks that tags nest and collects what a browser would fetch."""

    def __init__(self):
        super().__init__()
        self.open, self.fetched, self.titles, self.trained = [], [], [], ""

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.fetched += [value for name, value in attrs.items() if name in ("src", "href")]
        if tag == "span" and "title" in attrs:
            self.titles.append(attrs["title"])
        if tag not in ("meta", "rect", "line"):
            self.open.append((tag, attrs))

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        if tag not in ("rect", "line"):
            assert self.open.pop()[0] == tag

    def handle_data(self, data):
        if self.open and self.open[-1][0] == "span" and "title" in self.open[-1][1] and "on" in self.open[-1][1].get("class", "").split():
            self.trained += data


def test_inspect_writes_a_page_that_stands_alone(file, tmp_path, capsys):
    assert main(["data", "inspect", file, "--samples", "1", "--html", str(tmp_path / "out.html")]) == 0
    text = (tmp_path / "out.html").read_text()
    page = Page()
    page.feed(text)
    page.close()
    assert not page.open and not page.fetched and "http" not in text and "<script" not in text and "url(" not in text
    expected = "<|channel|>analysis<|message|>Easy.<|end|><|start|>assistant<|channel|>final<|message|><b>0</b> & \\x1b[31m<|return|>"
    assert page.trained == expected and all(re.fullmatch(r"\d+( \d+)*", title) for title in page.titles)
    assert "prefers-color-scheme: dark" in text and "<svg" in text and "<rect" in text


def test_inspect_takes_settings_and_both_sets_from_a_config(file, tmp_path, capsys):
    config = tmp_path / "c.yaml"
    data = {"train": [{"path": file, "weight": 2}], "eval_fraction": 0.34, "row_length": 24, "too_long": "truncate", "loss": "all"}
    config.write_text(f"model: nano\ndata: {json.dumps(data)}\n")
    assert main(["data", "inspect", "--config", str(config), "--samples", "1"]) == 0
    out = capsys.readouterr().out
    assert "train: 6 conversations" in out and "eval: 3 conversations" in out and "(weight 2)" in out
    assert "--- the row ends here; " in out and "WARNING: train: " in out and "are cut at its end; " in out


def test_inspect_shows_bad_rows_and_goes_on(tmp_path, capsys):
    path = write(tmp_path / "d.jsonl", [*GOOD, "nonsense\n"])
    assert main(["data", "inspect", path, "--samples", "0"]) == 0
    out = capsys.readouterr().out
    assert "train: 1 bad rows are left out" in out and f"{path}:6: not JSON" in out
    assert main(["data", "inspect", write(tmp_path / "all.jsonl", ["nonsense\n"])]) == 4
    assert "no row can be used; the first: " in capsys.readouterr().err


def test_columns_are_named_on_the_command_line(tmp_path, capsys):
    path = write(tmp_path / "d.jsonl", [{"question": "q", "answer": "a"}])
    assert main(["data", "validate", path]) == 4
    assert "name them: columns: {user: ..., assistant: ...}" in capsys.readouterr().out
    assert main(["data", "validate", path, "--columns", "user=question", "assistant=answer"]) == 0
    assert "1 conversations (columns user=question, assistant=answer: 1), clean" in capsys.readouterr().out


def test_validate_prints_every_bad_line_and_exits_with_4(tmp_path, capsys):
    bad = {
        "nonsense\n": "not JSON: Expecting value at column 1",
        json.dumps({"messages": "x"}) + "\n": "messages is of type str",
        json.dumps({"messages": GOOD[0]["messages"][:1]}) + "\n": "the last message must be the assistant's",
        json.dumps({"messages": [{"role": "usr", "content": "x"}]}) + "\n": 'did you mean "user"?',
        json.dumps({"messages": [{**GOOD[0]["messages"][0], "content": ""}, GOOD[0]["messages"][1]]}) + "\n": "messages[0].content is empty",
        json.dumps({"messages": [{"role": "user", "content": "a\0"}, GOOD[0]["messages"][1]]}) + "\n": "NUL at character 1",
        json.dumps({"messages": [{"role": "user", "content": "\ud800"}, GOOD[0]["messages"][1]]}) + "\n": "half a surrogate pair",
    }
    path = write(tmp_path / "d.jsonl", [GOOD[0], *bad, "\r\n", GOOD[1], *["{}\n"] * 30])
    assert main(["data", "validate", path, write(tmp_path / "good.jsonl", GOOD)]) == 4
    lines = capsys.readouterr().out.splitlines()
    for line, (number, reason) in zip(lines, enumerate(bad.values(), 2)):
        assert line.startswith(f"{path}:{number}: ") and reason in line
    assert len(lines) == len(bad) + 30 + 2 and lines[-2].endswith("2 conversations (messages: 2), 37 bad") and lines[-1].endswith("clean")


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["inspect"], 2, "give a path, or a --config that sets data.train"),
        (["inspect", "x.jsonl"], 2, "no such file or directory: x.jsonl"),
        (["validate", "x.jsonl", "--columns", "question"], 2, "ROLE=COLUMN"),
        (["validate", "x.jsonl", "--columns", "usr=question", "assistant=a"], 2, 'did you mean "user"?'),
        (["inspect", "x.jsonl", "--samples", "-1"], 2, "--samples must be at least 0"),
    ],
)
def test_bad_usage_gets_one_line(args, code, message, capsys):
    assert main(["data", *args]) == code
    err = capsys.readouterr().err
    assert message in err and len(err.strip().splitlines()) == 1


def test_training_without_data_says_which_flag_and_shows_rows_that_are_valid(tmp_path, capsys):
    assert main(["sft", "model=x", "output=y"]) == 2
    err = capsys.readouterr().err
    assert "data.train is not set: give data.train=FILE" in err
    rows = [line.strip() + "\n" for line in err.splitlines() if line.strip().startswith("{")]
    assert len(rows) == 2
    assert main(["data", "validate", write(tmp_path / "shown.jsonl", rows)]) == 0
