"""The training step lowers for CUDA and TPU on a machine that has neither, so a CPU-only construct cannot creep in; and what the CPU program
of a layer copies."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest

from gptoss_jax.data import Batch
from gptoss_jax.formats import Mxfp4
from gptoss_jax.model import abstract_params, forward
from gptoss_jax.quant import default_policy, make_expert_quant
from gptoss_jax.sharding import make_mesh
from gptoss_jax.training.config import parse
from gptoss_jax.training.step import Shardings, abstract_state, make_train_step


def lowered_step(config, platform, quantized, mesh=None, **changes):
    train = parse({"steps": 10, "batch": {"rows": 4, "accumulation": 2}, **changes})
    quant = make_expert_quant(default_policy(Mxfp4()), jnp.bfloat16) if quantized else None
    shapes = [jax.ShapeDtypeStruct((4, 40), dtype) for dtype in (jnp.int32, jnp.int32, jnp.float32, jnp.int32, jnp.int32)]
    shardings = mesh and Shardings.on(config, make_mesh(**mesh))
    step = make_train_step(config, train, quant, shardings)
    return step.trace(abstract_state(config, train, shardings), Batch(*shapes)).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize("quantized", [False, True], ids=["sft", "qat"])
def test_training_step_lowers(platform, quantized, tiny_config):
    assert "stablehlo" in lowered_step(tiny_config, platform, quantized)


@pytest.mark.parametrize("cast_at", ["layer", "step"])
def test_training_step_lowers_for_cuda_with_triton_kernels(cast_at, tiny_config):
    text = lowered_step(tiny_config, "cuda", True, kernels="triton", remat="products", cast_at=cast_at)
    assert {"forward_kernel", "dq_kernel", "dkv_kernel", "grouped_matmul", "grouped_matmul_weight_gradient"} <= set(re.findall(r"\w+", text))


def test_training_step_on_a_mesh_lowers_for_cuda_with_triton_kernels(tiny_config):
    """Inside shard_map a kernel is the code of one device: nothing is left to be partitioned around it."""
    text = lowered_step(tiny_config, "cuda", True, dict(fsdp=2, context=2, tensor=2), kernels="triton", remat="products")
    assert {"forward_kernel", "dq_kernel", "dkv_kernel", "grouped_matmul", "grouped_matmul_weight_gradient"} <= set(re.findall(r"\w+", text))


def test_a_layer_copies_its_expert_weights_once(tiny_config):
    """In the scan over layers: one slice of the stacked weights, which is what the products read. Float32, where no cast hides a copy."""
    config = dataclasses.replace(tiny_config, num_hidden_layers=4, layer_types=())
    assert config.repeats == 2
    run = jax.jit(lambda params, tokens: forward(config, params, tokens, dtype=jnp.float32).hidden_BTD)
    text = run.lower(abstract_params(config), jax.ShapeDtypeStruct((2, 40), jnp.int32)).compile().as_text()
    shape = rf"\w+\[{config.num_local_experts},{2 * config.intermediate_size},{config.hidden_size}\]"
    top_level = re.sub(r"%fused_computation[^}]*}", "", text)  # what a fusion computes inside is not written to memory
    made = re.findall(rf"= {shape}\S* (\w[\w-]*)\(", top_level)
    assert [op for op in made if op not in ("parameter", "get-tuple-element", "bitcast")] == ["fusion"] * config.period, made
