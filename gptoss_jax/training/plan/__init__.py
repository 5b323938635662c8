"""What a training config takes on so many devices, before anything is allocated: bytes, traffic, a bound on speed, and the layout to choose."""

from gptoss_jax.training.plan.architecture import architecture
from gptoss_jax.training.plan.devices import DEVICES, Device, find_device, present_device
from gptoss_jax.training.plan.layout import Layout, device_bytes
from gptoss_jax.training.plan.memory import Memory, memory
from gptoss_jax.training.plan.search import Candidate, evaluate, proposed_mesh, search
from gptoss_jax.training.plan.speed import EFFICIENCY, Speed, speed
from gptoss_jax.training.plan.summary import parameters, summary
from gptoss_jax.training.plan.traffic import Collective, expert_rows, traffic

__all__ = [
    "DEVICES", "EFFICIENCY", "Candidate", "Collective", "Device", "Layout", "Memory", "Speed", "architecture", "device_bytes", "evaluate",
    "expert_rows", "find_device", "memory", "parameters", "present_device", "proposed_mesh", "search", "speed", "summary", "traffic",
]  # fmt: skip
