"""The formats as values: frozen objects that name everything needed to reproduce the bytes. Checkpoints and policies store their `to_dict()`."""

import math
from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float

from gptoss_jax.formats import mx, mxfp4, nvfp4, nvfp4_cast
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
    """NVFP4 with a power-of-two ("pow2") or exact ("exact", NVIDIA's) global scale.

    `element_round`, `seed` and `block` as in `Mxfp4`; `four_six`, `scale_round` and `per_expert` as in `nvfp4.Options`. `tensor_amax` is where the
    maximum behind the global scale comes from: "dynamic", the array itself; a positive number, a constant found by calibration; "given", the
    argument `amax` of encode, which may be that of an earlier step:

        w, codes = fmt.encode_decode(x, dtype, amax=state)
        state = nvfp4.tensor_amax(x)

    `mxfp4_rule` makes it MXFP4 in other clothes: weights are encoded in MXFP4 by this scale rule, and the codes are cast, which rounds nothing
    (`nvfp4_cast`).
    """

    global_scale: str = "pow2"
    element_round: str = "rne"
    block: int = nvfp4.BLOCK_SIZE
    four_six: str | None = None
    scale_round: str = "rne"
    tensor_amax: float | str = "dynamic"
    per_expert: bool = True
    seed: int | None = None
    mxfp4_rule: str | None = None

    name: ClassVar[str] = "nvfp4"
    magnitudes: ClassVar[tuple[float, ...]] = E2M1.magnitudes
    always_recorded: ClassVar[tuple[str, ...]] = ("global_scale",)

    def __post_init__(self):
        nvfp4.check_options(self._options)
        is_number = isinstance(self.tensor_amax, int | float) and not isinstance(self.tensor_amax, bool)
        if not (0 < self.tensor_amax < math.inf if is_number else self.tensor_amax in ("dynamic", "given")):
            raise ValueError(f"tensor_amax is 'dynamic', 'given' or a positive number, not {self.tensor_amax!r}")
        self._check_seed()
        if self.mxfp4_rule is not None:
            mxfp4.check_options(mxfp4.Options(self.mxfp4_rule))
            if is_number or self._options._replace(per_expert=True) != nvfp4.Options():
                raise ValueError(f"mxfp4_rule={self.mxfp4_rule!r} is a cast of codes: it goes with the defaults of all else but per_expert")
            if self.mxfp4_rule == "mse" and not self.per_expert:
                raise ValueError("mxfp4_rule='mse' needs per_expert: its largest scale does not follow from the largest weight")

    @property
    def _options(self) -> nvfp4.Options:
        return nvfp4.Options(self.global_scale, self.element_round, self.block, self.four_six, self.scale_round, self.per_expert)

    @property
    def block_size(self) -> int:
        return self.block

    @property
    def export_problem(self) -> str | None:
        if self.block != nvfp4.BLOCK_SIZE:
            return f"NVFP4 files have blocks of 16, not {self.block}"
        if self.tensor_amax == "given":
            return "its global scale comes from a maximum that no file records"
        return self._rounding_problem()

    @property
    def has_one_global_scale(self) -> bool:
        """Whether all experts of a projection have the same global scale."""
        return not self.per_expert or self.tensor_amax not in ("dynamic", "given")

    @property
    def needs_all_experts(self) -> bool:
        return not self.per_expert and self.tensor_amax == "dynamic"

    def encode(
        self, x: Float[Array, "*batch n"], key: Key | None = None, amax: Float[Array, "*matrices"] | float | None = None
    ) -> nvfp4.Codes:
        amax = self._amax(amax)
        if self.mxfp4_rule is not None:
            return nvfp4_cast.encode(x, self.mxfp4_rule, self.per_expert, amax)
        return nvfp4.encode(x, options=self._options, key=key, amax=amax)

    def decode(self, q: nvfp4.Codes, dtype=jnp.bfloat16) -> Float[Array, "*batch n"]:
        return nvfp4.decode(q, dtype, self.block)

    def encode_decode(
        self, x: Float[Array, "*batch n"], dtype, key: Key | None = None, amax: Float[Array, "*matrices"] | float | None = None
    ) -> tuple[Float[Array, "*batch n"], nvfp4.Codes]:
        if self.mxfp4_rule is not None:
            q = self.encode(x, key, amax)
            return self.decode(q, dtype), q
        return nvfp4.encode_decode(x, self._options, dtype, key, self._amax(amax))

    def parts(self, q: nvfp4.Codes) -> Parts:
        return nvfp4.parts(q, self.block)

    def _amax(self, amax):
        if (amax is not None) != (self.tensor_amax == "given"):
            raise TypeError(f"tensor_amax={self.tensor_amax!r} {'needs' if amax is None else 'takes no'} argument amax")
        return self.tensor_amax if isinstance(self.tensor_amax, int | float) else amax


@dataclass(frozen=True, repr=False)
class _Mx(FormatOptions):
    """The two standard formats of one codec (`mx`); the subclasses differ in name and element types."""

    element: str
    scale_rule: str = "rceil"
    element_round: str = "rne"
    block: int = mx.BLOCK_SIZE
    seed: int | None = None

    elements: ClassVar[tuple[str, ...]]
    always_recorded: ClassVar[tuple[str, ...]] = ("element", "scale_rule")

    def __post_init__(self):
        if self.element not in self.elements:
            raise ValueError(f"{self.name} has elements {' or '.join(self.elements)}, not {self.element!r}")
        mx.check_options(self._options)
        self._check_seed()

    @property
    def _options(self) -> mx.Options:
        return mx.Options(self.element, self.scale_rule, self.element_round, self.block)

    @property
    def block_size(self) -> int:
        return self.block

    @property
    def magnitudes(self) -> tuple[float, ...]:
        return mx.ELEMENTS[self.element].magnitudes

    @property
    def export_problem(self) -> str | None:
        return f"no inference engine loads weights in {self.name.upper()}: it is for activations and for research"

    def encode(self, x: Float[Array, "*batch n"], key: Key | None = None) -> mx.Codes:
        return mx.encode(x, self._options, key)

    def decode(self, q: mx.Codes, dtype=jnp.bfloat16) -> Float[Array, "*batch n"]:
        return mx.decode(q, self._options, dtype)

    def encode_decode(self, x: Float[Array, "*batch n"], dtype, key: Key | None = None) -> tuple[Float[Array, "*batch n"], mx.Codes]:
        q = self.encode(x, key)
        return self.decode(q, dtype), q

    def parts(self, q: mx.Codes) -> Parts:
        return mx.parts(q, self._options)


@dataclass(frozen=True, repr=False)
class Mxfp8(_Mx):
    """MXFP8 with elements "e4m3" (activations) or "e5m2"."""

    element: str = "e4m3"

    name: ClassVar[str] = "mxfp8"
    elements: ClassVar[tuple[str, ...]] = ("e4m3", "e5m2")


@dataclass(frozen=True, repr=False)
class Mxfp6(_Mx):
    """MXFP6 with elements "e2m3" or "e3m2"."""

    element: str = "e2m3"

    name: ClassVar[str] = "mxfp6"
    elements: ClassVar[tuple[str, ...]] = ("e2m3", "e3m2")
