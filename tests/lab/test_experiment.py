"""Experiments: what a file may say, which arms it makes, that what they share is trained once, and that a run goes on where it stopped."""

import json
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptoss_jax.errors import CorruptError, RunError, UsageError
from gptoss_jax.lab import grid, trainer
from gptoss_jax.lab.experiment import Arm, load_experiment, reference_of
from gptoss_jax.lab.parts import parse_export, quantizer_of, tools_of
from gptoss_jax.lab.stages import Stage, Stages, label_of, locked
from tests.training.support import make_params, make_train

CONFIGS = sorted((Path(__file__).parents[2] / "configs" / "lab").glob("*.yaml"))
SMALL = """
name: small
question: Which?
seeds: [0, 1]
arm: {steps: 4, sft: {steps: 3}}
grid: {format: [mxfp4, {name: mxfp4, scale_rule: even}], learning_rate: [1e-5, 1e-4]}
arms: {longer: {}, rounded: {export: mxfp4}, sft: {steps: 0}}
reference: {format: mxfp4}
"""


def load(tmp_path, text=SMALL, *overrides):
    file = tmp_path / "small.yaml"
    file.write_text(text)
    return load_experiment(file, overrides)


# ---- files ------------------------------------------------------------------------------------------------------------------------
def test_arms_are_all_combinations_and_those_beside_the_grid(tmp_path):
    experiment, arms = load(tmp_path)
    names = ["mxfp4, 1e-05", "mxfp4, 0.0001", "mxfp4 scale_rule=even, 1e-05", "mxfp4 scale_rule=even, 0.0001", "longer", "rounded", "sft"]
    assert [arm.name for arm in arms] == names
    assert arms[2].settings.learning_rate == 1e-5 and arms[2].settings.format == {"name": "mxfp4", "scale_rule": "even"}
    assert all(arm.settings.sft.steps == 3 and arm.settings.sft.learning_rate == 2e-4 for arm in arms)
    assert [reference_of(experiment, arms, arm) for arm in arms] == [arms[0], arms[1], arms[0], arms[1], None, None, None]


def test_level_overrides_sft_settings_one_by_one(tmp_path):
    _, arms = load(tmp_path, SMALL, 'grid={"regime": {fast: {sft: {learning_rate: 1e-3}}, long: {sft: {steps: 9}}}}', "reference=sft")
    assert [(arm.settings.sft.steps, arm.settings.sft.learning_rate) for arm in arms[:2]] == [(3, 1e-3), (9, 2e-4)]


@pytest.mark.parametrize(
    "override,message",
    [
        ("arm.estimater=dge", "arm 'mxfp4, 1e-05': estimater: unknown key; did you mean 'estimator'?"),
        ("arm.sft.step=3", "unknown key; did you mean 'steps'?"),
        ("question=", "question = None"),
        ('grid={"estimators": [ste]}', "estimators: a list gives the values of a setting of an arm, and this is none; did you mean 'estimator'?"),
        ('grid={"format": []}', "format: no levels"),
        ("arm.estimator=dgee", "nearest is 'dge'"),
        ("arm.tools=[osci_rest]", "unknown tool 'osci_rest'; did you mean 'osci_reset'?"),
        ("arm.tools=[{name: tracker, size: 3}]", "tool 'tracker' has no option 'size'; it has window"),
        ('arms={"x": {export: {name: mxfp4, element_round: sr}}}', "needs a seed"),
        ('arms={"x": {quantizer: lsq}}', "quantizer needs a format"),
        ('arms={"x": {start: base, distill: 0.5}}', "distill needs start: sft"),
        ('arms={"x": {steps: 0, tools: [tracker]}}', "steps: 0 is no training"),
        ('arms={"x": {format: mxfp5}}', "unknown format 'mxfp5'"),
        ('arms={"mxfp4, 1e-05": {}}', "two arms are called 'mxfp4, 1e-05'"),
        ("reference=other", "reference = 'other' is no arm"),
        ("seeds=[-1]", "greater than or equal to 0"),
        ("evaluation.set=final", "'dev' or 'fresh'"),
    ],
)
def test_mistake_is_one_line_that_names_it(tmp_path, override, message):
    with pytest.raises(UsageError) as error:
        load(tmp_path, SMALL, override)
    text = str(error.value)
    assert message in text and "\n" not in text and text.startswith(str(tmp_path / "small.yaml"))


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_shipped_experiment_is_whole(file):
    experiment, arms = load_experiment(file)
    assert experiment.name.replace("-", "_") == file.stem and experiment.expected and experiment.evaluation.set == "fresh"
    assert len(experiment.seeds) >= 3 and sum(reference_of(experiment, arms, arm) is not None for arm in arms) >= len(arms) / 2
    paths = [task.file(Path("out")) for task in grid.tasks_of(experiment, arms)]
    assert len(set(paths)) == len(paths) == len(arms) * len(experiment.seeds)


