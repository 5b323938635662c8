"""Each limit of the gate, alone; and what happens to exports that break one."""

import json

import numpy as np
import pytest

from gptoss_jax.checkpoint.source import NANO
from gptoss_jax.errors import UsageError
from gptoss_jax.evaluation import pretraining_rows
from gptoss_jax.training.recipe.gate import GATE, GateConfig, GateFailed, judge
from gptoss_jax.training.recipe.run import Recipe
from tests.training.recipe.support import config, measured, write_rows


def broken(gate: dict, found, reference=None) -> list[str]:
    return [str(finding) for finding in judge(GateConfig(**gate), found, reference, ["A", "B"]) if not finding.ok]


def test_minimum_pass_rate_of_a_task():
    gate = {"min_pass": {"A": 0.9}}
    assert not broken(gate, measured(A=90, B=0))
    assert broken(gate, measured(A=89, B=100)) == ["min_pass: 89.0% of A pass, at least 90.0% must"]


def test_maximum_drop_against_the_bf16_row_of_one_task_or_of_all():
    reference = measured(A=100, B=100)
    assert not broken({"max_drop": 0.05}, measured("qat_mxfp4", A=95, B=95), reference)
    assert not broken({"max_drop": 0.05}, measured("qat_mxfp4", A=100, B=99), measured(A=95, B=100))
    assert [text[:40] for text in broken({"max_drop": 0.05}, measured("qat_mxfp4", A=94, B=93), reference)] == [
        "max_drop: the pass rate of A is 0.06 bel", "max_drop: the pass rate of B is 0.07 bel",
    ]  # fmt: skip
    assert not broken({"max_drop": {"A": 0.05}}, measured("qat_mxfp4", A=95, B=0), reference)


def test_maximum_increase_of_the_loss():
    gate = {"max_loss_increase": 0.1}
    assert not broken(gate, measured(loss=0.6, A=0), measured(loss=0.5))
    assert not broken(gate, measured(loss=0.1, A=0), measured(loss=0.5))
    assert "0.15 above" in broken(gate, measured(loss=0.65, A=0), measured(loss=0.5))[0]


def test_maximum_kl_to_the_original():
    gate = {"guard": "guard.jsonl", "max_kl": 0.1}
    assert not broken(gate, measured(kl=0.1))
    assert "0.11 nats" in broken(gate, measured(kl=0.11))[0]


@pytest.mark.parametrize("gate", [{"max_loss_increase": 0.1}, {"guard": "guard.jsonl", "max_kl": 0.1}])
def test_a_number_that_is_not_finite_breaks_its_limit(gate):
    assert broken(gate, measured(loss=float("nan"), kl=float("nan")), measured(loss=0.5))


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"gate": {}}, "no limit is set"),
        ({"gate": {"max_kl": 0.1}}, "guard and max_kl belong together"),
        ({"gate": {"max_drop": 0.1}, "rows": ["qat_mxfp4"]}, "compare with the row sft"),
        ({"gate": {"min_pass": {"A": 0.9}}, "rows": ["sft"]}, "none of these is among the rows"),
        ({"gate": {"min_pass": {"A": 0.9}, "rows": ["original"]}}, "the original is no export"),
        ({"gate": {"min_pas": {}}}, "did you mean 'gate.min_pass'"),
        ({"gate": {"min_pass": {"A": 95}}}, "gate.min_pass.A = 95"),
    ],
)
def test_a_gate_that_cannot_be_meant_is_refused(tmp_path, changes, message):
    with pytest.raises(UsageError, match=message):
        config(tmp_path, **changes)


def test_a_gate_on_a_task_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(UsageError, match="gate names the task 'C'; there is A, H"):
        Recipe(config(tmp_path, gate={"min_pass": {"C": 0.5}}))


def recipe(tmp_path, monkeypatch, said, **changes) -> Recipe:
    """A recipe whose stages are the untrained model: exports and measurements are real."""
    changes = {"rows": ["sft", "qat_mxfp4"], **changes}
    recipe = Recipe(config(tmp_path, **changes), say=said.append)
    monkeypatch.setattr(recipe.stages, "run", lambda stage, variant, seed: (NANO, 0))
    return recipe


def test_exports_that_fail_are_moved_aside_with_the_reasons_and_a_rerun_judges_anew(tmp_path, monkeypatch):
    said, place = [], tmp_path / "run" / "seed-0"
    with pytest.raises(GateFailed) as failure:
        recipe(tmp_path, monkeypatch, said, gate={"min_pass": {"A": 0.95, "H": 0.9}}).run()
    message = str(failure.value)
    assert failure.value.exit_code == 1 and len(message.splitlines()) == 1
    assert "min_pass: 20.0% of A pass, at least 95.0% must" in message and "H" not in message.split("fails")[0].partition("min_pass")[2]
    failures = place / "failures" / "qat_mxfp4" / "A.jsonl"
    assert f"16 in {failures}" in message and len(failures.read_text().splitlines()) == 16
    sample = json.loads(failures.read_text().splitlines()[0])
    assert sample["prompt"][-1]["content"] in message
    assert not (place / "export" / "qat_mxfp4").exists() and (place / "export" / "sft").exists()
    reasons = json.loads((place / "rejected" / "qat_mxfp4" / GATE).read_text())
    assert not reasons["passed"] and [finding["ok"] for finding in reasons["findings"]] == [False, True]
    assert json.loads((tmp_path / "run" / GATE).read_text()) == [reasons]

    said.clear()
    with pytest.raises(GateFailed):
        recipe(tmp_path, monkeypatch, said, gate={"min_pass": {"A": 0.21}}).run()
    assert [line.split(":")[0] for line in said] == ["[seed 0] SFT + QAT MXFP4"], "the failed row alone is measured again"

    recipe(tmp_path, monkeypatch, said, gate={"min_pass": {"A": 0.2}}).run()
    assert (place / "export" / "qat_mxfp4" / "config.json").exists() and not (place / "rejected" / "qat_mxfp4").exists()
    assert json.loads((tmp_path / "run" / GATE).read_text())[0]["passed"]


def test_kl_to_the_original_is_zero_for_the_original_and_not_for_another_model(tmp_path, monkeypatch):
    guard = write_rows(tmp_path / "guard.jsonl", pretraining_rows(3, 12))
    gated = recipe(tmp_path, monkeypatch, [], gate={"guard": str(guard), "max_kl": 1e-3}, rows=["qat_mxfp4"])
    assert gated.run().results[0].kl == pytest.approx(0.0, abs=1e-6)
    model = gated._load(NANO)
    moved = {**model.params, "norm.weight": model.params["norm.weight"] * 0.5}
    expected = expected_kl(model, moved, gated)
    assert expected > 0.01 and gated.evaluation.guard.mean_kl(moved) == pytest.approx(expected, rel=1e-4)


def expected_kl(model, moved, gated) -> float:
    """The same from whole logits in numpy."""
    from gptoss_jax.model import compute_logits, forward

    total, tokens = 0.0, 0
    for batch in gated.evaluation.guard._set.batches():
        logs = []
        for params in (model.params, moved):
            hidden = forward(model.config, params, batch.tokens_BT, batch.segment_ids_BT, batch.positions_BT, dtype=np.float32).hidden_BTD
            logits = np.asarray(compute_logits(params, hidden), np.float64)
            logs.append(logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True)) - logits.max(-1, keepdims=True))
        kl_BT = (np.exp(logs[0]) * (logs[0] - logs[1])).sum(-1)
        trained_BT = batch.loss_weights_BT > 0
        total, tokens = total + kl_BT[trained_BT].sum(), tokens + trained_BT.sum()
    return total / tokens
