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
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from gptoss_jax.cli.host_memory import HUGE_PAGES
from scripts.bench.common import WORKLOADS, machine, write_results
from scripts.bench.turns import Worker, serve

TURN = 3.0  # seconds of one turn, and 3 steps at least, after one step that is not counted: a pause leaves caches cold and memory given back
PAUSE = 0.5  # seconds between turns: OpenMP threads of the one before keep a core busy for 0.2 s after their last product
OURS, THEIRS = "ours", "transformers"


# ---- workers: 0 steps is the order to prepare, answered with the dense rate; others with the seconds of a step --------------------------------
def answer_with(prepare) -> None:
    """`prepare() -> (step, FLOP/s of a dense product)`."""
    made = {}

    def answer(steps: int) -> dict:
        if steps == 0:
            made["step"], dense = prepare()
            made["step"]()
            made["step"]()
            return {"dense": dense}
        made["step"]()
        start, done = time.perf_counter(), 0
        while done < steps or time.perf_counter() - start < TURN:
            made["step"]()
            done += 1
        return {"seconds": (time.perf_counter() - start) / done}

    serve(answer)


def dense_rate(multiply, size: int = 2048, repeats: int = 5) -> float:
    """FLOP/s of a square product."""
    multiply()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        multiply()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)


def work_ours(name: str, dtype: str, mode: str, masters: str):
    import jax
    import jax.numpy as jnp

    from gptoss_jax.model import init_params
    from gptoss_jax.quant import default_policy, make_expert_quant
    from gptoss_jax.training.config import parse
    from gptoss_jax.training.step import init_state, make_train_step
    from scripts.bench.batches import random_batch

    work = WORKLOADS[name]
    quant = {"quant": {"format": "mxfp4"}} if mode == "qat" else {}
    settings = {"compute_dtype": dtype, "master_dtype": masters, "remat": "products", "cast_at": "step", **quant}
    train = parse({"steps": 1000, "batch": {"rows": work.rows}, **settings})
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
    return step, dense_rate(lambda: jax.block_until_ready(multiply(square, square)))


def work_transformers(name: str, dtype: str):
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
    return step, dense_rate(lambda: square @ square)


# ---- the run ---------------------------------------------------------------------------------------------------------------------------
def compare(name: str, dtype: str, rounds: int, masters: str) -> dict:
    """One model in one dtype: transformers, our SFT and our QAT step in turns."""
    from gptoss_jax.model.flops import train_flops

    sides = {THEIRS: (THEIRS, name, dtype), "sft": (OURS, name, dtype, "sft", masters), "qat": (OURS, name, dtype, "qat", masters)}
    with contextlib.ExitStack() as stack:
        workers, dense = {}, {}
        for side, arguments in sides.items():  # one after the other: no two of them compile at once
            workers[side] = stack.enter_context(Worker(sys.executable, __file__, "--worker", *arguments, variables=HUGE_PAGES))
            dense[side] = workers[side].ask(steps=0)["dense"]
        seconds = {side: [] for side in sides}
        order = list(sides)
        for _ in range(rounds):
            for side in order:
                time.sleep(PAUSE)
                seconds[side].append(workers[side].ask(steps=3)["seconds"])
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
    parser.add_argument("--rounds", type=int, default=5, help="turns of each side")
    parser.add_argument("--json", action="store_true", help="print one object instead of the table")
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        side, *arguments = args.worker
        answer_with(lambda: {OURS: work_ours, THEIRS: work_transformers}[side](*arguments))
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
