"""The examples run: the notebook cell by cell, and the estimator that a researcher adds trains by its name."""

import json
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from gptoss_jax.lab.experiment import load_experiment
from gptoss_jax.lab.parts import quantizer_of
from gptoss_jax.quant import fake_quant

EXAMPLES = Path(__file__).parents[1] / "scripts" / "examples"


def test_example_estimator_is_an_arm_of_its_experiment():
    runpy.run_path(str(EXAMPLES / "new_estimator.py"))  # not as __main__: registers, runs nothing
    _, arms = load_experiment(EXAMPLES / "new_estimator.yaml")
    (taper,) = (quantizer_of(arm.settings).estimator for arm in arms if arm.name == "taper")
    x = jnp.concatenate([jnp.array([6.0, 0.0, 0.125, 0.25, 2.4]), jnp.zeros(27)])
    (grad,) = jax.vjp(lambda x: fake_quant(x, "mxfp4", taper), x)[1](jnp.ones(32))
    assert grad[:5].tolist() == pytest.approx([1, 1, 0.75, 0.5, 0.6])
    source = (EXAMPLES / "new_estimator.py").read_text()
    body = source[source.index("@register_estimator") : source.index("if __name__")]
    assert len(body.strip().splitlines()) < 30


@pytest.mark.slow
def test_notebook_runs():
    """Each code cell in order in one namespace; a cell's last line may be a bare value."""
    matplotlib = pytest.importorskip("matplotlib", reason="plots extra")
    matplotlib.use("Agg")
    cells = json.loads((EXAMPLES / "quantization_gradients.ipynb").read_text())["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    namespace = {"__name__": "notebook"}
    for number, source in enumerate(sources, 1):
        exec(compile(source, f"notebook cell {number}", "exec"), namespace)
    plt = namespace["plt"]
    assert len(sources) >= 8 and len(plt.get_fignums()) == 2
    plt.close("all")
    by_name = {row["estimator"]: row["cosine"] for row in namespace["whole"]}
    assert len(by_name) == 4 and all(0 < cosine < 1 for cosine in by_name.values())
