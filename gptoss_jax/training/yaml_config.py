"""Strict YAML -> `TrainConfig`: files, `extends:`, dotted overrides, and the resolved dump.

PyYAML's own loader takes the last of two equal keys, reads 1e-5 as text, `no` as false, 010 as 8 and 12:30:45 as 45045. Here scalars follow YAML 1.2
(true/false/null, decimal integers, floats with or without a point), equal keys, anchors, tags and files over 1 MB are refused, with the line.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from gptoss_jax.errors import UsageError
from gptoss_jax.training.config import TrainConfig, parse

MAX_BYTES = 1_000_000


class _Loader(yaml.SafeLoader):
    """SafeLoader with the scalars of YAML 1.2 and without anchors."""

    yaml_implicit_resolvers: dict = {}  # noqa: RUF012  (PyYAML wants a class attribute; the base class has its own)

    def compose_node(self, parent, index):
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise yaml.composer.ComposerError(None, None, "anchors and aliases are not allowed", event.start_mark)
        return super().compose_node(parent, index)


_DIGITS = list("-+0123456789.")
_Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"^(?:null|~|)$"), ["n", "~", ""])
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|false)$"), ["t", "f"])
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?(?:0|[1-9][0-9]*)$"), _DIGITS)
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"^[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?$"), _DIGITS)


def parse_yaml(text: str, where: str) -> tuple[Any, dict[tuple, int]]:
    """Plain values, and the line of every key path.

    Raises:
      UsageError: not YAML, or YAML that this project does not accept.
    """
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        lines: dict[tuple, int] = {}
        _check_keys(node, (), lines, where)
        return (None if node is None else loader.construct_document(node)), lines
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UsageError(f"{where}{line}: {error.problem}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UsageError(f"{where}: {str(error).splitlines()[0]}") from None
    finally:
        loader.dispose()


def _check_keys(node: yaml.Node | None, path: tuple, lines: dict[tuple, int], where: str) -> None:
    if isinstance(node, yaml.SequenceNode):
        for i, child in enumerate(node.value):
            _check_keys(child, (*path, i), lines, where)
    if not isinstance(node, yaml.MappingNode):
        return
    for key, child in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode) or not key.tag.endswith(":str"):
            raise UsageError(f"{where}:{line}: keys must be names")
        here = (*path, key.value)
        if here in lines:
            raise UsageError(f"{where}:{line}: key {'.'.join(map(str, here))!r} appears a second time; first in line {lines[here]}")
        lines[here] = line
        _check_keys(child, here, lines, where)


def _read(path: Path, seen: tuple[Path, ...] = ()) -> tuple[dict[str, Any], dict[tuple, int]]:
    """Values of a file over those of the files that it extends. Lines are of `path` itself."""
    if path.resolve() in seen:
        raise UsageError(f"{path}: extends itself through {' -> '.join(p.name for p in seen)}")
    try:
        if path.stat().st_size > MAX_BYTES:
            raise UsageError(f"{path}: larger than {MAX_BYTES} bytes, so this is no config")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or 'not UTF-8'})") from None
    values, lines = parse_yaml(text, str(path))
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise UsageError(f"{path}: a config is a mapping of keys, not {type(values).__name__}")
    base = values.pop("extends", None)
    if base is None:
        return values, lines
    if not isinstance(base, str):
        raise UsageError(f"{path}:{lines[('extends',)]}: extends must be one file name")
    below, _ = _read(path.parent / base, (*seen, path.resolve()))
    return merge(below, values), lines


def merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Values of `above` over `below`, section by section. A section of another `format` (quant) replaces the whole section."""
    out = dict(below)
    for key, value in above.items():
        old = out.get(key)
        same_kind = isinstance(old, dict) and isinstance(value, dict) and old.get("format") == value.get("format", old.get("format"))
        out[key] = merge(old, value) if same_kind else value
    return out


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Plain values of a file and of those it extends.

    Raises:
      UsageError: unreadable, or YAML that is not accepted here.
    """
    return _read(Path(path))[0]


def _override(text: str) -> dict[str, Any]:
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
    values, lines = _read(Path(path)) if path is not None else ({}, {})
    for text in overrides:
        values = merge(values, _override(text))
        # a bad key is looked for in the file first; one that an override brought in is not there
        lines = {key: line for key, line in lines.items() if ".".join(map(str, key)) != text.partition("=")[0].strip()}
    return parse(values, str(path) if path is not None else "config", lines)


def dump_config(config: TrainConfig) -> str:
    """The resolved config as YAML that `load_config` reads back to an equal value."""
    return yaml.safe_dump(config.to_dict(), sort_keys=False, allow_unicode=True)
