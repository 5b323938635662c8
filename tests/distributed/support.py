"""A run small enough for several processes on two cores: files that it reads, its config, and how it is started."""

import dataclasses
import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax

from gptoss_jax.checkpoint import orbax_store
from gptoss_jax.checkpoint.models import carried_files
from gptoss_jax.checkpoint.source import NANO
from gptoss_jax.data import load_tokenizer
from gptoss_jax.model import init_params
from tests.conftest import CACHE
from tests.training.support import CONFIG

ROOT = Path(__file__).parents[2]
MODEL = dataclasses.replace(CONFIG, vocab_size=1024)
HEARTBEAT = 10


def make_files(root: Path) -> None:
    """`root/base`, a training checkpoint with the tokenizer of nano, and `root/train.jsonl`."""
    assert len(load_tokenizer(NANO)) == MODEL.vocab_size
    meta = orbax_store.Meta(model=MODEL.to_dict(), source={"path": "base"})
    orbax_store.save(root / "base" / "checkpoints", 0, init_params(MODEL, jax.random.key(3)), meta, assets=carried_files(NANO))
    rows = [[("user", f"What is {i} and {i}?"), ("assistant", f"It is {2 * i}, I think.")] for i in range(40)]
    lines = [json.dumps({"messages": [{"role": role, "content": text} for role, text in row]}) for row in rows]
    (root / "train.jsonl").write_text("\n".join(lines))


def run_config(root: Path, output: str, **changes) -> dict:
    raw = {
        "model": str(root / "base"), "output": str(root / output), "data": {"train": str(root / "train.jsonl"), "row_length": 64},
        "batch": {"rows": 4}, "steps": 6, "checkpoint_every": 3, "compute_dtype": "float32", "optimizer": {"learning_rate": 1e-3},
        "quant": {"format": "mxfp4"}, "remat": "none",
    }  # fmt: skip
    return {**raw, **changes}


class Processes:
    """`command` on several processes by `scripts/launch/local.py`; one CPU device each. Output is collected while they run."""

    def __init__(self, count: int, command: list[str], *, grace: float = 60, **variables: str):
        env = {
            **os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(CACHE), "GLIBC_TUNABLES": "",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # compiles a third faster; that is what these runs spend their time on
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1", "JAX_NUM_CPU_DEVICES": "1",
            "GPTOSS_JAX_HEARTBEAT_SECONDS": str(HEARTBEAT), **variables,
        }  # fmt: skip
        launcher = [sys.executable, "scripts/launch/local.py", "--processes", str(count), "--grace", str(grace), "--"]
        self.launcher = subprocess.Popen(
            [*launcher, sys.executable, *command], cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self.lines: list[str] = []
        self.ended: float | None = None  # when the last process closed its output
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        self.lines.extend(self.launcher.stdout)
        self.ended = time.monotonic()

    @property
    def text(self) -> str:
        return "".join(self.lines)

    def wait_for(self, pattern: str, count: int = 1, seconds: float = 300) -> list[str]:
        """The matches of `pattern` in the output, when there are `count` of them."""
        end = time.monotonic() + seconds
        while len(found := re.findall(pattern, self.text)) < count:
            assert self.launcher.poll() is None and time.monotonic() < end, f"{pattern!r} not seen in:\n{self.text}"
            time.sleep(0.02)
        return found

    def pids(self, count: int) -> list[int]:
        return [int(pid) for pid in self.wait_for(r"local: process \d+ is (\d+)", count)]

    def end(self, seconds: float = 300) -> int:
        """Exit code of the launcher."""
        code = self.launcher.wait(seconds)
        self._reader.join(10)
        return code

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, *_) -> None:
        if self.launcher.poll() is None:
            self.launcher.kill()
            for pid in self.pids(0):
                try:
                    os.kill(pid, 9)
                except ProcessLookupError:
                    pass
