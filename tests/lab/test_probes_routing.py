"""What rounding changes downstream, counted on a small model; and that an export is the model whose loss was measured."""

import pytest

from gptoss_jax.formats import Mxfp4, Nvfp4
from gptoss_jax.lab.probes import export_gap, probe_routing
from gptoss_jax.lab.probes.objective import Objective, as_quantizer, rounded
from gptoss_jax.lab.quantizer import Unquantized
from tests.training.support import CONFIG, Batches, make_params

FMT, IDENTITY = Mxfp4(), Unquantized()


@pytest.fixture(scope="module")
def params():
    return make_params()


@pytest.fixture(scope="module")
def batch():
    return next(Batches())


def test_routing_of_equal_models_is_equal_and_of_rounded_ones_is_counted(params, batch):
    rows = probe_routing(CONFIG, params, batch, IDENTITY)
    assert all(row["flipped"] == row["moved"] == row["weight_moved"] == row["hidden_error"] == 0 for row in rows[1:])
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-6) and rows[0]["top1_agreement"] == 1 and rows[0]["loss"] == rows[0]["quantized_loss"]
    rows = probe_routing(CONFIG, params, batch, FMT)
    assert len(rows) == 1 + CONFIG.num_hidden_layers
    first, last = rows[1], rows[-1]
    assert first["flipped"] == first["moved"] == 0 and first["hidden_error"] > 0, "the first router reads what no expert has touched"
    assert 0 < last["moved"] <= last["flipped"] < 0.5 and 0 < last["weight_moved"] < 0.5 and rows[0]["kl"] > 0
    assert sum(last["load"]) == pytest.approx(1) and len(last["load"]) == CONFIG.num_local_experts
    objective = Objective(CONFIG, params)
    assert rows[0]["loss"] == pytest.approx(float(objective.loss(objective.experts, batch)), rel=1e-5)
    assert rows[0]["quantized_loss"] == pytest.approx(float(objective.loss(rounded(as_quantizer(FMT), objective.experts), batch)), rel=1e-5)


@pytest.mark.parametrize("fmt", [FMT, Nvfp4()], ids=lambda fmt: fmt.name)
def test_exported_model_has_exactly_the_loss_of_the_fake_quantized_one(fmt, params, batch):
    found = export_gap(CONFIG, params, batch, fmt)
    assert found["gap"] == 0 and found["differing_weights"] == 0 and found["loss"] == found["exported_loss"]
    assert found["in_layer_loss"] == pytest.approx(found["loss"], rel=1e-6)
    assert found["masters_loss"] == pytest.approx(found["loss"], rel=0.05) and found["masters_loss"] != found["loss"]
