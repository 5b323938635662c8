"""`gptoss-jax` for the tests of many processes: the command line with batches that can be held back.

PAUSE_AT=3: print "paused" before batch 3 is made, and wait for ever. SLOW=0.1: seconds that every batch takes.
"""

import os
import sys
import time

from gptoss_jax.cli import main
from gptoss_jax.data import BatchStream


def hold_back(make=BatchStream.__next__):
    def slowed(stream):
        if stream.next_batch == int(os.environ.get("PAUSE_AT", -1)):
            print("paused", flush=True)
            time.sleep(3600)
        time.sleep(float(os.environ.get("SLOW", 0)))
        return make(stream)

    return slowed


if __name__ == "__main__":
    BatchStream.__next__ = hold_back()
    sys.exit(main(sys.argv[1:]))
