"""`gptoss-jax lab`: research on quantization gradients."""

from gptoss_jax.cli.lab_probe import probe

COMMANDS = {"probe": probe}
