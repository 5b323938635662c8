"""A command that many processes run together: joins them, and ends all of them when one fails."""

import os
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from gptoss_jax.errors import GptOssError, RunError, UsageError
from gptoss_jax.secrets import redacted

# how a collective fails whose other side is gone
GONE = re.compile(r"Gloo \S+ failed|Connection (reset|closed)|Socket closed|NCCL .*(abort|remote)", re.IGNORECASE)


@contextmanager
def all_processes(command: str) -> Iterator[None]:
    """Joins the other processes of the launch, if there are any, before the block and parts from them after it.

    When the block fails on one process, that process says why in one line and ends with its exit code; the others, which wait for it, are ended by
    JAX. An error that all have at the same place is said once.
    """
    from gptoss_jax.sharding import distributed

    if distributed.initialize() is None:
        yield
        return
    try:
        yield
        code = 0
    except BaseException as error:
        code = _report(command, error)
    sys.stdout.flush()
    distributed.leave()
    if code:
        # not sys.exit: what JAX does at exit would wait for processes that never come
        os._exit(code)


def one_process(command: str, instead: str) -> None:
    """Refuses to run as one of several processes.

    Raises:
      UsageError: a launcher started this process among others.
    """
    from gptoss_jax.sharding.cluster import find_launch

    launch = find_launch(os.environ)
    if launch is not None:
        raise UsageError(f"{command} runs in a single process (it was started by {launch.how}); with many, run {instead}")


def _report(command: str, error: BaseException) -> int:
    """Says what went wrong, and returns the exit code."""
    import jax

    where = f"gptoss-jax {command}: process {jax.process_index()}: "
    if isinstance(error, GptOssError):
        if not error.everywhere or jax.process_index() == 0:
            print(redacted(f"{where}{error}"), file=sys.stderr, flush=True)
        return error.exit_code
    first_line = str(error).partition("\n")[0]
    if isinstance(error, Exception) and GONE.search(first_line):
        print(f"{where}another process is gone ({first_line[:200]})", file=sys.stderr, flush=True)
    else:
        print(f"{where}{''.join(traceback.format_exception(error))}", file=sys.stderr, flush=True)
    return 130 if isinstance(error, KeyboardInterrupt) else RunError.exit_code
