"""The same bytes however the program is run: op by op, under jit, vmap, scan with rematerialization, and on eight devices."""

import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gptoss_jax.formats import Mxfp4, Nvfp4
from tests.formats.inputs import BF16, random_bits

FORMATS = [Mxfp4("rceil"), Mxfp4("floor"), Mxfp4("even"), Mxfp4("mse"), Mxfp4(compat="modelopt"), Nvfp4("pow2"), Nvfp4("exact")]
SHAPE = (8, 4, 256)  # E, out, in


def digest(tree) -> str:
    h = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        leaf = np.asarray(leaf)
        h.update(f"{leaf.dtype}{leaf.shape}".encode() + leaf.tobytes())
    return h.hexdigest()


def program(formats):
    """Values and codes of several formats in one program: compiling is what these tests spend their time on."""
    return lambda x: [fmt.encode_decode(x, jnp.bfloat16) for fmt in formats]


def weights(dtype) -> np.ndarray:
    x = np.random.default_rng(21).standard_normal(SHAPE).astype(np.float32)
    x[:4] *= np.float32(2.0) ** np.random.default_rng(22).integers(-30, 30, (4, 4, 8)).repeat(32, -1)
    x[0, 0, ::32] = np.float32(2**-140)  # subnormal
    x[1, 1, 40:48] = [0, -0.0, 1e-45, -1e-45, 3e38, np.inf, -np.inf, np.nan]
    x[2] = random_bits(SHAPE[1:], seed=23) * np.float32(2**-100)
    return x.astype(dtype)


def sharded(x, spec):
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    return jax.device_put(x, NamedSharding(mesh, spec))


def scan_remat_vmap(run):
    def body(carry, x_OI):
        return carry, jax.vmap(run)(x_OI[None])

    def scanned(x):
        _, out = jax.lax.scan(jax.checkpoint(body), 0, x)
        return jax.tree.map(lambda leaf: leaf[:, 0], out)

    return scanned


@pytest.mark.parametrize(("dtype", "formats"), [(np.float32, FORMATS), (BF16, [Mxfp4("rceil"), Nvfp4("pow2")])], ids=["float32", "bfloat16"])
def test_bytes_are_the_same_under_every_transform_and_sharding(dtype, formats):
    x = weights(dtype)
    run = program(formats)
    expected = digest(jax.jit(run)(x))
    assert digest(jax.jit(scan_remat_vmap(run))(x)) == expected
    assert jax.device_count() == 8
    # rows and columns (in whole blocks) over devices: the maximum of NVFP4 crosses shards
    assert digest(jax.jit(run)(sharded(x, P(None, "a", "b")))) == expected
    mesh = jax.make_mesh((8,), ("expert",), axis_types=(jax.sharding.AxisType.Auto,))
    assert digest(jax.jit(jax.shard_map(run, mesh=mesh, in_specs=P("expert"), out_specs=P("expert")))(x)) == expected


@pytest.mark.parametrize("fmt", [Mxfp4("rceil"), Nvfp4("pow2")], ids=str)
def test_bytes_are_the_same_op_by_op(fmt):
    x = weights(np.float32)
    expected = digest(fmt.encode_decode(x, jnp.bfloat16))
    with jax.disable_jit():
        assert digest(fmt.encode_decode(x, jnp.bfloat16)) == expected
