"""A run: resumed equals unbroken bit for bit, damage and bad numbers are caught, metrics and directories are as promised."""

import io
import json

import numpy as np
import pytest
from rich.console import Console

from gptoss_jax.checkpoint import orbax_store
from gptoss_jax.checkpoint.hashes import code_hashes
from gptoss_jax.errors import NumericsError, RunError, UsageError
from gptoss_jax.formats import Mxfp4
from gptoss_jax.quant import default_policy
from gptoss_jax.training.console import Progress
from gptoss_jax.training.loop import Trainer
from gptoss_jax.training.run_dir import RunDir, read_metrics
from tests.training.support import CONFIG, Batches, bits, make_params, make_train

TRAIN = make_train(eval_every=2, checkpoint_every=3)
TIMES = ("tok_per_s",)


class Stop(Exception):
    """Stands for a process that ends here."""


def eval_batches():
    stream = Batches(seed=99)
    return [next(stream), next(stream)]


def run(path, batches=None, train=TRAIN, *, resume=False, overwrite=False, policy=None, params=None):
    """A whole run; returns the trainer and what it printed."""
    out = io.StringIO()
    with RunDir(path, resume=resume, overwrite=overwrite) as directory:
        progress = Progress(train.steps, Console(file=out, width=200))
        trainer = Trainer(CONFIG, train, directory, batches or Batches(), policy=policy, eval_batches=eval_batches, progress=progress)
        if not resume or trainer.resume() is None:
            trainer.start(params or make_params(), source={"path": "base"})
        trainer.fit()
    return trainer, out.getvalue()


def metrics_of(path):
    return [{k: v for k, v in line.items() if k not in TIMES} for line in read_metrics(path)]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "out"
    trainer, printed = run(path)
    return path, trainer, printed


def end_at(index):
    def on_next(i):
        if i == index:
            raise Stop

    return on_next


def break_off(path, index, **options):
    """A run that ends without warning when batch `index` is asked for."""
    with pytest.raises(Stop):
        run(path, Batches(on_next=end_at(index)), **options)


def test_resumed_run_equals_the_unbroken_one_bit_for_bit(unbroken, tmp_path):
    """Killed after step 5 (checkpoint of step 3, metrics of step 4 written) and again right after the checkpoint of step 6."""
    break_off(tmp_path / "out", 5)
    assert orbax_store.list_steps(tmp_path / "out" / "checkpoints") == [3]
    assert metrics_of(tmp_path / "out")[-1]["step"] == 4
    break_off(tmp_path / "out", 6, resume=True)
    trainer, _ = run(tmp_path / "out", resume=True)
    assert bits(trainer.state) == bits(unbroken[1].state)
    assert metrics_of(tmp_path / "out") == metrics_of(unbroken[0])
    assert (tmp_path / "out" / "router.jsonl").read_text() == (unbroken[0] / "router.jsonl").read_text()
    assert trainer.batches.state() == unbroken[1].batches.state()
    metas = [orbax_store.read_meta(p / "checkpoints", 7) for p in (tmp_path / "out", unbroken[0])]
    assert metas[0] == metas[1] and metas[0].source == {"path": "base"} and metas[0].data_state == {"index": 7, "seed": 0}


def test_metrics_have_one_line_a_step(unbroken):
    path, trainer, _ = unbroken
    lines = read_metrics(path)
    assert [line["step"] for line in lines] == list(range(8))
    assert set(lines[0]) == {"step", "eval_loss"}
    for line in lines[1:]:
        expected = {"step", "loss", "grad_norm", "lr", "tokens", "trained_tokens", "skipped", "tok_per_s"}
        expected |= {"router/load_max", "router/load_cv", "router/entropy", "router/dropped"}
        assert set(line) - {"eval_loss"} == expected and line["skipped"] == line["router/dropped"] == 0
        assert [len(line[key]) for key in ("router/load_max", "router/load_cv", "router/entropy")] == [CONFIG.num_hidden_layers] * 3
    assert [line["step"] for line in lines if "eval_loss" in line] == [0, 2, 4, 6, 7]
    assert lines[1]["tok_per_s"] is None and lines[2]["tok_per_s"] > 0
    assert lines[-1]["eval_loss"] == pytest.approx(trainer.evaluate(), rel=1e-6)
    assert orbax_store.list_steps(path / "checkpoints") == [6, 7]


