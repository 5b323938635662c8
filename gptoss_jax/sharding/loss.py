"""The loss on a mesh: each device has the logits of its own tokens, over the whole vocabulary.

The unembedding is put together in the compute dtype, its gradient summed in float32 and cut again. Left to the compiler, the loop over blocks of
tokens runs over the tokens of all devices, cuts the hidden dim over fsdp and sums a block's logits over it: 268 MB for 333 tokens of gpt-oss, 92 GB
sent by each device in a step of 65,536 tokens on 8. Devices along `tensor`, which have the same hidden states, share the tokens.
"""

import math
from collections.abc import Callable

import jax
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from gptoss_jax.quant import Gather
from gptoss_jax.sharding.rules import DEFAULT_RULES, ShardingRules


def loss_parallel(mesh: Mesh, rules: ShardingRules = DEFAULT_RULES) -> Callable[[Callable], Callable]:
    """`loss_parallel(mesh)(cross_entropy_sum)` has the arguments and the result of `cross_entropy_sum` on arrays that lie on the mesh."""
    rows, length, vocab, embed = (rules.axes(axis, mesh) for axis in ("batch", "length", "vocab", "embed"))
    gathers = tuple(Gather(axes, dim) for dim, axes in enumerate((vocab, embed)) if axes)

    def distribute(cross_entropy_sum: Callable) -> Callable:
        def sharded(hidden_BTD, w_VD, targets_BT, weights_BT, dtype):
            shared = length + tuple(a for a in vocab if a not in rows + length)
            divides = targets_BT.shape[1] % math.prod(mesh.shape[a] for a in shared) == 0
            tokens = PartitionSpec(rows or None, (shared if divides else length) or None)

            def local(hidden_BTD, w_VD, targets_BT, weights_BT):
                total = cross_entropy_sum(hidden_BTD, w_VD, targets_BT, weights_BT, dtype, gathers)
                return lax.psum(total, rows + (shared if divides else length))

            specs = tokens, PartitionSpec(vocab or None, embed or None), tokens, tokens
            run = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(), check_vma=False)
            return run(hidden_BTD, w_VD, targets_BT, weights_BT)

        return sharded

    return distribute
