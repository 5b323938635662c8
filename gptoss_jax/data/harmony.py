"""Conversations in the `messages` form -> harmony text -> token ids with a mask of the trained ones.

One turn of the text (no line breaks between messages):

    <|start|>system<|message|>...<|end|>                                    the release's system text, or none (nano)
    <|start|>developer<|message|># Instructions\n\nTEXT\n\n<|end|>           a leading message of role "developer" or "system"
    <|start|>user<|message|>TEXT<|end|>
    <|start|>assistant<|channel|>analysis<|message|>THINKING<|end|>          last turn only: the release never shows old thoughts
    <|start|>assistant<|channel|>final<|message|>TEXT<|return|>              last turn; an earlier one ends with <|end|>

This is the text of the release's chat template for conversations without tools, character by character.

Trained tokens, `train_on="assistant"`: what the model itself produces, which begins after the `<|start|>assistant` that prompts it and ends with
its stop token. Between analysis and final it writes `<|end|><|start|>assistant` itself, so these are trained. The `<|end|>` of an
earlier final is not: it was put there in place of `<|return|>`, and a model that learned to write it would not stop. `train_on="all"`: every
token (what NVIDIA's recipe does).

Encoding: special tokens go in by id, everything else as text with special tokens disabled, so that no message can forge one.
"""

import datetime
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from gptoss_jax.errors import CorruptError, UsageError

SPECIAL_TOKENS = (
    "<|startoftext|>", "<|endoftext|>", "<|return|>", "<|constrain|>", "<|channel|>", "<|start|>", "<|end|>", "<|message|>", "<|call|>",
    "<|endofprompt|>",
)  # fmt: skip
TrainOn = Literal["assistant", "all"]


class Piece(NamedTuple):
    """A stretch of the text: one special token, or text between two of them."""

    text: str
    special: bool
    trained: bool


class Encoded(NamedTuple):
    """A tokenized conversation. At place i the model reads `ids[i]` and is trained, with weight `weights[i]`, to produce `labels[i]`.

    The two tokens differ in one case only: where the `<|end|>` of an earlier answer stands for the `<|return|>` that the model itself writes there.
    """

    ids: np.ndarray  # int32 [n]
    labels: np.ndarray  # int32 [n]
    weights: np.ndarray  # float32 [n], 0 = not trained


def system_text(date: datetime.date, reasoning_effort: str = "medium") -> str:
    """The release's default system message. The date is an argument: the template's own is the day on which it runs."""
    return (
        "You are ChatGPT, a large language model trained by OpenAI.\n"
        f"Knowledge cutoff: 2024-06\nCurrent date: {date.isoformat()}\n\n"
        f"Reasoning: {reasoning_effort}\n\n"
        "# Valid channels: analysis, commentary, final. Channel must be included for every message."
    )


def _message(header: str, text: str, stop: str, trained: tuple[bool, bool, bool], channel: str | None = None) -> list[Piece]:
    """`trained` of (`<|start|>` header, the middle, the stop token)."""
    start, middle, end = trained
    pieces = [Piece("<|start|>", True, start), Piece(header, False, start)]
    if channel:
        pieces += [Piece("<|channel|>", True, middle), Piece(channel, False, middle)]
    pieces.append(Piece("<|message|>", True, middle))
    if text:
        pieces.append(Piece(text, False, middle))
    return [*pieces, Piece(stop, True, end)]


def render(messages: Sequence[dict[str, Any]], *, system: str | None = None, train_on: TrainOn = "assistant", prompt: bool = False) -> list[Piece]:
    """The pieces of a conversation. With `prompt` it ends with the `<|start|>assistant` that asks for an answer, and nothing is trained.

    `messages` must have passed `messages.check_row`: an optional system or developer message, then user and assistant ones.
    """
    everything = train_on == "all" and not prompt
    untrained, produced = (everything,) * 3, (everything, not prompt, not prompt)
    pieces = _message("system", system, "<|end|>", untrained) if system else []
    if messages and messages[0]["role"] in ("developer", "system"):
        if messages[0]["content"]:
            pieces += _message("developer", f"# Instructions\n\n{messages[0]['content']}\n\n", "<|end|>", untrained)
        messages = messages[1:]
    for i, message in enumerate(messages):
        last = i == len(messages) - 1 and not prompt
        if message["role"] == "user":
            pieces += _message("user", message["content"], "<|end|>", untrained)
            continue
        thinking = message.get("thinking") if last else None
        if thinking:
            pieces += _message("assistant", thinking, "<|end|>", produced, "analysis")
        header = everything or (bool(thinking) and not prompt)
        pieces += _message("assistant", message["content"], "<|return|>" if last else "<|end|>", (header, not prompt, last or everything), "final")
    if prompt:
        pieces += [Piece("<|start|>", True, False), Piece("assistant", False, False)]
    return pieces


def text_of(pieces: Iterable[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


class HarmonyEncoder:
    """Turns rendered pieces into ids with a fast tokenizer of transformers. Texts are encoded once each and kept.

    Raises UsageError when the tokenizer lacks one of the special tokens that the format needs.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        vocab = tokenizer.get_vocab()
        needed = ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>")
        missing = [name for name in needed if name not in vocab]
        if missing:
            raise UsageError(f"the tokenizer {tokenizer.name_or_path!r} has no {', '.join(missing)}: not a harmony tokenizer")
        self._special_ids = {name: vocab[name] for name in SPECIAL_TOKENS if name in vocab}
        self._forbidden = np.array(sorted(set(tokenizer.all_special_ids) | set(self._special_ids.values()) | set(tokenizer.added_tokens_decoder)))
        self._ids: dict[str, np.ndarray] = {}

    def _encode_new(self, texts: Iterable[str]) -> None:
        new = [text for text in dict.fromkeys(texts) if text not in self._ids]
        if not new:
            return
        encoded = self.tokenizer(new, add_special_tokens=False, split_special_tokens=True, return_attention_mask=False)["input_ids"]
        flat = np.fromiter((i for ids in encoded for i in ids), np.int32)
        if np.isin(flat, self._forbidden).any():
            raise CorruptError("a message was encoded to a special token: this tokenizer does not honour split_special_tokens")
        for text, ids in zip(new, encoded):
            self._ids[text] = np.array(ids, np.int32)

    def encode(self, rendered: Sequence[Sequence[Piece]]) -> list[Encoded]:
        """One `Encoded` for each list of pieces."""
        self._encode_new(piece.text for pieces in rendered for piece in pieces if not piece.special)
        special = {name: np.array([i], np.int32) for name, i in self._special_ids.items()}
        out = []
        for pieces in rendered:
            parts = [special[piece.text] if piece.special else self._ids[piece.text] for piece in pieces]
            trained = np.repeat([piece.trained for piece in pieces], [len(part) for part in parts])
            ids = np.concatenate(parts)
            out.append(Encoded(ids, ids, trained.astype(np.float32)))
        return out


def encode_conversations(
    rows: Sequence[dict[str, Any]], tokenizer: Any, *, system: str | None = None, train_on: TrainOn = "assistant"
) -> list[Encoded]:
    """Token ids and trained mask of each row, a dict with its conversation under "messages"."""
    return HarmonyEncoder(tokenizer).encode([render(row["messages"], system=system, train_on=train_on) for row in rows])


def load_tokenizer(directory: str | Path) -> Any:
    """The fast tokenizer of a local directory, without looking anything up on a hub. UsageError when there is none."""
    if not (Path(directory) / "tokenizer.json").is_file():
        raise UsageError(f"no tokenizer.json in {str(directory)!r}")
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(str(directory), local_files_only=True)
