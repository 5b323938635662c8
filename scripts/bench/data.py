"""Speed and memory of the data pipeline: read, check, render, tokenize, count and pack invented conversations; batches of the stream.

    python scripts/bench/data.py [--rows 100000] [--compare 3000]

Tokenizer: the release's 201,088-row vocabulary, built from the ranks in package bpe-openai. Each size runs in a process of its own, whose peak
memory is read from Linux: what it holds beyond the token arrays must not grow with the rows. Beside it, in turns, `datasets.map` with the
`apply_chat_template` of transformers on a subset: a call for each row, as trainers do it, and batches of 1000, which its tokenizer spreads over
threads.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

ROW_LENGTH, BATCH_ROWS, NUM_BATCHES = 4096, 32, 100
PARTS = (16, 4, 1)  # of the rows, for the growth of memory
TURNS = 3


def reset_peak() -> None:
    """The peak counts from here on: a process starts with that of loading the tokenizer."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")) * 1024


def pipeline_run(file: Path, limit: int, tokenizer: Any) -> dict[str, float]:
    """One pass over the first rows of a file; everything is dropped afterwards."""
    from gptoss_jax.data import BatchStream, Pipeline, Source, report, training_and_held_out

    pipeline = Pipeline(tokenizer, ROW_LENGTH)
    pipeline.tokenize([Source(str(file), limit=100)])  # what is made once: imports, the tokenizer's caches
    reset_peak()
    before = peak_bytes()
    clock = [time.perf_counter()]
    corpus = pipeline.tokenize([Source(str(file), limit=limit)])
    clock.append(time.perf_counter())
    after_tokenize = peak_bytes()
    training, _ = training_and_held_out(corpus, None, None, 0)
    counts = report("train", training, pipeline)
    clock.append(time.perf_counter())
    packed = pipeline.pack("train", training)
    clock.append(time.perf_counter())
    stream = BatchStream(packed.rows, BATCH_ROWS, 0, tokenizer)
    clock.append(time.perf_counter())
    for _ in range(NUM_BATCHES):
        next(stream)
    clock.append(time.perf_counter())
    tokenize, report_s, pack, fingerprint, batches = (end - start for start, end in itertools.pairwise(clock))
    flat = corpus.documents.flat
    arrays = sum({id(array): array.nbytes for array in flat}.values())
    tokens = int(corpus.documents.lengths.sum())
    return {
        "rows": limit,
        "tokens": tokens,
        "trained_share": round(counts.trained_share, 3),
        "packed_fill": round(counts.fill, 4),
        "seconds": {"read_check_render_tokenize": tokenize, "count": report_s, "pack": pack, "fingerprint": fingerprint},
        "tok_per_s": round(tokens / (tokenize + report_s + pack)),
        "batches_per_s": round(NUM_BATCHES / batches, 1),
        "before_mb": before / 1e6,
        "token_arrays_mb": arrays / 1e6,
        "packed_rows_mb": sum(array.nbytes for array in packed.rows) / 1e6,
        # joining the pieces holds one field twice
        "tokenize_beyond_arrays_mb": (after_tokenize - before - arrays - flat.ids.nbytes) / 1e6,
        "peak_mb": peak_bytes() / 1e6,
    }


def measure(file: Path, limit: int, tokenizer_dir: Path) -> dict[str, float]:
    """`pipeline_run` in a process of its own."""
    command = [sys.executable, __file__, "--worker", str(file), str(limit), str(tokenizer_dir)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    return json.loads(done.stdout.splitlines()[-1])


def compare(file: Path, rows: int, tokenizer: Any, work: Path) -> dict[str, Any]:
    """Tokens per second of both on the same rows, from file to token ids; medians of turns."""
    import datasets

    from gptoss_jax.checkpoint.source import NANO
    from gptoss_jax.data import Pipeline, Source

    datasets.disable_progress_bars()
    template = (NANO / "chat_template.jinja").read_text()  # shorter than the release's, so faster
    subset = work / "subset.jsonl"
    with file.open() as lines:
        subset.write_text("".join(line for _, line in zip(range(rows), lines)))

    def theirs(batched: bool) -> int:
        loaded = datasets.load_dataset("json", data_files=str(subset), split="train", cache_dir=str(work / f"cache-{time.monotonic_ns()}"))
        apply = lambda examples: {"ids": tokenizer.apply_chat_template(examples["messages"], chat_template=template, return_dict=True)["input_ids"]}
        done = loaded.map(apply, batched=batched, remove_columns=loaded.column_names, load_from_cache_file=False)
        return sum(map(len, done["ids"]))

    ways = {
        "ours": lambda: int(Pipeline(tokenizer, ROW_LENGTH).tokenize([Source(str(subset))]).documents.lengths.sum()),
        "datasets_map": lambda: theirs(False),
        "datasets_map_batched": lambda: theirs(True),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    tokens = {}
    for _ in range(TURNS):
        for name, way in ways.items():
            start = time.perf_counter()
            tokens[name] = way()
            seconds[name].append(time.perf_counter() - start)
    if len(set(tokens.values())) != 1:
        raise SystemExit(f"the two sides made different tokens: {tokens}")
    speed = {name: round(tokens[name] / statistics.median(times)) for name, times in seconds.items()}
    ratios = {f"ours_over_{name}": round(speed["ours"] / speed[name], 2) for name in ways if name != "ours"}
    return {"rows": rows, "tokens": tokens["ours"], "tok_per_s": speed, **ratios}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--compare", type=int, default=3000, help="rows of the comparison; 0 leaves it out")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    from gptoss_jax.data import load_tokenizer

    if args.worker:
        file, limit, directory = args.worker
        print(json.dumps(pipeline_run(Path(file), int(limit), load_tokenizer(directory))))
        return
    from gptoss_jax.data.release_tokenizer import write_tokenizer
    from scripts.bench import conversations
    from scripts.bench.common import machine, write_results
    from scripts.make_gptoss_tokenizer import packaged_ranks

    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        write_tokenizer(packaged_ranks(), work / "tokenizer")
        tokenizer = load_tokenizer(work / "tokenizer")
        file = work / "rows.jsonl"
        conversations.write(file, args.rows, tokenizer)
        result = {"machine": machine(), "row_length": ROW_LENGTH, "batch_rows": BATCH_ROWS, "file_mb": file.stat().st_size / 1e6, "sizes": []}
        for part in PARTS:
            result["sizes"].append(measure(file, args.rows // part, work / "tokenizer"))
            print(json.dumps(result["sizes"][-1]), flush=True)
        if args.compare:
            result["comparison"] = compare(file, args.compare, tokenizer, work)
            print(json.dumps(result["comparison"]))
    print(write_results("data", result))


if __name__ == "__main__":
    main()
