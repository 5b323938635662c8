"""Training checkpoints: exact, all or nothing, and no damaged or foreign one is restored."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from gptoss_jax.checkpoint import orbax_store as store
from gptoss_jax.errors import CorruptError, RunError, UsageError

ROOT = Path(__file__).parents[2]
META = store.Meta(model={"hidden_size": 6}, run={"steps": 3}, data_state={"next": 7}, quant=None, code_hashes={"a": "00ff"}, source=None)


def make(seed=0):
    keys = jax.random.split(jax.random.key(seed), 2)
    params = {
        "blocks.0.w": jax.random.normal(keys[0], (2, 8, 24)),
        "blocks.0.b": jax.random.normal(keys[1], (2, 8)).astype(jnp.bfloat16).at[0, 0].set(-0.0),
    }
    optimizer = (optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam()).init(params), jnp.int32(5))
    return params, optimizer


def abstract(tree, shardings=None):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=shardings), tree)


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A directory with step 3; tests copy it."""
    directory = tmp_path_factory.mktemp("saved") / "checkpoints"
    params, optimizer = make()
    store.save(directory, 3, params, META, optimizer, assets=[ROOT / "pyproject.toml"])
    return directory


@pytest.fixture
def copy(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "checkpoints"))


def test_round_trip_is_exact(saved):
    params, optimizer = make()
    restored = store.restore(saved, 3, abstract(params), abstract(optimizer))
    assert_equal(restored, (params, optimizer))
    assert store.read_meta(saved, 3) == META
    assert (saved / "3" / store.ASSETS / "pyproject.toml").read_bytes() == (ROOT / "pyproject.toml").read_bytes()


def test_parameters_alone_come_back_in_their_own_dtypes_and_onto_a_mesh(saved):
    params, _ = make()
    assert_equal(store.restore_params(saved, 3), params)
    mesh = jax.make_mesh((4, 2), ("x", "y"))
    shardings = {"blocks.0.w": NamedSharding(mesh, PartitionSpec(None, "y", "x")), "blocks.0.b": NamedSharding(mesh, PartitionSpec(None, "x"))}
    sharded = store.restore_params(saved, 3, shardings)
    assert_equal(sharded, params)
    assert {name: leaf.sharding for name, leaf in sharded.items()} == shardings


def test_checkpoint_without_optimizer_says_so(tmp_path):
    params, optimizer = make()
    store.save(tmp_path, 0, params, META)
    assert_equal(store.restore_params(tmp_path, 0), params)
    with pytest.raises(CorruptError, match="step 0 holds no optimizer"):
        store.restore(tmp_path, 0, abstract(params), abstract(optimizer))


def test_newest_steps_are_kept_and_found(tmp_path):
    params, _ = make()
    directory = tmp_path / "run" / "checkpoints"
    for step in (1, 9, 10):
        store.save(directory, step, params, META, keep=2)
    assert store.list_steps(directory) == [9, 10] and store.latest_step(directory) == 10
    assert store.locate(tmp_path / "run") == store.locate(directory) == (directory, 10)
    assert store.locate(directory / "9") == (directory, 9)
    assert store.locate(tmp_path) is None and store.latest_step(tmp_path / "none") is None
    with pytest.raises(UsageError, match=r"no checkpoint of step 4; present are \[9, 10\]"):
        store.restore_params(directory, 4)
    with pytest.raises(UsageError, match="exists already"):
        store.save(directory, 10, params, META)


