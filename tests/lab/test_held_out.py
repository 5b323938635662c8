"""What experiments measure: rows nobody has looked at, weights as a file holds them, and what rounding undoes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptoss_jax.checkpoint import export_hf, load_params
from gptoss_jax.checkpoint.source import NANO
from gptoss_jax.data import load_rows
from gptoss_jax.errors import UsageError
from gptoss_jax.evaluation.numbers import split_of_number
from gptoss_jax.evaluation.tasks import task_rows
from gptoss_jax.formats import Mxfp4, Nvfp4
from gptoss_jax.lab.held_out import deployed, evaluation_rows, rounding_of
from gptoss_jax.lab.noise import move_in_cell
from gptoss_jax.lab.quantizer import FakeQuant, Unquantized, expert_names
from tests.training.support import CONFIG, make_params


def questions(rows):
    return {tuple(message["content"] for message in row["messages"][:-1]) for row in rows}


def test_fresh_rows_share_no_question_with_sets_that_were_looked_at():
    counts = {"A": 500, "B": 300, "H": 100, "Eng": 100}
    rows = evaluation_rows("fresh", counts)
    assert {task: sum(row["task"] == task for row in rows) for task in counts} == counts and rows == evaluation_rows("fresh", counts)
    fresh = questions(rows)
    assert len(fresh) == 1000
    for file in ("final", "dev"):
        assert not fresh & questions(load_rows(NANO / "tasks" / f"{file}.jsonl").rows)
    assert not fresh & questions(row for task, n in {"A": 500, "B": 500, "H": 200, "Eng": 200}.items() for row in task_rows(task, "final", 0, n))
    numbers = [int(row["messages"][-2]["content"].rstrip(".").split()[-1]) for row in rows if row["task"] == "A"]
    assert all(split_of_number(number) == "final" for number in numbers), "a number that training rows may have"
    with pytest.raises(UsageError, match="different questions"):
        evaluation_rows("fresh", {"Eng": 1000})


@pytest.mark.parametrize(
    "fmt", [Mxfp4(), Mxfp4(scale_rule="even"), Nvfp4(), Mxfp4(element_round="sr", seed=3), Mxfp4(element_round="dither", seed=1), "bf16"], ids=str
)
def test_deployed_weights_are_those_of_the_exported_files(tmp_path, fmt):
    params = {name: jnp.asarray(p) for name, p in make_params().items()}
    _, loaded = load_params(export_hf(tmp_path / "out", CONFIG, params, format=fmt), jnp.float32)
    made = deployed(CONFIG, params, {}, Unquantized(), fmt)
    for name, weight in loaded.items():
        np.testing.assert_array_equal(np.asarray(made[name]), np.asarray(weight), err_msg=name)
    if fmt in (Mxfp4(), Nvfp4()):
        same = deployed(CONFIG, params, {}, FakeQuant.of(fmt), "same")
        assert all((same[name] == made[name]).all() for name in made)


def test_what_rounding_undoes():
    name = "blocks.0.mlp.experts.down_proj"
    base, delta, error = jnp.array([[1.0, 2.0]]), jnp.array([[0.25, -0.5]]), jnp.array([[-0.25, 0.0]])
    found = rounding_of({name: base + delta}, {name: base + delta + error}, {name: base})
    expected = {"changed": 0.5, "error_ratio": 0.2**0.5, "pull_back": 0.2**0.5, "kept": 0.8}
    assert found == pytest.approx(expected, rel=1e-6)
    assert rounding_of({name: base}, {name: base}, {name: base}) == {"changed": 0.0}


def test_scales_that_a_rule_changes():
    """Blocks with largest weight 6: any growth doubles rceil's scale, and leaves even's."""
    name = "blocks.0.mlp.experts.down_proj"
    base = jnp.zeros((4, 32)).at[:, 0].set(6.0)
    moved = base.at[0, 0].set(6.01).at[1, 0].set(5.99)
    found = {rule: rounding_of({name: moved}, {name: moved}, {name: base}, Mxfp4(scale_rule=rule))["scales_changed"] for rule in ("rceil", "even")}
    assert found == {"rceil": 0.25, "even": 0.0}


def test_moved_base_rounds_to_itself_and_fills_its_cells():
    names = expert_names(make_params())
    fmt = Mxfp4()
    base = {name: fmt.encode_decode(jnp.asarray(p), jnp.float32)[0] if name in names else p for name, p in make_params().items()}
    moved = move_in_cell(base, fmt, 1.0, jax.random.key(0))
    rounded = FakeQuant.of(fmt).round(moved, {})
    places = []
    for name in names:
        assert (rounded[name] != base[name]).mean() < 1e-4, "only a float32 tie may fall to the neighbour"
        elements, scale = fmt.parts(fmt.encode(base[name]))
        y = np.asarray(moved[name]).reshape(elements.shape) / np.asarray(scale)
        # elements 1.5 have the neighbours 1 and 2: their cell is 1.25 to 1.75
        places.append(np.abs(y)[np.abs(np.asarray(elements)) == 1.5])
        assert (np.abs(y).max(-1) == np.abs(np.asarray(elements)).max(-1)).all(), "scales must not change"
    places = np.concatenate(places)
    assert places.min() >= 1.25 and places.max() <= 1.75
    assert abs(places.mean() - 1.5) < 0.02 and places.std() == pytest.approx(0.5 / 12**0.5, rel=0.05)
    half = move_in_cell(base, fmt, 0.5, jax.random.key(0))
    np.testing.assert_allclose(np.asarray(half[names[0]] - base[names[0]]), 0.5 * np.asarray(moved[names[0]] - base[names[0]]), atol=1e-7)
    assert all((moved[name] == base[name]).all() for name in base if name not in names)
