"""The token embedding on a mesh: `jax.shard_map` around the lookup of one device. The table, 2.2 GiB in float32 for gpt-oss, stays where it lies,
and so does its gradient: what travels are token ids and rows of activations.

    gather the ids of the devices that hold other columns of D -> look them up in the part of the table here -> all-to-all: columns to tokens
    a vocabulary cut over devices: zeros for tokens of others, summed over them (one term is not zero: exact)

The gradient goes the way back, so each device sums the gradients of its own part of the table over the tokens of the whole group, in float32, and
only axes that replicate the table (`data`) sum it once more. A table made whole would travel once forward, and back as a float32 sum.

Legend: B rows  T tokens of a row  P devices that hold columns  V vocab  D hidden  V, D in lower case: the part of a device
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from gptoss_jax.ops.embedding import embedding
from gptoss_jax.sharding.rules import DEFAULT_RULES, ShardingRules


def embedding_parallel(mesh: Mesh, rules: ShardingRules = DEFAULT_RULES) -> Callable:
    """`lookup(weight_VD, tokens_BT, dtype)` is `embedding(weight_VD, tokens_BT).astype(dtype)` on this mesh.

    Rules under which a device without tokens of its own holds columns, or one with its own holds rows of the table, are left to the compiler.
    """
    rows, length, vocab, embed = (rules.axes(logical, mesh) for logical in ("batch", "length", "vocab", "embed"))
    if set(embed) - set(rows + length) or set(vocab) & set(rows + length):
        return lambda weight_VD, tokens_BT, dtype: embedding(weight_VD, tokens_BT).astype(dtype)
    tokens = PartitionSpec(rows or None, length or None)

    def lookup(weight_VD, tokens_BT, dtype):
        def local(weight_vd, tokens_BT):
            tokens_PBT = lax.all_gather(tokens_BT, embed) if embed else tokens_BT[None]
            is_here_PBT = None
            if vocab:
                tokens_PBT -= lax.axis_index(vocab) * weight_vd.shape[0]
                is_here_PBT = (tokens_PBT >= 0) & (tokens_PBT < weight_vd.shape[0])
                tokens_PBT = jnp.where(is_here_PBT, tokens_PBT, 0)
            x_PBTd = embedding(weight_vd, tokens_PBT).astype(dtype)
            if vocab:
                x_PBTd = lax.psum(jnp.where(is_here_PBT[..., None], x_PBTd, 0), vocab)
            return lax.all_to_all(x_PBTd, embed, split_axis=0, concat_axis=3, tiled=True)[0] if embed else x_PBTd[0]

        in_specs = PartitionSpec(vocab or None, embed or None), tokens
        return jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=tokens, check_vma=False)(weight_VD, tokens_BT)

    return lookup
