"""`gptoss-jax lab`: research on quantization gradients."""

from gptoss_jax.cli.lab_probe import probe
from gptoss_jax.cli.lab_run import plot, run

COMMANDS = {"run": run, "plot": plot, "probe": probe}
