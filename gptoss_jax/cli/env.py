"""`gptoss-jax env`: what is installed, what this machine offers, and how to start JAX on a GPU."""

import importlib.metadata
import importlib.util
import platform
import re
import sys
import tomllib
from pathlib import Path
from typing import Literal

EXTRAS = {"gpu": "jax_cuda12_plugin", "plots": "matplotlib", "eval": "py3langid", "test": "torch"}


def env(xla_flags: bool = False, exports: bool = False, device: Literal["h100", "h200", "b200"] = "h100", gpus: int = 1) -> int:
    """Prints versions, devices with their memory, and what is missing with the command that installs it. Exit code 1 where a package that every
    run needs is missing or too old, as after `pip install --no-deps` into a container that brings its own JAX.

    With one of the first two options, only the settings that we advise for NVIDIA GPUs, those left out that the installed jaxlib does not know:
    export XLA_FLAGS="$(gptoss-jax env --xla-flags --device h200)", or eval "$(gptoss-jax env --exports --device h200)".

    Args:
      xla_flags: print XLA's flags in one line; the reason of each goes to standard error.
      exports: print shell commands that set XLA_FLAGS and the other environment variables, each with its reason as a comment.
      device: kind of GPU that the settings are for.
      gpus: GPUs of one run; those of collectives are set from 2 on.
    """
    if xla_flags or exports:
        _advise(device, gpus, exports)
        return 0
    import gptoss_jax

    print(f"gptoss_jax {gptoss_jax.__version__}, Python {platform.python_version()}, {platform.platform()}")
    wrong = []
    for requirement in _requirements():
        name = re.match(r"[\w.-]+", requirement).group()
        found = _version(name)
        print(f"  {name:<18} {found or 'MISSING'}{_unfit(requirement, found)}")
        if found is None or _unfit(requirement, found):
            wrong.append(requirement)
    if _version("jax"):
        _print_devices()
    for extra, module in EXTRAS.items():
        if importlib.util.find_spec(module) is None:
            print(f"extra [{extra}] is not installed: pip install 'gptoss_jax[{extra}]'")
    if wrong:
        print(f"{len(wrong)} of the required packages missing or unfit: pip install {' '.join(map(repr, wrong))}")
    return 1 if wrong else 0


def _requirements() -> list[str]:
    """What every run needs, as pip was told, or as a checkout that is not installed says."""
    try:
        declared = importlib.metadata.requires("gptoss_jax") or []
    except importlib.metadata.PackageNotFoundError:
        project = Path(__file__).parents[2] / "pyproject.toml"
        declared = tomllib.loads(project.read_text())["project"]["dependencies"] if project.is_file() else []
    return ["jaxlib", *(requirement for requirement in declared if "extra ==" not in requirement)]


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _unfit(requirement: str, found: str | None) -> str:
    """A remark where the version is not one that is asked for. Without the package `packaging` versions are not compared."""
    if found is None or importlib.util.find_spec("packaging") is None:
        return ""
    from packaging.requirements import Requirement

    wanted = Requirement(requirement).specifier
    return "" if wanted.contains(found, prereleases=True) else f"  UNFIT: needs {wanted}"


def _print_devices() -> None:
    import jax

    print(f"backend {jax.default_backend()}, {jax.process_count()} process(es)")
    for device in jax.local_devices():
        stats = device.memory_stats() or {}
        limit = f", {stats['bytes_limit'] / 2**30:.1f} GiB for JAX" if "bytes_limit" in stats else ""
        print(f"  {device.id}: {device.device_kind}{limit}")


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
