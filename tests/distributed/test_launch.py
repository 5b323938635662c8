"""The launch scripts: exit codes and signals pass through, a stopped Slurm job is queued again, and a process that waits in vain says so."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from gptoss_jax.cli import main
from gptoss_jax.sharding.cluster import Launch, find_launch
from scripts.launch.local import free_port

ROOT = Path(__file__).parents[2]
LOCAL = [sys.executable, "scripts/launch/local.py"]


def local(count, code, *options):
    return subprocess.run([*LOCAL, "--processes", str(count), *options, "--", sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)


def test_local_launcher_gives_every_process_its_number():
    done = local(3, "import os; print(' '.join(os.environ[k] for k in ('RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'MASTER_ADDR')) + '\\n', end='')")
    assert done.returncode == 0 and sorted(done.stdout.split("\n")) == ["", "0 0 3 localhost", "1 1 3 localhost", "2 2 3 localhost"]


def test_local_launcher_ends_the_others_when_one_fails_and_returns_its_code():
    done = local(2, "import os, sys, time; time.sleep(600) if os.environ['RANK'] == '0' else sys.exit(4)", "--grace", "0.2")
    assert done.returncode == 4
    assert "process 1 ended with 4" in done.stderr and "process 0 is killed" in done.stderr and "process 0 ended with 137" in done.stderr


def test_local_launcher_passes_signals_on():
    # one write each: print makes two where output is not buffered, and those of two processes mix
    code = r"import os, signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(143)); os.write(1, b'up\n'); time.sleep(600)"
    process = subprocess.Popen([*LOCAL, "--processes", "2", "--", sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert [process.stdout.readline() for _ in range(2)] == ["up\n", "up\n"]
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 143


@pytest.mark.parametrize("code, requeued", [(0, False), (143, True), (2, False)])
def test_slurm_job_is_queued_again_only_after_it_was_stopped(tmp_path, code, requeued):
    for name, body in (("srun", f'echo "$@" > {tmp_path}/srun; exit {code}'), ("scontrol", f'echo "$@" > {tmp_path}/scontrol')):
        (tmp_path / name).write_text("")
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(f"#!/bin/sh\n{body}\n")
        program.chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "SLURM_JOB_ID": "77"}
    script = ["bash", "scripts/launch/slurm_sft.sbatch", "sft", "configs/sft_20b.yaml", "data.train=a b.jsonl"]
    assert subprocess.run(script, cwd=ROOT, env=env).returncode == code
    expected = "--kill-on-bad-exit=1 gptoss-jax sft --config configs/sft_20b.yaml --resume data.train=a b.jsonl\n"
    assert (tmp_path / "srun").read_text() == expected
    assert (tmp_path / "scontrol").read_text() == ("requeue 77\n" if requeued else "")


def test_kubernetes_manifest_tells_every_pod_who_takes_part():
    _, job = yaml.safe_load_all((ROOT / "scripts" / "launch" / "kubernetes.yaml").read_text())
    variables = {entry["name"]: entry.get("value", "1") for entry in job["spec"]["template"]["spec"]["containers"][0]["env"]}
    assert find_launch(variables) == Launch("COORDINATOR_ADDRESS", "gptoss-jax-0.gptoss-jax:29500", job["spec"]["completions"], 1)


def test_recipe_of_many_processes_is_refused(monkeypatch, capsys):
    for name, value in {"MASTER_ADDR": "localhost", "MASTER_PORT": "1", "WORLD_SIZE": "2", "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    assert main(["recipe"]) == 2
    assert "a recipe runs in a single process (it was started by torchrun); with many, run sft, qat and export" in capsys.readouterr().err


@pytest.mark.parametrize("rank", ["0", "1"])
def test_process_that_waits_in_vain_says_so_in_one_line(rank):
    with_others = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2", "RANK": rank, "GPTOSS_JAX_INIT_SECONDS": "1"}
    env = {**os.environ, **with_others, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", "import gptoss_jax; gptoss_jax.initialize()"], env=env, capture_output=True, text=True)
    said = [line for line in done.stderr.splitlines() if "gptoss-jax" in line]
    assert done.returncode == 1 and len(said) == 1, done.stderr
    assert f"process {rank} of 2 waited 1 s for the others at localhost:" in said[0]
    assert "stack trace" not in done.stderr
