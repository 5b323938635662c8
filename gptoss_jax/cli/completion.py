"""`gptoss-jax completion`: scripts by which shells complete commands, options and files, made from the signatures of the commands."""

import importlib
import inspect
import typing
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal, NamedTuple

import tyro


class Option(NamedTuple):
    """values: its choices; () is anything, None a switch without a value."""

    flag: str
    values: tuple[str, ...] | None


def completion(shell: Annotated[Literal["bash", "zsh", "fish"], tyro.conf.Positional]) -> None:
    """Prints a completion script. bash and zsh: eval "$(gptoss-jax completion bash)" in ~/.bashrc or ~/.zshrc (with the shell's own name);
    fish: gptoss-jax completion fish > ~/.config/fish/completions/gptoss-jax.fish

    Args:
        shell: that the script is for.
    """
    commands = dict(found())
    print(_fish(commands) if shell == "fish" else _bash(commands, zsh=shell == "zsh"), end="")


def found() -> Iterator[tuple[str, list[Option]]]:
    """(command, its options), commands of two words as "ckpt ls"."""
    from gptoss_jax.cli import COMMANDS

    for name, (module, function, _, _) in COMMANDS.items():
        run = getattr(importlib.import_module(f"gptoss_jax.cli.{module}"), function)
        for command, leaf in [(f"{name} {second}", leaf) for second, leaf in run.items()] if isinstance(run, dict) else [(name, run)]:
            yield command, list(_options(leaf))


def _options(function: Callable) -> Iterator[Option]:
    hints = typing.get_type_hints(function, include_extras=True)
    for name, parameter in inspect.signature(function).parameters.items():
        kind, extras = _without_annotations(hints[name])
        if parameter.kind is parameter.POSITIONAL_ONLY or tyro.conf.Positional in extras:
            continue
        renamed = next((extra.name for extra in extras if getattr(extra, "name", None)), None)
        parts = [part for part in (typing.get_args(kind) if typing.get_origin(kind) is not Literal else [kind]) if part is not type(None)] or [kind]
        choices = tuple(str(value) for part in parts if typing.get_origin(part) is Literal for value in typing.get_args(part))
        yield Option("--" + (renamed or name).replace("_", "-"), None if kind is bool else choices)
    yield Option("--help", None)


def _without_annotations(hint: Any) -> tuple[Any, tuple]:
    return (typing.get_args(hint)[0], hint.__metadata__) if typing.get_origin(hint) is Annotated else (hint, ())


def _words(commands: dict[str, list[Option]]) -> dict[str, list[str]]:
    """First words -> second words, where there are any."""
    words: dict[str, list[str]] = {}
    for command in commands:
        first, *second = command.split()
        words.setdefault(first, []).extend(second)
    return words


def _bash(commands: dict[str, list[Option]], zsh: bool) -> str:
    """Words already there choose the command; before the cursor a flag with choices offers these, `-` the flags, anything else files."""
    words = _words(commands)
    lines = ["autoload -U +X bashcompinit && bashcompinit"] if zsh else []
    lines += [
        "_gptoss_jax() {",
        '  local word="${COMP_WORDS[COMP_CWORD]}" before="${COMP_WORDS[COMP_CWORD-1]}" command="${COMP_WORDS[1]}" options=""',
        "  COMPREPLY=()",
        f'  if [ "$COMP_CWORD" -eq 1 ]; then COMPREPLY=($(compgen -W "{" ".join(words)} --help --version" -- "$word")); return; fi',
        '  case "$command" in',
        *(f'    {first}) if [ "$COMP_CWORD" -eq 2 ]; then COMPREPLY=($(compgen -W "{" ".join(second)} --help" -- "$word")); return; fi'
          '\n      command="$command ${COMP_WORDS[2]}";;' for first, second in words.items() if second),
        "  esac",
        '  case "$command $before" in',
        *(f'    "{command} {option.flag}") COMPREPLY=($(compgen -W "{" ".join(option.values)}" -- "$word")); return;;'
          for command, options in commands.items() for option in options if option.values),
        "  esac",
        '  case "$command" in',
        *(f'    "{command}") options="{" ".join(option.flag for option in options)}";;' for command, options in commands.items()),
        "  esac",
        '  case "$word" in -*) COMPREPLY=($(compgen -W "$options" -- "$word"));; *) COMPREPLY=($(compgen -f -- "$word"));; esac',
        "}",
        "complete -o filenames -F _gptoss_jax gptoss-jax",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def _fish(commands: dict[str, list[Option]]) -> str:
    from gptoss_jax.cli import COMMANDS

    quote = lambda text: "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
    words, lines = _words(commands), []
    for first, second in words.items():
        lines.append(f"complete -c gptoss-jax -n __fish_use_subcommand -f -a {first} -d {quote(COMMANDS[first][2])}")
        if second:
            chosen = f"__fish_seen_subcommand_from {first}; and not __fish_seen_subcommand_from {' '.join(second)}"
            lines.append(f"complete -c gptoss-jax -n {quote(chosen)} -f -a {quote(' '.join(second))}")
    for command, options in commands.items():
        when = quote("; and ".join(f"__fish_seen_subcommand_from {word}" for word in command.split()))
        for option in options:
            value = "" if option.values is None else f" -x -a {quote(' '.join(option.values))}" if option.values else " -r"
            lines.append(f"complete -c gptoss-jax -n {when} -l {option.flag[2:]}{value}")
    return "\n".join(lines) + "\n"
