"""The promise: the 4-bit weights in the exported files are, bit for bit, those that the training program computed with.

Real QAT steps move float32 masters; then the compiled training step (scan, remat, mesh as in training) runs on the final state and hands out the
expert weights that it consumed. These must equal the decoded export. The same comparison must fail when the exporter is given something else.
"""

import jax.numpy as jnp
import numpy as np
import pytest

from gptoss_jax.checkpoint import code_hashes, export_hf, load_params, verify_dir
from gptoss_jax.formats import Mxfp4, Nvfp4
from gptoss_jax.quant import default_policy, make_expert_quant
from gptoss_jax.sharding import batch_sharding, make_mesh, param_shardings, replicated
from gptoss_jax.training.config import parse
from gptoss_jax.training.step import Shardings, init_state, make_capture_step, make_train_step
from tests.support.params import lively_params
from tests.training.support import document, pack

STEPS = 3
FORMATS = {"mxfp4": Mxfp4(), "mxfp4_even": Mxfp4(scale_rule="even"), "nvfp4": Nvfp4()}


def trained(config, fmt, mesh, compute_dtype):
    """(state after QAT steps, the expert weights and codes that the compiled training step consumes on it)."""
    train = parse({"steps": STEPS, "batch": {"rows": 8, "accumulation": 1}, "compute_dtype": compute_dtype, "optimizer": {"learning_rate": 3e-3}})
    shardings = Shardings(param_shardings(config, mesh), batch_sharding(mesh), replicated(mesh)) if mesh else None
    quant = make_expert_quant(default_policy(fmt), jnp.dtype(compute_dtype))
    rng = np.random.default_rng(0)
    batch = pack([[document(rng, 20), document(rng, 9)] for _ in range(8)], length=32)
    params = lively_params(config)
    state = init_state(config, train, params, shardings)
    step = make_train_step(config, train, quant, shardings)
    for _ in range(STEPS):
        state, metrics = step(state, batch)
    assert np.isfinite(metrics["loss"]) and not metrics["skipped"]
    moved = np.asarray(state.params["blocks.0.mlp.experts.down_proj"]) != np.asarray(params["blocks.0.mlp.experts.down_proj"])
    assert moved.mean() > 0.9, "the masters must have moved off what was given"
    captured = make_capture_step(config, train, quant, shardings)(state, batch)
    return state, captured


def differing(directory, consumed) -> float:
    """Share of expert weights in a directory that are not, bit for bit, the consumed ones."""
    _, exported = load_params(directory, jnp.float32)
    different = total = 0
    for name, weight in consumed.items():
        ours, theirs = np.asarray(exported[name]), np.asarray(weight, np.float32)
        different += int((ours.view(np.uint32) != theirs.view(np.uint32)).sum())
        total += ours.size
    return different / total


@pytest.mark.parametrize(
    "name,sharded,compute_dtype",
    [("mxfp4", True, "bfloat16"), ("mxfp4_even", False, "float32"), pytest.param("nvfp4", True, "bfloat16", marks=pytest.mark.slow)],
)
def test_decoded_export_equals_the_weights_of_the_compiled_step(name, sharded, compute_dtype, tiny_config, tmp_path):
    fmt = FORMATS[name]
    mesh = make_mesh(data=2, fsdp=4) if sharded else None
    state, captured = trained(tiny_config, fmt, mesh, compute_dtype)
    assert len(captured.weights) == 6, "two projections of two stacked positions and one tail layer"
    assert all(weight.dtype == compute_dtype for weight in captured.weights.values())

    directory = export_hf(tmp_path / "good", tiny_config, state.params, format=fmt)
    assert differing(directory, captured.weights) == 0
    hashes = code_hashes(tiny_config, captured.codes)
    assert verify_dir(directory, against=hashes).ok

    # the same comparison notices masters that were rounded to bfloat16 on the way ...
    rounded = {n: p.astype(jnp.bfloat16) for n, p in state.params.items()}
    wrong = export_hf(tmp_path / "rounded", tiny_config, rounded, format=fmt)
    share = differing(wrong, captured.weights)
    assert 1e-4 < share < 0.05, share
    assert not verify_dir(wrong, against=hashes).ok

    # ... and another scale rule
    other = Nvfp4(global_scale="exact") if fmt.name == "nvfp4" else Mxfp4(scale_rule="floor")
    wrong = export_hf(tmp_path / "other_rule", tiny_config, state.params, format=other)
    assert differing(wrong, captured.weights) > 0.01
    assert not verify_dir(wrong, against=hashes).ok
