"""Small number formats: arrays to codes and bytes, and back. Knows nothing about models."""

from gptoss_jax.formats import mx, mxfp4, nvfp4
from gptoss_jax.formats.format import Format
from gptoss_jax.formats.objects import Mxfp4, Mxfp6, Mxfp8, Nvfp4
from gptoss_jax.formats.parts import Parts
from gptoss_jax.formats.registry import format_from_dict, get_format

__all__ = ["Format", "Mxfp4", "Mxfp6", "Mxfp8", "Nvfp4", "Parts", "format_from_dict", "get_format", "mx", "mxfp4", "nvfp4"]
