"""The experts of a layer on a mesh: `jax.shard_map` around the code for one device.

Experts are cut over the mesh axes of the rule `expert`. Those of `gathered` (fsdp) only store: before computing, the shards of a group of devices
are put together (`quant.gather`: packed codes travel, not weights). Over the others (expert, tensor) experts stay where they are, and tokens
come to them:

    over the axes that cut tokens too (expert) the choices of all tokens are gathered, 8 bytes per token and expert, and the rows travel by
        gather  an all-gather: every row to every device of the group; results come back as a reduce-scatter
        ragged  only to the devices that hold its experts (`transport`)
    over the others (tensor) every device has all rows already, and results are summed
    local grouped matmul over the experts at hand; rows of experts elsewhere get no slot, are not computed and add exact zeros

No capacity, no dropped token; works on every backend. Rows are exchanged in the compute dtype; weight gradients are summed in float32.

Legend: B rows  T tokens of a row  P devices of the exchange  S=B*T tokens of a device  D hidden  A experts per token
"""

import math
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gptoss_jax.errors import UsageError
from gptoss_jax.model.moe import StoredExperts
from gptoss_jax.precision import wide
from gptoss_jax.quant import Gather
from gptoss_jax.sharding.mesh import auto_mesh
from gptoss_jax.sharding.rules import DEFAULT_RULES, ShardingRules
from gptoss_jax.sharding.transport import expected_share, from_experts, in_order, is_received, make_route, to_experts

Transport = Literal["auto", "gather", "ragged"]
# `auto` takes ragged on GPUs where it is expected to send less than this share of what a gather sends: sorting and placing rows costs something
WORTHWHILE_SHARE = 0.75


def choose_transport(transport: Transport, on_gpus: bool, num_experts: int, per_token: int, devices: int) -> str:
    """"gather" or "ragged"."""
    if transport != "auto":
        return transport
    return "ragged" if on_gpus and expected_share(num_experts, per_token, devices) < WORTHWHILE_SHARE else "gather"


def stacked_experts(params: Mapping[str, Any]) -> Callable[[Callable], Callable] | None:
    """How generation runs experts that lie as these parameters do, None where no device has experts of its own: `stacked(run)` does on the mesh what
    `run_stacked_experts` does on one device. Every device reads the experts that it holds, however it came to them, for all tokens; results are
    summed. Few tokens are in flight in generation, and weights are what takes time to read: so they stay where they are."""
    name = next(name for name in params if name.endswith("experts.gate_up_proj"))
    sharding = getattr(jax.tree.leaves(params[name])[0], "sharding", None)
    dim = params[name.removesuffix("gate_up_proj") + "down_proj_bias"].ndim - 2
    axes = sharding.spec[dim] if isinstance(sharding, NamedSharding) and len(sharding.spec) > dim else None
    return None if axes is None else _stacked(auto_mesh(sharding.mesh), (axes,) if isinstance(axes, str) else tuple(axes))


@lru_cache  # the same function for the same mesh: programs are found by it
def _stacked(mesh: Mesh, axes: tuple[str, ...]) -> Callable[[Callable], Callable]:
    def distribute(run: Callable) -> Callable:
        def local(x_BTD, experts_BTA, weights_BTA, stored: StoredExperts, layer):
            num_here = stored.down_bias_ED.shape[-2]
            index_BTA = experts_BTA - lax.axis_index(axes) * num_here
            index_BTA = jnp.where((index_BTA >= 0) & (index_BTA < num_here), index_BTA, num_here)
            out_BTD = run(x_BTD, index_BTA, weights_BTA, stored, layer, elsewhere=True)
            return lax.psum(out_BTD.astype(wide(out_BTD.dtype)), axes).astype(out_BTD.dtype)

        def whole(x_BTD, experts_BTA, weights_BTA, stored: StoredExperts, layer):
            cut = PartitionSpec(*[None] * (stored.down_bias_ED.ndim - 2), axes)
            # the loops inside carry zeros that vary over no axis, which the check of replication does not follow
            on_mesh = jax.shard_map(
                local, mesh=mesh, in_specs=(PartitionSpec(),) * 3 + (cut, PartitionSpec()), out_specs=PartitionSpec(), check_vma=False
            )
            return on_mesh(x_BTD, experts_BTA, weights_BTA, stored, layer)

        return whole

    return distribute


