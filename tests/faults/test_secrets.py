"""Credentials: configs that hold one are refused without showing it, messages have it blotted out, and the environment is in no output."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gptoss_jax.cli import main
from gptoss_jax.errors import UsageError
from gptoss_jax.secrets import holds_secret, redacted
from gptoss_jax.training.yaml_config import load_config

ROOT = Path(__file__).parents[2]
# put together here, so that no scanner takes this file for a leak
SECRETS = {
    "Hugging Face": "hf_" + "aB3" * 11 + "q",
    "OpenAI": "sk-" + "proj-" + "Zx9_" * 8,
    "GitHub": "ghp_" + "k7" * 18,
    "GitHub, fine-grained": "github_pat_" + "A1b2" * 10,
    "GitLab": "glpat-" + "x1Y2" * 6,
    "AWS": "AKIA" + "QWER" * 4,
    "Google": "AIza" + "b-_9" * 9,
    "Slack": "xoxb-" + "1234567890",
    "URL": "https://me:pa55word@example.org/model",
    "URL with a token": "https://t0ken@example.org/model",
}
HARMLESS = (
    "openai/gpt-oss-20b", "data/train.jsonl", "Anthropic/hh-rlhf:helpful@train", "me@example.org", "http://localhost:8000/v1", "hf_model",
    "runs/sk-1", "https://example.org/a@b", "*.experts.gate_up_proj", "hf_20b", "task-sk-learn-and-other-long-words-behind-it",
)  # fmt: skip


@pytest.mark.parametrize("kind", SECRETS)
def test_each_kind_is_blotted_out_whatever_stands_around_it(kind):
    secret = SECRETS[kind]
    told = redacted(f"cannot read '{secret}', tried twice: {secret}.")
    assert "***" in told and not any(part in told for part in (secret, "pa55word", "t0ken")) and told.startswith("cannot read '")


@pytest.mark.parametrize("text", HARMLESS)
def test_names_and_addresses_stay(text):
    assert redacted(text) == text and not holds_secret(text)


@pytest.mark.parametrize("kind", SECRETS)
def test_configs_with_a_credential_are_refused_by_line_without_showing_it(kind, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(f"seed: 1\ndata:\n  train: ['{SECRETS[kind]}']\n")
    with pytest.raises(UsageError, match=r"run\.yaml:3: data\.train\.0 holds a credential") as error:
        load_config(file)
    assert not holds_secret(str(error.value))
    with pytest.raises(UsageError, match=r"override model:1: the value holds a credential") as error:
        load_config(None, [f"model={SECRETS[kind]}"])
    assert not holds_secret(str(error.value))


def test_what_the_command_line_was_given_is_not_echoed(capsys):
    assert main(["verify", SECRETS["URL"]]) == 2
    said = capsys.readouterr().err
    assert "***@example.org/model" in said and "pa55word" not in said


def test_a_server_address_with_a_password_is_refused(capsys):
    pytest.importorskip("requests", reason="endpoints need the package requests")
    from gptoss_jax.evaluation.endpoint import _base

    with pytest.raises(UsageError, match=r"URL of example\.org holds a credential: put the key into .* GPTOSS_JAX_API_KEY") as error:
        _base("https://me:pa55word@example.org/v1")
    assert "pa55word" not in str(error.value)


def test_the_environment_is_not_shown():
    """`env` is the command that tells most; test_kill.py looks through all files of a run."""
    secrets = {name: f"s3cret-{name}" for name in ("HF_TOKEN", "WANDB_API_KEY", "GPTOSS_JAX_API_KEY", "AWS_SECRET_ACCESS_KEY")}
    done = subprocess.run(
        [sys.executable, "-m", "gptoss_jax", "env"], capture_output=True, text=True, cwd=ROOT, env={**os.environ, **secrets}, timeout=120
    )
    assert done.stdout and "s3cret" not in done.stdout + done.stderr
