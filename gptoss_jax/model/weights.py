"""How a weight is declared: once, with shape, logical axes and initializer. Names, shardings and abstract shapes are derived from that.

A logical axis says what a dimension means (`embed`, `expert`, ...); `gptoss_jax.sharding` maps it to the mesh. Layers that are scanned over
carry a leading `layers` dimension.
"""

import jax
import jax.numpy as jnp
from flax import nnx

# standard deviation of the initial weights (`initializer_range` of the release)
INIT_STD = 0.02


def weight(rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str | None, ...], *, layers: int | None, dtype, init: str = "normal") -> nnx.Param:
    """Declares one weight.

    Args:
      axes: one logical axis per dimension of `shape`.
      layers: size of the leading stacked dimension, None for a layer of its own.
      init: "normal" (standard deviation 0.02), "zeros" or "ones".
    """
    assert len(shape) == len(axes), (shape, axes)
    if layers is not None:
        shape, axes = (layers, *shape), ("layers", *axes)
    if init == "normal":
        value = (INIT_STD * jax.random.normal(rngs.params(), shape)).astype(dtype)
    else:
        value = jnp.full(shape, {"zeros": 0, "ones": 1}[init], dtype)
    return nnx.Param(value, logical_axes=axes)


def _name(path) -> str:
    """Dotted name of a leaf: keys of modules and lists; the variable's own accessor is dropped."""
    keys = [getattr(key, "key", getattr(key, "idx", getattr(key, "name", None))) for key in path]
    return ".".join(str(key) for key in keys if key not in ("value", "raw_value"))


def named_leaves(state) -> dict[str, jax.Array]:
    """Flat dict of all arrays of an NNX state, by dotted name."""
    return {_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]}


def named_axes(state) -> dict[str, tuple[str | None, ...]]:
    """Logical axes of every weight, by dotted name."""
    leaves = jax.tree_util.tree_flatten_with_path(state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))[0]
    return {_name(path): leaf.get_metadata()["logical_axes"] for path, leaf in leaves}


def fill_state(state, named: dict[str, jax.Array]):
    """The inverse of `named_leaves`: `state` with the arrays of `named`, which must name exactly the same weights."""
    paths, treedef = jax.tree_util.tree_flatten_with_path(state)
    names = [_name(path) for path, _ in paths]
    if set(names) != set(named):
        raise ValueError(f"weights differ: missing {sorted(set(names) - set(named))}, unexpected {sorted(set(named) - set(names))}")
    return treedef.unflatten([named[name] for name in names])
