"""SIGTERM and SIGINT save and end a real process with 143 and 130; a second signal ends it at once."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from gptoss_jax.checkpoint import orbax_store
from gptoss_jax.training.run_dir import read_metrics
from tests.conftest import CACHE

ROOT = Path(__file__).parents[2]


def begin(path, *options):
    env = {
        **os.environ, "PYTHONPATH": str(ROOT), "JAX_COMPILATION_CACHE_DIR": str(CACHE), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3",
        "JAX_NUM_CPU_DEVICES": "8",
    }  # fmt: skip
    command = [sys.executable, "-m", "tests.training.run_forever", str(path), *options]
    process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "training\n", process.stderr.read()
    return process


@pytest.mark.parametrize("signum, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signal_saves_and_ends_with_its_code(tmp_path, signum, code):
    process = begin(tmp_path)
    process.send_signal(signum)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors
    assert f"stopped by signal {int(signum)}" in errors and "--resume" in errors and "Traceback" not in errors
    steps = orbax_store.list_steps(tmp_path / "checkpoints")
    assert steps == [read_metrics(tmp_path)[-1]["step"]]
    orbax_store.verify(tmp_path / "checkpoints", steps[0])


def test_second_signal_ends_at_once(tmp_path):
    """The step in progress lasts a minute; nothing is waited for."""
    process = begin(tmp_path, "slow")
    process.send_signal(signal.SIGTERM)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=10) == -signal.SIGTERM
