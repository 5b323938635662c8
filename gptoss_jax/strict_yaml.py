"""Strict YAML: plain values with the line of every key, `extends:`, and errors that name file, line and nearest key.

PyYAML's own loader takes the last of two equal keys, reads 1e-5 as text, `no` as false, 010 as 8 and 12:30:45 as 45045. Here scalars follow YAML 1.2
(true/false/null, decimal integers, floats with or without a point), equal keys, anchors, tags and files over 1 MB are refused, with the line.
"""

import json
import re
from pathlib import Path
from typing import Any

import yaml

from gptoss_jax.errors import UsageError
from gptoss_jax.secrets import holds_secret

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


class _Dumper(yaml.SafeDumper):
    """Quotes text that YAML 1.1 or the loader above would read as something else: `no` and `1e5`."""

    yaml_implicit_resolvers: dict = {  # noqa: RUF012
        first: [*yaml.SafeDumper.yaml_implicit_resolvers.get(first, []), *_Loader.yaml_implicit_resolvers.get(first, [])]
        for first in yaml.SafeDumper.yaml_implicit_resolvers.keys() | _Loader.yaml_implicit_resolvers.keys()
    }


def dump_yaml(values: Any) -> str:
    """YAML that `parse_yaml` reads back to equal values, which are those of JSON."""
    # PyYAML writes these ends of lines as they are and reads them as spaces; escaped they come back
    ends = re.search("[\x85\u2028\u2029]", json.dumps(values, ensure_ascii=False))
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=not ends)


def parse_yaml(text: str, where: str) -> tuple[Any, dict[tuple, int]]:
    """Plain values, and the line of every key path.

    Raises:
      UsageError: not YAML, or YAML that this project does not accept.
    """
    loader = None
    try:
        loader = _Loader(text)  # looks for characters that YAML forbids, as NUL
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
        if loader is not None:
            loader.dispose()


def _check_keys(node: yaml.Node | None, path: tuple, lines: dict[tuple, int], where: str) -> None:
    if isinstance(node, yaml.SequenceNode):
        for i, child in enumerate(node.value):
            _check_keys(child, (*path, i), lines, where)
    if isinstance(node, yaml.ScalarNode) and holds_secret(node.value):
        name = ".".join(map(str, path)) or "the value"
        line = node.start_mark.line + 1
        raise UsageError(f"{where}:{line}: {name} holds a credential, and configs are copied into runs: put it into an environment variable")
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


def read_mapping(path: Path, seen: tuple[Path, ...] = ()) -> tuple[dict[str, Any], dict[tuple, int]]:
    """Values of a file over those of the files that it extends, and the line of each key path in `path` itself.

    Raises:
      UsageError: unreadable, or YAML that is not accepted here.
    """
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
    below, _ = read_mapping(path.parent / base, (*seen, path.resolve()))
    return merge(below, values), lines


def merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Values of `above` over `below`, section by section. A section of another `format` (quant) replaces the whole section."""
    out = dict(below)
    for key, value in above.items():
        old = out.get(key)
        same_kind = isinstance(old, dict) and isinstance(value, dict) and old.get("format") == value.get("format", old.get("format"))
        out[key] = merge(old, value) if same_kind else value
    return out
