"""Research on quantization gradients: probes of a model, experiments, plots."""

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

__all__ = [
    "export_gap", "probe_array", "probe_descent", "probe_gradients", "probe_routing", "probe_smoothed", "probe_weights", "read_rows", "write_rows",
]  # fmt: skip
