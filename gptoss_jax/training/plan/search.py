"""Which layouts of a config a number of devices allows, which of them fit, and which is estimated to be the fastest."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import get_args

from gptoss_jax.errors import UsageError
from gptoss_jax.model import GptOssConfig
from gptoss_jax.ops.remat import Remat
from gptoss_jax.sharding import MESH_AXES
from gptoss_jax.training.config import MeshConfig, TrainConfig
from gptoss_jax.training.plan.devices import Device
from gptoss_jax.training.plan.layout import Layout
from gptoss_jax.training.plan.memory import Memory, memory
from gptoss_jax.training.plan.speed import EFFICIENCY, Speed, speed


@dataclass(frozen=True)
class Candidate:
    layout: Layout
    memory: Memory
    speed: Speed

    def fits(self, device: Device) -> bool:
        return self.memory.peak <= device.usable

    @property
    def name(self) -> str:
        """Its mesh, without axes of one device, remat and microbatches."""
        train = self.layout.train
        cuts = [f"{axis}={size}" for axis in MESH_AXES if (size := getattr(train.mesh, axis)) > 1]
        return f"{' '.join(cuts) or 'one device'}, remat {train.remat}, {train.batch.accumulation} microbatch{'es' * (train.batch.accumulation > 1)}"


class Found(list[Candidate]):
    """Candidates, those that fit first, each group fastest first; `refused` counts the reasons why other meshes cannot be laid out."""

    refused: Counter[str]


def meshes(devices: int) -> Iterator[MeshConfig]:
    """All ways to deal the devices to the axes."""

    def factors(left: int, axes: Sequence[str]) -> Iterator[dict[str, int]]:
        if len(axes) == 1:
            yield {axes[0]: left}
            return
        for size in range(1, left + 1):
            if left % size == 0:
                yield from ({axes[0]: size, **rest} for rest in factors(left // size, axes[1:]))

    return (MeshConfig(**sizes) for sizes in factors(devices, MESH_AXES))


def evaluate(layout: Layout, device: Device, efficiency: float = EFFICIENCY) -> Candidate:
    """Memory and speed of one layout.

    Raises:
      UsageError: it cannot be laid out.
    """
    _ = layout.shardings
    return Candidate(layout, memory(layout), speed(layout, device, efficiency))


def search(
    config: GptOssConfig, train: TrainConfig, device: Device, devices: int, *, efficiency: float = EFFICIENCY, mesh_only: bool = False
) -> Found:
    """All layouts of this batch on so many devices: meshes, and unless `mesh_only` every remat and number of microbatches.

    Raises:
      UsageError: no mesh can be laid out; the most frequent reason.
    """
    found, refused = Found(), Counter()
    rows, length = train.batch.rows, train.data.row_length
    accumulations = [train.batch.accumulation] if mesh_only else [n for n in range(1, rows + 1) if rows % n == 0]
    for mesh in meshes(devices):
        fitting = [n for n in accumulations if rows // n % mesh.row_groups == 0]
        if not fitting:
            refused[f"rows of a microbatch (of {rows // min(accumulations)}) do not divide among data * fsdp * expert"] += 1
            continue
        if length % mesh.context:
            refused[f"rows of {length} tokens do not divide among context"] += 1
            continue
        state = None
        for accumulation in fitting:
            for remat in [train.remat] if mesh_only else get_args(Remat):
                batch = train.batch.model_copy(update={"accumulation": accumulation})
                layout = Layout(config, train.model_copy(update={"mesh": mesh, "batch": batch, "remat": remat}))
                if state is not None:
                    layout.__dict__.update(state)  # shapes and shardings of the state depend on the mesh alone
                try:
                    found.append(evaluate(layout, device, efficiency))
                except UsageError as error:
                    refused[str(error)] += 1
                    break
                state = {name: layout.__dict__[name] for name in ("mesh", "shardings", "state")}
            else:
                continue
            break
    if not found:
        raise UsageError(f"no mesh of {devices} devices can hold this config: {refused.most_common(1)[0][0]}")
    found.sort(key=lambda c: (not c.fits(device), -c.speed.tokens_per_second_in_turn if c.fits(device) else c.memory.peak))
    found.refused = refused
    return found


def proposed_mesh(config: GptOssConfig, train: TrainConfig, device: Device, devices: int) -> MeshConfig:
    """The mesh for `mesh: auto`: the fastest by estimate that fits with the remat and microbatches of the config.

    Raises:
      UsageError: none fits, with the smallest that does not, and what would fit instead.
    """
    best = search(config, train, device, devices, mesh_only=True)[0]
    if best.fits(device):
        return best.layout.train.mesh
    gib = lambda n: f"{n / 2**30:.1f} GiB"
    other = search(config, train, device, devices)[0]
    hint = f"; {other.name} would fit" if other.fits(device) else ""
    raise UsageError(
        f"mesh: auto: nothing fits on {devices} x {device.name}: the smallest is {best.name} with {gib(best.memory.peak)} "
        f"of {gib(device.usable)} per device{hint}"
    )
