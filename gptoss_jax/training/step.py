"""One training step as a pure function: gradients of the global batch, clipped AdamW, non-finite updates left out.

    loss = sum over all microbatches of  sum(weight * nll)  /  sum of weights of the whole global batch

so neither the number of microbatches, nor packing, nor padding, nor the mesh changes loss or gradients beyond rounding. Gradients of microbatches
are summed in float32. float32 masters are differentiated directly; the cast to the compute dtype happens inside the forward pass, and for the
expert projections it is `expert_quant` that makes it: a plain cast in SFT (None), fake quantization in QAT. Nothing else differs.

The rows of a batch are dealt to microbatches in turn (row r to microbatch r mod A), so that a batch sharded over rows stays where it is.

Legend: A microbatches  B rows  T tokens of a row  C blocks  Q block size
"""

from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import Mesh, Sharding
from jaxtyping import Array, Float, Int

from gptoss_jax.formats import mxfp4
from gptoss_jax.model import GptOssConfig, RouterStats, abstract_params, forward, load_balancing_loss
from gptoss_jax.model.context import Distribute
from gptoss_jax.model.lora import abstract_adapters, attach, init_adapters, is_adapter
from gptoss_jax.ops.cross_entropy import cross_entropy_sum
from gptoss_jax.ops.distillation import Side, distillation_sums
from gptoss_jax.precision import wide
from gptoss_jax.quant import ExpertQuant, activation_rounding, plain_cast, with_activations
from gptoss_jax.quant.expert_quant import PROJECTIONS
from gptoss_jax.sharding import DEFAULT_RULES, ShardingRules, Transport, batch_sharding, distribution, param_shardings, replicated
from gptoss_jax.training.config import DistillConfig, TrainConfig
from gptoss_jax.training.optimizer import Optimizer, apply_updates, global_norm, init_moments, make_optimizer

Params = Mapping[str, Array]
Metrics = dict[str, Any]  # scalars, and under "router" the RouterStats of all layers


class TrainState(NamedTuple):
    """All that a step changes. `skipped` counts the updates left out because loss or gradient was not finite."""

    step: Int[Array, ""]
    params: dict[str, Array]
    opt_state: optax.OptState
    skipped: Int[Array, ""]
    skipped_in_row: Int[Array, ""]


class Shardings(NamedTuple):
    """Where things lie on a mesh: each parameter, a batch [B, T], and scalars; and how layers run there (None: as the compiler likes)."""

    params: Mapping[str, Sharding]
    batch: Sharding
    scalar: Sharding
    distribute: Distribute | None = None

    @classmethod
    def on(cls, config: GptOssConfig, mesh: Mesh, rules: ShardingRules = DEFAULT_RULES, transport: Transport = "auto") -> "Shardings":
        """What the rules make of this model and mesh."""
        return cls(param_shardings(config, mesh, rules), batch_sharding(mesh, rules), replicated(mesh), distribution(mesh, rules, transport))


class Teacher(NamedTuple):
    """The model that training distils from: its architecture, compute weights and, on a mesh, where they lie."""

    config: GptOssConfig
    params: Params
    shardings: Mapping[str, Sharding] | None = None


class Captured(NamedTuple):
    """What the training program consumed on one batch: compute weights and codes by parameter name, shaped like the parameters."""

    loss: Float[Array, ""]
    grad_norm: Float[Array, ""]
    weights: dict[str, Array]
    codes: dict[str, Any]


