"""AdamW on the trained part of the flat parameter dict, cosine schedule, and the write-back into the masters.

    g <- g * min(1, clip / |g|)                       |g| over all trained parameters, in float32 whatever the dtype of the gradients
    u  = adam(g)                                      moments stored as `optimizer.first_moment` and `.second_moment` say (see `moments.py`)
    w <- w - lr(step) * (u + weight_decay * w)        in float32; then exact for float32 masters, rounded for bfloat16 (see `rounding.py`)

The learning rate follows the step of the run; the bias correction of Adam counts only updates that were made: when the gradient norm (or the loss)
is not finite, masters and optimizer state keep their values. Frozen parameters are neither differentiated nor given moments.

The whole update is one pass over the gradients for the norm and, per parameter, one elementwise pass for each array that is written, in the memory of
the old one: the compiled program holds no copy of a master or moment. CPU, 46 M float32 parameters on two cores: 0.8 ns per parameter, 2.6 ns when
Optax's transformations were chained as they come (`scripts/bench/optimizer.py`, LOG.md).
"""

import fnmatch
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from typing import NamedTuple

import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Bool, Float

from gptoss_jax.errors import UsageError
from gptoss_jax.formats.noise import random_bits
from gptoss_jax.model.lora import is_adapter
from gptoss_jax.training.config import ScheduleConfig, TrainConfig
from gptoss_jax.training.moments import scale_by_adam
from gptoss_jax.training.rounding import Residual, float_bits, high_part, join, low_part, rounding_key, stochastic_round

# names that weight decay never touches
NO_DECAY = ("*bias", "*norm.weight", "*.sinks", "*.router.*", "embed_tokens.weight", "lm_head.weight")


class Optimizer(NamedTuple):
    """`transform` turns clipped float32 gradients into updates (before the learning rate); `trained` names what it covers."""

    transform: optax.GradientTransformationExtraArgs
    clip: float
    schedule: Callable[[Array], Array]
    trained: tuple[str, ...]
    seed: int
    residual: Residual | None


class Update(NamedTuple):
    """New masters and optimizer state, the norm of the gradient before clipping, and whether the update was made."""

    params: dict[str, Array]
    opt_state: optax.OptState
    grad_norm: Float[Array, ""]
    made: Bool[Array, ""]


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


def trainable(config: TrainConfig, names: Iterable[str]) -> tuple[str, ...]:
    """Names that a run may train, before `freeze`."""
    return tuple(name for name in names if config.lora is None or is_adapter(name))


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
    """The optimizer of a run over parameters of these names; with `lora` over the adapters among them.

    Raises:
      UsageError: bad freeze patterns, or a config whose length in steps is not known yet (`TrainConfig.with_steps`).
    """
    if config.steps is None:
        raise UsageError("the number of steps is not known: set `steps`, or resolve `epochs` with TrainConfig.with_steps")
    settings = config.optimizer
    trained, _ = split_frozen(trainable(config, names), config.freeze)

    def bits(name, moment, count, shape):
        return random_bits(rounding_key(config.seed, count, f"{name}.{moment}"), shape)

    chain = [scale_by_adam(settings.b1, settings.b2, settings.eps, settings.first_moment, settings.second_moment, bits)]
    if settings.weight_decay:
        chain.append(optax.add_decayed_weights(settings.weight_decay, mask={name: decays(name) for name in trained}))
    schedule = cosine_schedule(config.schedule, settings.learning_rate, config.steps)
    return Optimizer(optax.chain(*chain), config.clip, schedule, trained, config.seed, settings.master_residual)


def init_moments(optimizer: Optimizer, params: Mapping[str, Array]) -> optax.OptState:
    """Zero moments, and zero residuals as the last entry of the state if there are any, for the trained parameters."""
    state = optimizer.transform.init({name: jnp.zeros(params[name].shape, jnp.float32) for name in optimizer.trained})
    if optimizer.residual is None:
        return state
    return (*state, {name: jnp.zeros(params[name].shape, optimizer.residual) for name in optimizer.trained})


def global_norm(grads: Mapping[str, Array]) -> Float[Array, ""]:
    """Norm over all gradients, squared and summed in float32."""
    return optax.tree.norm({name: grad.astype(jnp.float32) for name, grad in grads.items()})


def apply_updates(
    optimizer: Optimizer,
    params: Mapping[str, Array],
    grads: Mapping[str, Array],
    opt_state: optax.OptState,
    step: Array,
    finite: Bool[Array, ""] | bool = True,
) -> Update:
    """One optimizer step.

    Args:
      params: the trained masters, float32 or bfloat16.
      grads: of the same names, float32 or bfloat16 (converted as they are read, which is exact).
      step: of the run, int32; gives learning rate and rounding keys.
      finite: of what else the step depends on; the update is left out if it is False, or the norm is not finite.
    """
    norm = global_norm(grads)
    finite = jnp.isfinite(norm) & finite
    shrink = jnp.minimum(1.0, optimizer.clip / norm)
    clipped = {name: grad.astype(jnp.float32) * shrink for name, grad in grads.items()}
    *opt_state, residuals = opt_state if optimizer.residual else (*opt_state, None)
    masters = {name: join(param, residuals[name]) if residuals else param.astype(jnp.float32) for name, param in params.items()}
    updates, opt_state = optimizer.transform.update(clipped, tuple(opt_state), masters, finite=finite)
    rate = optimizer.schedule(step)
    new, left = {}, {}
    for name, master in masters.items():
        moved, key = master - rate * updates[name], rounding_key(optimizer.seed, step, name)
        if residuals:
            bits = float_bits(moved, optimizer.residual, key)
            # the residual first, the master from it: computed side by side each needs a copy of the other's old value, so it is a copy of the
            # old residual alone
            left[name] = lax.optimization_barrier(jnp.where(finite, low_part(bits, optimizer.residual), residuals[name]))
            moved = high_part(bits, left[name])
        elif params[name].dtype == jnp.bfloat16:
            moved = stochastic_round(moved, key)
        new[name] = jnp.where(finite, moved, params[name])
    return Update(new, (*opt_state, left) if residuals else opt_state, norm, finite)
