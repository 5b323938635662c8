"""Tile sizes of the Triton attention kernels, and the shared memory that they take."""

from typing import NamedTuple


class Tile(NamedTuple):
    rows: int  # (token, query head) pairs
    keys: int
    stages: int  # of the pipelined loop: so many tiles of what it reads are in shared memory
    warps: int = 4


class Tiles(NamedTuple):
    """One tile for each kernel."""

    forward: Tile
    dq: Tile
    dkv: Tile

    def shared_bytes(self, head_dim: int, itemsize: int) -> dict[str, int]:
        """Shared memory that each kernel can ask for: operands that stay, those of every stage, scores that go into a second product."""
        row = head_dim * itemsize
        forward, dq, dkv = self
        return {
            "forward": row * (forward.rows + 2 * forward.stages * forward.keys) + itemsize * forward.rows * forward.keys,
            "dq": row * 2 * (dq.rows + dq.stages * dq.keys) + itemsize * dq.rows * dq.keys,
            "dkv": row * 2 * (dkv.keys + dkv.stages * dkv.rows) + 2 * itemsize * dkv.rows * dkv.keys,
        }


# By bytes of a row, head dim times item size: 128 is head dim 64 in bf16 (gpt-oss), 256 the same in float32. All stay below the 99 KiB that a program
# has on sm86 and sm89 (163 on sm80, 227 on sm90), so one table serves every card. bf16 tiles of gpt-oss have 64 rows at least, as the products of one
# warp group of Hopper. Compiled without a card by Triton 3.9 for gpt-oss' shapes, bf16 and float32: 48 to 66 KiB on sm80, sm89, sm90 and sm100, no
# spilled registers on sm90 (117 to 255 a thread). Chosen by these counts; no running time is measured.
TILES = {
    128: Tiles(forward=Tile(128, 64, 3), dq=Tile(128, 64, 2), dkv=Tile(64, 64, 3)),
    256: Tiles(forward=Tile(64, 32, 3), dq=Tile(64, 32, 2), dkv=Tile(32, 64, 2)),
    512: Tiles(forward=Tile(32, 32, 2), dq=Tile(32, 16, 2), dkv=Tile(16, 32, 2)),
}


def choose_tiles(head_dim: int, itemsize: int) -> Tiles:
    """Tiles for a padded head dim.

    Raises:
      ValueError: rows wider than the kernels have tiles for.
    """
    for most, tiles in TILES.items():
        if head_dim * itemsize <= most:
            return tiles
    raise ValueError(f"head dim {head_dim} with {itemsize}-byte elements takes {head_dim * itemsize} bytes a row, the kernels go up to {max(TILES)}")
