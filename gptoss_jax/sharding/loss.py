"""The cross-entropy on a mesh: `jax.shard_map` around the code for one device.

Over the axes that cut the vocabulary (`tensor`) the unembedding stays cut: every device makes the logits of its rows, and what is exchanged per token
is the maximum, the sum of exponentials and one row of gradients. Over all other axes a device has tokens of its own, and the unembedding is put
together in the compute dtype; its gradient goes back as a float32 reduce-scatter.

Left to the compiler, the blocks of all tokens run on all devices, each with a part of D, and the float32 logits of every block are summed over the
devices: 4 * 201,088 bytes a token against 1.08 GiB once for the unembedding of gpt-oss. The unembedding in bf16 and the float32 sum of its gradient,
3.2 GiB for gpt-oss, divided by the devices of `tensor`, are alive for the loss only.

The devices of axes that cut none of rows, length and vocabulary take their share of the tokens, if the length divides.
"""

import math
from collections.abc import Callable

import jax
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from gptoss_jax.precision import wide
from gptoss_jax.quant import Gather
from gptoss_jax.sharding.rules import DEFAULT_RULES, ShardingRules


def loss_parallel(mesh: Mesh, rules: ShardingRules = DEFAULT_RULES) -> Callable[[Callable], Callable]:
    """How the loss runs on this mesh: `distribute(run)` does what `run(hidden, w, targets, weights)` does on one device; `run` takes `gathers` and
    `vocab` (see `gptoss_jax.ops.cross_entropy`). A teacher's (hidden, w) may follow the four arrays, and `run` may return several sums."""
    rows, length, cut_vocab, embed = (rules.axes(logical, mesh) for logical in ("batch", "length", "vocab", "embed"))
    vocab = () if set(cut_vocab) & set(rows + length) else cut_vocab  # devices with other tokens cannot share their logits
    idle = tuple(a for a in mesh.axis_names if mesh.shape[a] > 1 and a not in rows + length + vocab)
    gathers = tuple(Gather(axes, dim) for axes, dim in ((embed, 1), (() if vocab else cut_vocab, 0)) if axes)

    def distribute(run: Callable) -> Callable:
        def whole(hidden_BTD, w_VD, targets_BT, weights_BT, *teacher):
            shards = math.prod(mesh.shape[a] for a in length + idle)
            cut = length + idle if hidden_BTD.shape[1] % shards == 0 else length
            tokens = PartitionSpec(rows or None, cut or None)
            if vocab:  # shares of its gradient are summed in the dtype in which it enters
                hidden_BTD = hidden_BTD.astype(wide(hidden_BTD.dtype))

            def local(*arrays):
                return lax.psum(run(*arrays, gathers=gathers, vocab=vocab), rows + cut + vocab)

            w = PartitionSpec(cut_vocab or None, embed or None)
            in_specs = tokens, w, tokens, tokens, *((tokens, w) if teacher else ())
            # the loops inside carry zeros that vary over no axis, which the check of replication does not follow
            on_mesh = jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=PartitionSpec(), check_vma=False)
            return on_mesh(hidden_BTD, w_VD, targets_BT, weights_BT, *teacher)

        return whole

    return distribute
