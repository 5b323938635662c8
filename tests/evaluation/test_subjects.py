"""A local model answers tasks: forward pass where the reference decides, generation elsewhere, and the numerics that were asked for."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

from gptoss_jax.checkpoint.models import load_model
from gptoss_jax.errors import UsageError
from gptoss_jax.evaluation import LocalSubject, Task, load_task, run_task
from gptoss_jax.evaluation.results import overall_loss
from gptoss_jax.evaluation.scorers import EXACT, Exact, Loss, NotRefused
from gptoss_jax.formats import Mxfp4, Nvfp4
from gptoss_jax.quant import default_policy


@pytest.fixture(scope="module")
def subject():
    return LocalSubject(load_model("nano", jnp.float32))


@pytest.fixture(scope="module")
def result(subject):
    return run_task(dataclasses.replace(load_task("A"), limit=30), subject)


def test_pass_rate_interval_and_loss(result):
    rate = result.pass_rate()
    assert (rate.passed, rate.total) == (int(result.passed.sum()), 30) and 0 < rate.low < rate.rate < rate.high < 1
    english = result.where(language="English")
    assert english.passed.all() and english.pass_rate().rate == 1 and english.mean_loss() < 0.01 < result.mean_loss()
    assert overall_loss([result, english])[1] == result.num_trained.sum() + english.num_trained.sum()
    assert result.perplexity() == pytest.approx(np.exp(result.mean_loss()))


def test_failing_samples_hold_what_a_person_needs(result, tmp_path):
    count = result.write_failures(tmp_path / "deep" / "A.jsonl")
    samples = [json.loads(line) for line in (tmp_path / "deep" / "A.jsonl").read_text().splitlines()]
    assert count == len(samples) == 30 - result.passed.sum() == len(result.failures())
    sample = samples[0]
    assert sample["prompt"][-1]["role"] == "user" and sample["reference"]["role"] == "assistant" and not sample["passed"]
    assert sample["row"]["language"] != "English" and "instead of" in sample["reason"]
    assert sample["answer"].startswith("<|channel|>final<|message|>") and len(result.failures(2)) == 2
    assert result.where(language="English").write_failures(tmp_path / "deep" / "A.jsonl") == 0
    assert not (tmp_path / "deep" / "A.jsonl").exists(), "an old file would tell of failures that are no more"


def test_generation_gives_the_verdicts_of_the_forward_pass_and_continues_its_answers(subject, result):
    """`normalize` does not change these answers, but it is decided on generated text."""
    task = dataclasses.replace(load_task("A"), limit=30, scorer=Exact(normalize=True), max_new_tokens=24)
    generated = run_task(task, subject)
    np.testing.assert_array_equal(generated.passed, result.passed)
    assert all(whole.startswith(begun) for whole, begun in zip(generated.answers, result.answers)) and generated.loss is None


def test_the_same_questions_are_generated_once(subject, monkeypatch):
    task = dataclasses.replace(load_task("A"), limit=30, scorer=NotRefused(), max_new_tokens=24)
    first = run_task(task, subject)
    assert first.passed.all() and first.answers[0].endswith("<|return|>")
    monkeypatch.setattr(subject.generator, "generate", lambda *args: pytest.fail("generated again"))
    assert run_task(dataclasses.replace(task, name="again"), subject).answers == first.answers


def test_loss_alone_passes_nothing(subject):
    rows = load_task("Eng").rows()[:8]
    found = run_task(Task("held_out", Loss()), subject, rows)
    assert found.passed is None and found.mean_loss() < 0.01 and "passed" not in found.to_dict() and not found.failures()
    with pytest.raises(ValueError, match="loss alone"):
        found.pass_rate()
    with pytest.raises(UsageError, match="no reference answer"):
        run_task(Task("t", EXACT), subject, [{"messages": [{"role": "user", "content": "hi"}]}])


def test_clusters_widen_the_interval(subject):
    rows = [{**row, "pair": "same"} for row in load_task("H").rows()[:20]]
    alone, together = (run_task(Task("t", cluster=cluster), subject, rows).pass_rate() for cluster in (None, "pair"))
    assert together.low < alone.low and alone.rate == together.rate == 1


def test_numerics_are_those_asked_for(subject):
    model = dataclasses.replace(subject.model, policy=default_policy(Nvfp4()))
    weight = model.params["blocks.0.mlp.experts.gate_up_proj"][0] * 1.07
    decoded = lambda fmt: fmt.decode(fmt.encode(weight), jnp.float32)
    for numerics, expected in (("trained", decoded(Nvfp4())), ("bf16", weight), ("mxfp4", decoded(Mxfp4())), ("nvfp4", decoded(Nvfp4()))):
        used = LocalSubject(model, subject.tokenizer, numerics=numerics).expert_quant("gate_up_proj", weight)[0]
        np.testing.assert_array_equal(used, expected)
    assert not np.array_equal(decoded(Mxfp4()), decoded(Nvfp4()))
