#!/usr/bin/env python
"""Speed of the 4-bit codecs: encode, decode and fake quantization of one block of gpt-oss-20b experts, beside a copy of the same bytes.

    python scripts/bench/codec.py --modelopt-python OTHER/bin/python      table, and scripts/bench/results/codec.json
    python scripts/bench/codec.py --json                                  one object instead of the table

GB/s always count the input as bfloat16, two bytes an element, whatever is read or written, so that rows compare; `ns` is nanoseconds per
element. "x copy" is the speed over that of the fastest copy of the same bfloat16 array in the same run: XLA's into a fresh array, or numpy's into
one that exists. With `--modelopt-python`, NVIDIA's converter (`MXFP4QTensor.quantize`, pip install nvidia-modelopt) runs in that interpreter, in
turns with ours, on the same weights; its bytes must equal those of `compat="modelopt"`.

On a CPU much of the time of these memory-bound programs goes into the kernel's handing out 4 KiB pages for results. `--huge-pages` starts everything,
modelopt too, under GLIBC_TUNABLES=glibc.malloc.hugetlb=1 (transparent huge pages for malloc).
"""

import argparse
import contextlib
import hashlib
import json
import os
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from gptoss_jax.cli.host_memory import HUGE_PAGES
from scripts.bench.common import best, machine, write_results
from scripts.bench.turns import Worker, least_seconds

SHAPE = (4, 5760, 2880)  # gate_up_proj of four experts
ROUNDS = 3


def our_cases(shape: tuple[int, ...], seed: int) -> dict:
    """Name -> (jitted function, its argument). Copies first."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from gptoss_jax.formats import Mxfp4, Nvfp4
    from gptoss_jax.quant import fake_quant

    host = np.random.default_rng(seed).standard_normal(shape, np.float32) * np.float32(0.02)
    f32 = jnp.asarray(host)
    bf16 = f32.astype(jnp.bfloat16)
    # one bit flipped: XLA forwards an unchanged argument instead of copying it
    flip = lambda x: jax.lax.bitcast_convert_type(jax.lax.bitcast_convert_type(x, jnp.uint16) ^ jnp.uint16(1), jnp.bfloat16)
    cases = {"copy bfloat16": (flip, bf16), "cast float32 -> bfloat16": (lambda x: x.astype(jnp.bfloat16), f32)}
    for fmt in (Mxfp4(), Nvfp4()):
        cases |= {
            f"{fmt.name} encode bfloat16": (fmt.encode, bf16),
            f"{fmt.name} encode float32": (fmt.encode, f32),
            f"{fmt.name} decode -> bfloat16": (partial(fmt.decode, dtype=jnp.bfloat16), fmt.encode(bf16)),
            f"{fmt.name} fake quant float32 -> bfloat16": (partial(fake_quant, fmt=fmt, dtype=jnp.bfloat16), f32),
            f"{fmt.name} fake quant bfloat16 -> bfloat16": (partial(fake_quant, fmt=fmt), bf16),
            f"{fmt.name} fake quant float32 -> float32": (partial(fake_quant, fmt=fmt), f32),
        }
    return {name: (jax.jit(function), argument) for name, (function, argument) in cases.items()}


def measure(shape: tuple[int, ...], seed: int, rounds: int, modelopt_python: str | None) -> dict:
    """Least seconds of each case over the rounds, whose order turns around each time; modelopt, if asked, at one end of each round."""
    import numpy as np

    from gptoss_jax.formats import Mxfp4, Nvfp4

    cases = our_cases(shape, seed)
    host = np.asarray(cases["copy bfloat16"][1])
    target = np.empty_like(host)
    seconds = {name: [] for name in ["numpy copyto bfloat16", *cases]}
    theirs: dict[str, list[float]] = {}
    same_bytes: dict[str, bool] = {}
    version = None
    with contextlib.ExitStack() as stack:
        worker = modelopt_python and stack.enter_context(
            Worker(modelopt_python, str(Path(__file__).with_name("modelopt_worker.py")))
        )

        def ask_modelopt():
            nonlocal version
            for name, fmt in {"mxfp4": Mxfp4(compat="modelopt"), "nvfp4": Nvfp4(global_scale="exact")}.items():
                reply = worker.ask(what=name, shape=list(shape), seed=seed, repeats=1)
                theirs.setdefault(name, []).append(reply["seconds"])
                version = reply["modelopt"]
                if name not in same_bytes:
                    # as one matrix: modelopt has one global scale for whatever it is given
                    packed = np.asarray(fmt.encode(cases["copy bfloat16"][1].reshape(-1, shape[-1])).packed)
                    same_bytes[name] = hashlib.sha256(packed.tobytes()).hexdigest() == reply["sha256"]

        for number in range(rounds):
            if worker and number % 2 == 0:
                ask_modelopt()
            seconds["numpy copyto bfloat16"].append(least_seconds(lambda: np.copyto(target, host), repeats=5))
            for name, (function, argument) in list(cases.items())[:: -1 if number % 2 else 1]:
                seconds[name].append(best(function, argument, repeats=5))
            if worker and number % 2:
                ask_modelopt()

    least = {name: min(values) for name, values in seconds.items()}
    least |= {f"modelopt {name} encode bfloat16": min(values) for name, values in theirs.items()}
    elements = int(np.prod(shape))
    copy = min(least["copy bfloat16"], least["numpy copyto bfloat16"])
    rows = {
        name: {"ns": round(1e9 * value / elements, 4), "gb_per_s": round(2e-9 * elements / value, 3), "x_copy": round(copy / value, 4)}
        for name, value in least.items()
    }
    ratios = {name: round(min(theirs[name]) / least[f"{name} encode bfloat16"], 1) for name in theirs}
    return {"shape": list(shape), "rows": rows, "encode_over_modelopt": ratios, "modelopt": version, "same_bytes_as_modelopt": same_bytes}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs="+", default=SHAPE)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--modelopt-python", help="interpreter of an environment with nvidia-modelopt")
    parser.add_argument("--huge-pages", action="store_true")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if args.huge_pages and "GLIBC_TUNABLES" not in os.environ:
        # malloc reads this when a process starts
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **HUGE_PAGES})

    result = {**machine(), "huge_pages": args.huge_pages, **measure(tuple(args.shape), 0, args.rounds, args.modelopt_python)}
    if args.json:
        print(json.dumps(result))
        return 0
    print(f"{result['device']}, commit {result['commit']}, {result['date']}: bfloat16 or float32 {args.shape}")
    for name, row in result["rows"].items():
        print(f"{name:40s} {row['ns']:8.3f} ns {row['gb_per_s']:8.2f} GB/s {row['x_copy']:7.3f} x copy")
    for name, ratio in result["encode_over_modelopt"].items():
        same = "same bytes" if result["same_bytes_as_modelopt"][name] else "OTHER BYTES"
        print(f"{name} encode: {ratio} x modelopt {result['modelopt']}, in its compatibility mode {same}")
    print(write_results("codec", result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
