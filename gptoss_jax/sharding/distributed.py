"""Many processes as one run: joining, leaving, and the few things that they decide together.

Every process runs the same program over arrays that span all devices. What touches the world outside (lines, files, locks) the first does alone, and
all hear how it went; what makes them go on or stop is the same on all, or they would wait for each other for ever.
"""

import json
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gptoss_jax import errors
from gptoss_jax.errors import RunError, UsageError
from gptoss_jax.sharding.cluster import Launch, find_launch

# seconds until the others must be there, and until a silent process is given up; JAX's defaults
INIT_SECONDS, HEARTBEAT_SECONDS = "GPTOSS_JAX_INIT_SECONDS", "GPTOSS_JAX_HEARTBEAT_SECONDS"
SHUTDOWN_SECONDS = 10
MESSAGE_BYTES = 8192
# of one process, in one collective of `gather`: what devices and host hold beyond the result is this times the number of processes
GATHER_BYTES = 16 << 20


def is_first() -> bool:
    """Whether this process is the one that prints and writes."""
    return jax.process_index() == 0


def initialize() -> Launch | None:
    """Joins the other processes of this launch, before anything touches devices. None, and nothing done, for a single process.

    Raises:
      UsageError: the launch is described in part.
      RunError: process 0 cannot open its port. (A process that waits in vain for the others ends with exit code 1: XLA would abort it.)
    """
    launch = find_launch(os.environ)
    if launch is None:
        return None
    seconds = _seconds(INIT_SECONDS, 300)
    where = f" at {launch.coordinator}" if launch.coordinator else ""
    me = f"process {launch.process_id} of {launch.num_processes}" if launch.coordinator else "this process"
    given = {}
    if launch.coordinator:
        given = dict(
            coordinator_address=launch.coordinator, num_processes=launch.num_processes, process_id=launch.process_id,
            local_device_ids=launch.local_device, cluster_detection_method="deactivate",
        )  # fmt: skip
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    with _deadline(seconds, f"{me} waited {seconds} s for the others{where} ({launch.how}): are all started, and is the port reachable?"):
        try:
            jax.distributed.initialize(
                **given, initialization_timeout=2 * seconds, heartbeat_timeout_seconds=_seconds(HEARTBEAT_SECONDS, 100),
                shutdown_timeout_seconds=SHUTDOWN_SECONDS,
            )  # fmt: skip
        except (RuntimeError, ValueError, OSError) as error:
            raise RunError(f"{me} could not join the others{where} ({launch.how}): {str(error).splitlines()[0]}") from error
        # gloo connects at the first collective and waits 30 s for the others: now they are near, after compiling they may not be
        barrier("joined")
    return launch


def leave() -> None:
    """Parts from the others, if they are there within seconds; a process that still waits for this one is ended by JAX."""
    leaving = threading.Thread(target=jax.distributed.shutdown, daemon=True)
    leaving.start()
    leaving.join(SHUTDOWN_SECONDS)


def _seconds(name: str, default: int) -> int:
    value = os.environ.get(name, str(default))
    if not value.isdecimal() or not int(value):
        raise UsageError(f"{name}={value} is no number of seconds")
    return int(value)


@contextmanager
def _deadline(seconds: int, message: str) -> Iterator[None]:
    """Ends the process with one line and exit code 1 when the block takes longer: XLA itself ends it with a stack trace and SIGABRT."""

    def end():
        os.write(2, f"gptoss-jax: {message}\n".encode())
        os._exit(RunError.exit_code)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


# ---- together ---------------------------------------------------------------------------------------------------------------


