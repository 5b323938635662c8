"""One table from logical axes to mesh axes; parameter shardings are derived from it and checked.

Refused with the parameter's name: a mesh axis used twice in one parameter, a dimension that the mesh does not divide, and a shard that would
cut a quantization block (2880 / 32 = 90 blocks, so the contraction axis of the released experts splits by divisors of 90 only: never by 4 or 8).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gptoss_jax.errors import UsageError
from gptoss_jax.model import GptOssConfig, abstract_params, logical_axes

# Experts take the tensor, fsdp and context devices too: 32 and 128 experts divide by what 90 blocks do not. Rows of 131,072 tokens on the devices of
# `context` would leave a whole model on each, so parameters are stored in parts over `context` as over `fsdp`; all others than experts also over
# `expert`, where 1.8 G of them would take 29 GB on each device (20b, float32 masters, gradients and moments).
DEFAULT_TABLE: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp", "expert"),
    "length": ("context",),
    "layers": (),
    "norm": (),
    "router": (),
    "embed": ("fsdp", "expert", "context"),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "vocab": ("tensor",),
    "expert": ("expert", "tensor", "fsdp", "context"),
    "expert_mlp": (),
    "expert_embed": (),
}
QUANT_BLOCK = 32


@dataclass(frozen=True)
class ShardingRules:
    """`table` maps every logical axis to the mesh axes that shard it, outermost first. Over `gathered` axes parameters are only stored in parts:
    they are put together to compute with."""

    table: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: dict(DEFAULT_TABLE))
    gathered: tuple[str, ...] = ("fsdp", "context")

    def axes(self, logical: str, mesh: Mesh) -> tuple[str, ...]:
        """Mesh axes of more than one device that cut a logical axis."""
        return tuple(a for a in self.table.get(logical, ()) if mesh.shape.get(a, 1) > 1)

    def spec(self, name: str, shape: tuple[int, ...], axes: tuple[str | None, ...], mesh: Mesh) -> PartitionSpec:
        """Partition of one parameter.

        Raises:
          UsageError: naming the parameter and the dimension that cannot be laid out.
        """
        entries, used = [], set()
        for size, logical in zip(shape, axes, strict=True):
            if logical is not None and logical not in self.table:
                raise UsageError(f"{name}: no sharding rule for logical axis {logical!r}; rules exist for {sorted(self.table)}")
            mesh_axes = self.axes(logical, mesh)
            if used & set(mesh_axes):
                raise UsageError(f"{name}: mesh axes {sorted(used & set(mesh_axes))} would shard two dimensions of {axes}")
            used |= set(mesh_axes)
            shards = math.prod(mesh.shape[a] for a in mesh_axes)
            if size % shards:
                fits = [n for n in range(1, shards) if size % n == 0]
                raise UsageError(
                    f"{name}: dimension {logical!r} of size {size} does not divide by {'*'.join(mesh_axes)} = {shards}; it divides by {fits}"
                )
            entries.append(mesh_axes or None)
        last_shards = math.prod(mesh.shape[a] for a in entries[-1] or ())
        if name.endswith(("gate_up_proj", "down_proj")) and (shape[-1] // last_shards) % QUANT_BLOCK and last_shards > 1:
            blocks = shape[-1] // QUANT_BLOCK
            fits = [n for n in range(1, last_shards) if blocks % n == 0]
            raise UsageError(f"{name}: {last_shards} shards would cut quantization blocks ({blocks} blocks of {QUANT_BLOCK}); use one of {fits}")
        return PartitionSpec(*entries)


DEFAULT_RULES = ShardingRules()


def check_heads(config: GptOssConfig, mesh: Mesh, rules: ShardingRules = DEFAULT_RULES) -> None:
    """Heads are cut between heads, each query head beside its kv head.

    Raises:
      UsageError: naming the sizes.
    """
    axes, kv_axes = rules.axes("heads", mesh), rules.axes("kv_heads", mesh)
    if axes != kv_axes:
        raise UsageError(f"rules 'heads' = {axes} and 'kv_heads' = {kv_axes} must be the same: a query head lies beside its kv head")
    shards = math.prod(mesh.shape[a] for a in axes)
    if config.num_key_value_heads % shards:
        fits = [n for n in range(1, shards) if config.num_key_value_heads % n == 0]
        raise UsageError(f"num_key_value_heads = {config.num_key_value_heads} does not divide by {'*'.join(axes)} = {shards}; it divides by {fits}")


def param_shardings(config: GptOssConfig, mesh: Mesh, rules: ShardingRules = DEFAULT_RULES) -> dict[str, NamedSharding]:
    """Sharding of every parameter by name.

    Raises:
      UsageError: naming what cannot be laid out.
    """
    check_heads(config, mesh, rules)
    axes = logical_axes(config)
    return {name: NamedSharding(mesh, rules.spec(name, leaf.shape, axes[name], mesh)) for name, leaf in abstract_params(config).items()}


def batch_sharding(mesh: Mesh, rules: ShardingRules = DEFAULT_RULES) -> NamedSharding:
    """A batch [B, T]: rows over the data-parallel devices, their length over `context`."""
    return NamedSharding(mesh, PartitionSpec(rules.axes("batch", mesh) or None, rules.axes("length", mesh) or None))


def replicated(mesh: Mesh) -> NamedSharding:
    """Whole on every device."""
    return NamedSharding(mesh, PartitionSpec())


def abstract_sharded_params(config: GptOssConfig, mesh: Mesh, dtype, rules: ShardingRules = DEFAULT_RULES) -> dict[str, jax.ShapeDtypeStruct]:
    """`abstract_params` with shardings: what a checkpoint is restored into."""
    shardings = param_shardings(config, mesh, rules)
    return {n: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=shardings[n]) for n, s in abstract_params(config, dtype).items()}
