"""Which layouts can hold what an export is asked for, and why another one cannot."""

from gptoss_jax.checkpoint.hf_layout import Layout
from gptoss_jax.errors import UsageError
from gptoss_jax.formats import Format
from gptoss_jax.model import GptOssConfig
from gptoss_jax.model.config import FULL, SLIDING

LAYOUTS = {"mxfp4": ("hf", "openai"), "bf16": ("hf", "openai"), "nvfp4": ("own", "modelopt", "compressed-tensors")}


def export_layout(config: GptOssConfig, fmt: Format | None, name: str | None) -> Layout:
    """The layout of that name for experts in this format (None: BF16); without a name the first that `LAYOUTS` has for it.

    Raises:
      UsageError: it does not exist for this format, or cannot hold this model, with the reason.
    """
    experts = fmt.name if fmt else "bf16"
    name = name or LAYOUTS[experts][0]
    if name not in LAYOUTS[experts]:
        raise UsageError(f"layout: {name!r} is none for experts in {experts.upper()}; known are {', '.join(LAYOUTS[experts])}")
    problem = {"openai": lambda: _openai_problem(config), "modelopt": lambda: _modelopt_problem(fmt), "compressed-tensors": lambda: _ct_problem(fmt)}
    reason = problem[name]() if name in problem else None
    if reason:
        raise UsageError(f"layout: {name!r} cannot hold this model: {reason}")
    return Layout("openai" if name == "openai" else "hf", experts, name if experts == "nvfp4" else "own")


def _openai_problem(config: GptOssConfig) -> str | None:
    """What OpenAI's reference computes in one way only, because its config has no word for it."""
    if config.rope.truncate:
        return "its RoPE is never truncated, that of this model is"
    if config.rms_norm_eps != 1e-5:
        return f"its rms_norm_eps is 1e-5, not {config.rms_norm_eps}"
    if any(kind != (SLIDING, FULL)[layer % 2] for layer, kind in enumerate(config.layer_types)):
        return "its layers alternate, the first slides; those of this model do not"
    return None


def _modelopt_problem(fmt: Format) -> str | None:
    if not fmt.has_one_global_scale:
        return f"it has one global scale per projection, {fmt} one per expert (per_expert=False, or --granularity tensor, has one)"
    return None


def _ct_problem(fmt: Format) -> str | None:
    if fmt.global_scale != "pow2":
        return f"it stores the reciprocal of the global scale, which is exact for powers of two and not for {fmt}"
    return None