def expert_parallel(mesh: Mesh, rules: ShardingRules = DEFAULT_RULES, transport: Transport = "auto") -> Callable[[Callable, bool], Callable]:
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
    size = lambda axes: math.prod(mesh.shape[a] for a in axes)
    on_gpus = isinstance(mesh, Mesh) and mesh.devices.flat[0].platform == "gpu"
    tokens = PartitionSpec(rows or None, length or None)
    experts = PartitionSpec(cut or None)
    counts = PartitionSpec(tuple(dict.fromkeys(rows + length + stay)) or None)  # a number from every device that has rows of its own

    def owner(chosen, num_here: int):
        """The device of `exchange` that holds an expert for this device's place in `summed`; their number where another place has it."""
        place = dict(zip(stay, jnp.unravel_index(chosen // num_here, tuple(mesh.shape[a] for a in stay))))
        found = sum((place[a] * size(exchange[i + 1 :]) for i, a in enumerate(exchange)), jnp.zeros_like(chosen))
        for a in summed:
            found = jnp.where(place[a] == lax.axis_index(a), found, size(exchange))
        return found

    def by_gather(run, x_BTD, index_BTA, weights_BTA):
        out_BTD, *others = run(lax.all_gather(x_BTD, exchange, axis=0, tiled=True), index_BTA, weights_BTA)
        return lax.psum_scatter(out_BTD, exchange, scatter_dimension=0, tiled=True), *others

    def by_route(run, x_BTD, index_BTA, weights_BTA, owner_BTA, num_here: int):
        of_devices = lambda x_BTA: x_BTA.reshape(size(exchange), -1, x_BTA.shape[-1])
        route = make_route(of_devices(owner_BTA), exchange)
        x_RD = to_experts(x_BTD.reshape(-1, x_BTD.shape[-1]), route, exchange)
        index_PSA = jnp.where(is_received(route)[:, :, None], in_order(of_devices(index_BTA), route), num_here)
        x_PSD = x_RD.reshape(*index_PSA.shape[:2], -1)
        out_PSD, *others = run(x_PSD, index_PSA, in_order(of_devices(weights_BTA), route))
        return from_experts(out_PSD.reshape(x_RD.shape), route, exchange).reshape(x_BTD.shape), *others

    def distribute(run: Callable, capture: bool) -> Callable:
        def local(x_BTD, experts_BTA, weights_BTA, stored: StoredExperts):
            if exchange:
                experts_BTA, weights_BTA = (lax.all_gather(x, exchange, axis=0, tiled=True) for x in (experts_BTA, weights_BTA))
            num_here = stored.down_bias_ED.shape[0] * size(gathered)
            index_BTA = experts_BTA - (lax.axis_index(stay) * num_here if stay else 0)
            index_BTA = jnp.where((index_BTA >= 0) & (index_BTA < num_here), index_BTA, num_here)

            def here(x_BTD, index_BTA, weights_BTA):
                return run(x_BTD, index_BTA, weights_BTA, stored, gather=Gather(gathered) if gathered else None)

            if not exchange:
                out_BTD, num_rows, captured = here(x_BTD, index_BTA, weights_BTA)
            elif choose_transport(transport, on_gpus, num_here * size(stay), experts_BTA.shape[-1], size(exchange)) == "gather":
                out_BTD, num_rows, captured = by_gather(here, x_BTD, index_BTA, weights_BTA)
            else:
                out_BTD, num_rows, captured = by_route(here, x_BTD, index_BTA, weights_BTA, owner(experts_BTA, num_here), num_here)
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
