"""Rendered conversations -> token ids, labels and loss weights: the tokenizer's side of the harmony format.

Special tokens go in by id, everything else as text with special tokens disabled, so that no message can forge one. The text is made by `rendering`,
the documents of a conversation by `examples`; what other modules need of both is found here as well.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gptoss_jax.checkpoint.hf_config import check_companions
from gptoss_jax.data.examples import TrainOn, training_examples
from gptoss_jax.data.rendering import SPECIAL_TOKENS, Piece, System, render, text_of
from gptoss_jax.errors import CorruptError, UsageError

__all__ = [
    "SPECIAL_TOKENS", "Encoded", "HarmonyEncoder", "Piece", "System", "TrainOn", "encode_conversations", "encode_examples", "load_tokenizer",
    "render", "text_of", "training_examples",
]  # fmt: skip

ROWS_AT_ONCE = 512  # rows whose texts go to the tokenizer in one call: enough for its threads, and little beside the tokens


class Encoded(NamedTuple):
    """A tokenized document. At place i the model reads `ids[i]` and is trained, with weight `weights[i]`, to produce `labels[i]`.

    The two tokens differ in one case only: where the `<|end|>` of an earlier answer stands for the `<|return|>` that the model itself writes there.
    """

    ids: np.ndarray  # int32 [n]
    labels: np.ndarray  # int32 [n]
    weights: np.ndarray  # float32 [n], 0 = not trained


class HarmonyEncoder:
    """Turns rendered pieces into ids with a fast tokenizer of transformers.

    Each text is tokenized once per call. What occurred more than once (headers, channels, system and developer texts) is kept for the next call, the
    rest is not, so memory does not grow with the data.
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
        self._kept: dict[str, np.ndarray] = {}

    def _tokenize(self, counts: Mapping[str, int]) -> dict[str, np.ndarray]:
        """int32 ids of each text; `counts` says how often each occurs."""
        ids = {text: self._kept[text] for text in counts if text in self._kept}
        new = [text for text in counts if text not in ids]
        if new:
            ids.update(zip(new, self._plain_ids(new)))
            if np.isin(np.concatenate([ids[text] for text in new]), self._forbidden).any():
                raise CorruptError("a message was encoded to a special token: this tokenizer does not honour split_special_tokens")
        self._kept = {text: ids[text] for text, count in counts.items() if count > 1}
        return ids

    def _plain_ids(self, texts: list[str]) -> list[np.ndarray]:
        """What `tokenizer(texts, add_special_tokens=False, split_special_tokens=True)` gives, without the character offsets that it
        computes on the way: 20 % less time."""
        backend = self.tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        before, backend.encode_special_tokens = backend.encode_special_tokens, True
        try:
            return [np.array(one.ids, np.int32) for one in backend.encode_batch_fast(texts, add_special_tokens=False)]
        finally:
            backend.encode_special_tokens = before

    def encode(self, rendered: Sequence[Sequence[Piece]]) -> list[Encoded]:
        """One `Encoded` for each list of pieces. UsageError where a piece is a special token that the tokenizer does not have."""
        for name in {name for pieces in rendered for piece in pieces if piece.special for name in (piece.text, piece.label or piece.text)}:
            if name not in self._special_ids:
                raise UsageError(f"a conversation needs {name}, which the tokenizer {self.tokenizer.name_or_path!r} does not have")
        ids = self._tokenize(Counter(piece.text for pieces in rendered for piece in pieces if not piece.special))
        special = {name: np.array([i], np.int32) for name, i in self._special_ids.items()}
        out = []
        for pieces in rendered:
            parts = [special[piece.text] if piece.special else ids[piece.text] for piece in pieces]
            tokens = np.concatenate(parts)
            labels = tokens
            if any(piece.label for piece in pieces):
                labels = np.concatenate([special[piece.label] if piece.label else part for piece, part in zip(pieces, parts)])
            weights = np.repeat(np.array([piece.weight for piece in pieces], np.float32), [len(part) for part in parts])
            out.append(Encoded(tokens, labels, weights))
        return out


def encode_examples(
    rows: Iterable[Mapping[str, Any]],
    tokenizer: Any,
    *,
    system: System | str | None = None,
    train_on: TrainOn = "assistant",
    only_last: bool = False,
) -> Iterator[list[Encoded]]:
    """For each row, in order, the documents that train it (`training_examples`): none, one or several.

    Rows are consumed as the result is, `ROWS_AT_ONCE` at a time; nothing of them is kept.
    """
    encoder, rows = HarmonyEncoder(tokenizer), iter(rows)
    while chunk := list(islice(rows, ROWS_AT_ONCE)):
        documents = [training_examples(row, system=system, train_on=train_on, only_last=only_last) for row in chunk]
        encoded = iter(encoder.encode([document for of_row in documents for document in of_row]))
        for of_row in documents:
            yield list(islice(encoded, len(of_row)))


def encode_conversations(
    rows: Sequence[Mapping[str, Any]], tokenizer: Any, *, system: System | str | None = None, train_on: TrainOn = "assistant"
) -> list[Encoded]:
    """One document for each row, a dict with its conversation under "messages": the last turn in its context. For evaluation; see `encode_examples`.

    A row of which nothing is trained (weight 0, a channel that its last turn does not have) raises UsageError.
    """
    encoded = list(encode_examples(rows, tokenizer, system=system, train_on=train_on, only_last=True))
    empty = [i for i, documents in enumerate(encoded) if not documents]
    if empty:
        raise UsageError(f"row {empty[0]} has nothing to evaluate: the last turn has weight 0, or nothing in the channels {train_on!r}")
    return [documents[0] for documents in encoded]


def load_tokenizer(directory: str | Path) -> Any:
    """The fast tokenizer of a local directory, without looking anything up on a hub. Code that its files name is not run, nor its chat template.

    Raises:
      UsageError: there is none.
      CorruptError: files that are too large or that make no tokenizer.
    """
    if not (Path(directory) / "tokenizer.json").is_file():
        raise UsageError(f"no tokenizer.json in {str(directory)!r}")
    from transformers import PreTrainedTokenizerFast

    check_companions(Path(directory))
    try:
        return PreTrainedTokenizerFast.from_pretrained(str(directory), local_files_only=True)
    except Exception as error:  # many kinds, of Rust and of Python
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise CorruptError(f"{directory}: its files make no tokenizer ({reason})") from None
