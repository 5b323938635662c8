"""Weight statistics: published signal-to-noise ratios, a slow count in numpy, every kind of checkpoint; rows written and read."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from gptoss_jax.checkpoint import export_hf, open_checkpoint, orbax_store
from gptoss_jax.formats import Mxfp4, Nvfp4
from gptoss_jax.lab import probe_array, probe_weights, read_rows, write_rows
from tests.support.params import lively_params

FORMATS = {
    **{rule: Mxfp4(scale_rule=rule) for rule in ("floor", "rceil", "even", "mse")},
    "nvfp4_exact": Nvfp4(global_scale="exact"), "nvfp4": Nvfp4(),
}  # fmt: skip
# dB on 2^21 bfloat16 weights, measured with an independent implementation
ANCHORS = {
    "normal": {"floor": 18.87, "rceil": 18.54, "even": 19.01, "mse": 19.06, "nvfp4_exact": 20.44, "nvfp4": 20.44},
    "t5": {"floor": 17.98, "rceil": 17.58, "even": 18.14, "mse": 18.24, "nvfp4_exact": 20.69, "nvfp4": 20.69},
    "laplace": {"floor": 17.96, "rceil": 17.59, "even": 18.14, "mse": 18.23, "nvfp4_exact": 20.65, "nvfp4": 20.65},
}
DRAW = {
    "normal": lambda rng, shape: rng.standard_normal(shape),
    "t5": lambda rng, shape: rng.standard_t(5, shape),
    "laplace": lambda rng, shape: rng.laplace(size=shape),
}
GRID = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def drawn(name, shape=(1024, 2048)):
    return jnp.asarray(0.02 * DRAW[name](np.random.default_rng(0), shape), jnp.bfloat16)


@pytest.mark.parametrize("name", ANCHORS)
def test_signal_to_noise_ratios_are_the_published_ones(name):
    x = drawn(name)
    found = {label: probe_array(x, fmt)["sqnr_db"] for label, fmt in FORMATS.items()}
    assert found == pytest.approx(ANCHORS[name], abs=0.05)


def test_shares_of_gaussian_weights_are_the_published_ones():
    x = drawn("normal")
    floor, rceil, even = (probe_array(x, FORMATS[rule]) for rule in ("floor", "rceil", "even"))
    assert floor["clipped"] == pytest.approx(0.02, abs=0.002) and rceil["clipped"] == 0 and 0 < even["clipped"] < floor["clipped"]
    assert rceil["zero"] == pytest.approx(0.11, abs=0.01) and 0.005 < rceil["tie"] < 0.02


def slow_counts(x, scale_exp):
    """The measures of MXFP4 blocks, element by element in float64."""
    out = {"clipped": 0, "zero": 0, "tie": 0, "near_edge": 0, "changed": 0, "codes": np.zeros(16, int), "cell": np.zeros(20, int)}
    for row, exps in zip(np.asarray(x, np.float64), scale_exp):
        for value, exp in zip(row, np.repeat(exps, 32)):
            a = abs(value) / 2.0**exp
            distance = np.abs(GRID - a)
            index = min(np.flatnonzero(distance == distance.min()), key=lambda i: i % 2)
            out["clipped"] += a > 6
            out["zero"] += index == 0
            out["changed"] += GRID[index] != a
            out["codes"][index + 8 * bool(np.signbit(value))] += 1
            if a < 6:
                lower = np.flatnonzero(GRID <= a)[-1]
                position = (a - GRID[lower]) / (GRID[lower + 1] - GRID[lower])
                out["tie"] += position == 0.5
                out["near_edge"] += abs(position - 0.5) < 0.05
                out["cell"][int(position * 20)] += 1
    return out


@pytest.mark.parametrize("rule", ["floor", "rceil"])
def test_counts_are_those_of_a_slow_count(rule):
    x = np.array(drawn("normal", (16, 96)))
    x[3, :32], x[5, 7] = 0, -0.0
    fmt = Mxfp4(scale_rule=rule)
    row, scale_exp = probe_array(jnp.asarray(x), fmt), np.asarray(fmt.encode(jnp.asarray(x)).scales, int) - 127
    slow = slow_counts(x, scale_exp)
    for name in ("clipped", "zero", "tie", "near_edge", "changed"):
        assert row[name] == pytest.approx(slow[name] / x.size), name
    assert row["codes"] == slow["codes"].tolist() and row["cell"] == slow["cell"].tolist()
    exponents = {row["first_exponent"] + i: count for i, count in enumerate(row["exponents"]) if count}
    assert exponents == {int(e): int((scale_exp == e).sum()) for e in np.unique(scale_exp)} and row["first_exponent"] == -127
    assert row["tie"] > 0 and row["weights"] == x.size == sum(row["codes"])


def test_values_on_the_grid_have_no_error():
    x = Mxfp4().decode(Mxfp4().encode(drawn("normal", (4, 64))))
    row = probe_array(x, Mxfp4())
    assert row["sqnr_db"] is None and row["changed"] == 0 and row["error2"] == 0 and row["cell"][0] == sum(row["cell"])


@pytest.fixture(scope="module")
def model(tmp_path_factory, tiny_config):
    params = lively_params(tiny_config)
    folder = tmp_path_factory.mktemp("model")
    export_hf(folder / "bf16", tiny_config, params, format="bf16")
    export_hf(folder / "mxfp4", tiny_config, params, format=Mxfp4())
    return folder, params


def test_every_expert_of_every_projection_has_a_row_and_sums_add_up(model, tiny_config):
    folder, params = model
    rows = probe_weights(folder / "bf16", "nvfp4")
    per_expert = [row for row in rows if row["expert"] is not None]
    assert len(per_expert) == tiny_config.num_hidden_layers * 2 * tiny_config.num_local_experts
    one = next(row for row in per_expert if (row["layer"], row["projection"], row["expert"]) == (2, "down_proj", 5))
    # layer 2 is the tail of a model of period 2
    expected = probe_array(jnp.asarray(params["tail.0.mlp.experts.down_proj"][5], jnp.bfloat16), Nvfp4())
    assert {**one, "layer": None, "projection": None, "expert": None} == expected
    for name in ("weights", "weight2", "error2"):
        layers = [row[name] for row in rows if row["layer"] is not None and row["expert"] is None]
        assert rows[0][name] == pytest.approx(sum(layers)) == pytest.approx(sum(row[name] for row in per_expert))
    assert sum(rows[0]["codes"]) == sum(rows[0]["exponents"]) * 16 == rows[0]["weights"]


def test_all_kinds_of_checkpoints_and_a_part_of_the_experts(model, tiny_config):
    folder, _ = model
    exact = probe_weights(folder / "mxfp4", "mxfp4")[0]
    assert exact["sqnr_db"] is None and exact["changed"] == 0
    source = open_checkpoint(folder / "bf16")
    assert probe_weights(folder / "bf16", "mxfp4", max_experts=3)[0]["weights"] == exact["weights"] * 3 / source.config.num_local_experts


def test_masters_of_a_training_checkpoint_are_read_one_parameter_at_a_time(model, tiny_config, tmp_path, monkeypatch):
    _, params = model
    orbax_store.save(tmp_path / orbax_store.CHECKPOINTS, 1, params, orbax_store.Meta(model=tiny_config.to_dict()))
    read, restore = [], orbax_store.restore_param
    monkeypatch.setattr(orbax_store, "restore_param", lambda directory, step, name: read.append(name) or restore(directory, step, name))
    rows = probe_weights(tmp_path, "mxfp4")
    assert sorted(read) == sorted(name for name in params if name.endswith("_proj") and "experts" in name)
    one = next(row for row in rows if (row["layer"], row["projection"], row["expert"]) == (1, "gate_up_proj", 7))
    expected = probe_array(params["blocks.1.mlp.experts.gate_up_proj"][0, 7], Mxfp4())
    assert {**one, "layer": None, "projection": None, "expert": None} == expected


def test_rows_come_back_from_both_files(tmp_path):
    rows = [{"probe": "a", "layer": None, "x": np.float64(0.5), "counts": [1, 2]}, {"probe": "a", "layer": 3, "x": float("nan"), "more": "text"}]
    parquet, lines = write_rows(rows, tmp_path / "new" / "rows.parquet")
    expected = [
        {"probe": "a", "layer": None, "x": 0.5, "counts": [1, 2], "more": None},
        {"probe": "a", "layer": 3, "x": None, "counts": None, "more": "text"},
    ]  # fmt: skip
    assert read_rows(parquet) == read_rows(lines) == expected
    assert json.loads(lines.read_text().splitlines()[1])["x"] is None
    with pytest.raises(ValueError, match="no rows"):
        write_rows([], tmp_path / "none")
