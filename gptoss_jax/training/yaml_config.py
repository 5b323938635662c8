"""Strict YAML -> `TrainConfig`: a file over those that it extends, dotted overrides, and the resolved dump."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gptoss_jax.errors import UsageError
from gptoss_jax.strict_yaml import dump_yaml, merge, parse_yaml, read_mapping
from gptoss_jax.training.config import TrainConfig, parse


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Plain values of a file and of those it extends.

    Raises:
      UsageError: unreadable, or YAML that is not accepted here.
    """
    return read_mapping(Path(path))[0]


def parse_override(text: str) -> dict[str, Any]:
    """`optimizer.learning_rate=1e-4` as nested values."""
    path, sign, value = text.partition("=")
    keys = path.strip().split(".")
    if not sign or not all(keys):
        raise UsageError(f"override {text!r} does not have the form section.key=value")
    nested, _ = parse_yaml(value, f"override {path}")
    for key in reversed(keys):
        nested = {key: nested}
    return nested


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> TrainConfig:
    """Defaults < the file that `extends:` names < the file < overrides.

    Raises:
      UsageError: anything that is not a valid config, in one line with file, line and key.
    """
    values, lines = read_mapping(Path(path)) if path is not None else ({}, {})
    for text in overrides:
        values = merge(values, parse_override(text))
        # a bad key is looked for in the file first; one that an override brought in is not there
        lines = {key: line for key, line in lines.items() if ".".join(map(str, key)) != text.partition("=")[0].strip()}
    return parse(values, str(path) if path is not None else "config", lines)


def dump_config(config: TrainConfig) -> str:
    """The resolved config as YAML that `load_config` reads back to an equal value."""
    return dump_yaml(config.to_dict())
