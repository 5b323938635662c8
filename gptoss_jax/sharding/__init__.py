"""Where arrays lie: the device mesh and the one table from logical axes to mesh axes."""

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

__all__ = ["DEFAULT_RULES", "MESH_AXES", "ShardingRules", "abstract_sharded_params", "batch_sharding", "expert_parallel", "loss_parallel", "make_mesh", "param_shardings", "replicated"]