def damages(root: Path):
    """One damaged copy of every kind for every file of a step: a flipped bit, a lost byte, an emptied and a removed file."""
    for file in sorted(p for p in root.rglob("*") if p.is_file() and p.stat().st_size and p.name != store.MANIFEST):
        content = file.read_bytes()
        flipped = bytearray(content)
        flipped[len(content) // 2] ^= 4
        for kind, new in (("flip", bytes(flipped)), ("cut", content[:-1]), ("empty", b""), ("gone", None)):
            yield file, kind, content, new


def test_every_damage_of_every_file_is_found_and_named(copy):
    count = 0
    for file, kind, content, new in damages(copy / "3"):
        file.unlink() if new is None else file.write_bytes(new)
        with pytest.raises(CorruptError) as caught:
            store.restore_params(copy, 3)
        text = str(caught.value)
        assert "step 3" in text and str(file.relative_to(copy / "3")) in text and "\n" not in text, (file, kind)
        file.write_bytes(content)
        count += 1
    assert count >= 4 * 12
    store.verify(copy, 3)


def test_manifest_and_foreign_files_are_checked_too(copy):
    (copy / "3" / "arrays" / "params" / "d" / "stray").write_bytes(b"x")
    with pytest.raises(CorruptError, match="stray is not in the manifest"):
        store.verify(copy, 3)
    manifest = copy / "3" / store.MANIFEST
    manifest.write_text(manifest.read_text()[:-9])
    with pytest.raises(CorruptError, match="manifest.json cannot be read"):
        store.verify(copy, 3)
    manifest.unlink()
    with pytest.raises(CorruptError, match="manifest.json cannot be read"):
        store.restore_params(copy, 3)


def test_other_shapes_dtypes_and_names_are_refused_and_all_listed(saved):
    params, optimizer = make()
    wrong = {"blocks.0.w": jnp.zeros((2, 8, 24), jnp.bfloat16), "blocks.0.b": jnp.zeros((2, 9), jnp.bfloat16), "new": jnp.zeros(3)}
    with pytest.raises(CorruptError) as caught:
        store.restore(saved, 3, abstract(wrong), abstract(optimizer))
    for part in ("blocks.0.w is float32[2, 8, 24], expected bfloat16", "blocks.0.b is bfloat16[2, 8], expected bfloat16[2, 9]", "new is missing"):
        assert part in str(caught.value)
    with pytest.raises(CorruptError, match="1 is int32.., expected float32"):
        store.restore(saved, 3, abstract(params), abstract((optimizer[0], jnp.float32(0))))


def test_meta_with_other_keys_is_refused(copy):
    (copy / "3" / store.META).write_text(json.dumps({"model": {}}))
    with pytest.raises(CorruptError, match="meta.json does not have the keys"):
        store.read_meta(copy, 3)


def test_failed_save_leaves_nothing_and_names_the_place(copy, monkeypatch):
    """What Orbax says of a full disk, and then a disk that has room again."""

    def full(*_):
        raise ValueError("RESOURCE_EXHAUSTED: No space left on device\nsource locations: ...")

    params, _ = make()
    with monkeypatch.context() as patch:
        patch.setattr(store.ocp, "save_checkpointables", full)
        with pytest.raises(RunError, match=r"step 4 was not written to .* GiB needed, .* GiB free\): RESOURCE_EXHAUSTED: No space left on device$"):
            store.save(copy, 4, params, META)
    assert [p.name for p in copy.iterdir()] == ["3"]
    store.save(copy, 4, params, META)
    assert store.list_steps(copy) == [3, 4]


def test_quarantined_step_is_out_of_the_way(copy):
    store.quarantine(copy, 3)
    assert store.list_steps(copy) == [] and (copy / "3.corrupt" / store.META).is_file()
    params, _ = make()
    store.save(copy, 3, params, META)
    store.verify(copy, 3)


KILLED = """
import itertools, sys, jax, jax.numpy as jnp
from gptoss_jax.checkpoint import orbax_store as store
print("ready", flush=True)
for step in itertools.count(1):
    store.save(sys.argv[1], step, {"w": jnp.full((300, 1000), step, jnp.float32)}, store.Meta(model={"step": step}), keep=3)
    print(step, flush=True)
"""


def test_killed_process_leaves_only_whole_steps(tmp_path):
    """kill -9 at moments spread over several saves; what is listed restores, the half-written step is neither listed nor in the way."""
    rng = np.random.default_rng(0)
    for attempt in range(2):
        directory = tmp_path / str(attempt)
        process = subprocess.Popen([sys.executable, "-c", KILLED, str(directory)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert process.stdout.readline() == "ready\n"
        assert process.stdout.readline() == "1\n"
        time.sleep(rng.uniform(0, 0.3))
        os.kill(process.pid, signal.SIGKILL)
        rest = process.communicate()[0].split()
        steps = store.list_steps(directory)
        # the last announced step is there, at most one more was committed before its announcement
        assert steps and steps[-1] - int(rest[-1] if rest else 1) in (0, 1)
        for step in steps:
            assert (np.asarray(store.restore_params(directory, step)["w"]) == step).all()
            assert store.read_meta(directory, step).model == {"step": step}
        store.save(directory, steps[-1] + 1, {"w": jnp.zeros(3)}, META)
        leftovers = [p.name for p in directory.iterdir() if not p.name.isdigit()]
        assert leftovers == []
