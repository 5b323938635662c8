#!/usr/bin/env python
"""One long row cut over the devices of `context` against the same row on one device: loss, every gradient, time and memory.

    python scripts/bench/long_rows.py                              131,072 tokens, 2 layers of nano (one sliding, one full), 8 virtual CPU devices
    python scripts/bench/long_rows.py --length 2048 --layers 4     the whole nano model on a short row

Each side is a process of its own: it compiles loss and gradients (float32, `remat: products`), runs them once, and states the seconds of that run,
what XLA allocates on each device, and the most memory the process held. The virtual devices share the cores of one machine, so their time says
nothing about speed on eight devices; what eight devices change is the memory of each. A row of one document is the most work that attention can have:
with `--documents` it holds several of equal length.
"""

import argparse
import dataclasses
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from scripts.bench.common import ROOT, machine, write_results


def work(length: int, layers: int, documents: int, devices: int, out: Path) -> None:
    """One side: loss and gradients to `out` (.npz), its measurements as a line of JSON on stdout."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    jax.config.update("jax_num_cpu_devices", devices)
    from gptoss_jax.model import GptOssConfig, init_params
    from gptoss_jax.sharding import make_mesh
    from gptoss_jax.training.config import parse
    from gptoss_jax.training.step import Shardings, make_loss
    from scripts.bench.batches import random_batch

    nano = GptOssConfig.from_dict(json.loads((ROOT / "gptoss_jax/nano/config.json").read_text()))
    config = dataclasses.replace(nano, num_hidden_layers=layers, layer_types=nano.layer_types[:layers])
    shardings = Shardings.on(config, make_mesh(context=devices)) if devices > 1 else None
    batch, token_1T = random_batch(config.vocab_size, rows=1, length=length), jnp.arange(length, dtype=jnp.int32)[None]
    batch = batch._replace(segment_ids_BT=1 + token_1T * documents // length, positions_BT=token_1T % (length // documents))
    args = init_params(config, jax.random.key(0)), batch
    if shardings:
        args = jax.device_put(args, (shardings.params, shardings.batch))
    loss = make_loss(config, parse({"compute_dtype": "float32", "remat": "products"}), None, distribute=shardings and shardings.distribute)
    step = jax.jit(jax.value_and_grad(lambda params, batch: loss(params, {}, batch, jnp.float32(length), length)[0]))
    start = time.perf_counter()
    compiled = step.lower(*args).compile()
    compile_seconds, start = time.perf_counter() - start, time.perf_counter()
    value, grads = jax.device_get(compiled(*args))
    seconds, sizes = time.perf_counter() - start, compiled.memory_analysis()
    np.savez(out, loss=value, **grads)
    print(json.dumps({
        "devices": devices, "compile_seconds": round(compile_seconds, 1), "seconds": round(seconds, 1), "loss": float(value),
        "mb_of_values_per_device": round(sizes.temp_size_in_bytes / 1e6, 1),
        "mb_of_arguments_per_device": round(sizes.argument_size_in_bytes / 1e6, 1),
        "peak_mb_of_process": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3),
    }))  # fmt: skip


def compare(one: Path, many: Path) -> dict:
    """Largest difference of a gradient relative to its largest element, and the parameter it is of."""
    import numpy as np

    with np.load(one) as expected, np.load(many) as got:
        worst = max((float(np.abs(got[name] - expected[name]).max() / np.abs(expected[name]).max()), name) for name in expected if name != "loss")
        return {"loss": float(abs(got["loss"] / expected["loss"] - 1)), "gradient": worst[0], "of": worst[1]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--length", type=int, default=131_072)
    parser.add_argument("--layers", type=int, default=2, choices=(1, 2, 3, 4))
    parser.add_argument("--documents", type=int, default=1, help="a divisor of the length")
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true", help="print the result and write no file")
    options = parser.parse_args()
    if options.worker:
        work(options.length, options.layers, options.documents, options.worker, options.out)
        return
    shape = [f"--{name}={getattr(options, name)}" for name in ("length", "layers", "documents")]
    with tempfile.TemporaryDirectory() as place:
        sides, files = [], []
        for devices in (options.devices, 1):
            files.append(Path(place) / f"{devices}.npz")
            command = [sys.executable, __file__, *shape, "--worker", str(devices), "--out", str(files[-1])]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            sides.append(json.loads(done.stdout))
            print(sides[-1], file=sys.stderr)
        difference = compare(files[1], files[0])
    command = " ".join(["scripts/bench/long_rows.py", *shape, f"--devices={options.devices}"])
    result = {"command": command, "sides": sides, "relative_difference": difference, **machine()}
    if options.json:
        print(json.dumps(result))
    else:
        print(write_results("long_rows", result))


if __name__ == "__main__":
    main()
