"""What two processes decide together: agreement, what the first does alone, and the refusal of unequal data."""

from tests.distributed.support import Processes

CODE = """
import sys
from gptoss_jax.errors import CorruptError, RunError, UsageError
from gptoss_jax.sharding.distributed import AgreedMaximum, check_same, initialize, is_first, on_first
launch = initialize()
me = launch.process_id
def say(*words): sys.stdout.write(" ".join(map(str, (f"[{me}]", *words))) + "\\n")
def fail(error): raise error
agreed = AgreedMaximum()
say("agreed", [agreed(15 if me == 1 and i == 1 else 0) for i in range(4)])
say("first", on_first(lambda: {"process": me, "step": None}))
for error in (CorruptError("bad file"), OSError("disk full")):
    try:
        on_first(lambda: fail(error))
    except Exception as caught:
        say(type(caught).__name__, caught, caught.everywhere)
check_same("rows", "ab12")
try:
    check_same("the data", "aa00" if is_first() else "aa01")
except UsageError as caught:
    say(caught, caught.everywhere)
"""


def test_two_processes_agree():
    with Processes(2, ["-c", CODE]) as run:
        assert run.end() == 0, run.text
    for me, kind in ((0, "OSError"), (1, "RunError")):
        said = [line.strip() for line in run.lines if line.startswith(f"[{me}]")]
        assert said == [
            f"[{me}] agreed [0, 0, 15, 0]",
            f"[{me}] first {{'process': 0, 'step': None}}",
            f"[{me}] CorruptError bad file True",
            f"[{me}] {kind} disk full True",
            f"[{me}] the data differ between processes: 1 do not have those of process 0 True",
        ], run.text
