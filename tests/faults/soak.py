"""A long run of a tiny model: `python -m tests.faults.soak DIR [STEPS]`, 2000 steps with 40 checkpoints and evaluations unless told otherwise.

Says memory and open files at every tenth of the run and fails where memory at the end is more than 5 % above that of the third tenth (compilation
and the first saves are behind it), where files stay open, or where a second run with the same seed writes other metrics.
"""

import os
import sys
from pathlib import Path

from gptoss_jax.training.loop import Trainer
from gptoss_jax.training.run_dir import RunDir, read_metrics
from tests.training.support import CONFIG, Batches, make_params, make_train


def usage() -> tuple[int, int]:
    """(resident bytes, open files) of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir("/proc/self/fd"))


def run(path: Path, steps: int) -> list[tuple[int, int]]:
    """Usage at every tenth of a run."""
    seen = []

    def on_next(index):
        if index % (steps // 10) == steps // 10 - 1:
            seen.append(usage())
            print(f"{path.name}: step {index + 1}: {seen[-1][0] >> 20} MiB, {seen[-1][1]} files", flush=True)

    settings = make_train(steps=steps, checkpoint_every=max(1, steps // 40), eval_every=max(1, steps // 40))
    with RunDir(path, resume=False, overwrite=False) as directory:
        evaluation = Batches(seed=99)
        trainer = Trainer(CONFIG, settings, directory, Batches(on_next=on_next), eval_batches=lambda: [next(evaluation) for _ in range(2)])
        trainer.start(make_params())
        trainer.fit()
    return seen


def soak(root: Path, steps: int) -> None:
    first, second = run(root / "first", steps), run(root / "second", steps)
    for seen in (first[2:], second[2:]):
        assert max(memory for memory, _ in seen) <= 1.05 * seen[0][0], f"memory grew: {seen}"
        assert max(files for _, files in seen) <= seen[0][1] + 2, f"files stay open: {seen}"
    told = [[{k: v for k, v in line.items() if k != "tok_per_s"} for line in read_metrics(root / name)] for name in ("first", "second")]
    assert told[0] == told[1], "the same seed gave other metrics"
    print(f"{steps} steps twice: flat, equal metrics ({len(told[0])} lines)")


if __name__ == "__main__":
    soak(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 2000)