def barrier(name: str) -> None:
    """Returns when all processes are here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def on_first(function: Callable[[], Any]) -> Any:
    """Result (plain JSON, some kilobytes) of `function`, run by the first process alone. What it raises is raised on all, in the end."""
    if jax.process_count() == 1:
        return function()
    result, error = None, None
    if is_first():
        try:
            result = function()
        except Exception as caught:
            error = caught
    said = {"result": result} if error is None else {"error": _error_name(error), "message": str(error)[: MESSAGE_BYTES // 8]}
    said = _broadcast(said)
    if "error" not in said:
        return said["result"]
    if error is None:
        error = getattr(errors, said["error"])(said["message"])
    error.everywhere = True
    raise error


def _error_name(error: Exception) -> str:
    return next((cls.__name__ for cls in type(error).__mro__ if hasattr(errors, cls.__name__)), RunError.__name__)


def _broadcast(value: Any) -> Any:
    """What the first process gives, on all."""
    content = json.dumps(value).encode()
    if len(content) > MESSAGE_BYTES:
        raise ValueError(f"{len(content)} bytes do not fit into a message of {MESSAGE_BYTES}")
    buffer = np.frombuffer(content.ljust(MESSAGE_BYTES), np.uint8)
    return json.loads(np.asarray(multihost_utils.broadcast_one_to_all(buffer), np.uint8).tobytes())


def gather(mine: np.ndarray) -> np.ndarray:
    """The arrays [n] of all processes one after the other, n being different on each; the same on all, which must all call this."""
    if jax.process_count() == 1:
        return mine
    local = np.ascontiguousarray(mine).view(np.uint8)
    counts = multihost_utils.process_allgather(np.array(divmod(local.size, GATHER_BYTES), np.int32)).astype(np.int64)
    sizes = counts @ [GATHER_BYTES, 1]
    begins = np.cumsum(sizes) - sizes
    out = np.empty(sizes.sum(), np.uint8)
    # few different sizes, because each is compiled
    step = min(GATHER_BYTES, max(4096, 1 << int(sizes.max()).bit_length()))
    for start in range(0, sizes.max(), step):
        piece = local[start : start + step]
        for row, begin, size in zip(multihost_utils.process_allgather(np.pad(piece, (0, step - piece.size))), begins, sizes):
            stop = min(size, start + step)
            if start < stop:
                out[begin + start : begin + stop] = row[: stop - start]
    return out.view(mine.dtype)


def on_each(function: Callable[[], Any]) -> list[Any]:
    """What `function` gives (plain JSON) on every process, in their order. What it raises on one is raised on all, in the end."""
    if jax.process_count() == 1:
        return [function()]
    error = None
    try:
        said = {"result": function()}
    except Exception as caught:
        error, said = caught, {"error": _error_name(caught), "message": str(caught)}
    content = np.frombuffer(json.dumps(said).encode() + b"\n", np.uint8)
    found = [json.loads(line) for line in gather(content).tobytes().splitlines()]
    failed = [number for number, one in enumerate(found) if "error" in one]
    if not failed:
        return [one["result"] for one in found]
    first = failed[0]
    if error is None or first != jax.process_index():
        where = f"process {first}: " if first else ""
        error = getattr(errors, found[first]["error"])(where + found[first]["message"])
    error.everywhere = True
    raise error


def check_same(what: str, digest: str) -> None:
    """Refuses to go on where processes have read different things.

    Args:
      digest: hexadecimal, of one length on all processes.

    Raises:
      UsageError: on all processes, naming those that differ from the first.
    """
    if jax.process_count() == 1:
        return
    found = multihost_utils.process_allgather(np.frombuffer(bytes.fromhex(digest), np.uint8))
    differ = np.flatnonzero((found != found[0]).any(axis=1))
    if differ.size:
        error = UsageError(f"{what} differ between processes: {', '.join(map(str, differ))} do not have those of process 0")
        error.everywhere = True
        raise error


class AgreedMaximum:
    """The largest of the numbers that the processes give, the same on all, for decisions that all must take at the same step.

    With several processes an answer is that of the call before: it is fetched when the next is on its way, so no device waits for a host. Its
    price is one all-reduce of 4 bytes a call.
    """

    def __init__(self):
        self._pending = None
        if jax.process_count() > 1:
            mesh = Mesh(np.array(jax.devices()), ("devices",))
            self._spread = NamedSharding(mesh, PartitionSpec("devices"))
            self._reduce = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))

    def __call__(self, value: int) -> int:
        if jax.process_count() == 1:
            return value
        mine = jax.make_array_from_callback((jax.device_count(),), self._spread, lambda index: np.array([value], np.int32))
        before, self._pending = self._pending, self._reduce(mine)
        return 0 if before is None else int(before)

