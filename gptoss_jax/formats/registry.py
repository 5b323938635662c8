"""Formats by name and from plain values."""

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

from gptoss_jax.formats.format import Format
from gptoss_jax.formats.objects import Mxfp4, Mxfp6, Mxfp8, Nvfp4

_FORMATS: dict[str, type] = {cls.name: cls for cls in (Mxfp4, Nvfp4, Mxfp8, Mxfp6)}


def get_format(fmt: str | Format, **options: Any) -> Format:
    """The format itself, or that of a name ("mxfp4", "nvfp4", "mxfp8", "mxfp6") with its options by keyword.

        get_format("mxfp4", scale_rule="even", element_round="sr")

    Raises:
      ValueError: unknown name, option or value.
      TypeError: neither a name nor a format, or options beside a format.
    """
    if isinstance(fmt, str):
        return _made(fmt, options)
    if isinstance(fmt, Format):
        if options:
            raise TypeError(f"options {sorted(options)} go with the name of a format, not with {fmt!r}")
        return fmt
    raise TypeError(f"a format is a name or a Format object, not {fmt!r}")


def format_from_dict(raw: Mapping[str, Any]) -> Format:
    """Inverse of `Format.to_dict`; missing fields take their defaults.

    Raises:
      ValueError: no or unknown name, unknown key or value.
    """
    options = dict(raw)
    name = options.pop("name", None)
    if not isinstance(name, str):
        raise ValueError(f"a format needs a name, one of {', '.join(_FORMATS)}: {dict(raw)!r}")
    return _made(name, options)


def _made(name: str, options: Mapping[str, Any]) -> Format:
    if name not in _FORMATS:
        near = difflib.get_close_matches(name, _FORMATS, n=1, cutoff=0.0)
        raise ValueError(f"unknown format {name!r}; nearest is {near[0]!r}, known are {', '.join(_FORMATS)}")
    cls = _FORMATS[name]
    known = {f.name for f in dataclasses.fields(cls)}
    unknown = sorted(set(options) - known)
    if unknown:
        raise ValueError(f"unknown keys {unknown} for format {name!r}; known are {', '.join(sorted(known))}")
    return cls(**options)
