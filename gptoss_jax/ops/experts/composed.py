"""The experts as a chain of operations over all routed rows."""

from gptoss_jax.ops.grouped_matmul import combine, dispatch, grouped_matmul
from gptoss_jax.ops.remat import product
from gptoss_jax.ops.swiglu import clamped_swiglu


def expert_mlp_composed(x_SD, weights_SA, w_gate_up_EUD, bias_up_EU, w_down_EDF, bias_down_ED, groups, limit, backend, activations=lambda x: x):
    """See `gptoss_jax.ops.experts.expert_mlp_counted`."""
    x_SD = activations(x_SD)
    h_PU = product(grouped_matmul(dispatch(x_SD, groups), w_gate_up_EUD, bias_up_EU, groups, backend))
    y_PD = product(grouped_matmul(activations(clamped_swiglu(h_PU, limit)), w_down_EDF, bias_down_ED, groups, backend))
    return combine(y_PD, weights_SA, groups)
