"""Time and memory of one optimizer update on 46 M parameters, beside a memory copy of the same run.

    python scripts/bench/optimizer.py master_dtype=bfloat16 optimizer.first_moment=int8 optimizer.second_moment=int8

Prints nanoseconds and temporaries per parameter and the time that a copy of the same bytes would take: with float32 AdamW 4 bytes per parameter are
read for the norm, then 16 read and 12 written.
"""

import math
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from gptoss_jax.training.optimizer import apply_updates, init_moments, make_optimizer
from gptoss_jax.training.yaml_config import load_config

SHAPES = {
    "experts.gate_up_proj": (2, 8, 1152, 1152),
    "experts.down_proj": (2, 8, 1152, 576),
    "q_proj.weight": (2, 2048, 1152),
    "embed_tokens.weight": (8192, 1152),
    "norm.weight": (2, 1152),
}
REPEATS = 8


def fastest(call) -> float:
    """Seconds of the fastest of several calls; the first, which touches the memory, is not counted."""
    call()
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def main(overrides: list[str]) -> None:
    train = load_config(None, ["steps=100", *overrides])
    optimizer = make_optimizer(train, SHAPES)
    rng = np.random.default_rng(0)
    draw = lambda scale: {n: jnp.asarray(rng.standard_normal(s, np.float32) * scale, train.master_dtype) for n, s in SHAPES.items()}
    params, grads = draw(1.0), draw(1e-3)
    state = init_moments(optimizer, params)
    update = jax.jit(lambda p, s, g, step: apply_updates(optimizer, p, g, s, step)[:2], donate_argnums=(0, 1))
    update = update.lower(params, state, grads, jnp.int32(0)).compile()

    def call():
        nonlocal params, state
        params, state = jax.block_until_ready(update(params, state, grads, jnp.int32(0)))

    num = sum(map(math.prod, SHAPES.values()))
    memory = update.memory_analysis()
    source, target = np.ones(num, np.float32), np.empty(num, np.float32)
    copy = 8 * num / fastest(lambda: np.copyto(target, source))
    moved = memory.argument_size_in_bytes + memory.output_size_in_bytes + sum(g.nbytes for g in grads.values())
    bound = f"{moved / num:.1f} B per parameter at the copy's {copy / 1e9:.1f} GB/s: {moved / num / copy * 1e9:.2f} ns"
    print(f"{num / 1e6:.0f} M parameters, {memory.temp_size_in_bytes / num:.2f} B of temporaries each")
    print(f"{fastest(call) / num * 1e9:.2f} ns per parameter; {bound}")


if __name__ == "__main__":
    main(sys.argv[1:])
