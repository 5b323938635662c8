"""Import and export at the size of the releases: speed against plain reads and copies of the same bytes, and host memory beyond the result.

    python scripts/bench/checkpoint_io.py --work DIR          # needs 14 GB of disk and 9 GB of memory

The checkpoints are invented (random codes, scales and BF16 values in the shapes of gpt-oss-20b and 120b):

    import 20b    a whole MXFP4 checkpoint of 13.8 GB; what one of 8 expert-parallel devices holds in BF16, from disk and from the page cache
    import 120b   64 devices; of its 65 GB the file holds what one of them reads (its 2 experts of 128, everything else whole), the rest is a hole
    export        the 20b shape with 2 of its 24 layers on one device, BF16 parameters -> MXFP4, with the verification that belongs to it

Each runs in a process of its own. Host memory is the peak of its resident memory (Linux, VmHWM) less what it held before and what it keeps. On a CPU
the device's memory is the host's, so its temporaries are in there. Plain reads and copies follow, in the same state of the cache.
"""

import argparse
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
POOL_BYTES, READ_BYTES = 64 << 20, 32 << 20
EXPORT_LAYERS = 2
DEVICES = {"20b": 8, "120b": 64}


# ---- invented checkpoints -----------------------------------------------------------------------------------------------------


def write_checkpoint(directory: Path, config: Any, experts: int | None = None) -> int:
    """An MXFP4 directory whose tensors hold random values; with `experts` only those of the first ones, the others are holes (zeros). Returns the
    bytes that lie on disk."""
    import ml_dtypes
    import numpy as np

    from gptoss_jax.checkpoint.hf_config import hf_config
    from gptoss_jax.checkpoint.hf_layout import Layout, expected_tensors
    from gptoss_jax.checkpoint.safetensors_io import DTYPES
    from gptoss_jax.formats import Mxfp4

    rng = np.random.default_rng(0)
    codes = np.frombuffer(rng.bytes(POOL_BYTES), np.uint8)
    pools = {"_blocks": codes, "_scales": codes % 16 + 110, "": (rng.standard_normal(1 << 20) * 0.02).astype(ml_dtypes.bfloat16).view(np.uint8)}
    header, end = {}, 0
    for spec in sorted(expected_tensors(config, Layout("hf", "mxfp4")).values(), key=lambda spec: (spec.dtypes[0] == "U8", spec.key)):
        begin, end = end, end + int(np.prod(spec.shape)) * DTYPES[spec.dtypes[0]].itemsize
        header[spec.key] = {"dtype": spec.dtypes[0], "shape": spec.shape, "data_offsets": [begin, end]}
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(hf_config(config, Mxfp4(), {}, {})))
    written = 0
    with open(directory / "model.safetensors", "wb", buffering=0) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for key, entry in header.items():
            pool = pools[next(suffix for suffix in pools if key.endswith(suffix))].data
            begin, stop = entry["data_offsets"]
            if experts and "experts" in key:
                stop = begin + (stop - begin) * experts // entry["shape"][0]
            for start in range(begin, stop, len(pool)):
                written += os.pwrite(file.fileno(), pool[: min(len(pool), stop - start)], 8 + len(text) + start)
        file.truncate(8 + len(text) + end)
        os.fsync(file.fileno())
    return written


# ---- measured -----------------------------------------------------------------------------------------------------------------


def resident(field: str) -> int:
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field)) * 1024


class Seconds(NamedTuple):
    wall: float
    cpu: float  # of all threads: what does not depend on who else uses the machine


def with_peak(function: Callable[[], Any]) -> tuple[Any, Seconds, int]:
    """(result, seconds, bytes of resident memory at the peak above those before)."""
    Path("/proc/self/clear_refs").write_text("5")
    before, cpu, start = resident("VmRSS"), time.process_time(), time.perf_counter()
    result = function()
    return result, Seconds(time.perf_counter() - start, time.process_time() - cpu), resident("VmHWM") - before


