"""From config to training: the QAT stage begins with the SFT parameters and a fresh optimizer, and what does not fit is refused before that.

The loop is tested elsewhere; here it is replaced, so nothing is compiled.
"""

import dataclasses
import io
import json
import re

import jax
import numpy as np
import pytest
from rich.console import Console

from gptoss_jax.checkpoint import orbax_store
from gptoss_jax.checkpoint.models import carried_files, load_model
from gptoss_jax.checkpoint.source import NANO
from gptoss_jax.data import load_tokenizer
from gptoss_jax.errors import UsageError
from gptoss_jax.formats import Mxfp4, Nvfp4
from gptoss_jax.model import init_params
from gptoss_jax.quant import default_policy, get_estimator
from gptoss_jax.training.config import parse
from gptoss_jax.training.console import Progress
from gptoss_jax.training.loop import Trainer
from gptoss_jax.training.stage import run_stage
from tests.training.support import CONFIG, bits

ROWS = [[("user", f"What is {i} and {i}?"), ("assistant", f"It is {2 * i}, I think.")] for i in range(40)]


@pytest.fixture(scope="module")
def sft(tmp_path_factory):
    """What an SFT run leaves: a checkpoint with parameters that differ from any base, and a used optimizer."""
    root = tmp_path_factory.mktemp("stage")
    config = dataclasses.replace(CONFIG, vocab_size=len(load_tokenizer(NANO)))
    params = init_params(config, jax.random.key(3))
    meta = orbax_store.Meta(model=config.to_dict(), source={"path": "base"})
    orbax_store.save(root / "sft" / "checkpoints", 12, params, meta, (params, jax.numpy.int32(9)), assets=carried_files(NANO))
    lines = [json.dumps({"messages": [{"role": role, "content": text} for role, text in row]}) for row in ROWS]
    (root / "train.jsonl").write_text("\n".join(lines))
    return root, params


@pytest.fixture
def begun(monkeypatch):
    """Trainers at the moment when their loop would begin."""
    trainers = []
    monkeypatch.setattr(Trainer, "fit", lambda self: trainers.append(self) or self.state)
    return trainers


def config(sft, tmp_path, **changes):
    raw = {
        "model": str(sft[0] / "sft"), "output": str(tmp_path / "out"), "data": {"train": str(sft[0] / "train.jsonl"), "row_length": 64},
        "batch": {"rows": 2}, "quant": {"format": "mxfp4", "scale_rule": "floor", "estimator": "ewgs"},
    }  # fmt: skip
    return parse({**raw, **changes})


def test_qat_begins_with_the_sft_parameters_and_a_fresh_optimizer(sft, tmp_path, begun):
    directory, state = run_stage(config(sft, tmp_path))
    (trainer,) = begun
    assert bits(state.params) == bits(sft[1]) and state.step == 0
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(state.opt_state))
    assert {fmt for _, fmt in trainer.policy.rules} == {Mxfp4(scale_rule="floor")} and trainer.policy.estimator.name == "ewgs"
    assert trainer.source == {"run": "sft", "step": 12, "base": {"path": "base"}}
    assert {p.name for p in trainer.assets} >= {"tokenizer.json", "chat_template.jinja"}
    # one epoch of packed rows
    assert directory == tmp_path / "out" and trainer.train.steps == len(trainer.batches.rows.tokens_BT) // 2 < len(ROWS) // 2
    assert f"steps: {trainer.train.steps}" in (directory / "config.yaml").read_text()


def test_a_checkpoint_says_through_which_estimator_it_was_trained(sft, tmp_path):
    """An export carries it as provenance; the model computes with the same codes under any estimator."""
    meta = orbax_store.read_meta(sft[0] / "sft" / "checkpoints", 12)
    policy = default_policy("mxfp4", get_estimator("dge", k=4))
    meta = dataclasses.replace(meta, quant=policy.to_dict())
    orbax_store.save(tmp_path / "checkpoints", 3, sft[1], meta, (jax.numpy.int32(9),), assets=carried_files(NANO))
    model = load_model(tmp_path, jax.numpy.float32)
    assert model.policy == policy and model.source["estimator"] == {"name": "dge", "k": 4, "c": 3.0}
    assert "estimator" not in load_model(sft[0] / "sft", jax.numpy.float32).source


