"""Gradient probes against what is known: gradients through fake_quant, formulas on small arrays, finite differences."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptoss_jax.errors import UsageError
from gptoss_jax.formats import Mxfp4, Nvfp4
from gptoss_jax.lab.probes import probe_descent, probe_gradients, probe_smoothed
from gptoss_jax.lab.probes.descent import AT_W
from gptoss_jax.lab.probes.gradients import Passes, _Samples, named_quantizers
from gptoss_jax.lab.probes.objective import Objective, as_quantizer, label_of, rounded
from gptoss_jax.lab.quantizer import FakeQuant, Unquantized
from gptoss_jax.quant import Ste, TwoWay, default_policy, fake_quant, get_estimator, make_expert_quant
from gptoss_jax.training.step import make_loss
from tests.training.support import CONFIG, Batches, make_params, make_train

FMT = Mxfp4()
ALL = (None, None, None)


@dataclass(frozen=True)
class Damped(FakeQuant):
    """Forward of the format; gradient half of straight-through, and none in the first expert of every projection."""

    def __call__(self, params, extra, key, step):
        fixed = jax.lax.stop_gradient
        mask = lambda w: jnp.ones(w.shape[-3]).at[0].set(0)[:, None, None] / 2
        return {name: fixed(fake_quant(w, self.format)) + mask(w) * (w - fixed(w)) for name, w in params.items()}

    def to_dict(self):
        return {"name": "damped"}


@dataclass(frozen=True)
class Shaken(FakeQuant):
    """A random forward around the format's."""

    def __call__(self, params, extra, key, step):
        return {name: fake_quant(w, self.format) + 0.01 * jax.random.normal(key, w.shape) for name, w in params.items()}

    def to_dict(self):
        return {"name": "shaken"}


@dataclass(frozen=True)
class InputsThroughMasters(FakeQuant):
    """Input gradients through the unquantized weight in the first layer, or in all layers."""

    everywhere: bool = False

    def __call__(self, params, extra, key, step):
        cut = lambda w: jax.lax.stop_gradient(w if self.everywhere else w.at[1:].set(fake_quant(w[1:], self.format)))
        return {name: TwoWay(fake_quant(w, self.format), cut(w)) for name, w in params.items()}

    def to_dict(self):
        return {"name": "masters"}


class Other(FakeQuant):
    """An estimator of another format: loss and gradient are those of other weights."""


KEY = jax.random.key(3)
DAMPED, SHAKEN, OTHER, IDENTITY = Damped.of(FMT), Shaken.of(FMT), Other.of(Nvfp4(), "ste"), Unquantized()


@pytest.fixture(scope="module")
def params():
    return make_params()


@pytest.fixture(scope="module")
def batches():
    stream = Batches()
    return [next(stream) for _ in range(3)]


def rows_at(rows, scope=ALL, **labels):
    wanted = dict(zip(("layer", "projection", "expert"), scope)) | labels
    return [row for row in rows if all(row[name] == value for name, value in wanted.items())]


def straight_through(objective, batch):
    (_, grads), = Passes(objective, batch).estimated({"ste": as_quantizer(FMT)}, KEY).values()
    return grads


def the_row(rows, scope=ALL, **labels):
    (row,) = rows_at(rows, scope, **labels)
    return row


def test_shared_forward_gives_the_gradient_through_fake_quant_in_the_layers(params, batches):
    """dL/dw_q, computed once outside, and the estimator's rule applied to it: the same as differentiating the quantized model of training."""
    objective = Objective(CONFIG, params)
    grads = straight_through(objective, batches[0])
    loss = make_loss(CONFIG, make_train(), make_expert_quant(default_policy(FMT), jnp.float32))
    weight = batches[0].loss_weights_BT.sum()
    expected = jax.jit(jax.grad(lambda experts: loss(experts, objective.others, batches[0], weight, 1)[0]))(objective.experts)
    for name, value in expected.items():
        np.testing.assert_allclose(grads[name], value, atol=1e-6 * np.abs(value).max(), rtol=1e-4)


def test_distinct_forwards_get_their_own_pass_and_equal_ones_share_it(params, batches, monkeypatch):
    objective, seen = Objective(CONFIG, params), []
    gradient = objective.gradient
    monkeypatch.setattr(objective, "gradient", lambda weights, batch: seen.append(1) or gradient(weights, batch))
    found = Passes(objective, batches[0]).estimated(named_quantizers(FMT, ["ste", DAMPED, OTHER]), KEY)
    assert len(seen) == 2 and found["ste"][0] == found["damped"][0] != found["fake_quant"][0]