def test_every_way_to_train_of_the_shipped_experiments_makes_a_program():
    """Traced, not compiled, with a loss that is no model: quantizers and tools see the parameters alone."""
    arms = [arm.settings for file in CONFIGS for arm in load_experiment(file)[1] if arm.settings.steps]
    ways = {(quantizer_of(arm), tools_of(arm)) for arm in arms}
    assert len(ways) > 20
    params = {name: jnp.asarray(p) for name, p in make_params().items()}
    loss = lambda weights, batch, context: (sum(jnp.sum(w**2) for w in jax.tree.leaves(weights)), {"loss": jnp.float32(0)})
    for quantizer, tools in ways:
        extra = jax.eval_shape(quantizer.init, params)
        optimizer, step = trainer._program(trainer._compiled_settings(make_train()), quantizer, tools, loss, frozenset(extra))
        trained = {**params, **extra}
        state = trainer.LabState(jnp.int32(0), trained, jax.eval_shape(optimizer.init, trained))
        new, metrics = jax.eval_shape(step, state, None, jnp.float32(1e-4), jax.random.key(0), None)
        assert jax.tree.structure(new) == jax.tree.structure(state), quantizer
        assert {"loss", "grad_norm", "lr"} <= metrics.keys() and all(value.shape == () for value in metrics.values())
        assert ("flip_rate" in metrics) == any(type(tool).__name__ == "OscillationTracker" for tool in tools)


# ---- stages -----------------------------------------------------------------------------------------------------------------------
@pytest.fixture
def trained(monkeypatch):
    """Stages that add their number of steps to one weight; the list of what was trained."""
    made = []

    def train(self, train, quantizer, params, seed, exports, **options):
        made.append((train.steps, train.optimizer.learning_rate, seed))
        curve = {label_of(export): [[0, float(number)]] for number, export in enumerate(exports)}
        return Stage({"w": params["w"] + train.steps}, {}, {"history": {"loss": [1.0] * train.steps}, "curve": curve, "seconds": 0.5})

    monkeypatch.setattr(Stages, "_train", train)
    monkeypatch.setattr(Stages, "base", lambda self, arm, seed: {"w": jnp.float32(arm.base_noise)})
    return made


def test_what_arms_share_is_trained_once_and_read_back_exactly(tmp_path, trained):
    experiment, arms = load(tmp_path)
    by_name = {arm.name: arm.settings for arm in arms}
    first = Stages(experiment, tmp_path / "stages").final(by_name["longer"], 0, keep=True, exports=["same", "mxfp4"])
    assert trained == [(3, 2e-4, 0), (4, 1e-4, 0)] and float(first.params["w"]) == 7
    stages = Stages(experiment, tmp_path / "stages")
    again = stages.final(by_name["rounded"], 0, keep=True)  # another export of the same weights
    assert len(trained) == 2 and float(again.params["w"]) == 7 and again.record == first.record
    assert first.record["curve"] == {"same": [[0, 0.0]], "mxfp4": [[0, 1.0]]}
    stages.final(by_name["mxfp4, 1e-05"], 0, keep=False)
    assert trained[2:] == [(4, 1e-5, 0)]
    stages.sft(by_name["sft"], 1)
    assert trained[3:] == [(3, 2e-4, 1)]
    noisy = by_name["longer"].model_copy(update={"base_noise": 0.5})
    assert float(stages.final(noisy, 0, keep=True).params["w"]) == 7.5 and trained[4:] == [(3, 2e-4, 0), (4, 1e-4, 0)]


def test_exports_do_not_multiply_the_training_of_a_shipped_experiment():
    experiment, arms = load_experiment(next(file for file in CONFIGS if file.stem == "e8_pull_back"))
    stages = Stages.__new__(Stages)
    stages.experiment = experiment
    names = {json.dumps(stages.settings(arm.settings, 0), sort_keys=True) for arm in arms}
    assert len(arms) == 3 * 15 + 2 and len(names) == 3 * 3 + 1  # per regime further SFT and two ways of QAT; further SFT from the moved base


# ---- runs -------------------------------------------------------------------------------------------------------------------------
@pytest.fixture
def fake(monkeypatch):
    """Arms that are measured without training; the list of those that ran."""
    ran = []

    def result(stages, task, sharing):
        ran.append(str(task))
        rng = np.random.default_rng((task.seed, len(task.arm.name)))
        measured = {
            "pass": {"A": [int(rng.integers(0, 100)), 100], "B": [100, 100]}, "loss": float(rng.uniform(0.1, 1)), "task_loss": {"A": 0.1, "B": 0.1},
            "rounding": {"changed": 0.1, "error_ratio": 0.2, "pull_back": 0.3, "kept": 0.4},
        }  # fmt: skip
        steps = task.arm.settings.steps
        return {
            "arm": task.arm.name, "levels": dict(task.arm.levels), "seed": task.seed, "definition": grid.definition(stages.experiment, task),
            "measured": measured, "history": {"loss": [0.1] * steps, "lr": [1e-4] * steps, "flip_rate": [0.01] * steps} if steps else {},
            "curve": [[0, 0.5], [4, 0.2]] if steps else [], "sft": {"history": {"loss": [0.5] * 3}, "curve": []},
            "seconds": {"arm": 1.0, "training": 0.5}, "versions": {"jax": "0", "cores": 2},
        }  # fmt: skip

    monkeypatch.setattr(grid, "_result", result)
    monkeypatch.setattr(grid, "_sft_first", lambda stages, tasks: None)
    return ran


