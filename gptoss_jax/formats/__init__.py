"""4-bit number formats: arrays to codes and bytes, and back. Knows nothing about models."""

from gptoss_jax.formats import mxfp4, nvfp4
from gptoss_jax.formats.registry import Format, Mxfp4, Nvfp4, format_from_dict, get_format

__all__ = ["Format", "Mxfp4", "Nvfp4", "format_from_dict", "get_format", "mxfp4", "nvfp4"]
