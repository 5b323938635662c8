"""Lowering for NVIDIA GPUs on a machine without one."""

import jax


def lower_for_cuda(function, *shapes) -> str:
    """The StableHLO text of `function` for the CUDA platform; Pallas kernels are lowered to Triton in it."""
    lower = lambda: jax.jit(function).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
    try:
        return lower()
    except RuntimeError as error:  # newer JAX wants to know the card
        if "AbstractDevice" not in str(error):
            raise
    card = jax.sharding.AbstractDevice(device_kind="NVIDIA H100", num_cores=132, platform="cuda")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("x",), abstract_device=card)):
        return lower()