def test_rows_say_how_an_estimator_differs_from_straight_through(params, batches):
    rows = probe_gradients(CONFIG, params, batches[:2], FMT, ["ste", DAMPED])
    same = the_row(rows, estimator="ste", reference="quantized")
    assert same["cosine"] == pytest.approx(1, abs=1e-6) and same["norm_ratio"] == pytest.approx(1, abs=1e-6)
    assert same["bias2"] == 0 and same["loss"] == same["reference_loss"] and same["variance_batches"] > 0
    assert the_row(rows, (0, "down_proj", 0), estimator="damped", reference="quantized")["norm_ratio"] == 0
    other = the_row(rows, (1, "gate_up_proj", 2), estimator="damped", reference="quantized")
    assert other["norm_ratio"] == pytest.approx(0.5, rel=1e-5) and other["cosine"] == pytest.approx(1, abs=1e-5)
    full = the_row(rows, estimator="ste", reference="full")
    assert 0.5 < full["cosine"] < 0.999 and full["bias2"] != 0 and full["loss"] != full["reference_loss"]
    per_expert = rows_at(rows, (1, "gate_up_proj", 3), estimator="ste")
    assert len(rows_at(rows, (0, None, None))) == 4 and len(per_expert) == 2 and "loss" not in per_expert[0]
    assert len(rows) == 2 * 2 * (1 + 2 * (1 + 2 * CONFIG.num_local_experts))


def test_weights_with_a_backward_of_their_own_are_probed_like_others(params, batches):
    """Input gradients reach what lies before: `gate_up_proj` of their layer and the layers below, never those above."""
    first, every = InputsThroughMasters.of(FMT, "ste"), InputsThroughMasters(FMT, Ste(), everywhere=True)
    rows = probe_gradients(CONFIG, params, batches[:1], FMT, [first, every], references=["quantized"])
    cosine = lambda label, layer: the_row(rows, (layer, None, None), estimator=label)["cosine"]
    assert cosine("masters", 1) == pytest.approx(1, abs=1e-6) and cosine("masters", 0) < 0.9999 and cosine("masters(everywhere=True)", 1) < 0.9999
    assert the_row(rows, (0, "down_proj", 1), estimator="masters")["cosine"] == pytest.approx(1, abs=1e-6)
    assert the_row(rows, (1, "down_proj", 0), estimator="masters(everywhere=True)")["cosine"] == pytest.approx(1, abs=1e-6)


def test_bias_and_variance_are_the_written_formulas_and_unbiased():
    """Batches with a common offset `bias` and noise; seeds with noise of their own. Averages over repetitions meet the truth."""
    rng, bias, batch_noise, seed_noise, dims = np.random.default_rng(0), 0.3, 0.5, 0.7, 24
    found = []
    for _ in range(400):
        of = _Samples(seeds=3)
        for _ in range(2):
            common = bias + batch_noise * rng.standard_normal((1, 1, dims))
            drawn = [{"w": jnp.asarray(common + seed_noise * rng.standard_normal((1, 1, dims)), jnp.float32)} for _ in range(3)]
            of.add(drawn, [0.0] * 3)
        sums = {name: float(value["w"][0]) for name, value in of.sums("x").items()}
        found.append((of.mean2("x", sums), *of.variances("x", sums)))
    means, errors = np.mean(found, axis=0), np.std(found, axis=0) / 20
    expected = dims * np.array([bias**2, batch_noise**2, seed_noise**2])
    assert (np.abs(means - expected) < 4 * errors).all(), (means, expected, errors)


def test_descent_along_the_true_gradient_realises_what_it_predicts(params, batches):
    rows = probe_descent(CONFIG, params, batches[0], FMT, ["ste"], steps=(0.01, 0.05), directions=["gradient"])
    full = the_row(rows, estimator=AT_W, forward="full", step=0.01)
    assert full["ratio"] == pytest.approx(1, abs=0.02) and full["predicted"] < 0
    rms = np.sqrt(np.mean(np.concatenate([np.ravel(params[name]) for name in Objective(CONFIG, params).experts]) ** 2))
    assert full["step_absolute"] == pytest.approx(0.01 * rms, rel=1e-5)
    objective = Objective(CONFIG, params)
    grads = straight_through(objective, batches[0])
    size = np.sqrt(np.mean(np.concatenate([np.ravel(g) for g in grads.values()]) ** 2))
    row = the_row(rows, estimator="ste", step=0.05)

    def loss(factor):
        moved = {name: w + factor * rms / size * grads[name] for name, w in objective.experts.items()}
        return float(objective.loss(rounded(as_quantizer(FMT), moved), batches[0]))

    assert row["realised"] == pytest.approx(loss(-0.05) - loss(0.05), rel=1e-3)
    assert row["ratio"] == pytest.approx(row["realised"] / row["predicted"]) and row["forward"] == "quantized"


