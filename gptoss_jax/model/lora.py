"""Which weights get adapters, what these are called, and how they come to the layers.

Adapters are parameters beside the others in the flat dict: of the weight `NAME` (without `.weight`)

    NAME.lora_a [.., r, in]      uniform within 1 / sqrt(in), as PEFT begins (Kaiming with a = sqrt 5)
    NAME.lora_b [.., out, r]     zero: training begins at the base model

with the leading dims (layers, experts) of the weight. `attach` puts a `LoraWeight` in place of each weight that has them, which is what the layers
and `expert_quant` know; nothing else in the model tells an adapted model from a plain one.
"""

import math
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from gptoss_jax.formats import mxfp4
from gptoss_jax.model.config import GptOssConfig
from gptoss_jax.model.transformer import abstract_params
from gptoss_jax.quant import LoraWeight

EXPERTS = ("gate_up_proj", "down_proj")
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", *EXPERTS)
LORA_A, LORA_B = ".lora_a", ".lora_b"


@dataclass(frozen=True)
class LoraSpec:
    """Rank, scale and targets of a set of adapters; recorded in every checkpoint that holds them.

    `targets` are names ("q_proj", "mlp.experts.down_proj"), or shell-style patterns over whole names ("blocks.0.*"). `expert_layers` are the layers,
    counted from 0, whose experts are adapted; None is all. Stacked layers are adapted together, so those left out hold adapters that stay zero.
    """

    rank: int = 16
    alpha: float = 32.0
    rslora: bool = False
    targets: tuple[str, ...] = PROJECTIONS
    expert_layers: tuple[int, ...] | None = None

    @property
    def scale(self) -> float:
        """alpha / r, with rsLoRA (Kalajdzievski 2023) alpha / sqrt(r)."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> "LoraSpec":
        """Inverse of `to_dict`, also after JSON made lists of tuples."""
        return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in raw.items()})


def is_adapter(name: str) -> bool:
    return name.endswith((LORA_A, LORA_B))


def adapter_name(weight: str) -> str:
    """What the adapters of a weight are called, without their suffix."""
    return weight.removesuffix(".weight")


def adapted_weights(config: GptOssConfig, spec: LoraSpec) -> dict[str, jax.ShapeDtypeStruct]:
    """The weights that get adapters.

    Raises:
      ValueError: a target that names no projection, layers that there are not, or that no expert target can have.
    """
    leaves = {name: leaf for name, leaf in abstract_params(config).items() if adapter_name(name).endswith(PROJECTIONS)}
    found = set()
    for target in spec.targets:
        pattern = target if any(c in target for c in "*?[") else f"*.{target}"
        hits = {name for name in leaves if fnmatchcase(adapter_name(name), pattern)}
        if not hits:
            near = get_close_matches(target, PROJECTIONS, n=1, cutoff=0.0)
            raise ValueError(f"target {target!r} is no projection of attention or experts; the nearest is {near[0]!r}")
        found |= hits
    if spec.expert_layers is not None:
        wrong = [layer for layer in spec.expert_layers if not 0 <= layer < config.num_hidden_layers]
        if wrong or not spec.expert_layers or not any(name.endswith(EXPERTS) for name in found):
            layers = f"layers are 0 to {config.num_hidden_layers - 1}"
            raise ValueError(f"expert_layers = {list(spec.expert_layers)}: {layers}, and targets must name experts")
    return {name: leaf for name, leaf in leaves.items() if name in found}


def abstract_adapters(config: GptOssConfig, spec: LoraSpec) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of all adapters, float32, by name."""
    shapes = {}
    for name, leaf in adapted_weights(config, spec).items():
        *lead, out, inputs = leaf.shape
        shapes[adapter_name(name) + LORA_A] = jax.ShapeDtypeStruct((*lead, spec.rank, inputs), jnp.float32)
        shapes[adapter_name(name) + LORA_B] = jax.ShapeDtypeStruct((*lead, out, spec.rank), jnp.float32)
    return shapes


def init_adapters(config: GptOssConfig, spec: LoraSpec, seed: int) -> dict[str, Array]:
    """The start of training; each adapter follows from the seed and its name."""
    out = {}
    for name, leaf in abstract_adapters(config, spec).items():
        if name.endswith(LORA_A):
            key, bound = jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode())), 1 / math.sqrt(leaf.shape[-1])
            out[name] = jax.random.uniform(key, leaf.shape, leaf.dtype, -bound, bound)
        else:
            out[name] = jnp.zeros(leaf.shape, leaf.dtype)
    return out


def layer_mask(config: GptOssConfig, spec: LoraSpec, weight: str) -> np.ndarray | None:
    """1 for the stacked layers of an expert weight that are adapted, else 0: [L, 1, 1, 1], or [1, 1, 1] of a layer of its own. None: all are."""
    if spec.expert_layers is None or not weight.endswith(EXPERTS):
        return None
    part, position, _ = weight.split(".", 2)
    if part == "tail":
        return np.full((1, 1, 1), config.repeats * config.period + int(position) in spec.expert_layers, np.float32)
    layers = np.arange(config.repeats) * config.period + int(position)
    return np.isin(layers, spec.expert_layers).astype(np.float32)[:, None, None, None]


def attach(config: GptOssConfig, spec: LoraSpec | None, params: Mapping[str, Any]) -> dict[str, Any]:
    """`params` without adapters, and `LoraWeight`s where they belong; params as they are without a spec. Differentiable in the adapters."""
    if spec is None:
        return dict(params)
    joined = {name: value for name, value in params.items() if not is_adapter(name)}
    for name in adapted_weights(config, spec):
        a, b = (params[adapter_name(name) + suffix] for suffix in (LORA_A, LORA_B))
        mask = layer_mask(config, spec, name)
        joined[name] = LoraWeight(params[name], a, b if mask is None else b * mask, spec.scale)
    return {name: LoraWeight(value, None, None) if isinstance(value, mxfp4.Codes) else value for name, value in joined.items()}
