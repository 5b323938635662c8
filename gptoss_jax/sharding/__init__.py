"""Where arrays lie: the device mesh, the one table from logical axes to mesh axes, and the processes that share them."""

from gptoss_jax.sharding.batches import local_rows, place_rows
from gptoss_jax.sharding.experts import expert_parallel
from gptoss_jax.sharding.mesh import MESH_AXES, make_mesh
from gptoss_jax.sharding.rules import (
    DEFAULT_RULES,
    ShardingRules,
    abstract_sharded_params,
    batch_sharding,
    param_shardings,
    replicated,
)

__all__ = [
    "DEFAULT_RULES", "MESH_AXES", "ShardingRules",
    "abstract_sharded_params", "batch_sharding", "expert_parallel", "local_rows", "make_mesh", "param_shardings", "place_rows", "replicated",
]  # fmt: skip
