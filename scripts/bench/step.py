#!/usr/bin/env python
"""Tokens per second of a whole training step (forward, backward, clipping, AdamW): ours, SFT and QAT, against transformers' GptOssForCausalLM.

    python scripts/bench/step.py                     both models, both dtypes, table and scripts/bench/results/step.json
    python scripts/bench/step.py --models 9m --dtypes float32 --json     one object; `ratio` is that of the 9.1 M model in float32

Each side runs in a process of its own that sleeps while the other computes, in the order A B B A ..., so that neither thread pool spins beside
the other and a drift of the machine's speed hits both. Both get memory in 2 MiB pages (`GLIBC_TUNABLES=glibc.malloc.hugetlb=1`), as our command line
asks for too. transformers runs without gradient checkpointing, with fused AdamW, with the faster of its experts implementations; in bfloat16 its
parameters and moments are bfloat16, ours stay float32 (more work for us). Ours runs with `remat: products` and `cast_at: step`, SFT and QAT alike.
Rows are random tokens, one document each.

`share` is the useful floating-point rate over the dense matmul rate of this machine: the larger of torch's and jax's at 2048^3, taken in the same
run and dtype. Useful: three times the products of the forward pass (`gptoss_jax.model.flops`), nothing for recomputation or padding.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from gptoss_jax.host_memory import HUGE_PAGES
from scripts.bench.common import WORKLOADS, machine, write_results

STEPS = 3  # of one turn
OURS, THEIRS = "ours", "transformers"


# ---- workers: prepare, say so, then answer each line "N" with the seconds of N steps ----------------------------------------------------
def serve(step, dense_flops_per_s: float) -> None:
    step()
    step()
    print(json.dumps({"dense": dense_flops_per_s}), flush=True)
    for line in sys.stdin:
        start = time.perf_counter()
        for _ in range(int(line)):
            step()
        print(json.dumps({"seconds": (time.perf_counter() - start) / int(line)}), flush=True)


def dense_rate(multiply, size: int = 2048, repeats: int = 5) -> float:
    """FLOP/s of a square product."""
    multiply()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        multiply()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)


def work_ours(name: str, dtype: str, mode: str, masters: str) -> None:
    import jax
    import jax.numpy as jnp

    from gptoss_jax.model import init_params
    from gptoss_jax.quant import default_policy, make_expert_quant
    from gptoss_jax.training.config import parse
    from gptoss_jax.training.step import init_state, make_train_step
    from scripts.bench.batches import random_batch

    work = WORKLOADS[name]
    train = parse({"steps": 1000, "batch": {"rows": work.rows}, "compute_dtype": dtype, "master_dtype": masters, "remat": "products", "cast_at": "step",
                   **({"quant": {"format": "mxfp4"}} if mode == "qat" else {})})  # fmt: skip
    batch = random_batch(work.config.vocab_size, work.rows, work.length)
    expert_quant = make_expert_quant(default_policy("mxfp4") if mode == "qat" else None, jnp.dtype(dtype))
    train_step = make_train_step(work.config, train, expert_quant)
    state = init_state(work.config, train, init_params(work.config, jax.random.key(0)))

    def step():
        nonlocal state
        state, metrics = train_step(state, batch)
        jax.block_until_ready(metrics["loss"])

    square = jnp.ones((2048, 2048), dtype)
    multiply = jax.jit(lambda a, b: a @ b)
    serve(step, dense_rate(lambda: jax.block_until_ready(multiply(square, square))))


def work_transformers(name: str, dtype: str) -> None:
    import torch
    from transformers import GptOssForCausalLM

    from tests.support.torch_model import hf_config

    torch.set_num_threads(2)
    work = WORKLOADS[name]
    torch.manual_seed(0)
    tokens = torch.randint(0, work.config.vocab_size, (work.rows, work.length))

    def make(experts: str):
        settings = hf_config(work.config)
        settings._experts_implementation = experts
        model = GptOssForCausalLM(settings).to(getattr(torch, dtype)).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5, betas=(0.9, 0.999), weight_decay=0.0, fused=True)

        def step():
            optimizer.zero_grad(set_to_none=True)
            model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()

        step()
        start = time.perf_counter()
        step()
        return time.perf_counter() - start, experts, step

    _, experts, step = min((make(experts) for experts in ("grouped_mm", "eager")), key=lambda made: made[0])
    print(f"transformers: {experts} experts", file=sys.stderr)
    square = torch.ones(2048, 2048, dtype=getattr(torch, dtype))
    serve(step, dense_rate(lambda: square @ square))


# ---- the run ---------------------------------------------------------------------------------------------------------------------------
class Worker:
    def __init__(self, *arguments: str):
        command = [sys.executable, __file__, "--worker", *arguments]
        environment = {**os.environ, **HUGE_PAGES}
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)

    def _answer(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"worker {self.process.args[3:]} died")
        return json.loads(line)

    def ready(self) -> float:
        return self._answer()["dense"]

    def seconds_per_step(self) -> float:
        print(STEPS, file=self.process.stdin, flush=True)
        return self._answer()["seconds"]

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def compare(name: str, dtype: str, rounds: int, masters: str) -> dict:
    """One model in one dtype: transformers, our SFT and our QAT step in turns."""
    from gptoss_jax.model.flops import train_flops

    sides = {THEIRS: (THEIRS, name, dtype), "sft": (OURS, name, dtype, "sft", masters), "qat": (OURS, name, dtype, "qat", masters)}
    with contextlib.ExitStack() as stack:
        workers, dense = {}, {}
        for side, arguments in sides.items():  # one after the other: no two of them compile at once
            workers[side] = Worker(*arguments)
            stack.callback(workers[side].close)
            dense[side] = workers[side].ready()
        seconds = {side: [] for side in sides}
        order = list(sides)
        for _ in range(rounds):
            for side in order:
                seconds[side].append(workers[side].seconds_per_step())
            order.reverse()
    work = WORKLOADS[name]
    median = {side: statistics.median(values) for side, values in seconds.items()}
    peak = max(dense.values())
    return {
        "model": name, "dtype": dtype, "masters": masters,
        "seconds": {side: round(value, 4) for side, value in median.items()},
        "tokens_per_s": {side: round(work.tokens / value, 1) for side, value in median.items()},
        "sft_over_transformers": round(statistics.median(b / a for a, b in zip(seconds["sft"], seconds[THEIRS])), 3),
        "qat_seconds_over_sft": round(statistics.median(a / b for a, b in zip(seconds["qat"], seconds["sft"])), 3),
        "dense_gflops": {"torch": round(dense[THEIRS] / 1e9, 1), "jax": round(max(dense["sft"], dense["qat"]) / 1e9, 1)},
        "useful_gflops": round(train_flops(work.config, work.rows, work.length) / median["sft"] / 1e9, 1),
        "share": round(train_flops(work.config, work.rows, work.length) / median["sft"] / peak, 3),
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    parser.add_argument("--masters", choices=("float32", "bfloat16"), default="float32", help="dtype of our master weights")
    parser.add_argument("--rounds", type=int, default=8, help=f"turns of {STEPS} steps for each side")
    parser.add_argument("--json", action="store_true", help="print one object instead of the table")
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        {OURS: work_ours, THEIRS: work_transformers}[args.worker[0]](*args.worker[1:])
        return 0

    rows = []
    for name in args.models:
        for dtype in args.dtypes:
            rows.append(compare(name, dtype, args.rounds, args.masters))
            if not args.json:
                print(json.dumps(rows[-1]), flush=True)
    by_key = {(row["model"], row["dtype"]): row for row in rows}
    result = {**machine(), "rows": rows, "best_against_best": {}}
    for name in args.models:
        mine = max(row["tokens_per_s"]["sft"] for row in rows if row["model"] == name)
        result["best_against_best"][name] = round(mine / max(row["tokens_per_s"][THEIRS] for row in rows if row["model"] == name), 3)
    if ("9m", "float32") in by_key:
        result["ratio"] = by_key["9m", "float32"]["sft_over_transformers"]
    if args.json:
        print(json.dumps(result))
    else:
        print(f"best dtype against best dtype: {result['best_against_best']}")
        if set(args.models) == set(WORKLOADS) and len(args.dtypes) == 2:
            print(write_results("step", result).relative_to(Path.cwd()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
