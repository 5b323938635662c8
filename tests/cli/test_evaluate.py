"""`eval` and `compare` from outside: tables, JSON, files of failures, verdicts as exit codes, and bad usage in one line."""

import json

import pytest

from gptoss_jax.cli import main


def test_eval_prints_and_writes_the_nano_tasks(tmp_path, capsys):
    out = tmp_path / "new" / "r.json"
    command = ["eval", "nano", "--task", "A", "Eng", "--limit", "50", "--failures", "1", "--failures-out", str(tmp_path / "f"), "--out", str(out)]
    assert main(command) == 0
    text = capsys.readouterr().out
    found = json.loads(out.read_text())
    assert found["tasks"]["A"]["total"] == 50 and found["tasks"]["Eng"]["passed"] == 50 and found["as"] == "trained"
    assert "50 of 50" in text and "instead of" in text and "loss over all" in text and "100.0% [92.9%, 100.0%]" in text
    failures = (tmp_path / "f" / "A.jsonl").read_text().splitlines()
    assert len(failures) == 50 - found["tasks"]["A"]["passed"] and not (tmp_path / "f" / "Eng.jsonl").exists()


def test_eval_of_conversations_groups_them_by_task_and_takes_task_files(tmp_path, capsys):
    rows = [
        {"messages": [{"role": "user", "content": f"Spell out {n}."}, {"role": "assistant", "content": answer}], "task": task}
        for n, answer, task in ((3, "three", "x"), (4, "four", "y"), (5, "six", "y"))
    ]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["eval", "nano", "--data", str(tmp_path / "d.jsonl"), "--out", str(tmp_path / "r.json")]) == 0
    tasks = json.loads((tmp_path / "r.json").read_text())["tasks"]
    assert [(name, task["passed"], task["total"]) for name, task in tasks.items()] == [("x", 1, 1), ("y", 1, 2)]
    (tmp_path / "mine.yaml").write_text("data: d.jsonl\nscorer: {name: regex, pattern: '^(three|f)'}\nmax_new_tokens: 16\n")
    assert main(["eval", "nano", "--task", str(tmp_path / "mine.yaml"), "--as", "mxfp4"]) == 0
    assert "3 of 3" in capsys.readouterr().out


def test_compare_prints_the_distance_and_its_verdict_is_the_exit_code(tmp_path, capsys):
    command = ["compare", "nano", "nano", "--as-b", "nvfp4", "--task", "Eng", "--limit", "20", "--out", str(tmp_path / "c.json")]
    assert main(command) == 0 and "verdict" not in capsys.readouterr().out
    found = json.loads((tmp_path / "c.json").read_text())
    assert 0 < found["kl_ab"] < 0.1 and len(found["layer_error"]) == 5 and found["as_b"] == "nvfp4"
    assert main([*command, "--max-kl", "1e-12"]) == 1
    assert "verdict: no, mean KL(A || B)" in capsys.readouterr().out
    assert main([*command[:2], "nano", "--task", "Eng", "--limit", "20", "--max-kl", "0", "--min-top1", "1"]) == 0
    assert "verdict: yes" in capsys.readouterr().out


@pytest.mark.parametrize(
    "args, message",
    [
        (["eval", "nano", "--task", "Engl"], "A, B, H, Eng"),
        (["eval", "nano", "--task", "A", "A"], "two tasks are called 'A'"),
        (["eval", "nano", "--task", "A", "--data", "x.jsonl"], "not both"),
        (["eval", "nano", "--limit", "0"], "--limit 0"),
        (["eval", "nano", "--data", "missing.jsonl"], "missing.jsonl"),
        (["eval", "nano", "--endpoint", "localhost:8000"], "is no URL"),
        (["eval", "nano", "--endpoint", "http://localhost:8000", "--timeout", "0"], "timeout = 0"),
        (["compare", "nano"], "second checkpoint or --endpoint"),
        (["compare", "nano", "nano", "--endpoint", "http://127.0.0.1:9"], "one of them"),
        (["compare", "nano", "nano", "--places", "0"], "--places"),
        (["compare", "nano", "no/such/dir/at/all"], "no/such/dir"),
    ],
)
def test_bad_usage_gets_one_line(args, message, capsys):
    assert main(args) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.strip().splitlines()) == 1, error


def test_a_server_that_is_not_there_is_said_with_exit_code_1(capsys):
    pytest.importorskip("requests", reason="endpoints need the package requests")
    assert main(["eval", "nano", "--endpoint", "http://127.0.0.1:9"]) == 1
    assert "connection refused: is the server running there?" in capsys.readouterr().err
