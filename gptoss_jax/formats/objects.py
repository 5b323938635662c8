"""The formats as values: frozen objects that name everything needed to reproduce the bytes. Checkpoints and policies store their `to_dict()`."""

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float

from gptoss_jax.formats import mxfp4, nvfp4
from gptoss_jax.formats.format import FormatOptions
from gptoss_jax.formats.minifloat import E2M1
from gptoss_jax.formats.noise import Key
from gptoss_jax.formats.parts import Parts


@dataclass(frozen=True, repr=False)
class Mxfp4(FormatOptions):
    """MXFP4 with a named scale rule; `compat="modelopt"` writes the bytes of NVIDIA's converter.

    `element_round` is a name of `ELEMENT_ROUNDS`. `seed` makes stochastic rounding reproducible where there is no explicit key: in an export, where
    the key of every matrix comes from it and the matrix's name. `block` other than 32 is for research.
    """

    scale_rule: str = "rceil"
    compat: str | None = None
    element_round: str = "rne"
    block: int = mxfp4.BLOCK_SIZE
    seed: int | None = None

    name: ClassVar[str] = "mxfp4"
    magnitudes: ClassVar[tuple[float, ...]] = E2M1.magnitudes
    always_recorded: ClassVar[tuple[str, ...]] = ("scale_rule", "compat")

    def __post_init__(self):
        mxfp4.check_options(self._options)
        self._check_seed()

    @property
    def _options(self) -> mxfp4.Options:
        return mxfp4.Options(self.scale_rule, self.compat, self.element_round, self.block)

    @property
    def block_size(self) -> int:
        return self.block

    @property
    def export_problem(self) -> str | None:
        return f"MXFP4 files have blocks of 32, not {self.block}" if self.block != mxfp4.BLOCK_SIZE else self._rounding_problem()

    def encode(self, x: Float[Array, "*batch n"], key: Key | None = None) -> mxfp4.Codes:
        return mxfp4.encode(x, self.scale_rule, self.compat, element_round=self.element_round, block_size=self.block, key=key)

    def decode(self, q: mxfp4.Codes, dtype=jnp.bfloat16) -> Float[Array, "*batch n"]:
        return mxfp4.decode(q, dtype, self.block)

    def encode_decode(self, x: Float[Array, "*batch n"], dtype, key: Key | None = None) -> tuple[Float[Array, "*batch n"], mxfp4.Codes]:
        return mxfp4.encode_decode(x, self._options, dtype, key)

    def parts(self, q: mxfp4.Codes) -> Parts:
        return mxfp4.parts(q, self.block)


@dataclass(frozen=True, repr=False)
class Nvfp4(FormatOptions):
    """NVFP4 with a power-of-two ("pow2") or exact ("exact", NVIDIA's) global scale."""

    global_scale: str = "pow2"
    element_round: str = "rne"
    seed: int | None = None

    name: ClassVar[str] = "nvfp4"
    block_size: ClassVar[int] = nvfp4.BLOCK_SIZE
    magnitudes: ClassVar[tuple[float, ...]] = E2M1.magnitudes
    always_recorded: ClassVar[tuple[str, ...]] = ("global_scale",)

    def __post_init__(self):
        nvfp4.check_options(self.global_scale)
        if self.element_round != "rne":
            raise ValueError("later")
        self._check_seed()

    @property
    def export_problem(self) -> str | None:
        return self._rounding_problem()

    def encode(self, x: Float[Array, "*batch n"], key: Key | None = None) -> nvfp4.Codes:
        return nvfp4.encode(x, self.global_scale)

    def decode(self, q: nvfp4.Codes, dtype=jnp.bfloat16) -> Float[Array, "*batch n"]:
        return nvfp4.decode(q, dtype)

    def encode_decode(self, x: Float[Array, "*batch n"], dtype, key: Key | None = None) -> tuple[Float[Array, "*batch n"], nvfp4.Codes]:
        return nvfp4.encode_decode(x, self.global_scale, dtype)

    def parts(self, q: nvfp4.Codes) -> Parts:
        return nvfp4.parts(q)
