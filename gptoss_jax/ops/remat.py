"""What a training step keeps of each layer for the backward pass, and what it computes again.

    layer      only the layer's input; everything is computed again (least memory, a third more products)
    products   besides, what took a matrix product or a sort to get: q, k, v, attention output, expert products, routing. Norms, rotation, SwiGLU and
               gathers are computed again; no large product runs twice.
    none       everything that differentiation asks for

`products` is also faster than `none` on a CPU: intermediates that are cheap to compute cost more to write and read back.
"""

from collections.abc import Callable
from typing import Literal

import jax
from jax.ad_checkpoint import checkpoint_name

Remat = Literal["none", "products", "layer"]
_PRODUCT = "product"


def product(x):
    """Marks a value, or a pytree of values, that `products` keeps."""
    return jax.tree.map(lambda leaf: checkpoint_name(leaf, _PRODUCT), x)


def rematerialize(function: Callable, remat: Remat, static_argnums: tuple[int, ...] = ()) -> Callable:
    """`function` with the chosen treatment of its intermediates; results are the same."""
    if remat == "none":
        return function
    policy = jax.checkpoint_policies.save_only_these_names(_PRODUCT) if remat == "products" else None
    return jax.checkpoint(function, prevent_cse=False, policy=policy, static_argnums=static_argnums)