def forget(path: Path) -> None:
    """Takes a file out of the page cache."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def plain_read(path: Path, nbytes: int) -> float:
    """Seconds to read so many bytes of a file into memory, one thread."""
    buffer, start = bytearray(READ_BYTES), time.perf_counter()
    with open(path, "rb", buffering=0) as file:
        while nbytes > 0:
            nbytes -= file.readinto(buffer) or nbytes
    return time.perf_counter() - start


def import_share(directory: str, devices: str) -> dict[str, Any]:
    """What the first device of an expert-parallel mesh holds, in BF16."""
    import jax
    import jax.numpy as jnp

    jax.config.update("jax_num_cpu_devices", int(devices))
    from gptoss_jax.checkpoint import load
    from gptoss_jax.checkpoint.safetensors_io import SafetensorsFile
    from gptoss_jax.checkpoint.source import open_checkpoint
    from gptoss_jax.sharding import make_mesh, param_shardings

    file, source = Path(directory) / "model.safetensors", open_checkpoint(directory)
    shardings, read = param_shardings(source.config, make_mesh(expert=int(devices))), SafetensorsFile.read
    sizes: list[int] = []

    def counted(self, name, ranges):
        found = read(self, name, ranges)
        sizes.append(found.nbytes)
        return found

    SafetensorsFile.read = counted
    runs = {}
    for state in ("from_disk", "from_page_cache"):
        sizes.clear()
        if state == "from_disk":
            forget(file)
        share, seconds, peak = with_peak(lambda: jax.block_until_ready(load.load_share(source, jnp.bfloat16, shardings, jax.devices()[0])))
        held, nbytes = sum(array.nbytes for array in share.values()), sum(sizes)
        del share
        if state == "from_disk":
            forget(file)
        plain = plain_read(file, nbytes)
        runs[state] = {
            "seconds": seconds.wall, "cpu_seconds": seconds.cpu, "read_gb_per_s": nbytes / seconds.wall / 1e9,
            "decoded_gb_per_s": held / seconds.wall / 1e9, "plain_read_gb_per_s": nbytes / plain / 1e9, "over_plain_read": seconds.wall / plain,
            "host_beyond_share_gib": (peak - held) / 2**30,
        }  # fmt: skip
    whole = sum(info.nbytes for info in source.store.infos.values())
    return {"devices": int(devices), "checkpoint_bytes": whole, "share_read_bytes": nbytes, "share_bf16_bytes": held, **runs}


def export_layers(work: str) -> dict[str, Any]:
    """Writes and verifies; then a plain copy of what was written."""
    import jax
    import jax.numpy as jnp

    from gptoss_jax.checkpoint import export_hf, verify_dir
    from gptoss_jax.model import abstract_params

    config, target = release("20b", EXPORT_LAYERS), Path(work) / "export"
    noise = jax.random.normal(jax.random.key(0), (1 << 22,), jnp.bfloat16) * 0.02
    fill = jax.jit(lambda noise, shape: jnp.resize(noise, shape), static_argnums=1)
    params = {name: jax.block_until_ready(fill(noise, leaf.shape)) for name, leaf in abstract_params(config).items()}
    _, seconds, peak = with_peak(lambda: export_hf(target, config, params, format="mxfp4"))
    files = list(target.glob("*.safetensors"))
    nbytes = sum(file.stat().st_size for file in files)
    _, verify_seconds, verify_peak = with_peak(lambda: verify_dir(target))
    start = time.perf_counter()
    for file in files:
        copy = file.with_suffix(".copy")
        shutil.copyfile(file, copy)
        forget(copy)
    plain = time.perf_counter() - start
    shutil.rmtree(target)
    held = sum(array.nbytes for array in params.values())
    return {
        "layers": EXPORT_LAYERS, "params_bf16_bytes": held, "written_bytes": nbytes, "seconds": seconds.wall, "cpu_seconds": seconds.cpu,
        "of_which_verify_about": verify_seconds.wall, "written_gb_per_s": nbytes / seconds.wall / 1e9,
        "encoded_gb_per_s": held / seconds.wall / 1e9, "plain_copy_gb_per_s": nbytes / plain / 1e9,
        "over_plain_copy": seconds.wall / plain, "over_plain_copy_without_verify": (seconds.wall - verify_seconds.wall) / plain,
        "host_beyond_params_gib": peak / 2**30, "verify_host_gib": verify_peak / 2**30,
    }  # fmt: skip


def release(size: str, layers: int | None = None) -> Any:
    from gptoss_jax.model import GptOssConfig

    config = {"20b": GptOssConfig.gpt_oss_20b, "120b": GptOssConfig.gpt_oss_120b}[size]()
    return config if layers is None else dataclasses.replace(config, num_hidden_layers=layers, layer_types=config.layer_types[:layers])


WORKERS: Mapping[str, Callable[..., dict[str, Any]]] = {"import": import_share, "export": export_layers}


def worker(*arguments: str) -> dict[str, Any]:
    """One of `WORKERS` in a process of its own, in memory pages as the commands have them."""
    from gptoss_jax.cli.host_memory import HUGE_PAGES

    done = subprocess.run(
        [sys.executable, __file__, "--worker", *arguments], stdout=subprocess.PIPE, text=True, check=True,
        env={**os.environ, **HUGE_PAGES, "PYTHONPATH": str(ROOT)},
    )
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("checkpoint_io"), help="directory for the files; they are removed")
    parser.add_argument("--parts", nargs="+", default=["20b", "120b", "export"], choices=["20b", "120b", "export"])
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(WORKERS[args.worker[0]](*args.worker[1:])))
        return
    from scripts.bench.common import RESULTS, machine, write_results

    command = " ".join(["python scripts/bench/checkpoint_io.py", *sys.argv[1:]]).replace(str(args.work), "DIR")
    results = {"machine": machine(), "command": command, "load_average": os.getloadavg()[0]}
    earlier = RESULTS / "checkpoint_io.json"
    if earlier.exists() and set(args.parts) != {"20b", "120b", "export"}:
        results = {**json.loads(earlier.read_text()), **results}
    for part in args.parts:
        if part == "export":
            args.work.mkdir(parents=True, exist_ok=True)
            results["export_20b_shape"] = worker("export", str(args.work))
        else:
            directory, config = args.work / part, release(part)
            experts = None if part == "20b" else config.num_local_experts // DEVICES[part]
            start = time.perf_counter()
            written = write_checkpoint(directory, config, experts)
            made = {"on_disk_bytes": written, "write_gb_per_s": written / (time.perf_counter() - start) / 1e9}
            try:
                results[f"import_{part}"] = made | worker("import", str(directory), str(DEVICES[part]))
            finally:
                shutil.rmtree(directory)
        print(json.dumps(results, indent=1), write_results("checkpoint_io", results), flush=True)


if __name__ == "__main__":
    main()
