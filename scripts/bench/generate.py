#!/usr/bin/env python
"""Tokens per second of generation, prefill and decode apart: ours against transformers' `generate` with the same weights.

    python scripts/bench/generate.py                   both models, both dtypes, 1 and 8 rows; table and scripts/bench/results/generate.json
    python scripts/bench/generate.py --models 9m --dtypes float32 --batches 1 --json

Prompts of 128 random tokens, greedy, 64 further tokens, no stop token. Both sides are called through their public function on the whole job: one call
for 1 token (prefill: prompt tokens over its time), one for 65 (decode: 64 tokens a row over the difference of the two). Each side runs in a process
of its own that sleeps while the other computes, in the order A B B A ..., as in `step.py`; transformers with the fastest of its experts
implementations and its default (dynamic) cache. `equal` says whether both wrote the same tokens, in float32.
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

PROMPT, NEW = 128, 64
TURN = 1.0  # seconds of a turn at least
PAUSE = 0.5  # seconds between turns: OpenMP threads of the one before keep a core busy for 0.2 s after their last product
OURS, THEIRS = "ours", "transformers"


def make_prompts(vocab: int, batch: int):
    import numpy as np

    return np.random.default_rng(0).integers(0, vocab, (batch, PROMPT)).astype(np.int32)


# ---- workers: `run(new tokens) -> tokens`; answered with the seconds of both calls ----------------------------------------------------
def answer_with(prepare) -> None:
    made = {}

    def answer(turn: bool) -> dict:
        if not turn:
            made["run"] = prepare()
            made["run"](1)
            return {"tokens": made["run"](1 + NEW)}
        seconds = {1: [], 1 + NEW: []}
        made["run"](1)
        start = time.perf_counter()
        while time.perf_counter() - start < TURN or len(seconds[1]) < 2:
            for new, times in seconds.items():
                begin = time.perf_counter()
                made["run"](new)
                times.append(time.perf_counter() - begin)
        prefill = statistics.median(seconds[1])
        return {"prefill": prefill, "decode": statistics.median(seconds[1 + NEW]) - prefill}

    serve(answer)


def work_ours(name: str, dtype: str, batch: int):
    import jax.numpy as jnp

    from gptoss_jax.evaluation.generate import Generator
    from tests.support.params import lively_params

    config = WORKLOADS[name].config
    generator = Generator(config, lively_params(config, dtype=jnp.dtype(dtype)), dtype)
    prompts = list(make_prompts(config.vocab_size, batch))
    return lambda new: [row.tolist() for row in generator.generate(prompts, new)]


def work_transformers(name: str, dtype: str, batch: int):
    import torch
    from transformers.utils import logging

    from tests.support.params import lively_params
    from tests.support.torch_model import hf_model

    logging.set_verbosity_error()
    config = WORKLOADS[name].config
    model = hf_model(config, lively_params(config)).to(getattr(torch, dtype))
    torch.set_num_threads(2)
    tokens = torch.tensor(make_prompts(config.vocab_size, batch)).long()

    def run(new: int):
        options = dict(max_new_tokens=new, min_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0)
        return model.generate(tokens, attention_mask=torch.ones_like(tokens), **options)[:, PROMPT:].tolist()

    def seconds_with(experts: str) -> float:
        model.set_experts_implementation(experts)
        run(2)
        start = time.perf_counter()
        run(8)
        return time.perf_counter() - start

    experts = min(("grouped_mm", "batched_mm", "eager"), key=seconds_with)
    model.set_experts_implementation(experts)
    print(f"transformers: {experts} experts", file=sys.stderr)
    return run


# ---- the run ---------------------------------------------------------------------------------------------------------------------------
def compare(name: str, dtype: str, batch: int, rounds: int) -> dict:
    with contextlib.ExitStack() as stack:
        workers, tokens = {}, {}
        for side in (THEIRS, OURS):
            workers[side] = stack.enter_context(Worker(sys.executable, __file__, "--worker", side, name, dtype, str(batch), variables=HUGE_PAGES))
            tokens[side] = workers[side].ask(turn=False)["tokens"]
        answers: dict[str, list] = {side: [] for side in workers}
        order = list(workers)
        for _ in range(rounds):
            for side in order:
                time.sleep(PAUSE)
                answers[side].append(workers[side].ask(turn=True))
            order.reverse()
    result = {"model": name, "dtype": dtype, "batch": batch}
    for phase, count in (("prefill", batch * PROMPT), ("decode", batch * NEW)):
        seconds = {side: [answer[phase] for answer in answers[side]] for side in workers}
        result[f"{phase}_tokens_per_s"] = {side: round(count / statistics.median(values), 1) for side, values in seconds.items()}
        result[f"{phase}_ratio"] = round(statistics.median(b / a for a, b in zip(seconds[OURS], seconds[THEIRS])), 3)
    if dtype == "float32":
        result["equal"] = tokens[OURS] == tokens[THEIRS]
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--rounds", type=int, default=5, help="turns of each side")
    parser.add_argument("--json", action="store_true", help="print one object instead of the table")
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        side, name, dtype, batch = args.worker
        answer_with(lambda: {OURS: work_ours, THEIRS: work_transformers}[side](name, dtype, int(batch)))
        return 0
    rows = []
    for name in args.models:
        for dtype in args.dtypes:
            for batch in args.batches:
                rows.append(compare(name, dtype, batch, args.rounds))
                if not args.json:
                    print(json.dumps(rows[-1]), flush=True)
    result = {**machine(), "prompt": PROMPT, "new": NEW, "rows": rows}
    if args.json:
        print(json.dumps(result))
    elif set(args.models) == set(WORKLOADS) and len(args.dtypes) == 2 and {1, 8} <= set(args.batches):
        print(write_results("generate", result).relative_to(Path.cwd()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
