"""Which launch a process belongs to, from the variables that each launcher sets."""

import pytest

from gptoss_jax.errors import UsageError
from gptoss_jax.sharding.cluster import Launch, find_launch

TORCHRUN = {"MASTER_ADDR": "node-0", "MASTER_PORT": "29500", "WORLD_SIZE": "16", "RANK": "9", "LOCAL_RANK": "1"}
SLURM = {"SLURM_JOB_ID": "77", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_NTASKS": "16", "SLURM_PROCID": "9", "SLURM_LOCALID": "1"}
OMPI = {"OMPI_COMM_WORLD_SIZE": "16", "OMPI_COMM_WORLD_RANK": "9", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}


@pytest.mark.parametrize(
    "environ, expected",
    [
        ({}, None),
        (TORCHRUN, Launch("torchrun", "node-0:29500", 16, 9, 1)),
        # the agent of torchrun listens on MASTER_PORT itself
        ({**TORCHRUN, "TORCHELASTIC_USE_AGENT_STORE": "True"}, Launch("torchrun", "node-0:29501", 16, 9, 1)),
        ({**TORCHRUN, "WORLD_SIZE": "1", "RANK": "0"}, None),
        ({"COORDINATOR_ADDRESS": "a:1", "NUM_PROCESSES": "2", "PROCESS_ID": "1"}, Launch("COORDINATOR_ADDRESS", "a:1", 2, 1)),
        ({"COORDINATOR_ADDRESS": "a", "COORDINATOR_PORT": "5", "NUM_PROCESSES": "2", "PROCESS_ID": "0"}, Launch("COORDINATOR_ADDRESS", "a:5", 2, 0)),
        ({"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}, Launch("COORDINATOR_ADDRESS", "a:1", 2, 1)),
        ({"COORDINATOR_ADDRESS": "a:1", **OMPI}, Launch("COORDINATOR_ADDRESS", "a:1", 16, 9, 1)),
        ({"JAX_COORDINATOR_ADDRESS": "a:1", **SLURM}, Launch("COORDINATOR_ADDRESS", "a:1", 16, 9, 1)),
        (SLURM, Launch("Slurm")),
        ({**SLURM, "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, None),
        # a batch script is no step of srun
        ({k: v for k, v in SLURM.items() if k != "SLURM_STEP_NODELIST"}, None),
        ({**OMPI, "OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:5"}, Launch("Open MPI")),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, None),
        # a cluster script may set MASTER_ADDR for others
        ({**SLURM, "MASTER_ADDR": "node-0"}, Launch("Slurm")),
    ],
)
def test_launch_is_read_from_the_variables_of_the_launcher(environ, expected):
    assert find_launch(environ) == expected


@pytest.mark.parametrize(
    "environ, message",
    [
        ({k: v for k, v in TORCHRUN.items() if k != "RANK"}, "did not set RANK"),
        ({**TORCHRUN, "MASTER_PORT": "http"}, "MASTER_PORT=http is no number"),
        ({**TORCHRUN, "RANK": "16"}, "RANK=16 is not below WORLD_SIZE=16"),
        ({"COORDINATOR_ADDRESS": "a"}, "has no port"),
        ({"COORDINATOR_ADDRESS": "a:1"}, "not NUM_PROCESSES and PROCESS_ID"),
        (OMPI, "set COORDINATOR_ADDRESS=HOST:PORT"),
    ],
)
def test_launch_described_in_part_is_refused(environ, message):
    with pytest.raises(UsageError, match=message):
        find_launch(environ)
