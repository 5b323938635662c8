"""A real llama.cpp server (package xllamacpp) in a process of its own, with its OpenAI-compatible HTTP interface on a free port."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SCRIPT = """
import sys, xllamacpp
params = xllamacpp.CommonParams()
params.model.path = sys.argv[1]
params.n_ctx, params.n_parallel = 2048, 4
params.cpuparams.n_threads, params.n_gpu_layers, params.warmup = 1, 0, False
params.hostnames, params.port = ["127.0.0.1"], 0
server = xllamacpp.Server(params)
print("listening", server.listening_address, flush=True)
sys.stdin.read()
"""


@contextmanager
def llama_server(gguf: Path) -> Iterator[str]:
    """Address of a server of this model; it ends with the context."""
    log = gguf.with_suffix(".log")  # a pipe that nobody reads would fill up and stop the server
    with log.open("w") as errors:
        process = subprocess.Popen([sys.executable, "-c", SCRIPT, str(gguf)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True)
    try:
        line = process.stdout.readline()
        if not line.startswith("listening "):
            raise RuntimeError(f"llama.cpp did not start: {log.read_text()[-2000:]}")
        yield line.split()[1]
    finally:
        process.stdin.close()
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()
