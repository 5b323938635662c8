"""Shape and constants of a gpt-oss model, under the names of its `config.json`.

`GptOssConfig.from_dict` reads both spellings of the RoPE settings (`rope_scaling` + `rope_theta`, as released; `rope_parameters`, as
transformers 5 writes) and refuses values that this architecture does not define, instead of computing something else in silence.
`to_dict` writes the released spelling, which every client reads (older TensorRT-LLM and vLLM know no other).
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from gptoss_jax.errors import CorruptError

SLIDING = "sliding_attention"
FULL = "full_attention"

# What the architecture fixes. A config.json that says otherwise describes another model.
_FIXED = {
    "model_type": ("gpt_oss",),
    "hidden_act": ("silu",),
    "attention_bias": (True,),
    "attention_dropout": (0, 0.0),
    "tie_word_embeddings": (False,),
}
# Keys of the release that carry no arithmetic of the forward pass; `router_aux_loss_coef` (0.9 in the release) is deliberately not read:
# a load-balancing loss is a choice of the training run.
_IGNORED = {
    "architectures", "bos_token_id", "decoder_start_token_id", "dtype", "eos_token_id", "experts_per_token", "initial_context_length",
    "initializer_range", "output_router_logits", "pad_token_id", "quantization_config", "router_aux_loss_coef", "swiglu_limit",
    "torch_dtype", "transformers_version", "unsloth_fixed", "use_cache", "_name_or_path", "swiglu_alpha",
}  # fmt: skip
_ROPE_KEYS = {
    "rope_type", "type", "factor", "beta_fast", "beta_slow", "truncate", "original_max_position_embeddings", "rope_theta", "attention_factor",
}  # fmt: skip


@dataclass(frozen=True)
class RopeConfig:
    """YaRN rotary embedding (arXiv 2309.00071). `truncate=False` keeps the correction range fractional, as the release demands."""

    rope_theta: float = 150000.0
    factor: float = 32.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = False
    original_max_position_embeddings: int = 4096

    def __post_init__(self):
        if self.factor < 1 or self.rope_theta <= 1 or self.beta_fast <= self.beta_slow:
            raise CorruptError(f"RoPE settings out of range: {self}")


@dataclass(frozen=True)
class GptOssConfig:
    """All numbers that define a gpt-oss model. Defaults are those that 20b and 120b share."""

    vocab_size: int = 201088
    hidden_size: int = 2880
    intermediate_size: int = 2880
    num_hidden_layers: int = 24
    num_local_experts: int = 32
    num_experts_per_tok: int = 4
    num_attention_heads: int = 64
    num_key_value_heads: int = 8
    head_dim: int = 64
    sliding_window: int = 128
    layer_types: tuple[str, ...] = ()
    max_position_embeddings: int = 131072
    rms_norm_eps: float = 1e-5
    swiglu_limit: float = 7.0
    rope: RopeConfig = RopeConfig()

    def __post_init__(self):
        if not self.layer_types:
            alternating = tuple(SLIDING if i % 2 == 0 else FULL for i in range(self.num_hidden_layers))
            object.__setattr__(self, "layer_types", alternating)
        for name in (
            "vocab_size hidden_size intermediate_size num_hidden_layers num_local_experts num_experts_per_tok num_attention_heads "
            "num_key_value_heads head_dim sliding_window"
        ).split():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise CorruptError(f"config: {name} must be a positive integer, not {value!r}")
        if len(self.layer_types) != self.num_hidden_layers:
            raise CorruptError(f"config: layer_types has {len(self.layer_types)} entries for num_hidden_layers = {self.num_hidden_layers}")
        unknown = sorted(set(self.layer_types) - {SLIDING, FULL})
        if unknown:
            raise CorruptError(f"config: unknown layer_types {unknown}; known are {SLIDING!r} and {FULL!r}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise CorruptError(
                f"config: num_attention_heads = {self.num_attention_heads} is not a multiple of num_key_value_heads = {self.num_key_value_heads}"
            )
        if self.num_experts_per_tok > self.num_local_experts:
            raise CorruptError(f"config: num_experts_per_tok = {self.num_experts_per_tok} exceeds num_local_experts = {self.num_local_experts}")
        if self.head_dim % 2:
            raise CorruptError(f"config: head_dim = {self.head_dim} must be even (rotary halves)")

    # ---- layers -------------------------------------------------------------------------------------------------------------
    @cached_property
    def period(self) -> int:
        """Length of the smallest pattern that, repeated, spells `layer_types` up to a tail shorter than itself (2 for the releases)."""
        kinds = self.layer_types
        return next(p for p in range(1, len(kinds) + 1) if all(kinds[i] == kinds[i % p] for i in range(len(kinds))))

    @property
    def repeats(self) -> int:
        """How often the period is scanned."""
        return self.num_hidden_layers // self.period

    @property
    def num_tail_layers(self) -> int:
        """Layers after the last whole period; they are unrolled."""
        return self.num_hidden_layers - self.repeats * self.period

    # ---- config.json --------------------------------------------------------------------------------------------------------
    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> "GptOssConfig":
        """Reads a parsed `config.json`.

        Raises:
          CorruptError: a key or value that this architecture does not define.
        """
        raw = dict(raw)
        for key, allowed in _FIXED.items():
            if key in raw and raw[key] not in allowed:
                raise CorruptError(f"config: {key} = {raw[key]!r} is not gpt-oss (expected {allowed[0]!r})")
        fields = {f.name for f in dataclasses.fields(cls)} - {"rope"}
        known = fields | set(_FIXED) | _IGNORED | {"rope_scaling", "rope_parameters", "rope_theta"}
        unknown = sorted(set(raw) - known)
        if unknown:
            raise CorruptError(f"config: unknown keys {unknown}")
        required = sorted(fields - {"layer_types", "max_position_embeddings", "rms_norm_eps", "swiglu_limit"} - set(raw))
        if required:
            raise CorruptError(f"config: missing keys {required}")
        values = {name: raw[name] for name in fields if name in raw and raw[name] is not None}
        if "layer_types" in values:
            values["layer_types"] = tuple(values["layer_types"])
        return cls(**values, rope=_read_rope(raw))

    def to_dict(self) -> dict[str, Any]:
        """The keys of `config.json` that describe the architecture, in the released spelling."""
        rope = dataclasses.asdict(self.rope)
        theta = rope.pop("rope_theta")
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "rope"}
        return {
            "architectures": ["GptOssForCausalLM"],
            "model_type": "gpt_oss",
            **fields,
            "layer_types": list(self.layer_types),
            "attention_bias": True,
            "attention_dropout": 0.0,
            "hidden_act": "silu",
            "tie_word_embeddings": False,
            "experts_per_token": self.num_experts_per_tok,
            "initial_context_length": self.rope.original_max_position_embeddings,
            "rope_theta": theta,
            "rope_scaling": {"rope_type": "yarn", **rope},
        }

    @classmethod
    def gpt_oss_20b(cls) -> "GptOssConfig":
        return cls()

    @classmethod
    def gpt_oss_120b(cls) -> "GptOssConfig":
        return cls(num_hidden_layers=36, num_local_experts=128)


def _read_rope(raw: Mapping[str, Any]) -> RopeConfig:
    """YaRN settings from `rope_parameters` (transformers 5) or `rope_scaling` + `rope_theta` (the release)."""
    settings = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    if not settings:
        raise CorruptError("config: neither rope_scaling nor rope_parameters is present; gpt-oss needs YaRN settings")
    kind = settings.get("rope_type", settings.get("type"))
    if kind != "yarn":
        raise CorruptError(f"config: rope_type {kind!r} is not supported; gpt-oss uses 'yarn'")
    unknown = sorted(set(settings) - _ROPE_KEYS)
    if unknown:
        raise CorruptError(f"config: unknown RoPE keys {unknown}")
    if settings.get("attention_factor") is not None:
        raise CorruptError("config: a fixed RoPE attention_factor is not gpt-oss; it follows from factor")
    theta = settings.get("rope_theta", raw.get("rope_theta"))
    if theta is None:
        raise CorruptError("config: rope_theta is missing")
    try:
        return RopeConfig(
            rope_theta=float(theta),
            factor=float(settings["factor"]),
            beta_fast=float(settings.get("beta_fast") or 32.0),
            beta_slow=float(settings.get("beta_slow") or 1.0),
            # transformers reads a missing `truncate` as true
            truncate=bool(settings.get("truncate", True)),
            original_max_position_embeddings=int(settings["original_max_position_embeddings"]),
        )
    except KeyError as missing:
        raise CorruptError(f"config: RoPE setting {missing.args[0]!r} is missing") from None
