"""`scripts/train_pjit.py`, a user's own training script: trains on a mesh with its own axis names, saves by plain Orbax, exports from the shards."""

import json
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding
from orbax.checkpoint import v1 as ocp

from gptoss_jax import export_hf, init_params, load_params, verify_dir
from gptoss_jax.checkpoint.orbax_store import restore_params
from gptoss_jax.checkpoint.source import NANO
from scripts import train_pjit
from tests.distributed.support import MODEL, Processes, make_files


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    path = tmp_path_factory.mktemp("train_pjit")
    make_files(path)
    export_hf(path / "model", MODEL, init_params(MODEL, jax.random.key(3)), format="mxfp4", source_dir=NANO)
    return path


def arguments(root, out, replica, model, *options):
    sizes = ["--replica", str(replica), "--model", str(model), "--rows", "4", "--length", "64", "--steps", "2"]
    return [str(root / "model"), str(root / "train.jsonl"), str(root / out), *sizes, *options]


def train(monkeypatch, capsys, *args):
    monkeypatch.setattr(sys, "argv", ["train_pjit.py", *arguments(*args)])
    train_pjit.main()
    return losses(capsys.readouterr().out)


def losses(text):
    return [float(value) for value in re.findall(r"step \d+: loss (\S+)", text)]


@pytest.fixture(scope="module")
def one_device(root):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train_pjit.py", *arguments(root, "one", 1, 1)])
        train_pjit.main()
    return root / "one"


def differing(one, other):
    """Share of the weights in two directories that differ."""
    (_, ours), (_, theirs) = load_params(one), load_params(other)
    return sum(int((np.asarray(ours[name]) != np.asarray(theirs[name])).sum()) for name in ours) / sum(p.size for p in ours.values())


@pytest.mark.parametrize("axis_type", ["Auto", pytest.param("Explicit", marks=pytest.mark.slow)])
def test_own_mesh_trains_as_one_device_and_exports_what_it_saved(root, one_device, axis_type, monkeypatch, capsys):
    many = train(monkeypatch, capsys, root, axis_type, 2, 2, "--axis-type", axis_type)
    assert len(many) == 2 and np.isfinite(many).all()
    assert differing(one_device / "export", root / axis_type / "export") < 0.01
    assert verify_dir(root / axis_type / "export", against=restored(root / axis_type / "checkpoint")).ok


def restored(checkpoint):
    """Parameters that plain Orbax wrote, on one device whatever the mesh was."""
    place = SingleDeviceSharding(jax.devices()[0])
    stored = ocp.checkpointables_metadata(checkpoint).metadata["params"]
    target = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place) for name, leaf in stored.items()}
    return ocp.load_checkpointables(checkpoint, {"params": target})["params"]


@pytest.mark.slow
def test_processes_train_the_same_and_export_from_their_shards(root, one_device):
    with Processes(2, ["scripts/train_pjit.py", *arguments(root, "processes", 1, 2)]) as run:
        assert run.end() == 0, run.text
    assert len(losses(run.text)) == 2, run.text
    report = verify_dir(root / "processes" / "export", against=restored(root / "processes" / "checkpoint"))
    assert report.ok, report
    assert differing(one_device / "export", root / "processes" / "export") < 0.01


BARE = """
import sys
class NoSuchPackage:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "gptoss_jax":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, NoSuchPackage())
import json
from pathlib import Path
import jax
from orbax.checkpoint import v1 as ocp
step = Path(sys.argv[1])
place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
stored = ocp.checkpointables_metadata(step / "arrays").metadata["params"]
target = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place) for name, leaf in stored.items()}
params = ocp.load_checkpointables(step / "arrays", {"params": target})["params"]
print(json.dumps({name: [list(p.shape), str(p.dtype), float(p.sum())] for name, p in params.items()}))
print(json.loads((step / "meta.json").read_text())["model"]["num_local_experts"])
"""


def test_checkpoint_is_read_by_orbax_alone(root):
    """In a process that cannot import this package: every parameter by name, shape, dtype and value."""
    done = subprocess.run([sys.executable, "-c", BARE, str(root / "base" / "checkpoints" / "0")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found, experts = done.stdout.splitlines()
    expected = restore_params(root / "base" / "checkpoints", 0)
    assert {name: shape_dtype for name, (*shape_dtype, _) in json.loads(found).items()} == {
        name: [list(p.shape), str(p.dtype)] for name, p in expected.items()
    }
    for name, (_, _, total) in json.loads(found).items():
        np.testing.assert_allclose(total, float(expected[name].sum()), rtol=1e-6)
    assert int(experts) == MODEL.num_local_experts
