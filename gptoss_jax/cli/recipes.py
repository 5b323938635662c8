"""`gptoss-jax recipes ls|cp`: the configs that come along."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import tyro


def shipped() -> Path:
    """The folder of configs: of the installed package, or of the checkout."""
    import gptoss_jax

    package = Path(gptoss_jax.__file__).parent
    return next(folder for folder in (package / "configs", package.parent / "configs") if folder.is_dir())


def ls() -> None:
    """Lists the configs that come along: name, command that takes it, and what it is for."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for title in ("name", "for"):
        table.add_column(title, no_wrap=True)
    table.add_column("what")
    for file in sorted(shipped().rglob("*.yaml")):
        table.add_row(file.relative_to(shipped()).with_suffix("").as_posix(), _command(file), _first_sentence(file))
    Console(highlight=False, markup=False).print(table)


def cp(name: Annotated[str, tyro.conf.Positional], file: Annotated[Path, tyro.conf.Positional]) -> None:
    """Copies a config to own and change it. Files that it names (what it extends, tasks) go beside the copy.

    Args:
        name: as `gptoss-jax recipes ls` lists it.
        file: where to; an existing file is not overwritten.
    """
    from difflib import get_close_matches

    from gptoss_jax.errors import UsageError

    known = {path.relative_to(shipped()).with_suffix("").as_posix(): path for path in sorted(shipped().rglob("*.yaml"))}
    source = known.get(name.removesuffix(".yaml"))
    if source is None:
        near = get_close_matches(name, known, n=1, cutoff=0.4)
        raise UsageError(f"no config {name!r}; " + (f"did you mean {near[0]!r}?" if near else "`gptoss-jax recipes ls` lists them"))
    if file.exists():
        raise UsageError(f"{file} exists already")
    copies = {file.parent / os.path.relpath(path, source.parent): path for path in _named(source)}
    if file in copies:
        raise UsageError(f"{file.name} is the name of a file that {name} refers to; choose another")
    copies = {file: source, **copies}
    for target, original in copies.items():
        if target.exists() and target.read_bytes() != original.read_bytes():
            raise UsageError(f"{target} exists already and is not the file of that name that {name} refers to")
    for target, original in copies.items():
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(original.read_bytes())
        print(target)


def _named(file: Path) -> Iterator[Path]:
    """Files beside a config that it names, and those that they name."""
    import yaml

    def texts(value: Any) -> Iterator[str]:
        if isinstance(value, dict | list):
            for item in value.values() if isinstance(value, dict) else value:
                yield from texts(item)
        elif isinstance(value, str):
            yield value

    for text in texts(yaml.safe_load(file.read_text(encoding="utf-8"))):
        if text.endswith(".yaml") and (file.parent / text).is_file():
            yield file.parent / text
            yield from _named(file.parent / text)


def _command(file: Path) -> str:
    folder = file.parent.name
    if folder in ("lab", "tasks"):
        return "lab run" if folder == "lab" else "eval --task"
    from gptoss_jax.strict_yaml import read_mapping

    values = read_mapping(file)[0]
    return "recipe" if "qat" in values else "qat" if "quant" in values else "sft"


def _first_sentence(file: Path) -> str:
    """Of the comment at the head, without what stands in brackets."""
    lines = []
    for line in file.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#") or line.startswith("#  "):
            break
        lines.append(line.removeprefix("#").strip())
    text = " ".join(lines)
    return text.split(". ")[0].split(": ")[0].rstrip(".")


COMMANDS = {"ls": ls, "cp": cp}
