"""Lowering for NVIDIA GPUs on a machine without one."""

import contextlib
from unittest import mock

import jax
from jax._src.pallas.triton import lowering  # its MLIR context knows the Triton dialect; there is no public way to one
from jax.experimental.pallas import triton
from jaxlib.mlir import ir

# jax 0.10 hands a kernel to XLA as Triton IR; later versions compile it while lowering and hand over the result.
TRITON_TARGETS = ("__gpu$xla.gpu.triton", "triton_kernel_call_ffi")


def _card():
    """Newer JAX asks which card Triton kernels are for, and takes an abstract mesh for an answer only where nothing in them is partitioned."""
    if not hasattr(triton, "get_gpu_info_from_version"):
        return contextlib.nullcontext()
    info = triton.get_gpu_info_from_version(triton.GpuVersion.H100)
    return mock.patch("jax._src.pallas.triton.gpu_info.get_gpu_info", lambda: info)


def _lower(function, shapes):
    with _card():
        return jax.jit(function).trace(*shapes).lower(lowering_platforms=("cuda",))


def lower_for_cuda(function, *shapes) -> str:
    """The StableHLO text of `function` for the CUDA platform; Pallas kernels are lowered to Triton in it."""
    return _lower(function, shapes).as_text()


def lower_with_programs(function, *shapes) -> tuple[str, list[str]]:
    """The StableHLO text, and the Triton IR of each kernel in it. Parsing verifies the IR, which jax 0.10 does not do while it lowers.

    The list is empty where jax has compiled, and thereby verified, the kernels itself.
    """
    lowered = _lower(function, shapes)
    programs = []

    def visit(op):
        if op.name == "stablehlo.custom_call" and "mhlo.backend_config" in op.attributes:
            config = ir.DictAttr(op.attributes["mhlo.backend_config"])
            if "ir" in config:
                programs.append(ir.StringAttr(config["ir"]).value_bytes)
        return ir.WalkResult.ADVANCE

    lowered.compiler_ir().operation.walk(visit)
    with lowering._new_ir_context():
        return lowered.as_text(), [str(ir.Module.parse(program)) for program in programs]
