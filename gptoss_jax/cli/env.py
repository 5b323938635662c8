"""`gptoss-jax env`: what is installed, what this machine offers, and how to start JAX on a GPU."""

import importlib.metadata
import importlib.util
import platform
import sys
from typing import Literal

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "datasets", "grain", "safetensors", "numpy", "ml_dtypes")
EXTRAS = {"gpu": "jax_cuda12_plugin", "plots": "matplotlib", "eval": "py3langid", "test": "torch"}


def env(xla_flags: bool = False, exports: bool = False, device: Literal["h100", "h200", "b200"] = "h100", gpus: int = 1) -> None:
    """Prints versions, devices with their memory, and optional parts that are missing with the command that installs them.

    With one of the first two options, only the settings that we advise for NVIDIA GPUs, those left out that the installed jaxlib does not know:
    export XLA_FLAGS="$(gptoss-jax env --xla-flags --device h200)", or eval "$(gptoss-jax env --exports --device h200)".

    Args:
      xla_flags: print XLA's flags in one line; the reason of each goes to standard error.
      exports: print shell commands that set XLA_FLAGS and the other environment variables, each with its reason as a comment.
      device: kind of GPU that the settings are for.
      gpus: GPUs of one run; those of collectives are set from 2 on.
    """
    if xla_flags or exports:
        return _advise(device, gpus, exports)
    import jax

    import gptoss_jax

    print(f"gptoss_jax {gptoss_jax.__version__}, Python {platform.python_version()}, {platform.platform()}")
    for name in PACKAGES:
        print(f"  {name:<18} {importlib.metadata.version(name)}")
    print(f"backend {jax.default_backend()}, {jax.process_count()} process(es)")
    for device in jax.local_devices():
        stats = device.memory_stats() or {}
        limit = f", {stats['bytes_limit'] / 2**30:.1f} GiB for JAX" if "bytes_limit" in stats else ""
        print(f"  {device.id}: {device.device_kind}{limit}")
    for extra, module in EXTRAS.items():
        if importlib.util.find_spec(module) is None:
            print(f"extra [{extra}] is not installed: pip install 'gptoss_jax[{extra}]'")


def _advise(device: str, gpus: int, exports: bool) -> None:
    from gptoss_jax.cli.xla_settings import advised, join, known_to_jaxlib

    flags, variables = advised(device, gpus)
    flags, unknown = known_to_jaxlib(flags)
    for flag in unknown:
        print(f"# {flag.name}: left out, unknown to jaxlib {importlib.metadata.version('jaxlib')}", file=sys.stderr)
    for flag in flags:
        print(f"# {flag.name}={flag.value}: {flag.why} ({flag.source})", file=None if exports else sys.stderr)
    if not exports:
        print(join(flags))
        return
    print(f'export XLA_FLAGS="{join(flags)}"')
    for variable in variables:
        print(f"# {variable.why} ({variable.source})\nexport {variable.name}={variable.value}")