def abstract_base(config: GptOssConfig, train: TrainConfig) -> dict[str, Any]:
    """Shapes of the parameters that the model has of its own, as a run holds them: masters, or under `lora` the frozen base, whose experts may be
    packed codes."""
    if train.lora is None:
        return abstract_params(config, jnp.dtype(train.master_dtype))
    packed = train.lora.base == "mxfp4"
    base = abstract_params(config, jnp.dtype("bfloat16" if packed else train.lora.base))

    def codes(leaf):
        *lead, width = leaf.shape
        return mxfp4.Codes(*(jax.ShapeDtypeStruct((*lead, width // per_byte), jnp.uint8) for per_byte in (2, mxfp4.BLOCK_SIZE)))

    return {name: codes(leaf) if packed and name.endswith(PROJECTIONS) else leaf for name, leaf in base.items()}


def param_names(config: GptOssConfig, train: TrainConfig) -> list[str]:
    """Of all parameters in the state of a run: the model's, then adapters."""
    return [*abstract_params(config), *(abstract_adapters(config, train.lora.spec) if train.lora else ())]


def model_params(config: GptOssConfig, train: TrainConfig, params: Params) -> dict[str, Any]:
    """What `forward` takes of the parameters of a state: with adapters in their places."""
    return attach(config, train.lora.spec, params) if train.lora else dict(params)


def saved_params(train: TrainConfig, params: Params) -> dict[str, Array]:
    """What a checkpoint holds of them: all, or under `lora` the adapters."""
    return {name: param for name, param in params.items() if train.lora is None or is_adapter(name)}


def init_state(config: GptOssConfig, train: TrainConfig, params: Params, shardings: Shardings | None = None, *, donate: bool = False) -> TrainState:
    """Fresh optimizer on given parameters, which are cast to the master dtype. The start of an SFT run and of the QAT run after it.

    float32 masters from bfloat16 weights are exact; bfloat16 masters from float32 weights round to nearest. With `donate` the memory of `params`
    is taken over; without, they stay usable.
    """
    make, out = _init(config, train), state_shardings(config, train, shardings)
    return jax.jit(make, out_shardings=out, donate_argnums=(0,) if donate else ())(dict(params))


def _init(config: GptOssConfig, train: TrainConfig) -> Callable[[Params], TrainState]:
    optimizer, base = make_optimizer(train, param_names(config, train)), abstract_base(config, train)

    def init(params):
        masters = {name: jax.tree.map(lambda x, held: x.astype(held.dtype), param, base[name]) for name, param in params.items()}
        if train.lora:
            masters |= init_adapters(config, train.lora.spec, train.seed)
        return TrainState(jnp.int32(0), masters, init_moments(optimizer, masters), jnp.int32(0), jnp.int32(0))

    return init


@lru_cache(maxsize=8)
def _abstract(config: GptOssConfig, train: TrainConfig) -> TrainState:
    return jax.eval_shape(_init(config, train), abstract_base(config, train))


def abstract_state(config: GptOssConfig, train: TrainConfig, shardings: Shardings | None = None) -> TrainState:
    """Shapes, dtypes (and shardings) of the state; allocates nothing. The target of a restore."""
    state = _abstract(config, train)
    if shardings is None:
        return state
    place = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    return jax.tree.map(place, state, state_shardings(config, train, shardings))


def state_shardings(config: GptOssConfig, train: TrainConfig, shardings: Shardings | None) -> Any:
    """Sharding of every leaf: moments lie where their parameter lies, also as codes [..., C, Q] and scales [..., C]. Factors of a moment, which
    lack a dimension, and what the mesh does not divide are on every device. None without a mesh."""
    if shardings is None:
        return None
    params = abstract_params(config)

    def sharding(path, leaf):
        name = next((key.key for key in reversed(path) if getattr(key, "key", None) in params), None)
        if name is None or len(leaf.shape) < len(params[name].shape):
            return shardings.scalar
        try:
            shardings.params[name].shard_shape(leaf.shape)
        except ValueError:
            return shardings.scalar
        return shardings.params[name]

    return jax.tree_util.tree_map_with_path(sharding, abstract_state(config, train))


def _split(batch, num_microbatches: int):
    """[B, T] leaves to [A, B/A, T]."""
    return jax.tree.map(lambda x: x.reshape(x.shape[0] // num_microbatches, num_microbatches, *x.shape[1:]).swapaxes(0, 1), batch)


def _prepare(expert_quant: ExpertQuant, params: Params) -> tuple[dict[str, Array], dict[str, Any]]:
    """`params` with the compute weights of all experts in place of the stored ones, and the codes those were decoded from."""
    made = {name: expert_quant(name.rpartition(".")[2], param) for name, param in params.items() if name.endswith(PROJECTIONS)}
    return {**params, **{name: weight for name, (weight, _) in made.items()}}, {name: codes for name, (_, codes) in made.items()}


def _loss_sum(hidden_BTD, params: Params, batch, dtype, distribute: Distribute | None) -> Float[Array, ""]:
    """Sum of weight * nll over the tokens of a batch."""
    run = lambda *arrays, gathers=(), vocab=(): cross_entropy_sum(*arrays, dtype, gathers, vocab)
    if distribute is not None:
        run = distribute.loss(run)
    return run(hidden_BTD, params["lm_head.weight"], batch.targets_BT, batch.loss_weights_BT)


class LossParts(NamedTuple):
    """What a loss hands out beside its value. `nll` is what is minimised but for the auxiliary loss of the router; `mixed` what a distillation mixes
    it of, cross_entropy and kl; `router` are sums over the tokens of the microbatch, [L, E] and [L]; `captured` is None unless asked for."""

    nll: Float[Array, ""]
    aux: Float[Array, ""]
    mixed: dict[str, Float[Array, ""]]
    router: RouterStats
    captured: dict[str, Any] | None


def _distillation(hidden_BTD, params: Params, teacher_BTD, teacher: Params, batch, dtype, distill: DistillConfig, distribute: Distribute | None):
    """The sums of `distillation_sums` over the tokens of a batch."""

    def run(hidden_BTD, w_VD, targets_BT, weights_BT, teacher_BTD, teacher_w_VD, gathers=(), vocab=()):
        sides = Side(hidden_BTD, w_VD), Side(teacher_BTD, teacher_w_VD)
        return distillation_sums(*sides, targets_BT, weights_BT, distill.weight, distill.temperature, dtype, gathers, vocab)

    if distribute is not None:
        run = distribute.loss(run)
    return run(hidden_BTD, params["lm_head.weight"], batch.targets_BT, batch.loss_weights_BT, teacher_BTD, teacher["lm_head.weight"])


def make_loss(
    config: GptOssConfig,
    train: TrainConfig,
    expert_quant: ExpertQuant | None,
    capture: bool = False,
    distribute: Distribute | None = None,
    teacher_config: GptOssConfig | None = None,
) -> Callable:
    """`loss(trained, frozen, microbatch, total_weight, total_tokens, *teacher) -> (scalar, LossParts)`: a microbatch's share.

    With `cast_at: step` the experts in trained and frozen are compute weights already. `teacher` are the parameters of the model that `train.distill`
    names, whose architecture is `teacher_config`."""
    dtype = jnp.dtype(train.compute_dtype)
    if train.cast_at == "step":
        expert_quant = with_activations(plain_cast(dtype), activation_rounding(expert_quant))

    run = partial(forward, dtype=dtype, backend=None if train.kernels == "auto" else train.kernels, distribute=distribute)
    tokens = lambda batch: (batch.tokens_BT, batch.segment_ids_BT, batch.positions_BT)

    def loss(trained, frozen, batch, total_weight, total_tokens, *teacher):
        params = model_params(config, train, {**trained, **frozen})
        out = run(config, params, *tokens(batch), expert_quant=expert_quant, capture=capture, remat=train.remat)
        mixed = {}
        if teacher:
            with jax.named_scope("teacher"):
                teacher_BTD = lax.stop_gradient(run(teacher_config, teacher[0], *tokens(batch), expert_quant=plain_cast(dtype)).hidden_BTD)
        with jax.named_scope("loss"):
            if teacher:
                sums = _distillation(out.hidden_BTD, params, teacher_BTD, teacher[0], batch, dtype, train.distill, distribute)
                nll, *rest = (x / total_weight for x in sums)
                mixed = dict(zip(("cross_entropy", "kl"), rest))
            else:
                nll = _loss_sum(out.hidden_BTD, params, batch, dtype, distribute) / total_weight
        aux = jnp.float32(0)
        if train.router_aux_loss_coef:
            # per microbatch, as every trainer does, weighted by its tokens: the product of two means is not a sum over tokens
            share = jnp.sum(batch.segment_ids_BT > 0) / total_tokens
            aux = load_balancing_loss(out.router) * share
        return nll + train.router_aux_loss_coef * aux, LossParts(nll, aux, mixed, out.router, out.captured)

    return loss


class _Grads(NamedTuple):
    grads: dict[str, Array]
    nll: Array
    aux: Array
    mixed: dict[str, Array]
    router: RouterStats


def _gradients(
    loss: Callable, train: TrainConfig, expert_quant: ExpertQuant | None, optimizer: Optimizer, shardings: Shardings | None, params: Params, batch,
    *teacher: Params,
) -> tuple[_Grads, Any]:
    """Gradients of the whole batch over the trained parameters, and what the last microbatch captured."""
    trained = {name: params[name] for name in optimizer.trained}
    frozen = {name: param for name, param in params.items() if name not in trained}
    to_masters, codes = lambda grads: grads, None
    if train.cast_at == "step":
        prepare = partial(_prepare, expert_quant or plain_cast(jnp.dtype(train.compute_dtype)))
        trained, pull, codes = jax.vjp(prepare, trained, has_aux=True)
        frozen, frozen_codes = prepare(frozen)
        to_masters, codes = lambda grads: pull(grads)[0], {**codes, **frozen_codes}
    weight = jnp.sum(batch.loss_weights_BT)
    # a batch without trained tokens has loss 0, not 0/0
    total_weight = jnp.where(weight > 0, weight, 1.0)
    total_tokens = jnp.maximum(jnp.sum(batch.segment_ids_BT > 0), 1)

    def place(grads):
        if shardings is None:
            return grads
        return {name: lax.with_sharding_constraint(grad, shardings.params[name]) for name, grad in grads.items()}

    def microbatch_grads(microbatch):
        (_, parts), grads = jax.value_and_grad(loss, has_aux=True)(trained, frozen, microbatch, total_weight, total_tokens, *teacher)
        captured = parts.captured
        if captured is not None and codes is not None:
            captured = {name: (consumed, codes[name]) for name, (consumed, _) in captured.items()}
        return _Grads(place(to_masters(grads)), parts.nll, parts.aux, parts.mixed, parts.router), captured

    num_microbatches = train.batch.accumulation
    if num_microbatches == 1:
        # bfloat16 masters have bfloat16 gradients: 2 bytes per parameter less than converted here; the optimizer converts as it reads
        return microbatch_grads(batch)

    microbatches = _split(batch, num_microbatches)
    first = jax.tree.map(lambda x: x[0], microbatches)
    shapes, captured_shapes = jax.eval_shape(microbatch_grads, first)
    zeros = lambda tree: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), tree)
    start = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, wide(leaf.dtype)), shapes)
    start = start._replace(grads=place(start.grads))

    def body(carry, microbatch):
        sums, _ = carry
        new, captured = microbatch_grads(microbatch)
        return (jax.tree.map(lambda total, part: total + part.astype(total.dtype), sums, new), captured), None

    (sums, captured), _ = lax.scan(body, (start, zeros(captured_shapes)), microbatches)
    return sums, captured


def _jit(function: Callable, in_shardings, out_shardings, shardings: Shardings | None, donate: bool = False) -> Callable:
    donated = (0,) if donate else ()
    if shardings is None:
        return jax.jit(function, donate_argnums=donated)
    return jax.jit(function, in_shardings=in_shardings, out_shardings=out_shardings, donate_argnums=donated)


def make_train_step(
    config: GptOssConfig,
    train: TrainConfig,
    expert_quant: ExpertQuant | None = None,
    shardings: Shardings | None = None,
    teacher: Teacher | None = None,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """The compiled `train_step(state, batch) -> (state, metrics)`, with the parameters of the teacher as a third argument if there is one; the state
    is donated.

    Metrics (scalars): loss, aux_loss, grad_norm, lr, tokens, trained_tokens, skipped (0 or 1), skipped_in_row; cross_entropy and kl with a teacher;
    and router, the `RouterStats` of the batch, stacked over layers.
    When loss or gradient norm is not finite, parameters and optimizer keep their values and only the step advances.

    Args:
      teacher: architecture (and layout) of the model of `train.distill`.
    """
    optimizer = make_optimizer(train, param_names(config, train))
    loss = make_loss(config, train, expert_quant, distribute=shardings and shardings.distribute, teacher_config=teacher and teacher.config)

    def train_step(state: TrainState, batch, *teacher: Params):
        (grads, nll, aux, mixed, router), _ = _gradients(loss, train, expert_quant, optimizer, shardings, state.params, batch, *teacher)
        with jax.named_scope("optimizer"):
            trained = {name: state.params[name] for name in optimizer.trained}
            finite = jnp.isfinite(nll) & jnp.isfinite(aux)
            moved, opt_state, norm, made = apply_updates(optimizer, trained, grads, state.opt_state, state.step, finite)
        skipped = 1 - made.astype(jnp.int32)
        in_row = (state.skipped_in_row + 1) * skipped
        metrics = {
            "loss": nll,
            "aux_loss": aux,
            "grad_norm": norm,
            "lr": optimizer.schedule(state.step),
            "tokens": jnp.sum(batch.segment_ids_BT > 0),
            "trained_tokens": jnp.sum(batch.loss_weights_BT > 0),
            "skipped": skipped,
            "skipped_in_row": in_row,
            **mixed,
            "router": router,
        }
        return TrainState(state.step + 1, {**state.params, **moved}, opt_state, state.skipped + skipped, in_row), metrics

    where = state_shardings(config, train, shardings)
    arguments = shardings and (where, shardings.batch, *((teacher.shardings,) if teacher else ()))
    return _jit(train_step, arguments, shardings and (where, shardings.scalar), shardings, donate=True)


def make_eval_step(
    config: GptOssConfig, train: TrainConfig, expert_quant: ExpertQuant | None = None, shardings: Shardings | None = None
) -> Callable[[Params, Any], tuple[Array, Array]]:
    """The compiled `eval_step(params, batch) -> (sum of weight * nll, sum of weights)` under the numerics of training, so the loss of a QAT run
    is that of its quantized weights. Sums, so that batches of different sizes average rightly."""
    dtype = jnp.dtype(train.compute_dtype)

    def eval_step(params, batch):
        params = model_params(config, train, params)
        out = forward(
            config, params, batch.tokens_BT, batch.segment_ids_BT, batch.positions_BT, dtype=dtype, expert_quant=expert_quant,
            distribute=shardings and shardings.distribute,
        )  # fmt: skip
        nll = _loss_sum(out.hidden_BTD, params, batch, dtype, shardings and shardings.distribute)
        return nll, jnp.sum(batch.loss_weights_BT)

    return _jit(eval_step, shardings and (dict(shardings.params), shardings.batch), shardings and shardings.scalar, shardings)


def make_capture_step(
    config: GptOssConfig, train: TrainConfig, expert_quant: ExpertQuant, shardings: Shardings | None = None, *, weights: bool = True
) -> Callable[[TrainState, Any], Captured]:
    """The compiled `capture_step(state, batch) -> Captured`: forward and backward exactly as in `train_step` (scan, remat, microbatches, sharding),
    without the update, handing out the expert weights that it computed with and the codes those were decoded from. A teacher has no part in it.

    With `weights` False, for the hashes of a checkpoint, the codes alone, from the forward pass of the first microbatch: they follow from the
    parameters, and gradients, held for their norm, would be 42 GB beside 10 GB of codes (20b on one GPU). Without `weights` and `grad_norm`."""
    optimizer = make_optimizer(train, param_names(config, train))
    loss = make_loss(config, train, expert_quant, capture=True, distribute=shardings and shardings.distribute)

    def capture_codes(state: TrainState, batch):
        params, prepared = state.params, None
        if train.cast_at == "step":
            params, prepared = _prepare(expert_quant, params)
        first = jax.tree.map(lambda x: x[0], _split(batch, train.batch.accumulation))
        _, parts = loss(params, {}, first, jnp.maximum(jnp.sum(first.loss_weights_BT), 1), jnp.int32(1))
        return Captured(parts.nll, jnp.float32(jnp.nan), {}, prepared or {name: codes for name, (_, codes) in parts.captured.items()})

    def capture_step(state: TrainState, batch):
        (grads, nll, *_), captured = _gradients(loss, train, expert_quant, optimizer, shardings, state.params, batch)
        consumed = {name: weight for name, (weight, _) in captured.items()}
        return Captured(nll, global_norm(grads), consumed, {name: codes for name, (_, codes) in captured.items()})

    where = state_shardings(config, train, shardings)
    step = capture_step if weights else capture_codes
    return jax.jit(step) if shardings is None else jax.jit(step, in_shardings=(where, shardings.batch))
