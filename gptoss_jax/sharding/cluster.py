"""Who takes part in a run of many processes, read from the environment that a launcher made.

    COORDINATOR_ADDRESS, NUM_PROCESSES, PROCESS_ID           JAX's own, also with the prefix JAX_; COORDINATOR_PORT where the address has none
    MASTER_ADDR, MASTER_PORT, WORLD_SIZE, RANK, LOCAL_RANK   torchrun and its relatives, `scripts/launch/local.py`
    SLURM_*                                                  srun: JAX reads them, one process per GPU
    OMPI_*                                                   mpirun of Open MPI up to 4; 5 has no coordinator in it: give COORDINATOR_ADDRESS too
    Kubernetes                                               an Indexed Job, where the package `kubernetes` is installed; else the first line

The first that is there decides. A launcher that starts a single process is no launcher.
"""

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass

from gptoss_jax.errors import UsageError

# what JAX demands of a Slurm step; a batch script outside srun lacks the node list
SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
# (number of processes, number of this one, its number on the host) that complete a given coordinator
COUNTS = (
    ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID", "LOCAL_RANK"),
    ("NUM_PROCESSES", "PROCESS_ID", "LOCAL_RANK"),
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID"),
)


@dataclass(frozen=True)
class Launch:
    """How this process finds the others. Without `coordinator` JAX detects everything itself.

    Attributes:
      how: the launcher, for messages.
      coordinator: "host:port" of process 0.
      local_device: the one accelerator of the host that this process uses; None is all of them (or those in JAX_LOCAL_DEVICE_IDS).
    """

    how: str
    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    local_device: int | None = None


def find_launch(environ: Mapping[str, str]) -> Launch | None:
    """The launch that this process belongs to, None for a single process.

    Raises:
      UsageError: a launch that is described in part, or with numbers that make no sense.
    """
    address = environ.get("JAX_COORDINATOR_ADDRESS") or environ.get("COORDINATOR_ADDRESS")
    if address:
        return _explicit(environ, address)
    if "MASTER_ADDR" in environ and "WORLD_SIZE" in environ:
        return _torchrun(environ)
    if all(name in environ for name in SLURM) and _number(environ, "SLURM_NTASKS") > 1:
        return Launch("Slurm")
    if "OMPI_COMM_WORLD_SIZE" in environ and _number(environ, "OMPI_COMM_WORLD_SIZE") > 1:
        if "OMPI_MCA_orte_hnp_uri" not in environ:
            raise UsageError("started by an MPI that names no coordinator: set COORDINATOR_ADDRESS=HOST:PORT, HOST being that of rank 0")
        return Launch("Open MPI")
    if "KUBERNETES_SERVICE_HOST" in environ and "JOB_COMPLETION_INDEX" in environ and importlib.util.find_spec("kubernetes"):
        return Launch("Kubernetes")
    return None


def _explicit(environ: Mapping[str, str], address: str) -> Launch | None:
    port = environ.get("COORDINATOR_PORT")
    coordinator = address if ":" in address or port is None else f"{address}:{port}"
    if ":" not in coordinator:
        raise UsageError(f"COORDINATOR_ADDRESS={address} has no port, as in HOST:1234; COORDINATOR_PORT serves as well")
    for count, rank, local in COUNTS:
        if count in environ:
            return _launch("COORDINATOR_ADDRESS", environ, coordinator, count, rank, local)
    raise UsageError(f"COORDINATOR_ADDRESS={address} is set, but not NUM_PROCESSES and PROCESS_ID")


def _torchrun(environ: Mapping[str, str]) -> Launch | None:
    port = _number(environ, "MASTER_PORT")
    # torchrun's agent keeps a store of its own on MASTER_PORT
    port += environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return _launch("torchrun", environ, f"{environ['MASTER_ADDR']}:{port}", "WORLD_SIZE", "RANK", "LOCAL_RANK")


def _launch(how: str, environ: Mapping[str, str], coordinator: str, count: str, rank: str, local: str) -> Launch | None:
    num_processes, process_id = _number(environ, count), _number(environ, rank)
    if process_id >= num_processes:
        raise UsageError(f"{rank}={process_id} is not below {count}={num_processes}")
    local_device = _number(environ, local) if local in environ else None
    return Launch(how, coordinator, num_processes, process_id, local_device) if num_processes > 1 else None


def _number(environ: Mapping[str, str], name: str) -> int:
    value = environ.get(name)
    if value is None:
        raise UsageError(f"the launcher did not set {name}")
    if not value.isdecimal():
        raise UsageError(f"{name}={value} is no number")
    return int(value)
