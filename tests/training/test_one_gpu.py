"""The settings for 20b on one GPU of 141 GB: bytes of the state at the released shapes, without allocating them."""

from pathlib import Path

import jax
import pytest

from gptoss_jax.model import GptOssConfig
from gptoss_jax.training.step import abstract_state
from gptoss_jax.training.yaml_config import load_config

CONFIGS = Path(__file__).parent.parent.parent / "configs"


def num_bytes(tree) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("name", ["sft_20b_1gpu", "qat_mxfp4_20b_1gpu"])
def test_masters_state_and_gradients_are_the_bytes_of_the_table(name):
    train = load_config(CONFIGS / f"{name}.yaml").model_copy(update={"steps": 1, "epochs": None})
    state = abstract_state(GptOssConfig.gpt_oss_20b(), train)
    params = sum(p.size for p in state.params.values())
    adam = state.opt_state[0]
    parts = {"masters": state.params, "residual": state.opt_state[-1], "first": adam.mu, "second": adam.nu}
    held = {part: num_bytes(tree) / 1e9 for part, tree in parts.items()}
    assert held == pytest.approx({"masters": 41.83, "residual": 20.91, "first": 21.38, "second": 0.049}, abs=0.01)
    # gradients have the dtype of the masters: nothing is accumulated
    assert train.batch.accumulation == 1 and train.mesh.size == 1
    total = sum(held.values()) + held["masters"]
    assert total / params * 1e9 == pytest.approx(6.03, abs=0.01) and total * 1e9 / 2**30 == pytest.approx(117.4, abs=0.1)