def test_descent_by_signs_and_of_single_layers(params, batches):
    """What layers predict adds up, and signs move every weight alike."""
    # with twice this step a token changes experts, and the loss jumps
    rows = probe_descent(CONFIG, params, batches[0], FMT, [], steps=(0.0005,), per_layer=True)
    for direction in ("gradient", "sign"):
        whole = the_row(rows, direction=direction, forward="full")
        parts = [the_row(rows, (layer, None, None), direction=direction, forward="full") for layer in range(CONFIG.num_hidden_layers)]
        assert all(row["ratio"] == pytest.approx(1, abs=0.005) for row in (whole, *parts))
        if direction == "sign":
            assert sum(row["predicted"] for row in parts) == pytest.approx(whole["predicted"], rel=1e-5)
            grads = Passes(Objective(CONFIG, params), batches[0]).at(Objective(CONFIG, params).experts)[1]
            assert whole["predicted"] == pytest.approx(-2 * whole["step_absolute"] * sum(float(jnp.abs(g).sum()) for g in grads.values()), rel=1e-4)
    with pytest.raises(ValueError, match="direction 'adam'"):
        probe_descent(CONFIG, params, batches[0], FMT, directions=["adam"])


def test_smoothed_slope_of_an_unquantized_model_is_the_gradients_own(params, batches):
    """With Q the identity the smoothed gradient is the gradient up to curvature: ratio 1 within its standard error."""
    # with ten times this radius a token or two changes experts, and the loss jumps
    rows = probe_smoothed(CONFIG, params, batches[0], IDENTITY, [IDENTITY], radius=0.003, draws=4)
    row = the_row(rows, estimator=AT_W)
    assert row["ratio"] == pytest.approx(1, abs=0.01) and row["ratio_error"] < 0.01 and row["cosine_at_least"] == pytest.approx(1, abs=0.02)
    assert len(rows_at(rows, (1, None, None))) == 2


def test_smoothed_error_is_the_spread_over_draws(params, batches):
    few, many = (the_row(probe_smoothed(CONFIG, params, batches[0], FMT, ["ste"], draws=n, seed=n), estimator="ste") for n in (8, 32))
    assert few["slope"] == pytest.approx(many["slope"], abs=4 * (few["slope_error"] + many["slope_error"]))
    assert 0.25 < many["slope_error"] / few["slope_error"] < 1 and many["ratio"] == pytest.approx(many["slope"] / (few["slope"] / few["ratio"]))


def test_random_forward_has_a_variance_between_seeds(params, batches):
    """Every seed is a pass of its own; a deterministic estimator beside it has none."""
    rows = probe_gradients(CONFIG, params, batches[:1], FMT, ["ste", SHAKEN], references=["quantized"], seeds=3)
    quiet, random = the_row(rows, estimator="ste"), the_row(rows, estimator="shaken")
    assert quiet["variance_seeds"] < 1e-12 and quiet["bias2"] == 0 and random["variance_seeds"] > 0
    assert quiet["variance_batches"] is None and random["batches"] == 1 and random["seeds"] == 3 and random["cosine"] < 0.9999
    again = probe_gradients(CONFIG, params, batches[:1], FMT, ["ste", SHAKEN], references=["quantized"], seeds=3)
    assert again == rows


def test_labels_show_what_is_not_the_default():
    assert label_of(as_quantizer(FMT, "ste")) == "ste" and label_of(DAMPED) == "damped"
    assert label_of(as_quantizer(FMT, get_estimator("dge", k=3))) == "dge(k=3)"


def test_unknown_names_are_refused(params, batches):
    with pytest.raises(ValueError, match="reference 'fp32'"):
        probe_gradients(CONFIG, params, batches, FMT, references=["fp32"])
    with pytest.raises(ValueError, match="unknown estimator"):
        probe_gradients(CONFIG, params, batches, FMT, ["stee"])
    with pytest.raises(UsageError, match="two estimators"):
        probe_gradients(CONFIG, params, batches, FMT, ["ste", "ste"])
    with pytest.raises(UsageError, match="is an estimator of a format"):
        probe_gradients(CONFIG, params, batches, IDENTITY, ["ste"])
