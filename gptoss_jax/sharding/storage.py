"""A layout for parameters that are only held, not computed with (import, export): cut over all devices, whatever their number."""

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from gptoss_jax.model import GptOssConfig, abstract_params, logical_axes


def storage_shardings(config: GptOssConfig) -> dict[str, NamedSharding] | None:
    """Each parameter over all devices, along its first dim that they divide (experts, then rows: long stretches of a file); what none divides is
    whole on each. None for a single device.

    The dim of stacked layers stays whole, so that a layer is read and encoded by all devices, and so does the one that blocks run along.
    """
    devices = jax.devices()
    if len(devices) == 1:
        return None
    mesh = Mesh(devices, ("devices",), axis_types=(AxisType.Auto,))
    axes = logical_axes(config)

    def spec(name: str, shape: tuple[int, ...]) -> PartitionSpec:
        last = len(shape) - (1 if name.endswith(("gate_up_proj", "down_proj")) else 0)
        first = 1 if axes[name][0] == "layers" else 0
        cut = next((dim for dim in range(first, last) if shape[dim] % len(devices) == 0), None)
        return PartitionSpec() if cut is None else PartitionSpec(*[None] * cut, "devices")

    return {name: NamedSharding(mesh, spec(name, leaf.shape)) for name, leaf in abstract_params(config).items()}
