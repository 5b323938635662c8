"""Random parameters in which every bias, sink and norm matters."""

import jax
import jax.numpy as jnp

from gptoss_jax.model import init_params


def lively_params(config, seed=0, dtype=jnp.float32):
    """Weights scaled so that activations, routing and SwiGLU clamping are all exercised."""
    params = init_params(config, jax.random.key(seed))
    out = {}
    for index, (name, value) in enumerate(sorted(params.items())):
        noise = jax.random.normal(jax.random.fold_in(jax.random.key(seed + 1), index), value.shape)
        if "layernorm" in name or name == "norm.weight":
            value = 1 + 0.2 * noise
        elif "sinks" in name:
            value = noise
        elif "router.weight" in name:
            value = 0.3 * noise
        elif name.endswith("bias"):
            value = 0.3 * noise
        elif "gate_up_proj" in name:
            value = 0.5 * noise
        elif "embed_tokens" in name:
            value = noise
        else:
            value = 0.15 * noise
        out[name] = value.astype(dtype)
    return out
