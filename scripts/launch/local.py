"""Starts the processes of one run on this machine: python scripts/launch/local.py --processes 4 -- gptoss-jax sft --config C.yaml mesh.fsdp=4

Each process gets the variables of torchrun (MASTER_ADDR, MASTER_PORT, WORLD_SIZE, RANK, LOCAL_RANK) and, where there are GPUs, the GPU of its number.
One process may as well drive all GPUs of a machine; several are for trying out what runs on many machines, and where a host is the bottleneck.

SIGTERM and SIGINT are passed on to all. When one process fails, the others have `--grace` seconds to end by themselves. The exit code is that of the
process that ended first with one that is not 0 (128 + signal for a signal).
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import time


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--processes", type=int, required=True)
    parser.add_argument("--port", type=int, help="of the coordinator; default a free one")
    parser.add_argument("--grace", type=float, default=120.0, help="seconds that the others have after one failed (JAX notices a lost one after 100)")
    parser.add_argument("command", nargs="+", help="what to run, after --")
    options = parser.parse_args()
    shared = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(options.port or free_port()), "WORLD_SIZE": str(options.processes)}
    running = {}
    for rank in range(options.processes):
        running[rank] = subprocess.Popen(options.command, env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        print(f"local: process {rank} is {running[rank].pid}", file=sys.stderr, flush=True)
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, lambda number, _: [process.send_signal(number) for process in running.values()])

    first_code, deadline = 0, None
    while running:
        for rank, process in list(running.items()):
            code = process.poll()
            if code is None:
                continue
            del running[rank]
            code = code if code >= 0 else 128 - code
            if code:
                print(f"local: process {rank} ended with {code}", file=sys.stderr, flush=True)
            if code and not first_code:
                first_code, deadline = code, time.monotonic() + options.grace
        if deadline is not None and time.monotonic() > deadline:
            for rank, process in running.items():
                print(f"local: process {rank} is killed", file=sys.stderr, flush=True)
                process.kill()
            deadline = None
        time.sleep(0.05)
    return first_code


if __name__ == "__main__":
    sys.exit(main())
