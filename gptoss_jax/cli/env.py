"""`gptoss-jax env`: what is installed and what this machine offers."""

import importlib.metadata
import importlib.util
import platform

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "datasets", "grain", "safetensors", "numpy", "ml_dtypes")
EXTRAS = {"gpu": "jax_cuda12_plugin", "plots": "matplotlib", "test": "torch"}


def env() -> None:
    """Prints versions, devices with their memory, and optional parts that are missing with the command that installs them."""
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
