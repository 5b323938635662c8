"""What the gradient probes share: the loss as a function of the expert weights, and what quantizers make of them.

One compiled loss and one compiled gradient serve every set of expert weights: unquantized, rounded, moved along a direction. A probe prepares weights
outside and passes them in, so two losses differ only where the weights do.

Legend: L stacked layers  E experts
"""

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from fnmatch import fnmatchcase
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gptoss_jax.checkpoint.hf_layout import pieces_of
from gptoss_jax.data.packing import Batch
from gptoss_jax.errors import UsageError
from gptoss_jax.formats import Format
from gptoss_jax.lab.quantizer import FakeQuant, Quantizer
from gptoss_jax.model import GptOssConfig, Params
from gptoss_jax.quant import Estimator, plain_cast
from gptoss_jax.quant.expert_quant import PROJECTIONS
from gptoss_jax.training.config import TrainConfig
from gptoss_jax.training.step import make_loss

Experts = dict[str, Array]


def as_quantizer(fmt: Format | str | Quantizer, estimator: Estimator | str = "ste") -> Quantizer:
    """The quantizer of a format or of its name; a quantizer itself."""
    return FakeQuant.of(fmt, estimator) if isinstance(fmt, str | Format) else fmt


def label_of(quantizer: Quantizer) -> str:
    """Name of the estimator, or of another quantizer, with the options that are not its defaults."""
    if type(quantizer) is FakeQuant:
        return _label(quantizer.estimator.name, quantizer.estimator)
    return _label(quantizer.to_dict().get("name", type(quantizer).__name__), quantizer)


def _label(name: str, value: Any) -> str:
    fields = dataclasses.fields(value) if dataclasses.is_dataclass(value) else ()
    optional = [f for f in fields if f.default is not dataclasses.MISSING]
    options = {f.name: getattr(value, f.name) for f in optional if getattr(value, f.name) != f.default}
    shown = ", ".join(f"{key}={option:g}" if isinstance(option, float) else f"{key}={option}" for key, option in options.items())
    return f"{name}({shown})" if shown else name


def split_experts(params: Params, only: str = "*") -> tuple[Experts, Experts]:
    """(expert projections whose name fits the pattern `only`, all other parameters).

    Raises:
      UsageError: no expert projection fits.
    """
    experts = {name: value for name, value in params.items() if name.endswith(PROJECTIONS) and fnmatchcase(name, only)}
    if not experts:
        raise UsageError(f"no expert projection has a name like {only!r}; they are called {[n for n in params if n.endswith(PROJECTIONS)]}")
    return experts, {name: value for name, value in params.items() if name not in experts}


class Objective:
    """The training loss of a model on one batch, in nats per trained token, as a function of its expert weights.

    Args:
      params: as stored, float32 or bfloat16. Expert weights are looked at in float32, so that small steps along a direction are made.
      dtype: compute dtype. float32 (products in full precision on a GPU too) shows what a format does; bfloat16 adds noise of its own.
      only: pattern of the expert projections that are looked at. The rest keep the values of `params`.
    """

    def __init__(self, config: GptOssConfig, params: Params, dtype: Any = "float32", only: str = "*"):
        self.config, self.dtype = config, str(jnp.dtype(dtype))
        experts, self.others = split_experts(params, only)
        self.experts = {name: value.astype(jnp.float32) for name, value in experts.items()}
        self._loss, self._gradient = _programs(config, self.dtype)

    def loss(self, experts: Experts, batch: Batch) -> Float[Array, ""]:
        return self._loss(experts, self.others, batch)

    def gradient(self, experts: Experts, batch: Batch) -> tuple[Float[Array, ""], Experts]:
        """(loss, its gradient at these expert weights)."""
        return self._gradient(experts, self.others, batch)


@lru_cache(maxsize=8)
def _programs(config: GptOssConfig, dtype: str):
    """Compiled (loss, loss with gradient) of (experts, other parameters, batch)."""
    share = make_loss(config, TrainConfig(compute_dtype=dtype, remat="products"), plain_cast(jnp.dtype(dtype)))

    def loss(experts, others, batch):
        with jax.default_matmul_precision("highest") if dtype == "float32" else nullcontext():
            weight = jnp.sum(batch.loss_weights_BT)
            return share(experts, others, batch, jnp.where(weight > 0, weight, 1.0), 1)[0]

    return jax.jit(loss), jax.jit(jax.value_and_grad(loss))


@partial(jax.jit, static_argnums=0)
def rounded(quantizer: Quantizer, experts: Experts) -> Experts:
    """The weights as deployed."""
    return quantizer.round(experts, quantizer.init(experts))


def computed(quantizer: Quantizer, experts: Experts, key: Array) -> Experts:
    """The weights that training computes with, at its first step. Those of fake quantization depend on the format alone: one program for all."""
    if type(quantizer) is FakeQuant:
        quantizer = FakeQuant.of(quantizer.format)
    return _computed(quantizer, experts, key)


@partial(jax.jit, static_argnums=0)
def _computed(quantizer: Quantizer, experts: Experts, key: Array) -> Experts:
    return quantizer(experts, quantizer.init(experts), key, jnp.int32(0))


@partial(jax.jit, static_argnums=0)
def pulled_back(quantizer: Quantizer, experts: Experts, key: Array, grads: Experts) -> Experts:
    """The estimator's gradient of the stored weights from that of the weights computed with; the quantizer's own arrays stay as they are."""
    extra = quantizer.init(experts)
    return jax.vjp(lambda stored: quantizer(stored, extra, key, jnp.int32(0)), experts)[1](grads)[0]


@jax.jit
def dot(a: Experts, b: Experts) -> dict[str, Float[Array, "*L E"]]:
    """Inner product of every expert matrix with its counterpart, in float32."""
    return {name: jnp.sum(a[name].astype(jnp.float32) * b[name].astype(jnp.float32), axis=(-2, -1)) for name in a}


@jax.jit
def combined(a: Experts, b: Experts, factor: Array | float) -> Experts:
    """a + factor * b in the dtype of a, computed in float32."""
    add = lambda x, y: (x.astype(jnp.float32) + factor * y.astype(jnp.float32)).astype(x.dtype)
    return {name: add(a[name], b[name]) for name in a}


def same(a: Experts, b: Experts) -> bool:
    """Whether two sets of weights are of one kind and equal."""
    return jax.tree.structure(a) == jax.tree.structure(b) and bool(_equal(a, b))


@jax.jit
def _equal(a: Experts, b: Experts) -> Array:
    return jnp.all(jnp.stack(jax.tree.leaves(jax.tree.map(jnp.array_equal, a, b))))


def places(config: GptOssConfig, experts: Mapping[str, Any]) -> Iterator[tuple[str, int | None, int, str]]:
    """(parameter, slot in its stack or None, layer, projection) of every layer's part of the expert projections, layer by layer."""
    pieces = [piece for name, leaf in experts.items() for piece in pieces_of(config, name, tuple(leaf.shape))]
    for piece in sorted(pieces, key=lambda piece: piece.layer):
        yield piece.name, piece.slot, piece.layer, piece.name.rpartition(".")[2]
