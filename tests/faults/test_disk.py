"""A disk that is really full and one that is really read-only (a tmpfs of a few MB): one clear line, exit code 1, and what was there stays intact."""

import io
import subprocess

import jax.numpy as jnp
import pytest
from rich.console import Console

from gptoss_jax.checkpoint import export_hf, orbax_store
from gptoss_jax.cli import main
from gptoss_jax.errors import RunError
from gptoss_jax.formats import Mxfp4
from gptoss_jax.training.console import Progress
from gptoss_jax.training.loop import Trainer
from gptoss_jax.training.run_dir import RunDir, read_metrics
from tests.training.support import CONFIG, Batches, make_params, make_train

META = orbax_store.Meta(model={"hidden_size": 6})
DISK_BYTES = 4 << 20


@pytest.fixture
def disk(tmp_path):
    """A file system of 4 MiB of its own."""
    place = tmp_path / "disk"
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", place], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def fill(disk, leave: int = 0):
    """Writes until the disk is full, then gives back `leave` bytes."""
    with open(disk / "filler", "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            file.truncate(file.tell() - leave)


def only_line(error) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def test_save_on_a_full_disk_keeps_the_steps_before_and_works_when_there_is_room(disk, caplog):
    params = {"w": jnp.arange(200_000, dtype=jnp.float32)}
    orbax_store.save(disk / "checkpoints", 1, params, META)
    fill(disk, leave=100_000)
    for _ in range(2):
        with pytest.raises(RunError, match=r"step 2 was not written to .* \(.* GiB needed, .* GiB free\)") as error:
            orbax_store.save(disk / "checkpoints", 2, params, META)
        assert "space" in only_line(error).lower() and "Traceback" not in caplog.text
    assert [path.name for path in (disk / "checkpoints").iterdir()] == ["1"]
    orbax_store.verify(disk / "checkpoints", 1)
    (disk / "filler").unlink()
    orbax_store.save(disk / "checkpoints", 2, params, META)
    assert orbax_store.restore_params(disk / "checkpoints", 2)["w"].tolist() == params["w"].tolist()


def test_metrics_on_a_full_disk_end_the_run_in_one_line_and_can_be_read(disk):
    with RunDir(disk / "run", resume=False, overwrite=False) as run:
        run.log({"step": 0})
        fill(disk)
        with pytest.raises(RunError, match=r"metrics\.jsonl: cannot be written \(the disk is full\)") as error:
            for step in range(1, 10_000):
                run.log({"step": step})
    only_line(error)
    (disk / "filler").unlink()
    with RunDir(disk / "run", resume=True, overwrite=False) as run:
        run.rewind_metrics(3)
        run.log({"step": 4})
    assert [line["step"] for line in read_metrics(disk / "run")] == [0, 1, 2, 3, 4]


def test_config_on_a_full_disk_keeps_the_old_one(disk):
    with RunDir(disk / "run", resume=False, overwrite=False) as run:
        run.write_config("seed: 1\n")
        fill(disk)
        with pytest.raises(RunError, match=r"config\.yaml: cannot be written \(the disk is full\)"):
            run.write_config("seed: 2\n" * 1000)
    assert (disk / "run" / "config.yaml").read_text() == "seed: 1\n"


def test_export_on_a_disk_that_fills_while_it_writes_leaves_nothing(disk, monkeypatch):
    """Without the look at the free space beforehand, which another test sees refuse."""
    monkeypatch.setattr("gptoss_jax.checkpoint.staging.MARGIN_BYTES", -(10**9))
    fill(disk, leave=30_000)
    with pytest.raises(RunError, match="the disk is full") as error:
        export_hf(disk / "out", CONFIG, make_params(), format=Mxfp4())
    only_line(error)
    assert [path.name for path in disk.iterdir()] == ["filler"]


def test_commands_say_in_one_line_that_the_disk_has_no_room(disk, tmp_path, capsys):
    export_hf(tmp_path / "source", CONFIG, make_params(), format=Mxfp4())
    source, target = str(tmp_path / "source"), str(disk / "run")
    for command in (["export", source, target, "--format", "mxfp4"], ["import", source, target]):
        fill(disk, leave=60_000)
        assert main(command) == 1
        assert len(capsys.readouterr().err.strip().splitlines()) == 1
        (disk / "filler").unlink()
    assert main(["import", source, target]) == 0, "the failed import is not in the way"


def test_a_read_only_place_gets_one_line_and_exit_code_1(disk, tmp_path, capsys):
    export_hf(tmp_path / "source", CONFIG, make_params(), format=Mxfp4())
    subprocess.run(["mount", "-o", "remount,ro,size=64m", disk], check=True)
    for command in (
        ["export", str(tmp_path / "source"), str(disk / "out"), "--format", "mxfp4"],
        ["import", str(tmp_path / "source"), str(disk / "run")],
        ["sft", "model=nano", "data.train=nano", f"output={disk / 'run'}"],
    ):
        assert main(command) == 1, capsys.readouterr().err
        said = capsys.readouterr().err.strip()
        assert "Read-only file system" in said and len(said.splitlines()) == 1, said


def test_a_run_that_cannot_save_ends_in_one_line_and_goes_on_when_there_is_room(disk):
    settings = make_train(checkpoint_every=3)
    disk_filled = []

    def on_next(index):
        if index == 4 and not disk_filled:
            fill(disk, leave=40_000)
            disk_filled.append(index)

    def run():
        with RunDir(disk / "run", resume=True, overwrite=False) as directory:
            trainer = Trainer(CONFIG, settings, directory, Batches(on_next=on_next), progress=Progress(7, Console(file=io.StringIO())))
            if trainer.resume() is None:
                trainer.start(make_params())
            trainer.fit()

    with pytest.raises(RunError, match="checkpoint of step 6 was not written") as error:
        run()
    only_line(error)
    assert orbax_store.list_steps(disk / "run" / "checkpoints") == [3]
    (disk / "filler").unlink()
    run()
    assert orbax_store.list_steps(disk / "run" / "checkpoints") == [6, 7]
