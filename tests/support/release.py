"""The release's own files, found in packages: chat template (trl), BPE ranks (bpe-openai)."""

import datetime
import gzip
import hashlib
import importlib.util
from pathlib import Path

import pytest
import transformers.utils.chat_template_utils as chat_template_utils

TEMPLATE_SHA256 = "a4c9919cbbd4acdd51ccffe22da049264b1b73e59055fa58811a99efbd7c8146"
TODAY = datetime.date(2026, 1, 31)


def _in_package(name: str, path: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None:
        pytest.skip(f"the package {name} is not installed: it carries {path}")
    return Path(spec.origin).parent / path


def chat_template() -> str:
    text = _in_package("trl", "chat_templates/gptoss.jinja").read_text()
    assert hashlib.sha256(text.encode()).hexdigest() == TEMPLATE_SHA256, "trl carries another template than that of openai/gpt-oss-20b@6cee5e8"
    return text


def ranks_file(directory: Path) -> Path:
    """`o200k_base.tiktoken`, unpacked into `directory`."""
    path = directory / "o200k_base.tiktoken"
    path.write_bytes(gzip.decompress(_in_package("bpe_openai", "data/o200k_base.tiktoken.gz").read_bytes()))
    return path


def pin_date(monkeypatch: pytest.MonkeyPatch) -> None:
    """The template asks transformers for the day on which it runs."""

    class Pinned(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(TODAY.year, TODAY.month, TODAY.day)

    monkeypatch.setattr(chat_template_utils, "datetime", Pinned)


def apply(tokenizer, template: str, row: dict, *, prompt: bool = False, tokenize: bool = False, **options):
    """The template's text of a row, or its ids."""
    effort = {"reasoning_effort": row["reasoning_effort"]} if "reasoning_effort" in row else {}
    out = tokenizer.apply_chat_template(
        row["messages"], tools=row.get("tools"), chat_template=template, add_generation_prompt=prompt, tokenize=tokenize, **effort, **options
    )
    return out["input_ids"] if tokenize else out
