"""Formats as values: a frozen object that names everything needed to reproduce the bytes. Checkpoints and policies store its `to_dict()`."""

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import jax.numpy as jnp
from jaxtyping import Array, Float

from gptoss_jax.formats import mxfp4, nvfp4


@runtime_checkable
class Format(Protocol):
    """What `quant` and `checkpoint` need of a number format. Blocks run along the last dim."""

    name: ClassVar[str]
    block_size: ClassVar[int]

    def encode(self, x: Float[Array, "*batch n"]) -> Any:
        """Codes of float32 or bfloat16 values."""

    def decode(self, q: Any, dtype=jnp.bfloat16) -> Float[Array, "*batch n"]:
        """Values of codes."""

    def encode_decode(self, x: Float[Array, "*batch n"], dtype) -> tuple[Float[Array, "*batch n"], Any]:
        """(decode(q, dtype), q) with q = encode(x). Under jit, XLA drops what is not used."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values from which `format_from_dict` makes an equal object."""


class _ToDict:
    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, **dataclasses.asdict(self)}


@dataclass(frozen=True)
class Mxfp4(_ToDict):
    """MXFP4 with a named scale rule; `compat="modelopt"` writes the bytes of NVIDIA's converter."""

    scale_rule: str = "rceil"
    compat: str | None = None

    name: ClassVar[str] = "mxfp4"
    block_size: ClassVar[int] = mxfp4.BLOCK_SIZE

    def __post_init__(self):
        mxfp4.check_options(self.scale_rule, self.compat)

    def encode(self, x: Float[Array, "*batch n"]) -> mxfp4.Codes:
        return mxfp4.encode(x, self.scale_rule, self.compat)

    def decode(self, q: mxfp4.Codes, dtype=jnp.bfloat16) -> Float[Array, "*batch n"]:
        return mxfp4.decode(q, dtype)

    def encode_decode(self, x: Float[Array, "*batch n"], dtype) -> tuple[Float[Array, "*batch n"], mxfp4.Codes]:
        return mxfp4.encode_decode(x, self.scale_rule, self.compat, dtype)


@dataclass(frozen=True)
class Nvfp4(_ToDict):
    """NVFP4 with a power-of-two ("pow2") or exact ("exact", NVIDIA's) global scale."""

    global_scale: str = "pow2"

    name: ClassVar[str] = "nvfp4"
    block_size: ClassVar[int] = nvfp4.BLOCK_SIZE

    def __post_init__(self):
        nvfp4.check_options(self.global_scale)

    def encode(self, x: Float[Array, "*batch n"]) -> nvfp4.Codes:
        return nvfp4.encode(x, self.global_scale)

    def decode(self, q: nvfp4.Codes, dtype=jnp.bfloat16) -> Float[Array, "*batch n"]:
        return nvfp4.decode(q, dtype)

    def encode_decode(self, x: Float[Array, "*batch n"], dtype) -> tuple[Float[Array, "*batch n"], nvfp4.Codes]:
        return nvfp4.encode_decode(x, self.global_scale, dtype)


_FORMATS: dict[str, type] = {cls.name: cls for cls in (Mxfp4, Nvfp4)}


def _class_named(name: str) -> type:
    if name not in _FORMATS:
        near = difflib.get_close_matches(name, _FORMATS, n=1, cutoff=0.0)
        raise ValueError(f"unknown format {name!r}; nearest is {near[0]!r}, known are {', '.join(_FORMATS)}")
    return _FORMATS[name]


def get_format(fmt: "str | Format") -> Format:
    """The format itself, or the default object of its name ("mxfp4", "nvfp4").

    Raises:
      ValueError: unknown name.
      TypeError: neither a name nor a format.
    """
    if isinstance(fmt, str):
        return _class_named(fmt)()
    if isinstance(fmt, Format):
        return fmt
    raise TypeError(f"a format is a name or a Format object, not {fmt!r}")


def format_from_dict(raw: Mapping[str, Any]) -> Format:
    """Inverse of `Format.to_dict`; missing fields take their defaults.

    Raises:
      ValueError: no or unknown name, unknown key or value.
    """
    fields = dict(raw)
    name = fields.pop("name", None)
    if not isinstance(name, str):
        raise ValueError(f"a format needs a name, one of {', '.join(_FORMATS)}: {dict(raw)!r}")
    cls = _class_named(name)
    known = {f.name for f in dataclasses.fields(cls)}
    unknown = sorted(set(fields) - known)
    if unknown:
        raise ValueError(f"unknown keys {unknown} for format {name!r}; known are {', '.join(sorted(known))}")
    return cls(**fields)
