"""The training step of experiments: any quantizer, any Optax chain, one device, small models.

    weights   quantizer(params, extra, key, step), once per step, outside the scan over layers
    loss      a function of compute weights, batch and context (a teacher, say); cross-entropy or distillation
    update    an Optax chain over parameters and the quantizer's own arrays together; tools that watch or hold back oscillation come after AdamW

With a straight-through `FakeQuant` it computes what `training.step` computes, to float32 rounding. The learning rate of a step is an argument of the
compiled program and not part of it, as are weights, batches and keys: arms that differ in schedule, length, seed or start share one compilation.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, ClassVar, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Int

from gptoss_jax.lab.quantizer import Quantizer
from gptoss_jax.model import GptOssConfig
from gptoss_jax.training.config import TrainConfig
from gptoss_jax.training.optimizer import cosine_schedule, decays, global_norm
from gptoss_jax.training.step import make_loss

# loss(compute weights, batch, context) -> (scalar, scalars to report)
Loss = Callable[[Mapping[str, Array], Any, Any], tuple[Array, dict[str, Array]]]


class Tool(Protocol):
    """Makes an Optax transformation that knows how weights are rounded: `round(params) -> params`. Frozen and hashable. One that acts on gradients
    comes before Adam, after clipping; one that acts on updates comes last."""

    acts_on: ClassVar[str]  # "gradients" or "updates"

    def transform(self, round: Callable[[Mapping[str, Array]], dict[str, Array]]) -> optax.GradientTransformationExtraArgs: ...


class LabState(NamedTuple):
    """Parameters and the quantizer's arrays in one dict, as the optimizer sees them."""

    step: Int[Array, ""]
    trained: dict[str, Array]
    opt_state: optax.OptState


class Trained(NamedTuple):
    """Where an arm ended. `history`: one dict of floats per step; `w_q`: the parameters as deployed."""

    params: dict[str, Array]
    extra: dict[str, Array]
    history: list[dict[str, float]]
    w_q: dict[str, Array]


def training_loss(config: GptOssConfig, train: TrainConfig) -> Loss:
    """What the settings minimise: cross-entropy per trained token; with `distill`, the mixture with the divergence from the teacher, whose parameters
    (of the same architecture) are the context. One object for settings that differ in what the program does not depend on."""
    return _training_loss(config, _compiled_settings(train))


@lru_cache(maxsize=32)
def _training_loss(config: GptOssConfig, train: TrainConfig) -> Loss:
    share = make_loss(config, train, None, teacher_config=config if train.distill else None)

    def loss(params, batch, context):
        weight = jnp.sum(batch.loss_weights_BT)
        tokens = jnp.maximum(jnp.sum(batch.segment_ids_BT > 0), 1)
        teacher = (context,) if train.distill else ()
        total, parts = share(params, {}, batch, jnp.where(weight > 0, weight, 1.0), tokens, *teacher)
        return total, {"loss": parts.nll, **parts.mixed}

    return loss


