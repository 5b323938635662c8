"""Lowering for NVIDIA GPUs on a machine without one."""

import contextlib
from unittest import mock

import jax
from jax.experimental.pallas import triton


def _card():
    """Newer JAX asks which card Triton kernels are for, and takes an abstract mesh for an answer only where nothing in them is partitioned."""
    if not hasattr(triton, "get_gpu_info_from_version"):
        return contextlib.nullcontext()
    info = triton.get_gpu_info_from_version(triton.GpuVersion.H100)
    return mock.patch("jax._src.pallas.triton.gpu_info.get_gpu_info", lambda: info)


def lower_for_cuda(function, *shapes) -> str:
    """The StableHLO text of `function` for the CUDA platform; Pallas kernels are lowered to Triton in it."""
    with _card():
        return jax.jit(function).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
