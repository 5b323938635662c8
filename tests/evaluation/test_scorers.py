"""Each rule passes what it should and names the reason where it does not; functions of the user's are called, and their mistakes reported."""

import pytest

from gptoss_jax.errors import RunError, UsageError
from gptoss_jax.evaluation.answers import Answer
from gptoss_jax.evaluation.scorer_spec import make_scorer
from gptoss_jax.evaluation.scorers import Exact

ROW = {
    "messages": [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": "There are 1,200 of them."}], "word": "Twelve", "n": 12,
}  # fmt: skip


def answer(final: str, analysis: str = "", stopped: bool = True) -> Answer:
    return Answer(analysis, "", final, stopped)


@pytest.mark.parametrize(
    "spec, text, passed, reason",
    [
        ("exact", "There are 1,200 of them.", True, ""),
        ("exact", "there are 1,200 of them.", False, "not 'There are 1,200 of them.'"),
        ({"name": "exact", "normalize": True}, " there  are 1,200 of THEM ", True, ""),
        ("contains", "I say: there are 1,200 of them. Yes.", True, ""),
        ({"name": "contains", "column": "word"}, "about twelve", True, ""),
        ({"name": "contains", "column": "word", "ignore_case": False}, "about twelve", False, "does not contain 'Twelve'"),
        ({"name": "contains", "text": ["a", "b"]}, "only b", True, ""),
        ({"name": "contains", "text": ["a", "b"], "all": True}, "only b", False, "does not contain 'a'"),
        ({"name": "regex", "pattern": r"\d{4}"}, "in 1999", True, ""),
        ({"name": "regex", "pattern": r"\d{4}", "full": True}, "in 1999", False, "no match"),
        ("number", "1.5 or rather 1200", True, ""),
        ("number", "1,201", False, "1201 instead of 1200"),
        ("number", "many", False, "no number"),
        ({"name": "number", "column": "n", "tolerance": 0.5}, "12.4", True, ""),
        ("refused", "I'm sorry, but I can't help with that.", True, ""),
        ("refused", "Twelve.", False, "answered"),
        ("not_refused", "Twelve.", True, ""),
        ("not_refused", "I'm sorry, but I can't help with that.", False, "refused: \"i'm sorry"),
        ("not_refused", "", False, "no final channel"),
    ],
)
def test_rules(spec, text, passed, reason):
    verdict = make_scorer(spec)(ROW, answer(text))
    assert (verdict.passed, bool(verdict.reason) if not passed else False) == (passed, not passed) and reason in verdict.reason


def test_exact_needs_the_end_and_the_reference_s_thoughts():
    assert not Exact()(ROW, answer("There are 1,200 of them.", stopped=False)).passed
    assert not Exact()(ROW, answer("There are 1,200 of them.", analysis="Hm.")).passed
    thinking = {"messages": [ROW["messages"][0], {**ROW["messages"][1], "thinking": "Hm."}]}
    assert Exact()(thinking, answer("There are 1,200 of them.", analysis="Hm.")).passed


def test_an_answer_cut_off_in_its_thoughts_says_so():
    verdict = make_scorer("not_refused")(ROW, answer("", analysis="Let me think", stopped=False))
    assert verdict == (False, "no final channel before the answer was cut off")


def test_language_of_a_channel_by_name_code_or_column():
    pytest.importorskip("py3langid", reason="the language check needs py3langid")
    french, german = "Je pense que la réponse est assez simple à trouver.", "Die Antwort ist nicht besonders schwer zu finden."
    row = {**ROW, "reasoning_language": "French"}
    check = make_scorer({"name": "language", "channel": "analysis", "expect": "reasoning_language"})
    assert check(row, answer("Twelve.", analysis=french)).passed
    verdict = check(row, answer(french, analysis=german))
    assert not verdict.passed and "analysis is de" in verdict.reason and "not fr" in verdict.reason
    assert make_scorer({"name": "language", "expect": "German"})(row, answer(german)).passed
    assert make_scorer({"name": "language", "expect": "de", "candidates": ["English", "fr"]})(row, answer("zwölf Stück")).passed
    assert not check(row, answer(french)).passed, "no analysis at all"


def test_language_of_the_reference_in_the_same_channel():
    pytest.importorskip("py3langid", reason="the language check needs py3langid")
    german, french = "Das ist eine sehr schöne Geschichte über unsere Katze.", "Je pense que nous devons répondre à cette question."
    row = {"messages": [ROW["messages"][0], {"role": "assistant", "thinking": french, "content": german}]}
    final, analysis = (make_scorer({"name": "language", "channel": channel, "expect": "reference"}) for channel in ("final", "analysis"))
    assert final(row, answer(german, french)).passed and analysis(row, answer(german, french)).passed
    assert not final(row, answer(french, german)).passed and not analysis(row, answer(french, german)).passed
    with pytest.raises(RunError, match="has no analysis channel"):
        analysis(ROW, answer(german, french))


def test_a_reference_that_is_missing_is_said():
    with pytest.raises(RunError, match="no reference answer"):
        make_scorer("contains")({"messages": ROW["messages"][:1]}, answer("x"))
    with pytest.raises(UsageError, match="no column 'wrd'"):
        make_scorer({"name": "contains", "column": "wrd"})(ROW, answer("x"))


def test_functions_of_the_user_are_called_and_their_mistakes_are_reported_with_the_row(tmp_path):
    (tmp_path / "mine.py").write_text(
        "def short(row, answer):\n    return len(answer.final) < 9, f'long for {row[\"word\"]}'\n"
        "def plain(row, answer):\n    return answer.stopped\n"
        "def broken(row, answer):\n    return 1 / 0\n"
        "def odd(row, answer):\n    return 'yes'\n"
    )
    use = lambda name: make_scorer({"function": f"mine.py:{name}"}, tmp_path)
    assert use("short")(ROW, answer("Twelve.")) == (True, "") and use("short")(ROW, answer("x" * 20)) == (False, "long for Twelve")
    assert use("plain")(ROW, answer("x")).passed and not use("plain")(ROW, answer("x", stopped=False)).passed
    with pytest.raises(RunError, match=r"mine.py:broken: ZeroDivisionError: .* \(mine.py:6\) at the row 'How many\?'"):
        use("broken")(ROW, answer("x"))
    with pytest.raises(RunError, match="it returned 'yes'"):
        use("odd")(ROW, answer("x"))
    with pytest.raises(UsageError, match="did you mean 'short'"):
        use("shrot")
    (tmp_path / "mine.py").write_text("import nothing_of_that_name\n")
    with pytest.raises(UsageError, match="ModuleNotFoundError"):
        use("short")
