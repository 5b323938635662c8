"""Loss and gradients of the whole model on meshes are those of one device: to 1e-10 in float64, where no mistake hides in the rounding."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptoss_jax.quant import default_policy, make_expert_quant
from gptoss_jax.quant.expert_quant import PROJECTIONS
from gptoss_jax.sharding import make_mesh
from gptoss_jax.training.config import parse
from gptoss_jax.training.step import Shardings, make_loss
from tests.sharding.uneven import uneven

MESHES = [
    dict(fsdp=2, expert=2, tensor=2), dict(context=8), dict(fsdp=2, expert=2, context=2), dict(data=2, context=2, tensor=2),
    *(pytest.param(sizes, marks=pytest.mark.slow) for sizes in (
        dict(expert=8), dict(fsdp=4), dict(data=2, fsdp=2, expert=2), dict(context=2), dict(context=4),
    )),
]  # fmt: skip
QAT_MESHES = [dict(fsdp=4, expert=2), dict(expert=2, context=2, tensor=2)]
ids = lambda sizes: "-".join(f"{axis}{size}" for axis, size in sizes.items())


def gradients(config, dtype, quant=False, sizes=None, estimator="ste"):
    """Loss and gradients. In QAT the quantized weights are float32 masters, which are what is encoded; all else is `dtype`."""
    params, batch = uneven(config)
    batch = batch._replace(loss_weights_BT=batch.loss_weights_BT.astype(dtype))  # a float32 sum of them depends on its order
    params = {name: param if quant and name.endswith(PROJECTIONS) else param.astype(dtype) for name, param in params.items()}
    train = parse({"router_aux_loss_coef": 0.1, "remat": "products"}).model_copy(update={"compute_dtype": dtype})
    shardings = sizes and Shardings.on(config, make_mesh(**sizes))
    expert_quant = make_expert_quant(default_policy("mxfp4", estimator), jnp.dtype(dtype)) if quant else None
    loss = make_loss(config, train, expert_quant, distribute=shardings and shardings.distribute)
    run = jax.jit(jax.value_and_grad(lambda p, b: loss(p, {}, b, jnp.sum(b.loss_weights_BT), jnp.sum(b.segment_ids_BT > 0))[0]))
    if shardings:
        params, batch = jax.device_put(params, shardings.params), jax.device_put(batch, shardings.batch)
    with jax.default_matmul_precision("highest"):
        return jax.device_get(run(params, batch))


def compare(got, expected, tolerance):
    """Relative to the largest element of each gradient, none of which is zero."""
    np.testing.assert_allclose(got[0], expected[0], rtol=tolerance("loss"))
    for name, grad in expected[1].items():
        scale = np.abs(grad).max()
        assert scale > 0, name
        np.testing.assert_allclose(got[1][name], grad, atol=tolerance(name) * scale, rtol=0, err_msg=name)


@pytest.fixture(scope="module")
def config(tiny_config):
    """One sliding and one full layer."""
    return dataclasses.replace(tiny_config, num_hidden_layers=2, layer_types=())


@pytest.fixture(scope="module")
def one_device(config):
    with jax.enable_x64(True):
        return {quant: gradients(config, "float64", quant) for quant in (False, True)}


@pytest.mark.parametrize("sizes", MESHES, ids=ids)
def test_sft_gradients_equal_one_device(config, one_device, sizes):
    with jax.enable_x64(True):
        got = gradients(config, "float64", False, sizes)
    assert got[0].dtype == np.float64
    compare(got, one_device[False], lambda name: 1e-10)


@pytest.mark.parametrize("sizes", QAT_MESHES, ids=ids)
def test_qat_gradients_equal_one_device(config, one_device, sizes):
    """Gradients of float32 masters are rounded to float32 once, at the end; a code that differed would be seen in all others."""
    with jax.enable_x64(True):
        got = gradients(config, "float64", True, sizes)
    compare(got, one_device[True], lambda name: 1e-7 if name.endswith(PROJECTIONS) else 1e-10)


@pytest.mark.slow
def test_an_estimator_sees_its_shard_and_the_summed_gradient(config):
    """Inside scan, remat and shard_map. The slope of `dge` is a float32 power, which amplifies the last place of a quotient where it is steep."""
    with jax.enable_x64(True):
        run = lambda sizes, estimator: gradients(config, "float64", True, sizes, estimator)
        one, many, straight = run(None, "dge"), run(QAT_MESHES[0], "dge"), run(None, "ste")
    compare(many, one, lambda name: 1e-5 if name.endswith(PROJECTIONS) else 1e-10)
    for name, grad in straight[1].items():
        assert name.endswith(PROJECTIONS) == (np.abs(grad - one[1][name]).max() > 0.1 * np.abs(grad).max()), name


def test_float32_gradients_equal_one_device(config):
    # a router's gradient is a difference of large sums: its own rounding on one device is of this size
    tolerance = lambda name: 5e-5 if ".router." in name else 1e-5
    compare(gradients(config, "float32", sizes=dict(fsdp=2, expert=2, context=2)), gradients(config, "float32"), tolerance)