def test_evaluations_write_the_load_of_every_expert(unbroken):
    path, _, _ = unbroken
    tables = [json.loads(line) for line in (path / "router.jsonl").read_text().splitlines()]
    assert [table["step"] for table in tables] == [2, 4, 6, 7]
    for table, line in zip(tables, [line for line in read_metrics(path) if line["step"] and "eval_loss" in line]):
        load_LE, mean_LE = np.array(table["assignments"]), np.array(table["probability"])
        assert load_LE.shape == mean_LE.shape == (CONFIG.num_hidden_layers, CONFIG.num_local_experts) and table["tokens"] == line["tokens"]
        np.testing.assert_array_equal(load_LE.sum(1), line["tokens"] * CONFIG.num_experts_per_tok)
        np.testing.assert_allclose(load_LE.max(1) / load_LE.mean(1), line["router/load_max"], atol=1e-4)
        np.testing.assert_allclose(mean_LE.sum(1), 1, atol=1e-5)


def test_console_prints_plain_lines_where_there_is_no_terminal(unbroken):
    printed = unbroken[2]
    assert "step 7/7 | loss " in printed and " | gnorm " in printed and " | lr 1.4e-04 | " in printed and "eval loss" in printed
    assert "\x1b" not in printed


def test_damaged_newest_checkpoint_is_set_aside_and_the_one_before_continues(unbroken, tmp_path):
    break_off(tmp_path / "out", 6)
    checkpoints = tmp_path / "out" / "checkpoints"
    file = max((checkpoints / "6").rglob("d/*"), key=lambda p: p.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    trainer, printed = run(tmp_path / "out", resume=True)
    assert "WARNING: " in printed and f"step 6 is damaged: {file.relative_to(checkpoints / '6')}" in printed
    assert (checkpoints / "6.corrupt").is_dir() and orbax_store.list_steps(checkpoints) == [6, 7]
    assert bits(trainer.state) == bits(unbroken[1].state) and metrics_of(tmp_path / "out") == metrics_of(unbroken[0])


def test_finished_run_resumes_to_nothing(unbroken):
    path, trainer, _ = unbroken
    before = (path / "metrics.jsonl").read_text()
    again, _ = run(path, resume=True)
    assert again.step == 7 and (path / "metrics.jsonl").read_text() == before and bits(again.state) == bits(trainer.state)


def test_other_settings_are_not_resumed(unbroken):
    changed = make_train(eval_every=3, checkpoint_every=1, optimizer={"learning_rate": 2e-3}, seed=1)
    with pytest.raises(UsageError, match=r"optimizer.learning_rate: 0.001 -> 0.002; seed: 0 -> 1$"):
        run(unbroken[0], train=changed, resume=True)


def test_non_finite_steps_are_skipped_logged_and_three_in_a_row_stop(tmp_path):
    """Two bad, one good, three bad: the count starts anew after the good one."""
    with pytest.raises(NumericsError, match=r"3 steps in a row, the last being step 6 .*'index': 5") as caught:
        run(tmp_path / "out", Batches(poison=(0, 1, 3, 4, 5)), make_train())
    assert caught.value.exit_code == 3
    lines = read_metrics(tmp_path / "out")
    assert [line["skipped"] for line in lines[1:]] == [1, 1, 0, 1, 1, 1]
    kept = np.load(tmp_path / "out" / lines[4]["batch_file"])
    assert lines[4]["batch_file"] == "batches/4.npz"
    assert {p.name for p in (tmp_path / "out" / "batches").iterdir()} == {f"{step}.npz" for step in (1, 2, 4, 5, 6)}
    again = Batches(poison=(3,))
    again.index = 3
    assert all((kept[name] == value).all() for name, value in next(again)._asdict().items())
    assert lines[1]["batch"] == {"index": 0, "seed": 0} and lines[1]["loss"] is None and "loss" in lines[1]["nonfinite"]
    assert "batch" not in lines[3] and np.isfinite(lines[3]["loss"])
    assert orbax_store.list_steps(tmp_path / "out" / "checkpoints") == []


def test_a_loss_spike_is_told_and_its_batch_kept_also_behind_a_resume(tmp_path, monkeypatch):
    """With a threshold next to nothing, so that the tiny run has spikes; the run that was broken off finds the same."""
    monkeypatch.setattr("gptoss_jax.training.spikes.LEAST", 2)
    settings = make_train(checkpoint_every=3, spike_sigmas=1e-3)
    _, printed = run(tmp_path / "out", train=settings)
    spikes = {line["step"]: line for line in read_metrics(tmp_path / "out") if "spike" in line}
    assert spikes and all(line["spike"] > 0 and line["batch"]["index"] == step - 1 for step, line in spikes.items())
    assert {p.name for p in (tmp_path / "out" / "batches").iterdir()} == {f"{step}.npz" for step in spikes}
    assert printed.count("sigmas above that of the last steps; its batch is batches/") == len(spikes)
    break_off(tmp_path / "broken", 5, train=settings)
    run(tmp_path / "broken", train=settings, resume=True)
    assert metrics_of(tmp_path / "broken") == metrics_of(tmp_path / "out")


def test_no_more_than_20_batches_are_kept(tmp_path):
    with RunDir(tmp_path, resume=True, overwrite=False) as directory:
        names = [directory.keep_batch(step, {"tokens_BT": np.arange(step)}) for step in range(25)]
        assert names == [f"batches/{step}.npz" for step in range(20)] + [None] * 5
        assert directory.keep_batch(3, {"tokens_BT": np.arange(7)}) == "batches/3.npz"
    assert (np.load(tmp_path / "batches" / "3.npz")["tokens_BT"] == np.arange(7)).all() and len(list((tmp_path / "batches").iterdir())) == 20


def test_non_finite_parameters_are_not_saved(tmp_path):
    params = make_params()
    params["lm_head.weight"] = params["lm_head.weight"].at[3, 4].set(np.nan)
    with pytest.raises(NumericsError, match="parameters are not finite after step 1"):
        run(tmp_path / "out", train=make_train(checkpoint_every=1), params=params)
    assert orbax_store.list_steps(tmp_path / "out" / "checkpoints") == []


def test_used_directory_needs_resume_or_overwrite(tmp_path):
    out = tmp_path / "out"
    (out / "checkpoints" / "3").mkdir(parents=True)
    (out / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(UsageError, match="not empty; give --resume .* or --overwrite"):
        RunDir(out, resume=False, overwrite=False)
    with pytest.raises(UsageError, match="not a run of gptoss_jax"):
        RunDir(out, resume=False, overwrite=True)
    (out / "config.yaml").write_text("")
    (out / "notes.txt").write_text("mine")
    with RunDir(out, resume=False, overwrite=True):
        assert {p.name for p in out.iterdir()} == {"notes.txt", ".lock"}
        with pytest.raises(UsageError, match="in use by another run"):
            RunDir(out, resume=True, overwrite=False)
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be written"):
        RunDir(tmp_path / "file", resume=False, overwrite=False)


def test_metrics_rewind_drops_later_and_half_written_lines(tmp_path):
    with RunDir(tmp_path, resume=True, overwrite=False) as directory:
        for step in range(4):
            directory.log({"step": step, "loss": float("nan") if step == 1 else 0.5})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "lo')
    with RunDir(tmp_path, resume=True, overwrite=False) as directory:
        directory.rewind_metrics(2)
        directory.log({"step": 3, "loss": 0.25})
    lines = read_metrics(tmp_path)
    assert [line["step"] for line in lines] == [0, 1, 2, 3] and lines[1] == {"step": 1, "loss": None, "nonfinite": ["loss"]}
    json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[1], parse_constant=lambda text: pytest.fail(text))


@pytest.mark.slow
def test_qat_checkpoint_carries_the_hashes_of_the_codes_of_its_masters(tmp_path):
    """The hashes come from the compiled training program; the oracle encodes the restored masters."""
    policy = default_policy(Mxfp4())
    trainer, _ = run(tmp_path / "out", train=make_train(), policy=policy)
    meta = orbax_store.read_meta(tmp_path / "out" / "checkpoints", 7)
    params = orbax_store.restore_params(tmp_path / "out" / "checkpoints", 7)
    codes = {name: Mxfp4().encode(p) for name, p in params.items() if name.endswith(("gate_up_proj", "down_proj"))}
    assert meta.code_hashes == code_hashes(CONFIG, codes) and len(meta.code_hashes) == 4
    assert bits(params) == bits(trainer.state.params) and meta.quant == policy.to_dict() and meta.quant["estimator"] == {"name": "ste"}
    rounded = {name: Mxfp4().encode(params[name].astype("bfloat16")) for name in codes}
    assert all(meta.code_hashes[key] != value for key, value in code_hashes(CONFIG, rounded).items())
