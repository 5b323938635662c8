"""What a number format is to everything else: the protocol, and what all formats share."""

import dataclasses
from typing import Any, ClassVar, Protocol, runtime_checkable

import jax.numpy as jnp
from jaxtyping import Array, Float

from gptoss_jax.formats.element_round import STOCHASTIC
from gptoss_jax.formats.noise import Key
from gptoss_jax.formats.parts import Parts


@runtime_checkable
class Format(Protocol):
    """What `quant` and `checkpoint` need of a number format: a frozen, hashable value. Blocks run along the last dim.

    Attributes:
      block_size: elements per scale.
      magnitudes: the non-negative numbers of the element type, in increasing order.
      stochastic: whether encoding needs a key (shape [2], or [*lead, 2] as in `noise`); with the others it must not be given.
      export_problem: why no file may hold such codes; None where one may.
      needs_all_experts: whether the codes of one expert depend on the others of its projection.
    """

    name: ClassVar[str]

    @property
    def block_size(self) -> int: ...
    @property
    def magnitudes(self) -> tuple[float, ...]: ...
    @property
    def stochastic(self) -> bool: ...
    @property
    def export_problem(self) -> str | None: ...
    @property
    def needs_all_experts(self) -> bool: ...

    def encode(self, x: Float[Array, "*batch n"], key: Key | None = None) -> Any:
        """Codes of float32 or bfloat16 values."""

    def decode(self, q: Any, dtype=jnp.bfloat16) -> Float[Array, "*batch n"]:
        """Values of codes."""

    def encode_decode(self, x: Float[Array, "*batch n"], dtype, key: Key | None = None) -> tuple[Float[Array, "*batch n"], Any]:
        """(decode(q, dtype), q) with q = encode(x, key). Under jit, XLA drops what is not used."""

    def parts(self, q: Any) -> Parts:
        """Elements and scales of codes."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values from which `format_from_dict` makes an equal object."""


class FormatOptions:
    """Base of the format dataclasses: their fields as plain values, and what follows from fields that several have."""

    name: ClassVar[str]
    always_recorded: ClassVar[tuple[str, ...]] = ()  # written even at their defaults; the defaults of all others are fixed for good

    def to_dict(self) -> dict[str, Any]:
        options = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        return {"name": self.name} | {key: value for key, value in options.items() if key in self.always_recorded or value != defaults[key]}

    def __repr__(self) -> str:
        options = ", ".join(f"{key}={value!r}" for key, value in self.to_dict().items() if key != "name")
        return f"{type(self).__name__}({options})"

    @property
    def stochastic(self) -> bool:
        return self.element_round in STOCHASTIC

    @property
    def exportable(self) -> bool:
        return self.export_problem is None

    @property
    def needs_all_experts(self) -> bool:
        return False

    def _rounding_problem(self) -> str | None:
        """Why the rounding of the elements cannot be reproduced from what a file records."""
        if self.stochastic and self.seed is None:
            return f"element_round={self.element_round!r} needs a seed, from which the rounding of a file can be reproduced"
        return None

    def _check_seed(self) -> None:
        if self.seed is not None and not self.stochastic:
            raise ValueError(f"seed={self.seed} is for stochastic rounding, not for element_round={self.element_round!r}")
        if self.seed is not None and not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be in 0..2^32-1, not {self.seed}")
