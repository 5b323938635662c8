"""Real processes on this machine (gloo): the same run as one process, through a lost process, another mesh, and a signal."""

import os
import re
import shutil
import signal
import time

import jax
import numpy as np
import pytest

from gptoss_jax.checkpoint import orbax_store
from gptoss_jax.checkpoint.hashes import code_hashes
from gptoss_jax.formats import Mxfp4
from gptoss_jax.training.config import parse
from gptoss_jax.training.run_dir import read_metrics
from gptoss_jax.training.stage import run_stage
from gptoss_jax.training.yaml_config import dump_config
from tests.distributed.support import HEARTBEAT, MODEL, Processes, make_files, run_config

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    path = tmp_path_factory.mktemp("processes")
    make_files(path)
    return path


def command(root, output, *options, **changes):
    train = parse(run_config(root, output, **changes))
    file = root / f"{output}.yaml"
    file.write_text(dump_config(train))
    return ["-m", "tests.distributed.worker", "qat", "--config", str(file), *options]


@pytest.fixture(scope="module", autouse=True)
def compile_as_the_processes_do():
    """A third faster, as in `support.Processes`."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def runs(root):
    """Two processes of which one is killed, and the run on one device of one process, which is made while the other waits for the heartbeat."""
    with Processes(2, command(root, "broken", mesh={"fsdp": 2}), PAUSE_AT="4") as run:
        run.wait_for("paused", 2)
        os.kill(run.pids(2)[1], signal.SIGKILL)
        start = time.monotonic()
        run_stage(parse(run_config(root, "unbroken")))
        code = run.end()
    return root / "broken", code, run.ended - start, run.text


@pytest.fixture(scope="module")
def unbroken(root, runs):
    return root / "unbroken"


@pytest.fixture(scope="module")
def broken(runs):
    """What two processes leave when one is killed after step 4: checkpoint of step 3, metrics up to step 3 or 4."""
    return runs


def losses(path):
    return {line["step"]: line["loss"] for line in read_metrics(path)}


def check_same_run(path, unbroken):
    ours, theirs = losses(path), losses(unbroken)
    assert list(ours) == list(theirs) == list(range(1, 7))
    np.testing.assert_allclose(list(ours.values()), list(theirs.values()), atol=1e-5, rtol=0)
    same = ("step", "tokens", "trained_tokens")
    assert [[line[key] for key in same] for line in read_metrics(path)] == [[line[key] for key in same] for line in read_metrics(unbroken)]
    metas = [orbax_store.read_meta(p / "checkpoints", 6) for p in (path, unbroken)]
    assert metas[0].data_state == metas[1].data_state


def test_others_end_within_the_heartbeat_when_a_process_is_killed(broken):
    path, code, seconds, text = broken
    assert code == 128 + signal.SIGKILL
    assert "process 0 is killed" not in text, "it ended by itself"
    assert re.search(r"local: process 0 ended with [1-9]", text), text
    assert seconds < HEARTBEAT + 5
    assert orbax_store.list_steps(path / "checkpoints") == [3]


def test_saved_codes_are_those_of_the_saved_masters(broken):
    """Hashed from shards of two processes; the oracle encodes the whole masters on one device."""
    checkpoints = broken[0] / "checkpoints"
    params = orbax_store.restore_params(checkpoints, 3)
    codes = {name: Mxfp4().encode(p) for name, p in params.items() if name.endswith(("gate_up_proj", "down_proj"))}
    hashes = orbax_store.read_meta(checkpoints, 3).code_hashes
    assert hashes == code_hashes(MODEL, codes) and len(hashes) == 4


def test_four_processes_on_another_mesh_go_on_and_equal_the_unbroken_run(root, broken, unbroken):
    shutil.copytree(broken[0], root / "four")
    with Processes(4, command(root, "four", "--resume", mesh={"fsdp": 2, "data": 2})) as run:
        assert run.end() == 0, run.text
    check_same_run(root / "four", unbroken)
    # the first alone speaks
    assert run.text.count("6 steps done") == run.text.count("step 6/6") == 1
    assert [p.name for p in (root / "four").glob("*.tmp")] == []


def test_one_process_goes_on_and_equals_the_unbroken_run(root, broken, unbroken):
    shutil.copytree(broken[0], root / "alone")
    run_stage(parse(run_config(root, "alone")), resume=True)
    check_same_run(root / "alone", unbroken)


def test_sigterm_to_one_process_saves_one_step_on_all(root):
    with Processes(2, command(root, "stopped", mesh={"fsdp": 2}, checkpoint_every=None), SLOW="1") as run:
        run.wait_for(r"step 1/6")
        os.kill(run.pids(2)[1], signal.SIGTERM)
        assert run.end() == 128 + signal.SIGTERM, run.text
    assert run.text.count("stopped by signal 15") == 1 and "--resume" in run.text and "Traceback" not in run.text
    assert run.text.count("ended with 143") == 2
    (step,) = orbax_store.list_steps(root / "stopped" / "checkpoints")
    orbax_store.verify(root / "stopped" / "checkpoints", step)
    assert read_metrics(root / "stopped")[-1]["step"] == step


def test_what_the_first_process_refuses_ends_all_in_one_line(root, unbroken):
    with Processes(2, command(root, "unbroken", mesh={"fsdp": 2})) as run:
        assert run.end() == 2, run.text
    said = [line for line in run.text.splitlines() if "gptoss-jax" in line]
    assert len(said) == 1 and "is not empty; give --resume" in said[0]
    assert run.text.count("ended with 2") == 2


def test_devices_without_a_place_in_the_mesh_are_refused(monkeypatch):
    from gptoss_jax.training.stage import make_shardings

    monkeypatch.setattr(jax, "process_count", lambda: 4)
    with pytest.raises(Exception, match="mesh has 2 devices, but 4 processes with 8 devices take part"):
        make_shardings(parse({"mesh": {"fsdp": 2}}), MODEL)
