"""Research on quantization gradients: quantizers and a trainer for any of them, probes of a model, experiments, plots."""

from gptoss_jax.lab.experiment import load_experiment
from gptoss_jax.lab.grid import run_experiment
from gptoss_jax.lab.probes import (
    export_gap,
    probe_array,
    probe_descent,
    probe_gradients,
    probe_routing,
    probe_smoothed,
    probe_weights,
    read_rows,
    write_rows,
)
from gptoss_jax.lab.quantizer import FakeQuant, Quantizer, Unquantized
from gptoss_jax.lab.report import write_report

__all__ = [
    "FakeQuant", "Quantizer", "Unquantized", "export_gap", "load_experiment", "probe_array", "probe_descent", "probe_gradients", "probe_routing",
    "probe_smoothed", "probe_weights", "read_rows", "run_experiment", "write_report", "write_rows",
]  # fmt: skip
