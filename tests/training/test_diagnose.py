"""Diagnosis: the measures against cases whose answer is known, the loss gap against real exports, and the rule."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptoss_jax.checkpoint import export_hf, orbax_store
from gptoss_jax.checkpoint.models import load_model
from gptoss_jax.checkpoint.source import NANO
from gptoss_jax.cli import main
from gptoss_jax.data import load_rows
from gptoss_jax.errors import UsageError
from gptoss_jax.evaluation import LocalSubject
from gptoss_jax.formats import Mxfp4, Nvfp4
from gptoss_jax.training.diagnose import Diagnosis, Gap, diagnose, loss_gap, plot_layers, recorded_base, weight_changes
from gptoss_jax.training.diagnose.weights import Change, total
from tests.support.params import lively_params

FMT = Mxfp4()


def on_grid(params):
    """Expert weights put on the grid, as a release has them."""
    return {name: FMT.decode(FMT.encode(value), value.dtype) if name.endswith("_proj") else value for name, value in params.items()}


def moved(params, size, seed=0):
    """Expert weights with noise of `size` times their standard deviation."""
    out = {}
    for i, (name, value) in enumerate(sorted(params.items())):
        noise = jax.random.normal(jax.random.fold_in(jax.random.key(seed), i), value.shape)
        out[name] = value + size * jnp.std(value) * noise if name.endswith("_proj") else value
    return out


@pytest.fixture(scope="module")
def models(tmp_path_factory, tiny_config):
    """(base in MXFP4, base parameters, function that exports parameters in bfloat16 and returns the directory)."""
    folder = tmp_path_factory.mktemp("models")
    base = on_grid(lively_params(tiny_config))
    export_hf(folder / "base", tiny_config, base, format=FMT)
    return folder / "base", base, lambda name, params: export_hf(folder / name, tiny_config, params, format="bf16")


def test_rounding_undoes_what_stays_within_half_a_step_of_the_grid(models):
    directory, base, export = models
    change = total(weight_changes(export("tiny", moved(base, 1e-3)), directory, FMT).values())
    # next to nothing crosses a border between codes
    assert change.codes_changed < 0.01
    assert change.pull_back > 0.9 and change.error_ratio == pytest.approx(1, abs=0.1) and change.kept < 0.15


def test_rounding_keeps_what_lands_on_the_grid(models):
    directory, base, export = models
    change = total(weight_changes(export("on_grid", on_grid(moved(base, 1.0))), directory, FMT).values())
    assert (change.error_ratio, change.kept) == (0.0, 1.0) and change.codes_changed > 0.5


def test_measures_are_their_formulas_in_numpy_for_every_layer_and_for_a_training_checkpoint(models, tiny_config, tmp_path):
    directory, base, export = models
    params = {name: value.astype(jnp.bfloat16).astype(jnp.float32) for name, value in moved(base, 0.2).items()}
    orbax_store.save(tmp_path / orbax_store.CHECKPOINTS, 1, params, orbax_store.Meta(model=tiny_config.to_dict()))
    for fmt in (FMT, Nvfp4()):
        found = weight_changes(export(f"plain_{fmt.name}", params), directory, fmt)
        assert {layer for layer, _ in found} == {0, 1, 2} and {name for _, name in found} == {"gate_up_proj", "down_proj"}
        assert weight_changes(tmp_path, directory, fmt) == found
        for (layer, name), change in found.items():
            key, index = (f"tail.0.mlp.experts.{name}", ()) if layer == 2 else (f"blocks.{layer}.mlp.experts.{name}", (0,))
            w, b = (np.asarray(tree[key][index], np.float64) for tree in (params, base))
            rounded, rounded_base = (np.asarray(fmt.decode(fmt.encode(jnp.float32(x)), jnp.float32), np.float64) for x in (w, b))
            delta, error = w - b, rounded - w
            expected = {
                "codes_changed": (rounded != rounded_base).mean(), "pull_back": -(error * delta).sum() / np.sqrt((error**2).sum() * (delta**2).sum()),
                "error_ratio": np.sqrt((error**2).sum() / (delta**2).sum()), "kept": ((rounded - b) * delta).sum() / (delta**2).sum(),
            }  # fmt: skip
            assert change.to_dict() == pytest.approx(expected, rel=1e-4)


def test_an_untouched_model_has_nothing_to_lose(models):
    directory, _, _ = models
    change = total(weight_changes(directory, directory, FMT).values())
    assert change.to_dict() == {"codes_changed": 0.0, "pull_back": 0.0, "error_ratio": 0.0, "kept": 1.0}


def test_a_part_of_the_experts_stands_for_all(models):
    directory, base, export = models
    sft = export("part", moved(base, 0.2, seed=5))
    every, half = (total(weight_changes(sft, directory, FMT, experts).values()) for experts in (8, 4))
    assert (every.weights, half.weights) == (3 * 8 * (128 * 96 + 96 * 64), 3 * 4 * (128 * 96 + 96 * 64))
    assert half.to_dict() == pytest.approx(every.to_dict(), rel=0.05) and half != every


def test_models_of_different_shape_are_refused(models):
    with pytest.raises(UsageError, match="different shape"):
        weight_changes(models[0], NANO, FMT)


@pytest.fixture(scope="module")
def fine_tuned(tmp_path_factory):
    """nano moved off the grid, as masters in a BF16 directory that says where it came from, and its MXFP4 export."""
    folder = tmp_path_factory.mktemp("nano")
    model = load_model("nano", jnp.float32)
    params = moved(model.params, 0.1, seed=3)
    export_hf(folder / "sft", model.config, params, format="bf16", source_dir=NANO, provenance={"run": "sft", "base": model.source})
    stored = load_model(folder / "sft", jnp.float32)
    export_hf(folder / "ptq", model.config, stored.params, format=FMT, source_dir=NANO)
    return folder


def test_the_loss_gap_is_that_of_the_export_and_each_layer_is_alone(fine_tuned):
    rows = load_rows(NANO / "tasks" / "dev.jsonl").rows[::100]
    gap = loss_gap(fine_tuned / "sft", FMT, rows, "float32")
    model, rounded = (load_model(fine_tuned / name, jnp.float32) for name in ("sft", "ptq"))
    loss = lambda params: LocalSubject(model.__class__(**{**vars(model), "params": params})).score(rows).mean_loss()
    assert gap.loss == loss(model.params) and gap.num_conversations == len(rows)
    assert gap.rounded == pytest.approx(loss(rounded.params), rel=1e-6) and gap.rounded != gap.loss
    assert gap.relative == pytest.approx(gap.rounded / gap.loss - 1)
    for layer in (0, 3):  # blocks of period 2: layer 3 is the second of the second position
        position, slot = layer % 2, layer // 2
        mixed = dict(model.params)
        for name in ("gate_up_proj", "down_proj"):
            key = f"blocks.{position}.mlp.experts.{name}"
            mixed[key] = mixed[key].at[slot].set(rounded.params[key][slot])
        assert gap.per_layer[layer] == pytest.approx(loss(mixed), rel=1e-6)


def finding(kept=0.2, loss=1.0, rounded=None, trained_for=None) -> Diagnosis:
    change = Change(100.0, 5.0, 1.0, 1.0, 1 - kept)
    gap = Gap(loss, rounded, (loss, rounded), 0.9, 0.8, 7) if rounded else None
    return Diagnosis("sft", "base", "mxfp4", {(0, "down_proj"): change, (1, "down_proj"): change}, gap, "held.jsonl", trained_for)


@pytest.mark.parametrize(
    "found,verdict",
    [
        (finding(kept=0.9, rounded=1.06), "needed"), (finding(kept=0.1, rounded=1.04), "not needed"), (finding(rounded=math.nan), "needed"),
        (finding(kept=0.2), "likely needed"), (finding(kept=0.6), "open"), (finding(kept=0.9), "likely not needed"),
        (finding(rounded=2.0, trained_for="mxfp4"), "done"), (finding(rounded=2.0, trained_for="nvfp4"), "needed"),
    ],
)  # fmt: skip
def test_the_loss_decides_and_weights_only_without_it(found, verdict):
    assert found.verdict == verdict
    assert found.describe().startswith("VERDICT: ") and "Rule: " in found.describe()
    assert json.loads(json.dumps(found.to_dict()))["verdict"] == verdict


def test_layers_and_projections_are_summed(tmp_path):
    found = finding(rounded=1.5)
    assert [layer for layer, _ in found.layers()] == [0, 1] and found.projections()[0][1].weights == 200
    pytest.importorskip("matplotlib", reason="the picture needs the extra `plots`")
    assert plot_layers(found, tmp_path / "d.png") and plot_layers(finding(), tmp_path / "e.png")


def test_the_base_is_what_the_checkpoint_says(fine_tuned, models):
    assert recorded_base(fine_tuned / "sft") == "nano"
    with pytest.raises(UsageError, match="does not say which model it was trained from: give --base"):
        recorded_base(models[0])


def test_the_command_prints_table_and_verdict_and_writes_json(fine_tuned, tmp_path, capsys):
    assert main(["diagnose", str(fine_tuned / "sft"), "--limit", "12", "--out", str(tmp_path / "d.json")]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "layer 3" in text and "down_proj" in text and "VERDICT: quantization-aware training is" in text and "12 conversations" in text
    written = json.loads((tmp_path / "d.json").read_text())
    assert written["base"] == "nano" and len(written["matrices"]) == 8 and len(written["gap"]["per_layer"]) == 4


def test_without_held_out_data_the_weights_alone_are_judged(models):
    directory, base, export = models
    found = diagnose(export("no_data", moved(base, 1e-3)), FMT, base=str(directory))
    assert found.gap is None and found.verdict == "likely needed"
