"""The Triton programs inside a function lowered for CUDA, on a machine without a GPU."""

import jax
from jax._src.pallas.triton import lowering  # its MLIR context knows the Triton dialect; there is no public way to one
from jaxlib.mlir import ir

# jax 0.10 hands the program to XLA as Triton IR; later versions compile it while lowering and hand over the result.
TARGETS = ("__gpu$xla.gpu.triton", "triton_kernel_call_ffi")


def lower_for_cuda(function, *args) -> tuple[str, list[str]]:
    """(StableHLO, Triton IR of each kernel). Parsing the IR verifies it, which jax 0.10 does not do while it lowers.

    The list is empty where jax compiles the kernels itself.
    """
    lowered = jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",))
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
