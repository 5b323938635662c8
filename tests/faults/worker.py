"""Processes to be killed: `python -m tests.faults.worker train DIR STEPS | export DIR | import SOURCE DIR`.

Each prints a line at every step (training), or for every directory (named 0, 1, 2, ...) that is complete, until it is killed; training ends.
"""

import itertools
import sys
from pathlib import Path

from gptoss_jax.checkpoint import export_hf
from gptoss_jax.cli import main as command
from gptoss_jax.formats import Mxfp4
from gptoss_jax.training.loop import Trainer
from gptoss_jax.training.run_dir import RunDir
from gptoss_jax.training.yaml_config import dump_config
from tests.training.support import CONFIG, Batches, make_params, make_train


def train(path: str | Path, steps: int, on_next=lambda index: None) -> Trainer:
    """A run with a checkpoint at every other step, from its beginning or from where it was killed."""
    settings = make_train(steps=steps, checkpoint_every=2)
    with RunDir(path, resume=True, overwrite=False) as run:
        trainer = Trainer(CONFIG, settings, run, Batches(on_next=on_next))
        if trainer.resume() is None:
            trainer.start(make_params())
        run.write_config(dump_config(settings))
        trainer.fit()
    return trainer


def say(what) -> None:
    print(what, flush=True)


def main(kind: str, *args: str) -> None:
    if kind == "train":
        train(args[0], int(args[1]), on_next=say)
        return
    params = make_params() if kind == "export" else None
    for number in itertools.count():
        target = str(Path(args[-1]) / str(number))
        if kind == "export":
            export_hf(target, CONFIG, params, format=Mxfp4())
            say(number)
        elif code := command(["import", args[0], target]):
            sys.exit(code)


if __name__ == "__main__":
    main(*sys.argv[1:])
