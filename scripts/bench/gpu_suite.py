#!/usr/bin/env python
"""Everything that one GPU can tell in one call of less than ten minutes, written part by part to scripts/bench/results/gpu_suite.json.

    python scripts/bench/gpu_suite.py                     all parts
    python scripts/bench/gpu_suite.py --parts codec step_sft --minutes 5
    python scripts/bench/gpu_suite.py --smoke             tiny shapes on whatever device there is; times mean nothing then

Each part runs in a process of its own with a time limit: a crash, a hang or a lack of memory loses that part alone, and peak memory is the part's
own. First what must be right, then what should be fast. XLA flags and environment are taken as they are; set those that `gptoss-jax env --exports`
advises.

    codec                 bytes and values equal the CPU's: all bfloat16, beside every border, a million float32 blocks; compiled and op by op
    trained_is_exported   nano QAT on the device, exported by the CPU: the weights its compiled step used
    repeatable            a step twice from one state: equal bits
    kernels               every backend against dense float32, values and gradients
    codec_speed           encode, decode, fake quantization against a device copy
    op_speed              attention, experts, cross-entropy at 20b shapes against dense products
    step_sft, step_qat    whole 20b steps (fewer layers where 24 do not fit): tokens/s, TFLOP/s, MFU, peak memory
    layers                two 20b layers, SFT and QAT, 16k and 64k tokens
    decode                one row of 20b token by token: share of the memory bandwidth, experts in bfloat16 and packed
    transformers_layers   the same two layers in transformers, where torch has CUDA
"""

import argparse
import json
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

# seconds that a part may take
LIMITS = {
    "codec": 120, "trained_is_exported": 100, "repeatable": 60, "kernels": 100, "codec_speed": 60, "op_speed": 120, "step_sft": 150, "step_qat": 150,
    "layers": 120, "decode": 120, "transformers_layers": 120,
}  # fmt: skip
MARK = "RESULT "


def run_part(name: str, smoke: bool) -> dict:
    """One part in this process."""
    from scripts.bench import gpu_correctness, gpu_generation, gpu_speed

    parts = {
        "codec": gpu_correctness.codec,
        "trained_is_exported": gpu_correctness.trained_is_exported,
        "repeatable": gpu_correctness.repeatable,
        "kernels": gpu_correctness.kernels,
        "codec_speed": gpu_speed.codec_speed,
        "op_speed": gpu_speed.op_speed,
        "step_sft": partial(gpu_speed.whole_step, mode="sft"),
        "step_qat": partial(gpu_speed.whole_step, mode="qat"),
        "layers": gpu_speed.layers,
        "decode": gpu_generation.decode,
        "transformers_layers": gpu_speed.transformers_layers,
    }
    return parts[name](smoke)


def spawn(name: str, smoke: bool, limit: float) -> dict:
    """One part in a process of its own: its result, or what became of it."""
    command = [sys.executable, __file__, "--part", name, *(["--smoke"] if smoke else [])]
    environment = dict(os.environ)
    if name == "transformers_layers":
        environment["JAX_PLATFORMS"] = "cpu"  # JAX takes most of the memory when it starts; torch must not find it taken
    elif environment.get("JAX_PLATFORMS"):
        environment["JAX_PLATFORMS"] += ",cpu"  # the reference of the codec
    start = time.perf_counter()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, env=environment)
        lines = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
        result = json.loads(lines[-1][len(MARK) :]) if lines else {"error": f"exit {done.returncode}: {done.stderr[-2000:]}"}
    except subprocess.TimeoutExpired as late:
        result = {"error": f"stopped after {limit:.0f} s: {(late.stderr or b'')[-1000:].decode(errors='replace')}"}
    return {**result, "part_s": round(time.perf_counter() - start, 1)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=LIMITS, default=list(LIMITS))
    parser.add_argument("--minutes", type=float, default=9.5, help="for all parts together")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--out", help="directory for gpu_suite.json instead of scripts/bench/results")
    parser.add_argument("--part", choices=LIMITS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        print(MARK + json.dumps(run_part(args.part, args.smoke)), flush=True)
        return 0

    end = time.perf_counter() + 60 * args.minutes
    # in a process of its own too: a JAX that lives here would keep the memory of the device
    about = subprocess.run(
        [sys.executable, "-c", "import json; from scripts.bench.common import machine; print(json.dumps(machine()))"],
        cwd=Path(__file__).resolve().parents[2], capture_output=True, text=True,
    )  # fmt: skip
    result = json.loads(about.stdout.splitlines()[-1]) if about.returncode == 0 else {"error": about.stderr[-2000:]}
    result |= {"smoke": args.smoke, "xla_flags": os.environ.get("XLA_FLAGS", ""), "parts": {}}
    print(json.dumps({key: value for key, value in result.items() if key != "parts"}), flush=True)
    directory = Path(args.out) if args.out else Path(__file__).resolve().parent / "results"
    directory.mkdir(parents=True, exist_ok=True)
    file = directory / ("gpu_suite_smoke.json" if args.smoke else "gpu_suite.json")  # no smoke run passes for a measurement
    for name in args.parts:
        left = end - time.perf_counter()
        part = spawn(name, args.smoke, min(LIMITS[name], left)) if left > 10 else {"error": "no time left"}
        result["parts"][name] = part
        file.write_text(json.dumps(result, indent=1) + "\n")
        print(name, json.dumps(part), flush=True)
    sft, qat = (result["parts"].get(name, {}).get("seconds") for name in ("step_sft", "step_qat"))
    if sft and qat:
        result["qat_step_over_sft_step"] = round(qat / sft, 4)
        file.write_text(json.dumps(result, indent=1) + "\n")
        print(f"QAT step / SFT step: {result['qat_step_over_sft_step']}")
    failed = [name for name, part in result["parts"].items() if "error" in part or part.get("ok") is False]
    print(f"failed: {', '.join(failed) or 'none'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
