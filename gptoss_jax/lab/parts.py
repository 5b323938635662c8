"""From the names in an experiment file to objects: formats, estimators, quantizers, tools, exports. A part is a name, or {name: ..., option: ...}."""

import dataclasses
import difflib
from typing import Any

from gptoss_jax.formats import Format, format_from_dict
from gptoss_jax.lab.quantizer import FakeQuant, Quantizer, Unquantized
from gptoss_jax.lab.trainer import Tool
from gptoss_jax.quant import Estimator, get_estimator

# names of experiment files -> classes; others may be added before an experiment is loaded
LEARNED_SCALES: dict[str, type] = {}
TOOLS: dict[str, type] = {}


def parse_format(spec: str | dict[str, Any]) -> Format:
    """`mxfp4`, or {name: mxfp4, scale_rule: even}. ValueError for what is none."""
    return format_from_dict({"name": spec} if isinstance(spec, str) else spec)


def parse_estimator(spec: str | dict[str, Any]) -> Estimator:
    """`dge`, or {name: dge, k: 5}. ValueError for what is none."""
    name, options = _split(spec)
    try:
        return dataclasses.replace(get_estimator(name), **options)
    except TypeError as error:
        raise ValueError(f"estimator {name!r}: {error}") from None


def quantizer_of(arm: Any) -> Quantizer:
    """What an arm trains through."""
    if arm.format is None:
        return Unquantized()
    fmt = parse_format(arm.format)
    if arm.learned_scale is not None:
        return _make(LEARNED_SCALES, "learned scale", arm.learned_scale, format=fmt)
    return FakeQuant(fmt, parse_estimator(arm.estimator))


def tools_of(arm: Any) -> tuple[Tool, ...]:
    return tuple(_make(TOOLS, "tool", spec) for spec in arm.tools)


def export_of(arm: Any) -> str | Format:
    """`same`, `bf16`, or a format for the masters."""
    return arm.export if arm.export in ("same", "bf16") else parse_format(arm.export)


def _split(spec: str | dict[str, Any]) -> tuple[str, dict[str, Any]]:
    if isinstance(spec, str):
        return spec, {}
    if not isinstance(spec.get("name"), str):
        raise ValueError(f"{spec!r} has no name")
    return spec["name"], {key: value for key, value in spec.items() if key != "name"}


def _make(known: dict[str, type], what: str, spec: str | dict[str, Any], **given: Any) -> Any:
    name, options = _split(spec)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        raise ValueError(f"unknown {what} {name!r}; " + (f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known) or 'none'}"))
    try:
        return known[name](**given, **options)
    except TypeError as error:
        raise ValueError(f"{what} {name!r}: {error}") from None