def scale_by_rate() -> optax.GradientTransformationExtraArgs:
    """update * -learning_rate, the learning rate handed to every update."""

    def update(updates, state, params=None, *, learning_rate, **_):
        return jax.tree.map(lambda u: -learning_rate * u, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def adamw(train: TrainConfig, first: Sequence[optax.GradientTransformation] = ()) -> list[optax.GradientTransformation]:
    """Clip, Adam and decay of the settings, as `training.optimizer` has them; the learning rate comes with every update. `first` sees clipped
    gradients."""
    settings = train.optimizer
    chain = [optax.clip_by_global_norm(train.clip), *first, optax.scale_by_adam(settings.b1, settings.b2, settings.eps)]
    if settings.weight_decay:
        chain.append(optax.add_decayed_weights(settings.weight_decay, mask=lambda params: {name: decays(name) for name in params}))
    return [*chain, scale_by_rate()]


def run(
    train: TrainConfig,
    quantizer: Quantizer,
    params: Mapping[str, Array],
    batches: Iterator[Any],
    *,
    loss: Loss,
    tools: tuple[Tool, ...] = (),
    context: Any = None,
    extra: Mapping[str, Array] | None = None,
    watch: Callable[[int, dict[str, Array], dict[str, Array]], None] = lambda step, params, extra: None,
) -> Trained:
    """Trains `train.steps` steps from `params` (which stay usable), in float32 masters.

    Args:
      train: of its settings those of the optimizer, the schedule, the loss and the computation are read.
      batches: gives at least `steps` batches.
      loss: as `training_loss(config, train)`.
      tools: made into Optax transformations around AdamW.
      context: handed to the loss, as an argument of the compiled program.
      extra: the quantizer's own arrays; by default those of its `init`.
      watch: called with (steps made, parameters, the quantizer's arrays) before every step and after the last; the arrays end with the call.
    """
    masters = {name: jnp.array(param, jnp.float32) for name, param in params.items()}
    extra = dict(quantizer.init(masters) if extra is None else extra)
    names = frozenset(extra)
    optimizer, step = _program(_compiled_settings(train), quantizer, tools, loss, names)
    trained = {**masters, **extra}
    state = LabState(jnp.int32(0), trained, optimizer.init(trained))
    key, history = jax.random.key(train.seed), []
    rates = np.asarray(jax.vmap(cosine_schedule(train.schedule, train.optimizer.learning_rate, train.steps))(jnp.arange(train.steps)))
    for number in range(train.steps):
        watch(number, *_split(state.trained, names))
        state, metrics = step(state, next(batches), rates[number], key, context)
        history.append(metrics)
    params, extra = _split(state.trained, names)
    watch(train.steps, params, extra)
    history = [{name: float(np.asarray(value)) for name, value in jax.device_get(metrics).items()} for metrics in history]
    return Trained(params, extra, history, quantizer.round(params, extra))


def _compiled_settings(train: TrainConfig) -> TrainConfig:
    """The settings without what is an argument of the program: two that differ in it share one."""
    optimizer = train.optimizer.model_copy(update={"learning_rate": 1.0})
    return TrainConfig(
        optimizer=optimizer, clip=train.clip, compute_dtype=train.compute_dtype, remat=train.remat, kernels=train.kernels, cast_at="step",
        router_aux_loss_coef=train.router_aux_loss_coef, distill=train.distill,
    )  # fmt: skip


@lru_cache(maxsize=32)
def _program(train: TrainConfig, quantizer: Quantizer, tools: tuple[Tool, ...], loss: Loss, names: frozenset[str]):
    """(optimizer, compiled step) of an arm."""

    def rounded(trained):
        params, extra = _split(trained, names)
        return {**quantizer.round(params, extra), **extra}

    before, after = ([tool.transform(rounded) for tool in tools if tool.acts_on == place] for place in ("gradients", "updates"))
    optimizer = optax.with_extra_args_support(optax.chain(*adamw(train, before), *after))
    def step(state: LabState, batch, rate, key, context):
        def objective(trained):
            with jax.named_scope("quantizer"):
                weights = quantizer(*_split(trained, names), jax.random.fold_in(key, state.step), state.step)
            return loss(weights, batch, context)

        (_, metrics), grads = jax.value_and_grad(objective, has_aux=True)(state.trained)
        with jax.named_scope("optimizer"):
            updates, opt_state = optimizer.update(grads, state.opt_state, state.trained, learning_rate=rate)
            trained = optax.apply_updates(state.trained, updates)
        metrics = {**metrics, "grad_norm": global_norm(grads), "lr": rate, **_reports(opt_state)}
        return LabState(state.step + 1, trained, opt_state), metrics

    return optimizer, jax.jit(step, donate_argnums=0)


def _split(trained: Mapping[str, Array], names: frozenset[str]) -> tuple[dict[str, Array], dict[str, Array]]:
    """(parameters, the quantizer's own arrays)."""
    return {n: x for n, x in trained.items() if n not in names}, {n: x for n, x in trained.items() if n in names}


def _reports(opt_state: Any) -> dict[str, Array]:
    """What the states of the tools have to say, `report() -> scalars`."""
    found = {}
    for state in opt_state:
        if hasattr(state, "report"):
            found |= state.report()
    return found
