"""Advice for GPUs: XLA ends the process on a flag it does not know, so every flag is tried on the installed jaxlib."""

import os
import subprocess
import sys

import pytest

from gptoss_jax.cli import main
from gptoss_jax.cli.xla_settings import DEVICES, Setting, known_to_jaxlib


def start_jax(flags: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    return subprocess.run([sys.executable, "-c", "import jax; print(jax.jit(lambda x: x + 1)(1))"], env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("device", DEVICES)
def test_flags_stand_alone_on_stdout_and_jax_starts_with_them(device, capsys):
    assert main(["env", "--xla-flags", "--device", device, "--gpus", "8"]) == 0
    out, reasons = capsys.readouterr()
    flags = out.split()
    assert out.count("\n") == 1 and all(flag.startswith("--xla_gpu_") and "=" in flag for flag in flags)
    assert "left out" not in reasons and all(f"# {flag}: " in reasons for flag in flags)
    assert ("--xla_gpu_enable_command_buffer=FUSION,CUSTOM_CALL" in flags) == (device == "b200")
    done = start_jax(out.strip())
    assert done.returncode == 0 and done.stdout == "2\n", done.stderr


def test_an_unknown_flag_would_end_jax_and_is_left_out():
    assert start_jax("--xla_gpu_no_such_flag=1").returncode != 0
    good, bad = Setting("--xla_gpu_autotune_level", "4", ""), Setting("--xla_gpu_no_such_flag", "1", "")
    assert known_to_jaxlib([bad, good]) == ([good], [bad])


def test_exports_are_shell_commands(capsys):
    assert main(["env", "--exports", "--device", "h200"]) == 0
    script = capsys.readouterr().out
    done = subprocess.run(["sh", "-e"], input=f'{script}\necho "$JAX_OPTIMIZATION_LEVEL|$XLA_PYTHON_CLIENT_MEM_FRACTION|$XLA_FLAGS"',
                          capture_output=True, text=True)  # fmt: skip
    level, fraction, flags = done.stdout.strip().split("|")
    assert level == "O1" and 0.75 < float(fraction) < 1 and flags == "--xla_gpu_enable_latency_hiding_scheduler=true"
    assert "CUDA_DEVICE_MAX_CONNECTIONS" not in script, "one GPU has no collectives"