def test_python_runs_a_file_as_the_command_does(tmp_path, fake):
    load(tmp_path)
    results = grid.run_experiment(tmp_path / "small.yaml", tmp_path / "out", ["seeds=[4]"])
    assert [(result["arm"], result["seed"]) for result in results] == [(name.rpartition(", seed ")[0], 4) for name in fake] and len(fake) == 7


def run(experiment, arms, out, limit=None):
    tasks = grid.tasks_of(experiment, arms, limit)
    grid.prepare(experiment, tasks, out)
    grid.work(experiment, tasks, out)
    grid.check_complete(tasks, out)


def test_interrupted_run_goes_on_and_whole_one_does_nothing(tmp_path, fake):
    experiment, arms = load(tmp_path)
    run(experiment, arms, tmp_path / "out", limit=3)
    assert fake == [f"{arm.name}, seed 0" for arm in arms[:3]]
    run(experiment, arms, tmp_path / "out")
    assert len(fake) == 14 and fake[3:] == [f"{arm.name}, seed {seed}" for seed, arm in product((0, 1), arms)][3:]
    run(experiment, arms, tmp_path / "out")
    assert len(fake) == 14


def test_arms_and_seeds_may_be_added_but_not_changed(tmp_path, fake):
    out = tmp_path / "out"
    run(*load(tmp_path), out)
    run(*load(tmp_path, SMALL, "seeds=[0, 1, 2]", "arms.direct={start: base}"), out)
    assert len(fake) == 8 * 3
    with pytest.raises(UsageError, match=r"other settings \(arm.sft.steps: 3 -> 5\)"):
        run(*load(tmp_path, SMALL, "arm.sft.steps=5"), out)
    result = json.loads((file := next(out.rglob("seed-0.json"))).read_text())
    del result["definition"]["arm"]["distill"]  # as written before there was this setting
    file.write_text(json.dumps(result))
    run(*load(tmp_path), out)
    with pytest.raises(UsageError, match=r"evaluation.rows.A: 500 -> 9"):
        run(*load(tmp_path, SMALL, "evaluation.rows.A=9"), out)
    assert len(fake) == 8 * 3


def test_task_that_another_process_holds_is_left_to_it(tmp_path, fake):
    experiment, arms = load(tmp_path)
    tasks = grid.tasks_of(experiment, arms, 2)
    file = tasks[0].file(tmp_path / "out")
    file.parent.mkdir(parents=True)
    with locked(file.with_suffix(".lock")) as mine:
        assert mine
        grid.work(experiment, tasks, tmp_path / "out")
        assert fake == [str(tasks[1])]
        with pytest.raises(RunError, match=f"1 of 2 results are missing, the first: {tasks[0]}"):
            grid.check_complete(tasks, tmp_path / "out")
    grid.work(experiment, tasks, tmp_path / "out")
    assert fake == [str(tasks[1]), str(tasks[0])]


def test_damaged_result_is_named(tmp_path, fake):
    experiment, arms = load(tmp_path)
    run(experiment, arms, tmp_path / "out", limit=1)
    file = grid.tasks_of(experiment, arms, 1)[0].file(tmp_path / "out")
    file.write_text(file.read_text()[:50])
    with pytest.raises(CorruptError, match=r"seed-0.json: is no result of an arm"):
        grid.results_of(experiment, arms, tmp_path / "out")
    with pytest.raises(UsageError, match="no results of small"):
        grid.results_of(experiment, arms, tmp_path / "nowhere")


def test_export_of_an_arm():
    assert parse_export("bf16") == "bf16" and parse_export(Arm().export) == "same"
    assert parse_export({"name": "mxfp4", "element_round": "sr", "seed": 1}).stochastic


def test_arms_that_deploy_the_same_weights_have_curves_of_their_own(tmp_path, trained, monkeypatch):
    """What was recorded under another arm's export is not this arm's."""
    experiment, arms = load(tmp_path, SMALL, "seeds=[0]")
    held_out = SimpleNamespace(measure=lambda made: {"pass": {"A": [1, 1]}, "loss": 0.1, "task_loss": {}})
    monkeypatch.setattr(Stages, "held_out", held_out)
    monkeypatch.setattr(Stages, "model", SimpleNamespace(config=None, params={}))
    monkeypatch.setattr(grid, "deployed", lambda *_: {})
    monkeypatch.setattr(grid, "rounding_of", lambda *_: {})
    run(experiment, arms, tmp_path / "out")
    curves = {result["arm"]: result["curve"] for result in grid.results_of(experiment, arms, tmp_path / "out")}
    assert curves["longer"] == [[0, 0.0]] and curves["rounded"] == [[0, 1.0]] and curves["sft"] == []