def test_sft_has_no_policy_and_evaluation_passes_over_every_row_once(sft, tmp_path, begun):
    data = {"train": str(sft[0] / "train.jsonl"), "eval": str(sft[0] / "train.jsonl"), "row_length": 64}
    run_stage(config(sft, tmp_path, quant=None, steps=3, data=data, batch={"rows": 3}))
    (trainer,) = begun
    assert trainer.policy is None and trainer.train.steps == 3
    batches = list(trainer.eval_batches())
    assert {b.tokens_BT.shape for b in batches} == {(3, 64)}
    assert sum(b.loss_weights_BT.sum() for b in batches) == trainer.batches.rows.loss_weights_BT.sum() > 0


@pytest.mark.parametrize(
    "changes, fragment",
    [
        ({"model": None}, "model is not set"),
        ({"output": None}, "output is not set"),
        ({"data": {"row_length": 64}}, "data.train is not set"),
        ({"model": "/nowhere/at/all"}, "/nowhere/at/all"),
        ({"quant": {"format": "nvfp4", "rules": ["*.experts.gate_up"]}}, "'*.experts.gate_up' matches no parameter"),
        ({"quant": {"format": "nvfp4", "rules": ["blocks.0.mlp.experts.*_proj"]}}, "every layer"),
        ({"freeze": ["*.rooter.*"]}, "'*.rooter.*' matches no parameter"),
        ({"mesh": {"fsdp": 3}, "batch": {"rows": 3}}, "does not divide"),
    ],
)
def test_what_does_not_fit_is_refused(sft, tmp_path, begun, changes, fragment):
    with pytest.raises(UsageError) as caught:
        run_stage(config(sft, tmp_path, **changes))
    assert fragment in str(caught.value) and not begun
    assert not (tmp_path / "out" / "config.yaml").exists()


@pytest.mark.parametrize(
    "data, fragment",
    [
        ({"row_length": 8}, "data.train: 40 of 40 documents are longer than the rows of 8 tokens"),
        ({"row_length": 8, "too_long": "drop"}, "data.train: no document is left: all 40 are empty or longer than the rows of 8 tokens"),
        ({"row_length": 8, "too_long": "truncate"}, "data.train: none of the 40 documents has a token to train on"),
        ({"row_length": 64, "loss": "analysis"}, "data.train: nothing to train: none of its 40 conversations has a message"),
        ({"row_length": 64, "eval_fraction": 0.99}, "leaves none to train on"),
        ({"row_length": 64, "eval": "missing.jsonl"}, "no such file or directory: missing.jsonl"),
    ],
)
def test_data_with_nothing_to_train_on_is_refused_before_anything_is_compiled(sft, tmp_path, begun, data, fragment):
    with pytest.raises(UsageError) as caught:
        run_stage(config(sft, tmp_path, quant=None, data={"train": str(sft[0] / "train.jsonl"), **data}))
    assert fragment in str(caught.value) and "\n" not in str(caught.value) and not begun


def test_a_list_of_sources_and_a_held_out_share_train_as_told(sft, tmp_path, begun):
    out = io.StringIO()
    path = str(sft[0] / "train.jsonl")
    data = {"train": [path, {"path": path, "weight": 0.5, "limit": 20}], "eval_fraction": 0.1, "row_length": 64}
    run_stage(config(sft, tmp_path, quant=None, data=data), progress=Progress(console=Console(file=out, width=200)))
    (trainer,) = begun
    said = out.getvalue()
    assert "eval: 6 conversations" in said and "(weight 0.5)" in said and re.search(r"train: \d+ conversations", said)
    assert re.search(r"WARNING: eval: \d+ of 6 held-out conversations are also in the training set", said), said
    assert re.search(r"WARNING: train: \d+ conversations repeat an earlier one", said)
    assert "\x1b" not in said and trainer.progress.steps == trainer.train.steps
    assert (trainer.run.path / "config.yaml").read_text().count(path) == 2


def test_rules_choose_what_is_quantized(sft, tmp_path, begun):
    run_stage(config(sft, tmp_path, quant={"format": "nvfp4", "global_scale": "exact", "rules": ["*.experts.down_proj"]}))
    assert begun[0].policy.rules == (("*.experts.down_proj", Nvfp4(global_scale="exact")),)
