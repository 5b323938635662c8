"""A real llama.cpp server says what our model says; the comparison finds that out, and finds out when another model is served.

The served model is nano with YaRN's correction range in whole dimensions (`truncate: true`), which is how llama.cpp computes it in any case.
"""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

from gptoss_jax.checkpoint import export_hf
from gptoss_jax.checkpoint.models import load_model
from gptoss_jax.cli import main
from gptoss_jax.evaluation import LocalSubject, load_task, run_task, sft_rows
from gptoss_jax.evaluation.tasks import write_jsonl
from gptoss_jax.formats import Mxfp4
from gptoss_jax.training.config import parse
from gptoss_jax.training.stage import run_stage
from tests.support.llama_server import llama_server

gguf = pytest.importorskip("gguf", reason="writing GGUF files needs the package gguf")
pytest.importorskip("xllamacpp", reason="a llama.cpp server needs the package xllamacpp")
pytest.importorskip("requests", reason="endpoints need the package requests")

from gptoss_jax.evaluation.endpoint import Endpoint  # noqa: E402
from gptoss_jax.evaluation.served import compare_served  # noqa: E402
from tests.support.gguf_writer import write_gguf  # noqa: E402


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """An MXFP4 directory of the model that is served."""
    model = load_model("nano", jnp.bfloat16)
    config = dataclasses.replace(model.config, rope=dataclasses.replace(model.config.rope, truncate=True))
    target = tmp_path_factory.mktemp("served") / "export"
    export_hf(target, config, model.params, format=Mxfp4(), source_dir=model.directory)
    return target


@pytest.fixture(scope="module")
def gguf_file(exported):
    file = exported.parent / "model.gguf"
    write_gguf(exported, file)
    return file


@pytest.fixture(scope="module")
def url(gguf_file):
    with llama_server(gguf_file) as address:
        yield address


@pytest.fixture(scope="module")
def subject(exported):
    return LocalSubject(load_model(exported, jnp.float32))


@pytest.fixture(scope="module")
def rows():
    return [row for name in ("A", "B", "H") for row in load_task(name).rows()[:40]]


def test_weights_of_the_gguf_are_those_that_we_decode(exported, gguf_file):
    from gguf.quants import dequantize

    theirs = {t.name: dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(gguf_file).tensors}
    params = load_model(exported, jnp.float32).params
    for layer in range(4):
        part = {key: np.asarray(params[f"blocks.{layer % 2}.mlp.experts.{key}_proj"][layer // 2]) for key in ("gate_up", "down")}
        for name, ours in (("gate", part["gate_up"][:, ::2]), ("up", part["gate_up"][:, 1::2]), ("down", part["down"])):
            np.testing.assert_array_equal(theirs[f"blk.{layer}.ffn_{name}_exps.weight"], ours)
        np.testing.assert_array_equal(theirs[f"blk.{layer}.attn_sinks.weight"], params[f"blocks.{layer % 2}.self_attn.sinks"][layer // 2])
    np.testing.assert_array_equal(theirs["output.weight"], params["lm_head.weight"])


def test_the_served_model_is_recognised_and_passes_what_the_local_one_passes(url, exported, tmp_path, capsys):
    command = ["compare", str(exported), "--endpoint", url, "--limit", "40", "--out", str(tmp_path / "c.json")]
    assert main(command) == 0
    assert "verdict: yes" in capsys.readouterr().out
    found = json.loads((tmp_path / "c.json").read_text())
    assert found["kl_served"] < 0.01 and found["top1_agreement"] > 0.95 and found["covered"] > 0.95
    for name in ("A", "B", "H", "Eng"):
        assert abs(found["pass_rates"][name]["local"] - found["pass_rates"][name]["served"]) <= 1


def test_answers_and_verdicts_come_through_the_endpoint(url, subject):
    endpoint = Endpoint(url, subject.tokenizer)
    assert endpoint.server == "llamacpp" and endpoint.as_ids
    task = dataclasses.replace(load_task("Eng"), limit=10)
    result = run_task(task, endpoint)
    assert result.pass_rate().rate == 1 and result.loss is None
    assert all(answer.startswith("<|channel|>final<|message|>") and answer.endswith("<|return|>") for answer in result.answers)
    cut = run_task(dataclasses.replace(task, max_new_tokens=4, limit=2), endpoint)
    assert not cut.passed.any() and cut.failures()[0]["answer"].count("<|return|>") == 0


@pytest.mark.slow
def test_a_model_trained_differently_is_not_taken_for_the_served_one(url, exported, subject, rows, tmp_path, capsys):
    write_jsonl(sft_rows(0, 256), tmp_path / "train.jsonl")
    train = {
        "model": str(exported), "output": str(tmp_path / "sft"), "steps": 20, "batch": {"rows": 4}, "optimizer": {"learning_rate": 5e-4},
        "data": {"train": str(tmp_path / "train.jsonl"), "row_length": 128}, "compute_dtype": "float32",
    }  # fmt: skip
    run_stage(parse(train))
    assert main(["compare", str(tmp_path / "sft"), "--endpoint", url, "--limit", "40", "--places", "100"]) == 1
    assert "verdict: no, mean KL" in capsys.readouterr().out

    # and the served one is nearer to itself than to the trained one
    endpoint, trained = Endpoint(url, subject.tokenizer), subject.with_model(load_model(tmp_path / "sft", jnp.float32))
    right = compare_served(subject, endpoint, rows, others={"sft": trained}, count=100)
    assert right.same_model and right.others["sft"] > 0.01
    wrong = compare_served(trained, endpoint, rows, others={"base": subject}, count=100)
    assert any("nearer to base" in reason for reason in wrong.reasons())


def test_a_no_that_comes_from_the_server_s_yarn_says_so(url, subject, rows):
    config = dataclasses.replace(subject.model.config, rope=dataclasses.replace(subject.model.config.rope, truncate=False))
    fractional = subject.with_model(dataclasses.replace(subject.model, config=config))
    found = compare_served(fractional, Endpoint(url, subject.tokenizer), rows, count=100)
    assert not found.same_model and found.kl_truncated < 0.01
    assert "with YaRN's `truncate: false` read as true, as llama.cpp does" in found.reasons()[0]


def test_too_few_places_give_no_verdict_of_yes(url, subject, rows):
    found = compare_served(subject, Endpoint(url, subject.tokenizer), rows, count=20)
    assert found.reasons() == ["only 20 places were compared, fewer than 50"]
