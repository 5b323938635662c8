"""Tile sizes of the Triton grouped matmul, and the shared memory that they take."""

from typing import NamedTuple

import jax


class Tile(NamedTuple):
    """A program computes `rows x cols` outputs in steps of `depth` along the contraction."""

    rows: int
    cols: int
    depth: int
    stages: int  # steps of operands that are in shared memory at a time
    warps: int

    def shared_bytes(self, itemsize: int) -> int:
        """Shared memory of a program: both operands of every stage. Outputs pass through the same memory when the loop is over."""
        return self.stages * self.depth * (self.rows + self.cols) * itemsize


# Shared memory that one program may have, by compute capability; cards that are not listed get the least.
SHARED_BYTES = {80: 163 << 10, 86: 99 << 10, 87: 163 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 103: 227 << 10, 120: 99 << 10}

# By bytes of an element, in order of preference; a card takes the first whose operands fit. The contraction of gpt-oss is 2880 = 64 * 45 or 5760 =
# 64 * 90 long, hence depth 64 (32 for float32), which leaves no rest. Of the outputs, 5760 = 22.5 * 256 = 45 * 128 and 2880 = 11.25 * 256 = 22.5 *
# 128: the last tile is partly empty, 2 % of the work at 5760 and 6 % at 2880 with 256 columns. For that, 128 x 256 needs 3/4 of the operand traffic
# of 128 x 128, and its float32 sums take 128 registers of a thread in 8 warps (two warp groups of Hopper, 64 rows each). Compiled by Triton 3.9 for
# sm80, sm89 and sm90, no kernel spills registers with these tiles (159 to 254 of 255 used with 128 x 256), and all sums stay in the registers of the
# tensor cores. Not measured.
TILES = {
    2: (Tile(128, 256, 64, stages=4, warps=8), Tile(128, 256, 64, stages=3, warps=8), Tile(128, 128, 64, stages=3, warps=8)),
    4: (Tile(128, 128, 32, stages=3, warps=8),),
}


def choose_tile(itemsize: int, capability: int) -> Tile:
    """The tile for elements of 2 or 4 bytes on a card of this compute capability (90 for 9.0)."""
    most = SHARED_BYTES.get(capability, min(SHARED_BYTES.values()))
    return next(tile for tile in TILES[itemsize] if tile.shared_bytes(itemsize) <= most)


def compute_capability() -> int:
    """Of the first local GPU; 90 where there is none and programs are only lowered, as Pallas itself assumes."""
    try:
        device = jax.local_devices(backend="gpu")[0]
    except RuntimeError:
        return 90
    return int(device.compute_capability.replace(".", ""))
