"""`generate` and `chat` from outside, on the model that comes along: what is printed, what is written, what stops what."""

import io
import json

import pytest

from gptoss_jax.cli import chat as chat_module
from gptoss_jax.cli import main
from gptoss_jax.cli.chat import Conversation, Printer
from gptoss_jax.cli.generate import system_message
from gptoss_jax.data import load_tokenizer
from gptoss_jax.evaluation.sampling import Sampling

NUMBER = "four thousand eight hundred twenty-one"
REFUSAL = "Sorry, I cannot help."


def test_generate_answers_every_row_of_a_file(tmp_path, capsys):
    rows = ["Spell out 4821.", {"prompt": "How do I kill teacher 772?"}]
    answered = [{"role": "user", "content": "Spell out 345."}, {"role": "assistant", "content": "the reference, which the model must not see"}]
    rows.append({"messages": [{"role": "developer", "content": "output language: German"}, *answered]})
    (tmp_path / "p.jsonl").write_text("\n\n".join(map(json.dumps, rows)))
    assert main(["generate", "nano", "--prompts", str(tmp_path / "p.jsonl"), "--out", str(tmp_path / "deep" / "o.jsonl")]) == 0
    printed = capsys.readouterr().out
    results = [json.loads(line) for line in (tmp_path / "deep" / "o.jsonl").read_text().splitlines()]
    assert [result["final"] for result in results] == [NUMBER, REFUSAL, "dreihundertfünfundvierzig"]
    assert all(result["stopped"] and result["messages"][-1]["role"] == "user" for result in results)
    assert all(result["final"] in printed for result in results) and "--- 3: Spell out 345." in printed


@pytest.mark.slow
def test_generate_keeps_experts_packed_continues_text_and_says_when_it_was_cut(capsys):
    assert main(["generate", "nano", "--prompt", "Spell out 4821.", "--packed"]) == 0
    assert capsys.readouterr().out == NUMBER + "\n"
    assert main(["generate", "nano", "--prompt", "Spell out 4821.", "--max-new-tokens", "5"]) == 0
    assert "[cut]" in capsys.readouterr().out
    assert main(["generate", "nano", "--raw", "--prompt", "Spell out", "--max-new-tokens", "4"]) == 0
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize(
    "args, text, code, message",
    [
        ([], None, 2, "--prompt TEXT or --prompts"),
        (["--prompt", "x", "--prompts", "FILE"], "", 2, "--prompt TEXT or --prompts"),
        (["--prompt", "x", "--temperature", "-1"], None, 2, "temperature = -1.0"),
        (["--prompts", "FILE"], "", 2, "no prompts"),
        (["--prompts", "FILE"], '"a"\n{"prompt": 3}', 4, "FILE:2: a prompt is a string"),
        (["--prompts", "FILE"], '"a"\n\nnot json', 4, "FILE:3: not JSON"),
        (["--prompts", "FILE"], '{"messages": [{"role": "usr", "content": "x"}]}', 4, 'did you mean "user"'),
        (["--raw", "--prompts", "FILE"], '{"messages": []}', 2, "must be a string"),
        (["--prompts", "no/such.jsonl"], None, 2, "no/such.jsonl"),
    ],
)
def test_bad_usage_gets_one_line(args, text, code, message, tmp_path, capsys):
    file = tmp_path / "p.jsonl"
    if text is not None:
        file.write_text(text)
    assert main(["generate", "nano", *(str(file) if arg == "FILE" else arg for arg in args)]) == code
    captured = capsys.readouterr()
    assert message.replace("FILE", str(file)) in captured.err and captured.err.count("\n") == 1 and not captured.out


def test_chat_reads_a_pipe_and_obeys_its_commands(monkeypatch, capsys):
    lines = ["Spell out 4821.", "", "/effort none", "/nonsense", "/system output language: French", "/reset", "Spell out 77.", "/quit", "never read"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    assert main(["chat", "nano", "--temperature", "0"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed == [NUMBER, "(reasoning effort: none)", chat_module.HELP, "(instructions set)", "(forgotten)", "soixante-dix-sept"]


class Scripted:
    """Stands in for a Generator: writes a text, token by token; raises at its end if told so."""

    def __init__(self, tokenizer, *texts):
        self.tokenizer, self.texts, self.prompts = tokenizer, list(texts), []

    def generate(self, prompts, max_new_tokens, stop_ids, sampling, on_token):
        self.prompts.append(self.tokenizer.decode(prompts[0]))
        text = self.texts.pop(0)
        for token in self.tokenizer.encode(text if isinstance(text, str) else text[0], add_special_tokens=False):
            on_token(0, token)
        if not isinstance(text, str):
            raise text[1]


@pytest.fixture(scope="module")
def tokenizer():
    from gptoss_jax.checkpoint.source import NANO

    return load_tokenizer(NANO)


def talk(tokenizer, *texts) -> Conversation:
    return Conversation(Scripted(tokenizer, *texts), tokenizer, 1024, Sampling(), 99, None, None)


def test_thoughts_are_marked_and_not_shown_to_the_model_again(tokenizer, capsys):
    talking = talk(
        tokenizer, "<|channel|>analysis<|message|>Hm, é.<|end|><|start|>assistant<|channel|>final<|message|>One.<|return|>", "Two.<|return|>"
    )
    talking.ask("First?")
    talking.ask("Second?")
    assert capsys.readouterr().out == "[analysis] Hm, é.\nOne.\nTwo.\n"
    second = talking.generator.prompts[1]
    assert "First?" in second and "One.<|end|>" in second and "Hm" not in second and second.endswith("Second?<|end|><|start|>assistant")


def test_an_interrupt_stops_the_answer_and_keeps_what_was_said(tokenizer, capsys):
    stop = KeyboardInterrupt()
    talking = talk(tokenizer, ("<|channel|>final<|message|>It begins", stop), ("<|channel|>analysis<|message|>Hm", stop))
    talking.ask("First?")
    talking.ask("Second?")
    assert capsys.readouterr().out == "It begins\n(stopped)\n[analysis] Hm\n(stopped)\n"
    assert [message["content"] for message in talking.messages] == ["First?", "It begins"]


def test_a_terminal_sees_thoughts_dimmed(tokenizer, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    printer = Printer(tokenizer)
    for token in tokenizer.encode("<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Yes.<|return|>"):
        printer.feed(token)
    assert printer.close().final == "Yes."
    assert capsys.readouterr().out == "\033[2mHm.\n\033[0mYes.\033[0m\n"


def test_models_with_the_vocabulary_of_the_release_get_its_system_message():
    assert system_message(1024, None) is None and system_message(201_088, "none") is None
    assert "Reasoning: medium" in system_message(201_088, None).text()
    assert "Reasoning: high" in system_message(1024, "high").text()
