#!/usr/bin/env python
"""Seconds to compile a QAT training step and the memory it plans, by depth: layers run in a scan, so depth must not matter.

    python scripts/bench/compile.py            depths 2 and 36, table and scripts/bench/results/compile.json
    python scripts/bench/compile.py --json     one object instead of the table

Each compilation happens in a fresh process without a compilation cache, depths in turns, the least of `--rounds` counts. "plan" is what XLA plans
for one step beside parameters and optimizer (`temp_size_in_bytes`, gradients included), "host" the largest resident size of the compiling process.
For `cast_at: layer` and `step`, the plan is also given in units of the experts' bfloat16 bytes: `step` holds them all at once.
"""

import argparse
import dataclasses
import json
import resource
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from scripts.bench.common import machine, write_results
from scripts.bench.turns import Worker, serve

ROWS, LENGTH = 4, 512


def compile_step(depth: int, cast_at: str, dtype: str, remat: str) -> dict:
    """Traces, lowers and compiles; nothing is allocated or run."""
    import jax
    import jax.numpy as jnp

    from gptoss_jax.quant import default_policy, make_expert_quant
    from gptoss_jax.training.config import parse
    from gptoss_jax.training.step import abstract_state, make_train_step
    from scripts.bench.batches import random_batch
    from scripts.bench.common import WORKLOADS

    jax.config.update("jax_enable_compilation_cache", False)
    small = dataclasses.replace(WORKLOADS["9m"].config, num_hidden_layers=depth, layer_types=())
    train = parse({"steps": 10, "batch": {"rows": ROWS}, "compute_dtype": dtype, "remat": remat, "cast_at": cast_at, "quant": {"format": "mxfp4"}})
    state = abstract_state(small, train)
    batch = jax.eval_shape(lambda: random_batch(small.vocab_size, ROWS, LENGTH))
    step = make_train_step(small, train, make_expert_quant(default_policy("mxfp4"), jnp.dtype(dtype)))
    start = time.perf_counter()
    lowered = step.lower(state, batch)
    traced = time.perf_counter()
    compiled = lowered.compile()
    done = time.perf_counter()
    memory = compiled.memory_analysis()
    experts = 2 * sum(leaf.size for name, leaf in state.params.items() if name.endswith("_proj") and ".experts." in name)
    return {
        "trace_s": round(traced - start, 3),
        "compile_s": round(done - traced, 3),
        "total_s": round(done - start, 3),
        "plan_mib": round(memory.temp_size_in_bytes / 2**20, 1),
        "plan_over_bf16_experts": round(memory.temp_size_in_bytes / experts, 3),
        "host_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10),
    }


def measure(depths: list[int], casts: list[str], dtype: str, remat: str, rounds: int) -> dict:
    runs: dict[tuple[str, int], list[dict]] = {(cast, depth): [] for cast in casts for depth in depths}
    for number in range(rounds):
        for key in list(runs)[:: -1 if number % 2 else 1]:
            with Worker(sys.executable, __file__, "--worker") as worker:
                runs[key].append(worker.ask(cast_at=key[0], depth=key[1], dtype=dtype, remat=remat))
    rows = [{"cast_at": cast, "depth": depth, **min(found, key=lambda run: run["total_s"])} for (cast, depth), found in runs.items()]
    seconds = {(row["cast_at"], row["depth"]): row["total_s"] for row in rows}
    ratio = {cast: round(seconds[cast, max(depths)] / seconds[cast, min(depths)], 3) for cast in casts}
    return {"dtype": dtype, "remat": remat, "rows": rows, "seconds_of_deepest_over_shallowest": ratio}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depths", type=int, nargs="+", default=[2, 36])
    parser.add_argument("--cast-at", nargs="+", choices=("layer", "step"), default=["layer", "step"])
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--remat", choices=("none", "products", "layer"), default="layer")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        serve(compile_step)
        return 0
    result = {**machine(), **measure(args.depths, args.cast_at, args.dtype, args.remat, args.rounds)}
    if args.json:
        print(json.dumps(result))
        return 0
    print(f"{result['device']}, commit {result['commit']}, {result['date']}, {args.dtype}, remat {args.remat}")
    for row in result["rows"]:
        print(" ".join(f"{key} {value}" for key, value in row.items()))
    print(f"deepest over shallowest: {result['seconds_of_deepest_over_shallowest']}")
    print(write_results("compile", result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
