"""What we advise to set before JAX starts on NVIDIA GPUs, with reasons, checked against the installed jaxlib.

None of this was measured by us on a GPU yet.
"""

import os
import re
import subprocess
import sys
from dataclasses import dataclass

DEVICES = ("h100", "h200", "b200")
HOPPER = ("h100", "h200")
TOOLBOX = "NVIDIA/JAX-Toolbox docs/GPU_performance.md"
# one layer of gpt-oss-20b in BF16: experts 32 * (5760 + 2880) * 2880 * 2 B = 1.59 GB, attention 0.05 GB
LAYER_BYTES = 1 << 31


@dataclass(frozen=True)
class Setting:
    """A flag of XLA (`--...`) or an environment variable. `min_gpus` is 2 for what only concerns collectives."""

    name: str
    value: str
    why: str
    source: str = TOOLBOX
    devices: tuple[str, ...] = DEVICES
    min_gpus: int = 1


SETTINGS = (
    Setting("--xla_gpu_enable_latency_hiding_scheduler", "true", "copies and collectives run beside kernels; part of O1, named to hold without it"),
    Setting("--xla_gpu_all_gather_combine_threshold_bytes", str(LAYER_BYTES), "all weights of a layer in one all-gather (fsdp)", min_gpus=2),
    Setting("--xla_gpu_reduce_scatter_combine_threshold_bytes", str(LAYER_BYTES), "all gradients of a layer in one reduce-scatter", min_gpus=2),
    Setting("--xla_gpu_all_reduce_combine_threshold_bytes", str(LAYER_BYTES), "the same for replicated parameters", min_gpus=2),
    Setting("--xla_gpu_enable_command_buffer", "FUSION,CUSTOM_CALL", "CUDA graphs of kernels alone: less launch latency", devices=("b200",)),
    Setting(
        "JAX_OPTIMIZATION_LEVEL",
        "O1",
        "pipelined collectives, latency model of the interconnect, unrolled loops; longer compilation",
        source="openxla.org/xla/effort_levels",
    ),
    Setting(
        "XLA_PYTHON_CLIENT_MEM_FRACTION",
        "0.95",
        "of the GPU's memory for JAX; its default 0.75 leaves 35 of 141 GB unused",
        source="docs.jax.dev/en/latest/gpu_memory_allocation.html",
    ),
    Setting("CUDA_DEVICE_MAX_CONNECTIONS", "1", "one launch queue keeps the scheduler's order; slower on Blackwell", devices=HOPPER, min_gpus=2),
)


def advised(device: str, gpus: int) -> tuple[list[Setting], list[Setting]]:
    """(XLA flags, environment variables) for a kind of GPU and their number."""
    fitting = [s for s in SETTINGS if device in s.devices and gpus >= s.min_gpus]
    return [s for s in fitting if s.name.startswith("--")], [s for s in fitting if not s.name.startswith("--")]


def known_to_jaxlib(flags: list[Setting]) -> tuple[list[Setting], list[Setting]]:
    """(known, unknown): XLA ends the process on a flag that it does not know, so a process that may end is asked.

    Raises:
      RuntimeError: JAX does not start for another reason.
    """
    known, unknown = list(flags), []
    while True:
        environment = {**os.environ, "XLA_FLAGS": join(known), "JAX_PLATFORMS": "cpu"}
        done = subprocess.run([sys.executable, "-c", "import jax; jax.devices()"], env=environment, capture_output=True, text=True)
        if done.returncode == 0:
            return known, unknown
        named = re.search(r"Unknown flags? in XLA_FLAGS:(.*)", done.stderr)
        refused = [flag for flag in known if named and flag.name in named.group(1)]
        if not refused:
            raise RuntimeError(f"JAX does not start with XLA_FLAGS={environment['XLA_FLAGS']!r}: {done.stderr.strip()[-500:]}")
        known, unknown = [flag for flag in known if flag not in refused], unknown + refused


def join(flags: list[Setting]) -> str:
    return " ".join(f"{flag.name}={flag.value}" for flag in flags)
