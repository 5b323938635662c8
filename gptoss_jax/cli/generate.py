"""`gptoss-jax generate`: answers to prompts of the command line or of a file."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

if TYPE_CHECKING:
    from gptoss_jax.data import System

Effort = Literal["low", "medium", "high", "none"]
RELEASE_VOCABULARY = 201_088


def generate(
    checkpoint: Annotated[str, tyro.conf.Positional],
    prompt: str | None = None,
    prompts: Path | None = None,
    developer: str | None = None,
    reasoning_effort: Effort | None = None,
    raw: bool = False,
    max_new_tokens: int = 512,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int = 32,
    dtype: Literal["float32", "bfloat16"] = "bfloat16",
    packed: bool = False,
    out: Path | None = None,
) -> None:
    """Writes what a model answers, thoughts and answer apart. A QAT checkpoint answers through the quantization that it was trained with.

    Args:
        checkpoint: HF directory (MXFP4 or BF16), OpenAI's original layout, training checkpoint, hub id, or "nano".
        prompt: what the user says.
        prompts: JSONL instead, one prompt a line: a string, {"prompt": "..."}, or {"messages": [...]}, without its last message if that is the
            assistant's.
        developer: instructions of the developer message, where the row has none.
        reasoning_effort: writes the release's system message with it and today's date; "none" writes none. By default "medium" for models with the
            release's vocabulary, "none" for others.
        raw: continue the text itself, without harmony.
        max_new_tokens: at most so many for each prompt.
        temperature: 0 takes the most probable token.
        top_k: draw from so many of the most probable tokens.
        top_p: draw from the fewest tokens that have this probability together.
        seed: of all draws; a prompt's draws do not depend on the others.
        batch_size: prompts at a time.
        dtype: of weights, activations and cache.
        packed: keep the experts of an MXFP4 checkpoint as 4-bit codes in memory: less memory; on a CPU slower.
        out: also write the answers as JSONL.
    """
    from gptoss_jax.errors import UsageError
    from gptoss_jax.evaluation.generate import stop_ids
    from gptoss_jax.evaluation.sampling import Sampling

    if (prompt is None) == (prompts is None):
        raise UsageError("give --prompt TEXT or --prompts FILE.jsonl")
    sampling = Sampling(temperature, top_k, top_p, seed)
    rows = [prompt] if prompts is None else read_prompts(prompts)
    if not raw:
        rows = [conversation(row, developer, where=f"{prompts}:{i}" if prompts else "--prompt") for i, row in enumerate(rows, 1)]
    elif not all(isinstance(row, str) for row in rows):
        raise UsageError("--raw continues text: every prompt must be a string")
    model, tokenizer, generator = open_model(checkpoint, dtype, packed, batch_size)
    if raw:
        ids = [tokenizer(row, add_special_tokens=False)["input_ids"] for row in rows]
        texts = tokenizer.batch_decode(generator.generate(ids, max_new_tokens, stop_ids(tokenizer), sampling), skip_special_tokens=False)
        results = [{"text": text} for text in texts]
    else:
        system = system_message(model.config.vocab_size, reasoning_effort)
        answers = generator.answer(rows, tokenizer, system=system, max_new_tokens=max_new_tokens, sampling=sampling)
        names = ("analysis", "commentary", "final", "stopped")
        results = [{**{name: getattr(answer, name) for name in names}, "calls": [call._asdict() for call in answer.calls]} for answer in answers]
    for i, (row, result) in enumerate(zip(rows, results)):
        show(row, result, number=i + 1 if len(rows) > 1 else None)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        keys = [{"prompt": row} if raw else {"messages": row} for row in rows]
        out.write_text("".join(json.dumps({**key, **result}, ensure_ascii=False) + "\n" for key, result in zip(keys, results)))


def open_model(checkpoint: str, dtype: str, packed: bool, batch_size: int = 1) -> tuple[Any, Any, Any]:
    """(model, tokenizer, generator)."""
    import jax.numpy as jnp

    from gptoss_jax.checkpoint.models import load_model
    from gptoss_jax.data import load_tokenizer
    from gptoss_jax.evaluation.generate import Generator

    model = load_model(checkpoint, jnp.dtype(dtype), packed=packed, apart=True)
    generator = Generator(model.config, model.params, dtype, expert_quant=model.expert_quant(jnp.dtype(dtype)), batch_size=batch_size)
    return model, load_tokenizer(model.directory), generator


def system_message(vocab_size: int, effort: str | None) -> "System | None":
    """The release's, dated today; None for models that never saw one."""
    import datetime

    from gptoss_jax.data import System

    effort = effort or ("medium" if vocab_size == RELEASE_VOCABULARY else "none")
    return None if effort == "none" else System(datetime.date.today(), effort)


def read_prompts(path: Path) -> list[Any]:
    """The rows of a JSONL file; {"prompt": text} counts as its text."""
    from gptoss_jax.errors import CorruptError, UsageError

    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read as UTF-8 text ({error})") from None
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise CorruptError(f"{path}:{number}: not JSON ({error})") from None
        row = row.get("prompt", row) if isinstance(row, dict) else row
        if not isinstance(row, str) and not (isinstance(row, dict) and isinstance(row.get("messages"), list)):
            raise CorruptError(f'{path}:{number}: a prompt is a string, {{"prompt": "..."}} or {{"messages": [...]}}')
        rows.append(row)
    if not rows:
        raise UsageError(f"{path}: no prompts in it")
    return rows


def conversation(row: str | dict[str, Any], developer: str | None, where: str) -> list[dict[str, Any]]:
    """Messages that end with the user's (or a tool's)."""
    from gptoss_jax.data.messages import BadRow, check_row
    from gptoss_jax.errors import CorruptError

    messages = list(row["messages"]) if isinstance(row, dict) else [{"role": "user", "content": row}]
    if messages and isinstance(messages[-1], dict) and messages[-1].get("role") == "assistant":
        messages = messages[:-1]
    try:
        messages = check_row({"messages": messages}, prompt=True)["messages"]
    except BadRow as error:
        raise CorruptError(f"{where}: {error}") from None
    has_own = messages and messages[0]["role"] in ("system", "developer")
    return messages if has_own or not developer else [{"role": "developer", "content": developer}, *messages]


def show(row: Any, result: dict[str, Any], number: int | None) -> None:
    """One answer: thoughts dimmed on a terminal, marked elsewhere."""
    from rich.console import Console
    from rich.text import Text

    console = Console(file=sys.stdout, highlight=False, soft_wrap=True)

    def part(name: str, text: str) -> None:
        if text:
            console.print(Text(text, "dim") if console.is_terminal else Text(f"[{name}] {text}"))

    if number is not None:
        said = row if isinstance(row, str) else row[-1]["content"]
        console.print(Text(f"--- {number}: {said.splitlines()[0][:100] if said.strip() else ''}", "bold"))
    if "text" in result:
        print(result["text"])
        return
    part("analysis", result["analysis"])
    part("commentary", result["commentary"])
    for call in result["calls"]:
        part(f"call to {call['recipient']}", call["arguments"])
    print(result["final"])
    if not result["stopped"]:
        part("cut", "the answer reached its length limit")
