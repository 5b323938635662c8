"""AdamW on the trained part of the flat parameter dict, cosine schedule, and the write-back into the masters.

    g <- g * min(1, clip / |g|)                       |g| over all trained parameters
    u  = adam(g)                                      moments in float32 whatever the master dtype: at b2 = 0.999 a bfloat16 second
                                                      moment (8 bits, steps of 0.4 %) would stop moving
    w <- w - lr(step) * (u + weight_decay * w)        in float32; then exact for float32 masters, stochastically rounded for bfloat16

The learning rate follows the step of the run; the bias correction of Adam counts only updates that were made (see `step.py` for skipped ones).
Frozen parameters are neither differentiated nor given moments.
"""

import fnmatch
import zlib
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, BFloat16, Float, Key

from gptoss_jax.errors import UsageError
from gptoss_jax.training.config import ScheduleConfig, TrainConfig

# names that weight decay never touches
NO_DECAY = ("*bias", "*norm.weight", "*.sinks", "*.router.*", "embed_tokens.weight", "lm_head.weight")


class Optimizer(NamedTuple):
    """`transform` turns float32 gradients into updates (before the learning rate); `trained` names what it covers."""

    transform: optax.GradientTransformation
    schedule: Callable[[Array], Array]
    trained: tuple[str, ...]
    seed: int


def split_frozen(names: Iterable[str], patterns: Iterable[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(trained, frozen) names, in order.

    Raises:
      UsageError: a pattern that matches nothing, or nothing left to train.
    """
    names = tuple(names)
    frozen = set()
    for pattern in patterns:
        hits = fnmatch.filter(names, pattern)
        if not hits:
            near = get_close_matches(pattern, names, n=3, cutoff=0.0)
            raise UsageError(f"freeze: pattern {pattern!r} matches no parameter; nearest are {', '.join(near)}")
        frozen.update(hits)
    if len(frozen) == len(names):
        raise UsageError(f"freeze: {list(patterns)} leaves nothing to train")
    return tuple(n for n in names if n not in frozen), tuple(n for n in names if n in frozen)


def decays(name: str) -> bool:
    """Whether weight decay applies to the parameter."""
    return not any(fnmatch.fnmatchcase(name, pattern) for pattern in NO_DECAY)


def cosine_schedule(config: ScheduleConfig, peak: float, steps: int) -> Callable[[Array], Array]:
    """Linear warm-up over `warmup_ratio` of the steps, then a cosine to `min_ratio`. No step has rate 0.

    With w warm-up steps, n in all and m = `min_ratio`:

        lr(s) = peak * (s + 1) / w                                        for s < w
        lr(s) = peak * (m + (1 - m) * (1 + cos(pi * (s - w) / (n - w))) / 2)   for s >= w
    """
    warmup = min(round(config.warmup_ratio * steps), steps - 1)

    def schedule(step):
        step = jnp.asarray(step, jnp.float32)
        progress = jnp.clip((step - warmup) / (steps - warmup), 0.0, 1.0)
        cosine = config.min_ratio + (1 - config.min_ratio) * 0.5 * (1 + jnp.cos(jnp.pi * progress))
        return jnp.float32(peak) * jnp.where(step < warmup, (step + 1) / max(warmup, 1), cosine)

    return schedule


def make_optimizer(config: TrainConfig, names: Iterable[str]) -> Optimizer:
    """The optimizer of a run over parameters of these names.

    Raises:
      UsageError: bad freeze patterns, or a config whose length in steps is not known yet (`TrainConfig.with_steps`).
    """
    if config.steps is None:
        raise UsageError("the number of steps is not known: set `steps`, or resolve `epochs` with TrainConfig.with_steps")
    settings = config.optimizer
    trained, _ = split_frozen(names, config.freeze)
    chain = [optax.scale_by_adam(b1=settings.b1, b2=settings.b2, eps=settings.eps)]
    if settings.weight_decay:
        chain.append(optax.add_decayed_weights(settings.weight_decay, mask={name: decays(name) for name in trained}))
    schedule = cosine_schedule(config.schedule, settings.learning_rate, config.steps)
    return Optimizer(optax.chain(optax.clip_by_global_norm(config.clip), *chain), schedule, trained, config.seed)


def init_moments(optimizer: Optimizer, params: Mapping[str, Array]) -> optax.OptState:
    """Zero moments in float32 for the trained parameters."""
    return optimizer.transform.init({name: jnp.zeros(params[name].shape, jnp.float32) for name in optimizer.trained})


def stochastic_round(x: Float[Array, "..."], key: Key[Array, ""]) -> BFloat16[Array, "..."]:
    """Rounds float32 to one of the two bfloat16 neighbours, up with probability equal to the position between them.

    E[result] = x: 16 uniform bits are added below the 16 bits that are kept, then cut. Values that bfloat16 holds stay. The bits depend on
    key and element alone, so every sharding gives the same result. Not for NaN (the cut could turn it into an infinity).
    """
    bits = lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    return lax.bitcast_convert_type(((bits + noise) >> 16).astype(jnp.uint16), jnp.bfloat16)


def rounding_key(seed: int, step: Array, name: str) -> Key[Array, ""]:
    """Key of the rounding of one parameter at one step; the same after a resume and on any mesh."""
    key = jax.random.fold_in(jax.random.key(seed), step)
    return jax.random.fold_in(key, zlib.crc32(name.encode()))


def apply_updates(
    optimizer: Optimizer, params: Mapping[str, Array], grads: Mapping[str, Array], opt_state: optax.OptState, step: Array
) -> tuple[dict[str, Array], optax.OptState]:
    """One optimizer step.

    Args:
      params: the trained masters, float32 or bfloat16.
      grads: of the same names, float32.
      step: of the run, int32; gives learning rate and rounding keys.
    """
    masters = {name: param.astype(jnp.float32) for name, param in params.items()}
    updates, opt_state = optimizer.transform.update(grads, opt_state, masters)
    rate = optimizer.schedule(step)
    new = {}
    for name, master in masters.items():
        moved = master - rate * updates[name]
        is_bf16 = params[name].dtype == jnp.bfloat16
        new[name] = stochastic_round(moved, rounding_key(optimizer.seed, step, name)) if is_bf16 else moved
    return new, opt_state
