"""Where arrays lie: the device mesh, the one table from logical axes to mesh axes, and the processes that share them."""

from jax.sharding import AxisType, Mesh

from gptoss_jax.model.context import Distribute
from gptoss_jax.sharding.attention import attention_parallel
from gptoss_jax.sharding.batches import local_rows, place_rows
from gptoss_jax.sharding.experts import expert_parallel
from gptoss_jax.sharding.loss import loss_parallel
from gptoss_jax.sharding.mesh import MESH_AXES, make_mesh
from gptoss_jax.sharding.rules import (
    DEFAULT_RULES,
    ShardingRules,
    abstract_sharded_params,
    batch_sharding,
    param_shardings,
    replicated,
)
from gptoss_jax.sharding.storage import storage_shardings


def distribution(mesh: Mesh, rules: ShardingRules = DEFAULT_RULES) -> Distribute:
    """How `forward` runs on this mesh.

    What lies between is laid out by the compiler (AxisType.Auto). On a mesh of Explicit axes call it within `jax.sharding.auto_axes`, as
    `scripts/train_pjit.py` does.

    Raises:
      UsageError: rules that attention or experts cannot be run with.
    """
    if isinstance(mesh, Mesh):  # an abstract one, as `plan` makes, has Auto axes
        mesh = Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))
    return Distribute(attention_parallel(mesh, rules), expert_parallel(mesh, rules), loss_parallel(mesh, rules))


__all__ = [
    "DEFAULT_RULES", "MESH_AXES", "ShardingRules", "abstract_sharded_params", "attention_parallel", "batch_sharding", "distribution",
    "expert_parallel", "local_rows", "loss_parallel", "make_mesh", "param_shardings", "place_rows", "replicated",
    "storage_shardings",
]  # fmt: skip
