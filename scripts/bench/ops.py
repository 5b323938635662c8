#!/usr/bin/env python
"""Each operation of a layer against torch, on a CPU: seconds, ratio, share of the dense matmul rate.

    python scripts/bench/ops.py                      both models, both dtypes, table and scripts/bench/results/ops.json
    python scripts/bench/ops.py --sizes 9m --dtypes float32 --json

The counterparts: `grouped_mm`, transformers' GptOssExperts (grouped_mm and eager), its eager attention with sinks (and torch's fused attention, which
has no sinks and does less), F.cross_entropy on float32 logits. Both sides get the same numbers and must find the same value (`agree`: relative
difference). ours and torch run in processes of their own, in turns A B B A. "dense" is the time of a dense product of the same useful FLOPs at the
larger of the two libraries' rates for 2048^3, "copy" that of the bytes of bfloat16 -> bfloat16, for fake quantization. On a GPU see `gpu_suite.py`.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from scripts.bench.common import machine, write_results
from scripts.bench.op_cases import OPS, SIZES, inputs, useful_flops
from scripts.bench.turns import Worker, least_seconds, serve

VARIANTS = {"expert layer, forward and backward": ("grouped_mm", "eager"),
            "full attention, forward and backward": ("eager with sinks", "sdpa without sinks")}  # fmt: skip


# ---- our side --------------------------------------------------------------------------------------------------------------------------
def make(op: str, size: str, dtype: str):
    """(function of its arguments, arguments that it is differentiated in). The loss is half the sum of squares of the result."""
    import jax.numpy as jnp

    from gptoss_jax.ops.attention import attention
    from gptoss_jax.ops.cross_entropy import cross_entropy_sum
    from gptoss_jax.ops.experts import expert_mlp
    from gptoss_jax.ops.grouped_matmul import block_rows, dispatch, group_rows, grouped_matmul

    z = SIZES[size]
    a = {name: jnp.asarray(value) for name, value in inputs(op, z).items()}
    a = {name: value.astype(dtype) if jnp.issubdtype(value.dtype, jnp.floating) else value for name, value in a.items()}
    kind = op.split(",")[0]
    if kind == "grouped matmul":
        groups = group_rows(a["experts_SA"], z.experts, block_rows())
        bias = jnp.zeros(a["w_up_EUD"].shape[:2], dtype)
        return lambda x_PD, w_EUD: grouped_matmul(x_PD, w_EUD, bias, groups), (dispatch(a["x_SD"], groups), a["w_up_EUD"])
    if kind == "expert layer":
        experts = a.pop("experts_SA")

        def layer(x, weights, w_up, b_up, w_down, b_down):
            return expert_mlp(x, experts, weights, w_up, b_up, w_down, b_down, limit=7.0)

        return layer, tuple(a[n] for n in ("x_SD", "weights_SA", "w_up_EUD", "bias_up_EU", "w_down_EDF", "bias_down_ED"))
    if kind == "cross-entropy":
        rows = lambda x: x.reshape(z.rows, z.length, *x.shape[1:])
        weights, targets = jnp.ones((z.rows, z.length)), rows(a["targets_S"])
        return lambda h, w: cross_entropy_sum(h, w, targets, weights, jnp.dtype(dtype)), (rows(a["hidden_SD"]), a["w_VD"])
    segments = jnp.ones((z.rows, z.length), jnp.int32)
    window = z.window if kind.startswith("sliding") else None
    return lambda q, k, v, s: attention(q, k, v, s, segments, window), tuple(a.values())


def answer(op: str, size: str, dtype: str, repeats: int, variant: str = "", dense: int = 2048) -> dict:
    """As `torch_ops.answer`, and three more: "cast", "fake quant" and "copy" of the bytes of one layer's experts."""
    import jax
    import jax.numpy as jnp

    from gptoss_jax.quant import fake_quant

    ready = jax.block_until_ready
    if op == "dense":
        square = jnp.ones((dense, dense), dtype)
        multiply = jax.jit(lambda a, b: a @ b)
        return {"flops_per_s": 2 * dense**3 / least_seconds(lambda: ready(multiply(square, square)), repeats)}
    if op in ("cast", "fake quant", "copy"):
        z = SIZES[size]
        w = jax.random.normal(jax.random.key(0), (z.experts, 3 * z.width, z.hidden)) * 0.02
        run = {"cast": lambda w: w.astype(jnp.bfloat16), "fake quant": lambda w: fake_quant(w, "mxfp4", dtype=jnp.bfloat16), "copy": lambda w: -w}[op]
        run, argument = jax.jit(run), w.astype(jnp.bfloat16) if op == "copy" else w
        return {"seconds": least_seconds(lambda: ready(run(argument)), repeats), "elements": w.size}
    function, arguments = make(op, size, dtype)
    loss = lambda *a: function(*a) if op.startswith("cross") else 0.5 * jnp.sum(jnp.square(function(*a).astype(jnp.float32)))
    value = float(jax.jit(loss)(*arguments))
    run = jax.jit(jax.grad(loss, argnums=tuple(range(len(arguments)))) if op.endswith("backward") else function)
    return {"seconds": least_seconds(lambda: ready(run(*arguments)), repeats), "value": value}


