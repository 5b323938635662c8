"""Where and with what a run was started, for its environment.json: enough to start it again, or to say why two runs differ.

    from_step, started        finished steps that it began with; time in UTC
    command                   as it was typed
    versions                  of Python and of the packages that decide about numbers
    commit                    of this package, if it runs from a git checkout or was installed from one; "-dirty" where files are changed
    platform, cores, devices, processes
    variables                 that steer JAX and XLA
"""

import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import jax

import gptoss_jax

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "ml_dtypes")
VARIABLES = ("JAX_", "XLA_", "NCCL_", "CUDA_VISIBLE_DEVICES", "GLIBC_TUNABLES")


def environment(from_step: int = 0) -> dict[str, Any]:
    """The present process, as plain values."""
    devices = Counter(device.device_kind for device in jax.devices())
    versions = {"gptoss_jax": gptoss_jax.__version__, "python": platform.python_version()}
    return {
        "from_step": from_step,
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": _command(),
        "versions": versions | {name: importlib.metadata.version(name) for name in PACKAGES},
        "commit": commit(),
        "platform": platform.platform(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "devices": ", ".join(f"{count} x {kind}" for kind, count in devices.items()),
        "processes": jax.process_count(),
        "variables": {name: value for name, value in sorted(os.environ.items()) if name.startswith(VARIABLES)},
    }


def _command() -> str:
    """`python -m gptoss_jax`, which the command line also restarts itself as, is the command."""
    program = Path(sys.argv[0])
    ours = program.name == "gptoss-jax" or program.parent == Path(gptoss_jax.__file__).parent
    return shlex.join(["gptoss-jax" if ours else sys.argv[0], *sys.argv[1:]])


def commit() -> str | None:
    """None where neither git nor the installer knows. A package that lies in somebody else's checkout, as in its .venv, is not tracked there."""
    folder = Path(gptoss_jax.__file__).parent
    git = lambda *command: subprocess.run(["git", "-C", str(folder), *command], capture_output=True, text=True, timeout=20)
    try:
        if git("ls-files", "--error-unmatch", "__init__.py").returncode == 0:
            return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*").stdout.strip() or None
    except (OSError, subprocess.TimeoutExpired):
        pass
    try:
        origin = importlib.metadata.distribution("gptoss_jax").read_text("direct_url.json")
    except importlib.metadata.PackageNotFoundError:
        return None
    return json.loads(origin).get("vcs_info", {}).get("commit_id") if origin else None
