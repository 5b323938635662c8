"""kill -9 at random moments: of training and saving, of export, of import. Nothing committed is lost, nothing broken is visible, nothing stays.

KILLS is the number of kills per test, 2 unless the environment variable GPTOSS_JAX_KILLS says otherwise; README.md has the command for 20.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from gptoss_jax.checkpoint import export_hf, orbax_store, verify_dir
from gptoss_jax.cli import main
from gptoss_jax.formats import Mxfp4
from gptoss_jax.training.run_dir import CONFIG, METRICS, ROUTER, read_metrics
from gptoss_jax.training.yaml_config import load_config
from tests.conftest import CACHE
from tests.faults import worker
from tests.training import support
from tests.training.support import bits, make_params

ROOT = Path(__file__).parents[2]
KILLS = int(os.environ.get("GPTOSS_JAX_KILLS", "2"))
pytestmark = pytest.mark.slow


def killed(*args, after: int, delay: float) -> list[str] | None:
    """Output of a worker that is killed `delay` seconds after its line number `after`; None where it ended before that."""
    env = {
        **os.environ, "PYTHONPATH": str(ROOT), "JAX_COMPILATION_CACHE_DIR": str(CACHE), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3",
        "JAX_NUM_CPU_DEVICES": "8", "PYTHONUNBUFFERED": "1", "HF_TOKEN": "hf_" + "s3cret" * 5,
    }  # fmt: skip
    command = [sys.executable, "-m", "tests.faults.worker", *map(str, args)]
    process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    lines = [process.stdout.readline() for _ in range(after)]
    time.sleep(delay)
    alive = process.poll() is None
    process.send_signal(signal.SIGKILL)
    rest, errors = process.communicate()
    assert alive or process.returncode == 0, errors
    return [line.strip() for line in [*lines, *rest.splitlines()] if line.strip()] if alive else None


def as_told(path):
    return [{key: value for key, value in line.items() if key != "tok_per_s"} for line in read_metrics(path)]


def test_training_killed_at_random_moments_ends_as_the_unbroken_run(tmp_path):
    """A step takes some 10 ms and a save, at every other step, some 100: most kills hit a save."""
    rng, steps = np.random.default_rng(int(time.time())), 6 * KILLS
    kills = 0
    for _ in range(KILLS):
        kills += killed("train", tmp_path / "run", steps, after=int(rng.integers(1, 6)), delay=rng.uniform(0, 0.3)) is not None
        for step in orbax_store.list_steps(tmp_path / "run" / "checkpoints"):
            orbax_store.verify(tmp_path / "run" / "checkpoints", step)
        assert load_config(tmp_path / "run" / CONFIG).steps == steps
    trainer = worker.train(tmp_path / "run", steps)
    unbroken = worker.train(tmp_path / "unbroken", steps)
    print(f"{kills} kills of {KILLS} tries")
    assert bits(trainer.state) == bits(unbroken.state) and as_told(tmp_path / "run") == as_told(tmp_path / "unbroken")
    assert {p.name for p in (tmp_path / "run").iterdir()} == {".lock", "checkpoints", CONFIG, METRICS, ROUTER}
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir()) == sorted([str(steps - 2), str(steps)])
    written = b"".join(path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file())
    assert b"s3cret" not in written and b"HF_TOKEN" not in written


def test_export_killed_at_random_moments_shows_whole_directories_only(tmp_path):
    rng = np.random.default_rng(int(time.time()))
    for attempt in range(KILLS):
        out = tmp_path / str(attempt)
        told = killed("export", out, after=int(rng.integers(1, 3)), delay=rng.uniform(0, 0.5))
        shown = sorted((p for p in out.iterdir() if not p.name.startswith(".")), key=lambda p: int(p.name))
        assert len(shown) - len(told) in (0, 1) and all(verify_dir(path).ok for path in shown)
        orphans = [p for p in out.iterdir() if p.name.startswith(".")]
        assert len(orphans) <= 1 and all(p.name.startswith(f".{len(shown)}.export-") for p in orphans)
        export_hf(out / str(len(shown)), support.CONFIG, make_params(), format=Mxfp4())
        assert not [p for p in out.iterdir() if p.name.startswith(".")], "the next export to the same place removes the orphan"


def test_import_killed_at_random_moments_is_whole_or_done_again(tmp_path, capsys):
    rng = np.random.default_rng(int(time.time()))
    export_hf(tmp_path / "source", support.CONFIG, make_params(), format=Mxfp4())
    for attempt in range(KILLS):
        out = tmp_path / str(attempt)
        told = killed("import", tmp_path / "source", out, after=int(rng.integers(1, 3)), delay=rng.uniform(0, 0.5))
        begun = sorted(out.iterdir(), key=lambda p: int(p.name))
        whole = [path for path in begun if orbax_store.locate(path)]
        assert len(whole) - len([line for line in told if "parameters" in line]) in (0, 1) and begun[: len(whole)] == whole
        for path in whole:
            orbax_store.verify(path / "checkpoints", 0)
            assert main(["import", str(tmp_path / "source"), str(path)]) == 2, "a finished import is not written over"
        again = out / str(len(whole))
        assert main(["import", str(tmp_path / "source"), str(again)]) == 0, capsys.readouterr().err
        assert [p.name for p in (again / "checkpoints").iterdir()] == ["0"]
        orbax_store.verify(again / "checkpoints", 0)
