"""`gptoss-jax data inspect` and `data validate`: what a data set turns into, and what is wrong with it, before anything is trained."""

from pathlib import Path
from typing import Annotated, Any

import tyro


def inspect(
    paths: Annotated[tuple[str, ...], tyro.conf.Positional] = (),
    /,
    config: Path | None = None,
    tokenizer: str | None = None,
    row_length: int | None = None,
    columns: tuple[str, ...] = (),
    split: str | None = None,
    samples: int = 3,
    html: Path | None = None,
    json: bool = False,
) -> int:
    """Shows what training makes of a data set: layout of its columns, token lengths, packing, trained share, repeated, cut and bad rows, samples.

    Args:
        paths: files (.jsonl, .json, .parquet), directories or hub names; without any, the `data` section of the config.
        config: YAML file of a training run, whose settings apply (row length, loss, system message, ...).
        tokenizer: model whose tokenizer is used; default the config's, else "nano".
        row_length: tokens of a row, over the config's.
        columns: names of columns by role, as user=question assistant=answer; roles are user, assistant, system, thinking, messages.
        split: of the paths, where they have several.
        samples: documents to show.
        html: also write a page with the same and more.
        json: print the counts as JSON instead.
    """
    from rich.console import Console

    from gptoss_jax.data.harmony import load_tokenizer
    from gptoss_jax.data.inspection import inspect as inspect_corpus
    from gptoss_jax.data.inspection_html import page
    from gptoss_jax.data.inspection_text import print_inspection
    from gptoss_jax.errors import CorruptError, UsageError
    from gptoss_jax.training.console import Progress
    from gptoss_jax.training.stage import data_pipeline
    from gptoss_jax.training.yaml_config import load_config

    if samples < 0 or (row_length is not None and row_length < 2):
        raise UsageError("--samples must be at least 0, and --row-length at least 2")
    train = load_config(config, () if row_length is None else (f"data.row_length={row_length}",))
    sources, held_out = _sources(paths, columns, split, train.data)
    pipeline = data_pipeline(train.data, load_tokenizer(_tokenizer_directory(tokenizer or train.model or "nano")))
    with Progress().reading() as tick:
        corpus = pipeline.tokenize(sources, tick, keep_bad=True)
        evaluation = pipeline.tokenize(held_out, tick, keep_bad=True) if held_out else None
    if not len(corpus.documents):
        problems = [problem for count in corpus.counts for problem in count.problems]
        raise CorruptError(f"no row can be used; the first: {problems[0]}") if problems else UsageError(f"{', '.join(map(str, sources))}: no rows")
    fraction = None if paths else train.data.eval_fraction
    inspection = inspect_corpus(corpus, evaluation, pipeline, eval_fraction=fraction, split_seed=train.data.split_seed, samples=samples)
    if json:
        _print_json(inspection.to_dict())
    else:
        print_inspection(inspection, Console(highlight=False))
    if html is not None:
        html.write_text(page(inspection, ", ".join(map(str, sources))), encoding="utf-8")
    return 0


def validate(
    paths: Annotated[tuple[str, ...], tyro.conf.Positional] = (),
    /,
    config: Path | None = None,
    columns: tuple[str, ...] = (),
    split: str | None = None,
) -> int:
    """Checks every row and prints all that is wrong, as file:line: reason. Exit code 4 if anything is, 0 if all rows can be used.

    Args:
        paths: files (.jsonl, .json, .parquet), directories or hub names; without any, the data sets of the config.
        config: YAML file of a training run.
        columns: names of columns by role, as user=question assistant=answer; roles are user, assistant, system, thinking, messages.
        split: of the paths, where they have several.
    """
    from collections import Counter

    from gptoss_jax.data.sources import conversations
    from gptoss_jax.errors import CorruptError
    from gptoss_jax.training.yaml_config import load_config

    train, held_out = _sources(paths, columns, split, load_config(config).data)
    clean = True
    for source in (*train, *held_out):
        layouts, bad = Counter(), 0
        try:
            for conversation in conversations(source):
                if conversation.problem is None:
                    layouts[conversation.layout] += 1
                else:
                    print(conversation.problem)
                    bad += 1
        except CorruptError as error:
            print(error)
            bad += 1
        found = ", ".join(f"{name}: {n:,}" for name, n in layouts.items()) or "none"
        print(f"{source}: {sum(layouts.values()):,} conversations ({found}), {f'{bad:,} bad' if bad else 'clean'}")
        clean = clean and not bad and bool(layouts)
    return 0 if clean else 4


COMMANDS = {"inspect": inspect, "validate": validate}


def _sources(paths: tuple[str, ...], columns: tuple[str, ...], split: str | None, data: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """(sources, held-out sources): the paths, or those of the config."""
    from gptoss_jax.data.sources import Source
    from gptoss_jax.errors import UsageError

    if not paths:
        if columns or split:
            raise UsageError("--columns and --split belong to paths; in a config they stand in the list under data.train")
        if not data.train:
            raise UsageError("give a path, or a --config that sets data.train")
        return data.sources("train"), data.sources("eval")
    names = dict(column.partition("=")[::2] for column in columns)
    if not all(names.values()):
        raise UsageError(f"--columns {' '.join(columns)}: give them as ROLE=COLUMN, as user=question assistant=answer")
    try:
        return tuple(Source(path, split=split, columns=names or None) for path in paths), ()
    except ValueError as error:
        raise UsageError(f"--columns: {error}") from None


def _tokenizer_directory(model: str) -> Path:
    if (Path(model) / "tokenizer.json").is_file():
        return Path(model)
    from gptoss_jax.checkpoint.models import look_at

    return look_at(model)[1]


def _print_json(values: dict[str, Any]) -> None:
    import json

    print(json.dumps(values, indent=1, ensure_ascii=False))
