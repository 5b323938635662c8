"""Accelerators that a plan can be made for: figures as their makers publish them, noted from memory, none measured by us. Flags take your own.

Memory is what CUDA offers to a process on a card of the stated size, rounded down to GiB; of it JAX takes `POOL` (XLA_PYTHON_CLIENT_MEM_FRACTION=0.95
as `gptoss-jax env --exports` advises), the rest is for the CUDA context, NCCL's buffers and compiled kernels. A further `FRAGMENTED` of the pool is
assumed to be lost between allocations.
"""

import dataclasses
import os
from dataclasses import dataclass
from difflib import get_close_matches

import jax

from gptoss_jax.errors import UsageError

POOL = 0.95
FRAGMENTED = 0.02


@dataclass(frozen=True)
class Device:
    """Peak of dense BF16 products in FLOP/s, bytes of memory, bytes/s: of the memory, to the other devices of a node (one direction), and to other
    nodes (one network card per device)."""

    name: str
    peak_flops: float
    memory: int
    memory_rate: float
    link_rate: float
    network_rate: float
    per_node: int = 8

    @property
    def usable(self) -> int:
        """Bytes that a program can fill."""
        return int(self.memory * POOL * (1 - FRAGMENTED))


def _gpu(name, tflops, gib, tb_s, link_gb_s, network_gb_s, per_node=8) -> Device:
    return Device(name, tflops * 1e12, gib << 30, tb_s * 1e12, link_gb_s * 1e9, network_gb_s * 1e9, per_node)


DEVICES = {
    device.name: device
    for device in (
        # NVIDIA A100 80GB SXM data sheet: 312 TFLOPS, 2,039 GB/s, NVLink 600 GB/s in both directions; DGX A100: 200 Gb/s per GPU
        _gpu("a100", 312, 79, 2.039, 300, 25),
        # NVIDIA Ada GPU architecture paper, GeForce RTX 4090: 165.2 TFLOPS BF16 with float32 sums, 24 GB at 1,008 GB/s; no links but PCIe 4.0 x16
        _gpu("rtx4090", 165.2, 23, 1.008, 32, 3, per_node=1),
        # NVIDIA H100 SXM data sheet: 1,979 TFLOPS with sparsity, 3.35 TB/s, NVLink 900 GB/s; DGX H100: 400 Gb/s per GPU
        _gpu("h100", 989.4, 79, 3.35, 450, 50),
        # NVIDIA H200 data sheet: products as H100, 141 GB at 4.8 TB/s
        _gpu("h200", 989.4, 139, 4.8, 450, 50),
        # NVIDIA DGX B200 data sheet: 72 PFLOPS FP8 of 8 GPUs with sparsity, a quarter of it dense BF16; 1,440 GB at 64 TB/s; NVLink 1.8 TB/s
        _gpu("b200", 2250, 178, 8.0, 900, 50),
        # NVIDIA GB200 NVL72 data sheet: 360 PFLOPS BF16 of 72 GPUs with sparsity; 13.4 TB at 576 TB/s, NVLink 130 TB/s between all 72; 400 Gb/s
        _gpu("gb200", 2500, 184, 8.0, 900, 50, per_node=72),
    )
}


def find_device(name: str, **own: float | None) -> Device:
    """A device of the table with the caller's own numbers in place of those that are given (fields of `Device`).

    Raises:
      UsageError: unknown name, with the nearest one; a number that is not positive.
    """
    if name not in DEVICES:
        near = get_close_matches(name.lower(), DEVICES, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(DEVICES)}"
        raise UsageError(f"unknown device {name!r}; {hint} Other cards: the nearest of these with numbers of your own")
    given = {field: value for field, value in own.items() if value is not None}
    for field, value in given.items():
        if not value > 0:
            raise UsageError(f"device: {field} = {value} is not positive")
    return dataclasses.replace(DEVICES[name], **given)


def present_device() -> Device:
    """The kind of device that JAX runs on here, for `mesh: auto`. Its memory is what JAX may allocate where JAX knows it.

    On a CPU the devices share the host's memory, and speeds are those of no machine in particular: only their ratios choose a mesh.

    Raises:
      UsageError: a kind that is not in the table.
    """
    device = jax.local_devices()[0]
    if device.platform == "cpu":
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // len(jax.local_devices())
        return Device("cpu", 1e12, memory, 5e10, 1e10, 1e9, per_node=len(jax.local_devices()))
    kind = device.device_kind.lower()
    name = next((name for name in sorted(DEVICES, key=len, reverse=True) if name in kind), None)
    if name is None:
        raise UsageError(f"mesh: auto knows no device {device.device_kind!r}; known are {', '.join(DEVICES)}: write the mesh into the config")
    limit = (device.memory_stats() or {}).get("bytes_limit")
    return dataclasses.replace(DEVICES[name], memory=int(limit / POOL)) if limit else DEVICES[name]
