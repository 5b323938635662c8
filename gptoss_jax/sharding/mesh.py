"""The device mesh. Its axes:

    data      replicates parameters                fsdp     stores them in parts
    expert    shards experts                       context  cuts the length of rows, and stores parameters in parts as fsdp does
    tensor    shards heads, vocabulary and experts

Neighbours along the last axes are neighbours among the devices: heads and the length of a row exchange most often.
"""

import math

import jax
from jax.sharding import AxisType, Mesh

from gptoss_jax.errors import UsageError

MESH_AXES = ("data", "fsdp", "expert", "context", "tensor")


def auto_mesh(mesh: Mesh) -> Mesh:
    """The same devices and names with axes whose layouts the compiler chooses. An abstract mesh, as `plan` makes, has such axes."""
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names)) if isinstance(mesh, Mesh) else mesh


def make_mesh(data: int = 1, fsdp: int = 1, expert: int = 1, context: int = 1, tensor: int = 1, devices=None) -> Mesh:
    """A mesh over the first `data * fsdp * expert * context * tensor` devices.

    Raises:
      UsageError: a size below 1, or more devices than there are.
    """
    sizes = (data, fsdp, expert, context, tensor)
    devices = jax.devices() if devices is None else devices
    if min(sizes) < 1:
        raise UsageError(f"mesh sizes must be at least 1: {dict(zip(MESH_AXES, sizes))}")
    if math.prod(sizes) > len(devices):
        raise UsageError(f"mesh {dict(zip(MESH_AXES, sizes))} needs {math.prod(sizes)} devices, {len(devices)} are present")
    return jax.make_mesh(sizes, MESH_AXES, axis_types=(AxisType.Auto,) * len(sizes), devices=devices[: math.prod(sizes)])
