"""Where arrays lie: the device mesh, the one table from logical axes to mesh axes, and the processes that share them."""

from jax.sharding import Mesh

from gptoss_jax.model.context import Distribute
from gptoss_jax.sharding.attention import attention_parallel
from gptoss_jax.sharding.batches import local_rows, place_rows
from gptoss_jax.sharding.embedding import embedding_parallel
from gptoss_jax.sharding.experts import Transport, expert_parallel, stacked_experts
from gptoss_jax.sharding.loss import loss_parallel
from gptoss_jax.sharding.mesh import MESH_AXES, auto_mesh, make_mesh
from gptoss_jax.sharding.rules import (
    DEFAULT_RULES,
    ShardingRules,
    abstract_sharded_params,
    batch_sharding,
    param_shardings,
    replicated,
)
from gptoss_jax.sharding.storage import storage_shardings


def distribution(mesh: Mesh, rules: ShardingRules = DEFAULT_RULES, transport: Transport = "auto") -> Distribute:
    """How `forward` runs on this mesh. `transport` is how rows get to experts of other devices (`experts.py`).

    What lies between is laid out by the compiler (AxisType.Auto). On a mesh of Explicit axes call it within `jax.sharding.auto_axes`, as
    `scripts/train_pjit.py` does.

    Raises:
      UsageError: rules that attention or experts cannot be run with.
    """
    mesh = auto_mesh(mesh)
    experts = expert_parallel(mesh, rules, transport)
    return Distribute(attention_parallel(mesh, rules), experts, loss_parallel(mesh, rules), embedding_parallel(mesh, rules))


__all__ = [
    "DEFAULT_RULES", "MESH_AXES", "ShardingRules", "Transport", "abstract_sharded_params", "attention_parallel", "batch_sharding", "distribution",
    "embedding_parallel", "expert_parallel", "local_rows", "loss_parallel", "make_mesh", "param_shardings", "place_rows", "replicated",
    "stacked_experts", "storage_shardings",
]  # fmt: skip
