"""What the gradient probes share: the loss as a function of the expert weights, and quantizers as differentiable functions of them.

One compiled loss and one compiled gradient serve every set of expert weights: unquantized, rounded, moved along a direction. A probe prepares weights
outside and passes them in, so two losses differ only where the weights do.

Legend: L stacked layers  E experts
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gptoss_jax.checkpoint.hf_layout import pieces_of
from gptoss_jax.data.packing import Batch
from gptoss_jax.errors import UsageError
from gptoss_jax.formats import Format, get_format
from gptoss_jax.model import GptOssConfig, Params
from gptoss_jax.quant import Estimator, fake_quant, get_estimator, plain_cast
from gptoss_jax.quant.expert_quant import PROJECTIONS
from gptoss_jax.training.config import TrainConfig
from gptoss_jax.training.step import make_loss

Experts = dict[str, Array]
# (stored expert weights, random key or None) -> the weights to compute with. Differentiable and hashable; the gradient is the estimator's
Quantize = Callable[[Experts, Array | None], Experts]


@dataclass(frozen=True)
class FakeQuant:
    """A format with a gradient estimator, as a `Quantize`. A stochastic format draws independent bits for every parameter from the key."""

    fmt: Format
    estimator: Estimator

    @property
    def label(self) -> str:
        """Name of the estimator with the hyperparameters that are not its defaults."""
        fields = [(f.name, getattr(self.estimator, f.name), f.default) for f in dataclasses.fields(self.estimator)]
        changed = ", ".join(f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}" for name, value, usual in fields if value != usual)
        return f"{self.estimator.name}({changed})" if changed else self.estimator.name

    def __call__(self, experts: Experts, key: Array | None = None) -> Experts:
        if not getattr(self.fmt, "stochastic", False):
            return {name: fake_quant(w, self.fmt, self.estimator) for name, w in experts.items()}
        if key is None:
            raise ValueError(f"{self.fmt} rounds at random: give a key")
        keys = jax.random.split(key, len(experts))
        return {name: fake_quant(w, self.fmt, self.estimator, key=k) for (name, w), k in zip(sorted(experts.items()), keys)}


def as_quantize(fmt: Format | str | Quantize, estimator: Estimator | str = "ste") -> Quantize:
    """The quantizer of a format or of its name; a quantizer itself."""
    if isinstance(fmt, str | Format):
        return FakeQuant(get_format(fmt), get_estimator(estimator))
    return fmt


def label_of(quantize: Quantize) -> str:
    return getattr(quantize, "label", None) or getattr(quantize, "__name__", type(quantize).__name__)


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
      params: as stored, float32 or bfloat16.
      dtype: compute dtype. float32 (products in full precision on a GPU too) shows what a format does; bfloat16 adds noise of its own.
      only: pattern of the expert projections that are looked at. The rest keep the values of `params`.
    """

    def __init__(self, config: GptOssConfig, params: Params, dtype: Any = "float32", only: str = "*"):
        self.config, self.dtype = config, str(jnp.dtype(dtype))
        self.experts, self.others = split_experts(params, only)
        self._loss, self._gradient = _programs(config, self.dtype)

    def loss(self, experts: Experts, batch: Batch) -> Float[Array, ""]:
        return self._loss(experts, self.others, batch)

    def gradient(self, experts: Experts, batch: Batch) -> tuple[Float[Array, ""], Experts]:
        """(loss, its gradient at these expert weights, in their dtype)."""
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
def rounded(quantize: Quantize, experts: Experts, key: Array | None = None) -> Experts:
    """The weights to compute with."""
    return quantize(experts, key)


@partial(jax.jit, static_argnums=0)
def pulled_back(quantize: Quantize, experts: Experts, key: Array | None, grads: Experts) -> Experts:
    """The estimator's gradient of the stored weights from that of the weights computed with."""
    return jax.vjp(lambda stored: quantize(stored, key), experts)[1](grads)[0]


@jax.jit
def dot(a: Experts, b: Experts) -> dict[str, Float[Array, "*L E"]]:
    """Inner product of every expert matrix with its counterpart, in float32."""
    return {name: jnp.sum(a[name].astype(jnp.float32) * b[name].astype(jnp.float32), axis=(-2, -1)) for name in a}


@jax.jit
def combined(a: Experts, b: Experts, factor: Array | float) -> Experts:
    """a + factor * b in the dtype of a, computed in float32."""
    add = lambda x, y: (x.astype(jnp.float32) + factor * y.astype(jnp.float32)).astype(x.dtype)
    return {name: add(a[name], b[name]) for name in a}


@jax.jit
def same(a: Experts, b: Experts) -> Array:
    """Whether two sets of weights are equal."""
    return jnp.all(jnp.stack([jnp.array_equal(a[name], b[name]) for name in a]))


def places(config: GptOssConfig, experts: Mapping[str, Any]) -> Iterator[tuple[str, int | None, int, str]]:
    """(parameter, slot in its stack or None, layer, projection) of every layer's part of the expert projections, layer by layer."""
    pieces = [piece for name, leaf in experts.items() for piece in pieces_of(config, name, tuple(leaf.shape))]
    for piece in sorted(pieces, key=lambda piece: piece.layer):
        yield piece.name, piece.slot, piece.layer, piece.name.rpartition(".")[2]
