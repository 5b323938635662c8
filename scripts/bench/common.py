"""What the benchmarks share: the models they time, a stop watch, and how a result says where it comes from."""

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from gptoss_jax.model import GptOssConfig
from gptoss_jax.model.config import RopeConfig

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).resolve().parent / "results"


class Workload(NamedTuple):
    """A model and the batch that one step of it takes."""

    config: GptOssConfig
    rows: int
    length: int

    @property
    def tokens(self) -> int:
        return self.rows * self.length


def _model(hidden: int, experts: int, kv_heads: int, head_dim: int, vocab: int) -> GptOssConfig:
    return GptOssConfig(
        vocab_size=vocab, hidden_size=hidden, intermediate_size=hidden, num_hidden_layers=4, num_local_experts=experts, num_experts_per_tok=4,
        num_attention_heads=8, num_key_value_heads=kv_heads, head_dim=head_dim, rope=RopeConfig(),
    )  # fmt: skip


WORKLOADS = {
    "9m": Workload(_model(hidden=256, experts=8, kv_heads=2, head_dim=32, vocab=4096), rows=4, length=512),
    "112m": Workload(_model(hidden=512, experts=32, kv_heads=2, head_dim=64, vocab=8192), rows=2, length=1024),
}


def best(function: Callable, *args: Any, repeats: int = 5) -> float:
    """Least seconds of a call whose result is waited for; the first call compiles and is not counted."""
    import jax

    jax.block_until_ready(function(*args))
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(function(*args))
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown processor"


def machine() -> dict[str, Any]:
    """Device, versions, commit and date of a measurement."""
    import jax

    def git(*args):
        done = subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    versions = {}
    for package in ("jax", "jaxlib", "flax", "optax", "torch", "transformers", "numpy"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    device = jax.devices()[0]
    return {
        "device": f"{os.cpu_count()} cores of {_processor()}" if device.platform == "cpu" else f"{jax.device_count()} x {device.device_kind}",
        "platform": device.platform,
        "python": platform.python_version(),
        "versions": versions,
        "commit": git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "--", "gptoss_jax", "scripts") else ""),
        "date": datetime.date.today().isoformat(),
    }


def write_results(name: str, result: dict[str, Any]) -> Path:
    """Writes `results/NAME.json`, which the tables of README and LOG are read from."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path
