"""What quantization does to values, gradients and routing, measured on any checkpoint. Pure functions; results are lists of flat dicts.

    probe_weights    error, clipped, zero and tied weights, histograms of codes, scales and places in the cell, expert by expert
    probe_gradients  estimators against the gradient at w and at Q(w): cosine, size, bias, variance
    probe_descent    what the rounded loss does along an estimator's gradient, over what that gradient predicts
    probe_smoothed   estimators against the gradient of the smoothed rounded loss
    probe_routing    choices of experts, hidden states and predictions that rounding changes
    export_gap       loss of the fake-quantized model against the exported and loaded one; 0
    write_rows       rows as .parquet and .jsonl
"""

from gptoss_jax.lab.probes.deployed import export_gap
from gptoss_jax.lab.probes.descent import probe_descent, probe_smoothed
from gptoss_jax.lab.probes.gradients import probe_gradients
from gptoss_jax.lab.probes.routing import probe_routing
from gptoss_jax.lab.probes.rows import read_rows, write_rows
from gptoss_jax.lab.probes.weights import probe_array, probe_weights

__all__ = [
    "export_gap", "probe_array", "probe_descent", "probe_gradients", "probe_routing", "probe_smoothed", "probe_weights", "read_rows",
    "write_rows",
]  # fmt: skip