# ---- the run ---------------------------------------------------------------------------------------------------------------------------
def compare(size: str, dtype: str, ops: list[str], repeats: int, rounds: int, ours: Worker, theirs: Worker, dense: int) -> list[dict]:
    ask = dict(size=size, dtype=dtype, repeats=repeats, dense=dense)
    rate = max(side.ask(op="dense", **ask)["flops_per_s"] for side in (ours, theirs))
    rows = []
    for op in ops:
        variants = VARIANTS.get(op, ("",))
        found: dict[str, list[dict]] = {"ours": [], **{variant: [] for variant in variants}}
        for number in range(rounds):
            turns = [(ours, "ours"), *((theirs, variant) for variant in variants)]
            for side, name in turns[:: -1 if number % 2 else 1]:
                found[name].append(side.ask(op=op, variant="" if name == "ours" else name, **ask))
        seconds = {name: min(run["seconds"] for run in runs) for name, runs in found.items()}
        flops, value = useful_flops(op, SIZES[size]), found["ours"][0]["value"]
        for variant in variants:
            rows.append(
                {
                    "size": size, "dtype": dtype, "op": op, "torch": variant or "torch",
                    "ours_ms": round(1e3 * seconds["ours"], 3), "torch_ms": round(1e3 * seconds[variant], 3),
                    "torch_over_ours": round(seconds[variant] / seconds["ours"], 3),
                    "dense_ms": round(1e3 * flops / rate, 3), "share_of_dense": round(flops / rate / seconds["ours"], 3),
                    "agree": float(f"{abs(found[variant][0]['value'] / value - 1):.1e}"),
                }
            )
    return rows


def quantization(size: str, repeats: int, ours: Worker) -> dict:
    """Nanoseconds per element of what happens to float32 master experts on their way to bfloat16."""
    found = {op: ours.ask(op=op, size=size, dtype="float32", repeats=repeats) for op in ("copy", "cast", "fake quant")}
    return {"size": size, **{f"{op} ns": round(1e9 * run["seconds"] / run["elements"], 4) for op, run in found.items()}}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["9m", "112m"])
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    parser.add_argument("--ops", nargs="+", default=list(OPS), help="beginnings of names")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--dense", type=int, default=2048, help="edge of the square product that sets the dense rate")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        serve(answer)
        return 0
    ops = [op for op in OPS if op.startswith(tuple(args.ops))]
    rows, quant = [], []
    with Worker(sys.executable, __file__, "--worker") as ours, Worker(sys.executable, str(Path(__file__).with_name("torch_ops.py"))) as theirs:
        for size in args.sizes:
            for dtype in args.dtypes:
                rows += compare(size, dtype, ops, args.repeats, args.rounds, ours, theirs, args.dense)
            quant.append(quantization(size, args.repeats, ours))
    result = {**machine(), "rows": rows, "quantization": quant}
    if args.json:
        print(json.dumps(result))
        return 0
    print(f"{result['device']}, commit {result['commit']}, {result['date']}")
    for r in rows:
        theirs = f"{r['torch']:18s} {r['torch_ms']:9.2f} ms = {r['torch_over_ours']:6.2f}x"
        print(f"{r['size']:5s} {r['dtype']:9s} {r['op']:40s} {r['ours_ms']:9.2f} ms, {theirs}, {r['share_of_dense']:6.1%} of dense, {r['agree']}")
    for q in quant:
        print(", ".join(f"{key} {value}" for key, value in q.items()))
    if args.sizes == ["9m", "112m"] and len(args.dtypes) == 2 and ops == list(OPS):
        print(write_results("ops", result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
