"""The experts of a layer on a mesh: `jax.shard_map` around the code for one device.

Experts are cut over the mesh axes of the rule `expert`. Those of `gathered` (fsdp) only store: before computing, the shards of a group of devices
are put together (`quant.gather`: packed codes travel, not weights). Over the others (expert, tensor) experts stay where they are, and tokens
come to them:

    all-gather tokens and their routing over the axes that cut tokens too (expert); over the others (tensor) every device has them already
    local grouped matmul over the experts at hand; rows of experts elsewhere get no slot, are not computed and add exact zeros
    reduce-scatter the sums back (psum over the axes that do not cut tokens)

No capacity, no dropped token; works on every backend. Rows are exchanged in the compute dtype; weight gradients are summed in float32.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from gptoss_jax.errors import UsageError
from gptoss_jax.model.moe import StoredExperts
from gptoss_jax.quant import Gather
from gptoss_jax.sharding.rules import DEFAULT_RULES, ShardingRules


def expert_parallel(mesh: Mesh, rules: ShardingRules = DEFAULT_RULES) -> Callable[[Callable, bool], Callable]:
    """How `forward` runs the experts on this mesh: `distribute(run_experts, capture)`.

    Raises:
      UsageError: rules that cut an expert in itself, or that store over an axis outside those that compute.
    """
    for axis in ("expert_mlp", "expert_embed"):
        if rules.axes(axis, mesh):
            raise UsageError(f"rule {axis!r} = {rules.axes(axis, mesh)} would cut an expert; the devices of these axes can serve as 'expert'")
    cut = rules.axes("expert", mesh)
    stay = tuple(a for a in cut if a not in rules.gathered)
    gathered = cut[len(stay) :]
    if cut != stay + gathered:
        raise UsageError(f"rule 'expert' = {cut}: the axes {rules.gathered}, which only store, must come last")
    rows, length = rules.axes("batch", mesh), rules.axes("length", mesh)
    exchange = tuple(a for a in stay if a in rows)
    summed = tuple(a for a in stay if a not in rows)
    if set(stay) & set(length):
        raise UsageError(f"mesh axes {sorted(set(stay) & set(length))} cut both experts and the length of rows")
    tokens = PartitionSpec(rows or None, length or None)
    experts = PartitionSpec(cut or None)
    counts = PartitionSpec(tuple(dict.fromkeys(rows + length + stay)) or None)  # a number from every device that has rows of its own

    def distribute(run: Callable, capture: bool) -> Callable:
        def local(x_BTD, experts_BTA, weights_BTA, stored: StoredExperts):
            if exchange:
                x_BTD, experts_BTA, weights_BTA = (lax.all_gather(x, exchange, axis=0, tiled=True) for x in (x_BTD, experts_BTA, weights_BTA))
            num_here = stored.down_bias_ED.shape[0] * math.prod(mesh.shape[a] for a in gathered)
            index_BTA = experts_BTA - (lax.axis_index(stay) * num_here if stay else 0)
            index_BTA = jnp.where((index_BTA >= 0) & (index_BTA < num_here), index_BTA, num_here)
            out_BTD, num_rows, captured = run(x_BTD, index_BTA, weights_BTA, stored, gather=Gather(gathered) if gathered else None)
            if exchange:
                out_BTD = lax.psum_scatter(out_BTD, exchange, scatter_dimension=0, tiled=True)
            if summed:
                out_BTD = lax.psum(out_BTD, summed)
            return out_BTD, num_rows, captured if capture else {}

        # of what is captured, weights are whole over the gathered axes, codes are those of the shard
        captured = dict.fromkeys(("gate_up_proj", "down_proj") if capture else (), (PartitionSpec(stay or None), experts))
        # the loops inside carry zeros that vary over no axis, which the check of replication does not follow
        return jax.shard_map(
            local, mesh=mesh, in_specs=(tokens, tokens, tokens, experts), out_specs=(tokens, counts, captured), check_vma=False,
        )  # fmt: skip

    return distribute
