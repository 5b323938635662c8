"""A run for the signal tests: `python -m tests.training.run_forever DIR [slow]`.

Prints a line after the first step; slow: the next takes a minute.
"""

import sys
import time

from gptoss_jax.errors import GptOssError
from gptoss_jax.training.loop import Trainer
from gptoss_jax.training.run_dir import RunDir
from tests.training.support import CONFIG, Batches, make_params, make_train


def on_next(index):
    if index == 1:
        print("training", flush=True)
        time.sleep(60 if "slow" in sys.argv else 0)
    time.sleep(0.05 if index else 0)


def main(path: str) -> int:
    train = make_train(steps=100_000)
    try:
        with RunDir(path, resume=True, overwrite=False) as run:
            trainer = Trainer(CONFIG, train, run, Batches(on_next=on_next))
            if trainer.resume() is None:
                trainer.start(make_params())
            trainer.fit()
    except GptOssError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
