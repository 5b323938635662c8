"""Which parameters are quantized, and to what: ordered (pattern, format) rules over parameter names, shell-style as in `fnmatch`; and the gradient
estimator that training passes through them with.

The first rule that matches a name decides. A rule that decides for no parameter is an error, so a typing mistake cannot silently train
an unquantized model. Default: the expert projections, and only those.
"""

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from gptoss_jax.formats import Format, format_from_dict, get_format
from gptoss_jax.quant.estimators import Estimator, Ste, estimator_from_dict, estimator_to_dict, get_estimator
from gptoss_jax.quant.fake_quant import fake_quant

EXPERT_PROJECTIONS = "*.mlp.experts.*_proj"
BACKWARD_WEIGHTS = ("quantized", "original")


@dataclass(frozen=True)
class QuantPolicy:
    """Rules (pattern, format) and the estimator; formats and estimator may be given by name."""

    rules: tuple[tuple[str, Format], ...]
    estimator: Estimator = field(default_factory=Ste)
    # which weight the gradient of an expert's input goes through, see `two_way`
    backward_weight: str = "quantized"
    # what the inputs of both expert products are rounded to, straight-through; a format of rows, not of whole matrices
    activations: Format | None = None

    def __post_init__(self):
        rules = tuple((pattern, get_format(fmt)) for pattern, fmt in self.rules)
        if not rules:
            raise ValueError("a quantization policy needs at least one rule; no quantization is policy None")
        object.__setattr__(self, "rules", rules)
        object.__setattr__(self, "estimator", get_estimator(self.estimator))
        if self.backward_weight not in BACKWARD_WEIGHTS:
            raise ValueError(f"backward_weight = {self.backward_weight!r} is not {' or '.join(BACKWARD_WEIGHTS)}")
        if self.activations is not None:
            object.__setattr__(self, "activations", get_format(self.activations))
            if not isinstance(getattr(self.activations, "tensor_amax", 1.0), int | float) or self.activations.stochastic:
                raise ValueError(
                    f"activations = {self.activations}: rows of other tokens must not change a token's rounding; "
                    "NVFP4 needs a tensor_amax that is a number, and rounding must be to nearest"
                )

    def format_of(self, name: str) -> Format | None:
        """Format of the first rule that matches the parameter name, None where none does."""
        return next((fmt for pattern, fmt in self.rules if fnmatchcase(name, pattern)), None)

    def match(self, params: Mapping[str, Any]) -> dict[str, Format]:
        """The quantized parameters of a flat dict of arrays or shapes.

        Raises:
          ValueError: a rule that decides for no parameter, or a parameter that its format cannot encode.
        """
        matched = {}
        unused = list(range(len(self.rules)))
        for name, leaf in params.items():
            deciding = next((i for i, (pattern, _) in enumerate(self.rules) if fnmatchcase(name, pattern)), None)
            if deciding is None:
                continue
            fmt = self.rules[deciding][1]
            _check_encodable(name, leaf, fmt)
            matched[name] = fmt
            if deciding in unused:
                unused.remove(deciding)
        if unused:
            raise ValueError(_unmatched_message(self.rules[unused[0]][0], params))
        return matched

    def describe(self, params: Mapping[str, Any]) -> str:
        """A table of what is quantized: name, shape, format, block dim; then the count of the rest."""
        matched = self.match(params)
        rows = [("parameter", "shape", "format", "blocks along")]
        for name, fmt in matched.items():
            shape = tuple(params[name].shape)
            options = ", ".join(f"{key}={value}" for key, value in fmt.to_dict().items() if key != "name" and value is not None)
            rows.append((name, "x".join(map(str, shape)), f"{fmt.name}({options})", f"dim {len(shape) - 1}: {shape[-1]} / {fmt.block_size}"))
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        size = {name: math.prod(leaf.shape) for name, leaf in params.items()}
        quantized, total = sum(size[name] for name in matched), sum(size.values())
        if self.estimator != Ste():
            lines.append(f"gradient estimator {self.estimator}")
        if self.backward_weight != "quantized":
            lines.append(f"gradients of inputs through the {self.backward_weight} weight")
        if self.activations is not None:
            lines.append(f"inputs of expert products rounded to {self.activations}")
        lines.append(f"{len(matched)} of {len(params)} arrays quantized: {quantized:,} of {total:,} parameters; the others stay as they are")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        rules = [{"pattern": pattern, "format": fmt.to_dict()} for pattern, fmt in self.rules]
        activations = self.activations and self.activations.to_dict()
        return {
            "rules": rules, "estimator": estimator_to_dict(self.estimator), "backward_weight": self.backward_weight, "activations": activations
        }  # fmt: skip

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> "QuantPolicy":
        """Inverse of `to_dict`. What an older record lacks has its default: it was not known then.

        Raises:
          ValueError: unknown or missing key.
        """
        unknown = sorted(set(raw) - {"rules", "estimator", "backward_weight", "activations"})
        if unknown or "rules" not in raw:
            raise ValueError(f"a quantization policy has the keys rules, estimator, backward_weight and activations, not {sorted(raw)}")
        for rule in raw["rules"]:
            if set(rule) != {"pattern", "format"}:
                raise ValueError(f"a rule has the keys 'pattern' and 'format', not {sorted(rule)}")
        rules = tuple((rule["pattern"], format_from_dict(rule["format"])) for rule in raw["rules"])
        activations = raw.get("activations")
        return cls(
            rules, estimator_from_dict(raw.get("estimator", {"name": "ste"})), raw.get("backward_weight", "quantized"),
            activations and format_from_dict(activations),
        )  # fmt: skip

    def rounded_activations(self, x: Float[Array, "*rows n"]) -> Float[Array, "*rows n"]:
        """The input of an expert product as it is computed with, straight-through."""
        return x if self.activations is None else fake_quant(x, self.activations)


def default_policy(fmt: str | Format, estimator: str | Estimator = "ste") -> QuantPolicy:
    """Only the expert projections; attention, router, biases, sinks, norms, embedding and head stay as they are."""
    return QuantPolicy(((EXPERT_PROJECTIONS, get_format(fmt)),), get_estimator(estimator))


def _check_encodable(name: str, leaf: Any, fmt: Format) -> None:
    shape = tuple(leaf.shape)
    if len(shape) < 2 or shape[-1] % fmt.block_size:
        raise ValueError(f"{name} {shape} cannot be {fmt.name}: it needs a matrix whose last dim is a multiple of {fmt.block_size}")
    if leaf.dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(f"{name} is {leaf.dtype}; {fmt.name} encodes float32 or bfloat16")


def _unmatched_message(pattern: str, params: Mapping[str, Any]) -> str:
    if any(fnmatchcase(name, pattern) for name in params):
        return f"quantization rule {pattern!r} never decides: earlier rules match all its parameters"
    near = difflib.get_close_matches(pattern, list(params), n=3, cutoff=0.0)
    return f"quantization rule {pattern!r} matches no parameter; nearest names: {', '.join(near) or '(no parameters)'}"
