"""From the names in an experiment file to objects: formats, estimators, quantizers, tools, exports. A part is a name, or {name: ..., option: ...}."""

import dataclasses
import difflib
from typing import Any

from gptoss_jax.formats import Format, format_from_dict
from gptoss_jax.lab.learned_scale import DualLsq, Lsq
from gptoss_jax.lab.oscillation import Dampening, EdgeReset, IterativeFreezing, OscillationTracker, OsciReset, QEma, TrackEma
from gptoss_jax.lab.quantizer import FakeQuant, Quantizer, Unquantized
from gptoss_jax.lab.surrogates import PseudoNoise, SoftRounding
from gptoss_jax.lab.trainer import Tool
from gptoss_jax.quant.estimators import estimator_from_dict

# names of experiment files -> classes; others may be added before an experiment is loaded
QUANTIZERS: dict[str, type] = {"lsq": Lsq, "dual_lsq": DualLsq, "soft_rounding": SoftRounding, "pseudo_noise": PseudoNoise, "q_ema": QEma}
TOOLS: dict[str, type] = {
    "tracker": OscillationTracker, "dampening": Dampening, "osci_reset": OsciReset, "edge_reset": EdgeReset, "freezing": IterativeFreezing,
    "track_ema": TrackEma,
}  # fmt: skip


def parse_format(spec: str | dict[str, Any]) -> Format:
    """`mxfp4`, or {name: mxfp4, scale_rule: even}. ValueError for what is none."""
    return format_from_dict({"name": spec} if isinstance(spec, str) else spec)


def quantizer_of(arm: Any) -> Quantizer:
    """What an arm trains through. `steps` of a quantizer that anneals are those of the arm."""
    if arm.format is None:
        return Unquantized()
    fmt = parse_format(arm.format)
    if arm.quantizer is not None:
        return _make(QUANTIZERS, "quantizer", arm.quantizer, {"format": fmt, "steps": max(arm.steps, 1)})
    estimator = estimator_from_dict({"name": arm.estimator} if isinstance(arm.estimator, str) else arm.estimator)
    return FakeQuant(fmt, estimator, arm.backward_weight)


def tools_of(arm: Any) -> tuple[Tool, ...]:
    """Optax transformations around AdamW. A tool that looks at cells does so under the arm's format."""
    given = {"format": parse_format(arm.format)} if arm.format is not None else {}
    return tuple(_make(TOOLS, "tool", spec, given) for spec in arm.tools)


def parse_export(spec: str | dict[str, Any]) -> str | Format:
    """`same`, `bf16`, or a format for the masters.

    Raises:
      ValueError: what is none, or a format that draws at random without a seed.
    """
    if spec in ("same", "bf16"):
        return spec
    fmt = parse_format(spec)
    if fmt.stochastic and fmt.seed is None:
        raise ValueError(f"export = {spec!r}: a format that rounds at random needs a seed, from which the file can be made again")
    return fmt


def _make(known: dict[str, type], what: str, spec: str | dict[str, Any], given: dict[str, Any]) -> Any:
    """The object of a part: options of the file over those of `given` that its class has."""
    options = {"name": spec} if isinstance(spec, str) else dict(spec)
    name = options.pop("name", None)
    if name not in known:
        near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
        raise ValueError(f"unknown {what} {name!r}; " + (f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"))
    fields = {field.name for field in dataclasses.fields(known[name])}
    if unknown := sorted(options.keys() - fields):
        raise ValueError(f"{what} {name!r} has no option {unknown[0]!r}; it has {', '.join(sorted(fields)) or 'none'}")
    needed = {key: value for key, value in given.items() if key in fields and key not in options}
    try:
        return known[name](**needed, **options)
    except TypeError as error:
        raise ValueError(f"{what} {name!r}: {error}") from None
