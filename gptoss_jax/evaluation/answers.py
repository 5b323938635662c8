"""What a model wrote after `<|start|>assistant`, taken apart into harmony's channels, whole or while it is being written.

    <|channel|>analysis<|message|>THOUGHTS<|end|><|start|>assistant<|channel|>final<|message|>ANSWER<|return|>
    <|start|>assistant to=functions.f<|channel|>commentary <|constrain|>json<|message|>{...}<|call|>        a tool call; `to=` may follow the channel

Models write less orderly things too, and answers are cut at the length limit. Nothing is refused:

    cut inside a message            its text counts, `stopped` is False
    cut inside a header             the header is dropped
    no channel                      final; so is text without any header, as a model without harmony training writes it
    unknown channel                 commentary
    a new header without `<|end|>`  ends the message before it
    a message of another role       ends the answer: from there on the model plays the user or a tool
    text after `<|end|>`            final

From token ids, only special tokens are tags; a model that spells "<|end|>" in letters has written text. A string holds no such difference.

Several messages of one channel are joined by a line break.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from gptoss_jax.data.harmony import SPECIAL_TOKENS

STOP_TOKENS = ("<|return|>", "<|call|>", "<|endoftext|>")
CHANNELS = ("analysis", "commentary", "final")
_TAGS = re.compile("(" + "|".join(map(re.escape, SPECIAL_TOKENS)) + ")")
_RECIPIENT = re.compile(r"\bto=([^\s<]+)")


class Call(NamedTuple):
    """A tool call: whom the message goes to ("functions.NAME") and its text, JSON if the model did as it should."""

    recipient: str
    arguments: str


@dataclass(frozen=True)
class Answer:
    """`stopped`: a stop token ended it, not the length limit. `raw`: all of it, tags included. Tool calls are in `calls` alone."""

    analysis: str
    commentary: str
    final: str
    stopped: bool
    calls: tuple[Call, ...] = ()
    raw: str = ""


class Delta(NamedTuple):
    """New text of a channel; `opens` where a message begins (the text may be empty then)."""

    channel: str
    text: str
    opens: bool


class AnswerParser:
    """Reads an answer piece by piece: `feed` what arrives, cut anywhere between tags, then `finish`."""

    def __init__(self):
        self.stopped = False
        self._raw: list[str] = []
        self._messages: list[tuple[str, str | None, list[str]]] = []  # channel, recipient, text
        self._header = "assistant"
        self._at = "header"  # or "text" of a message, "border" after one, "end" where nothing counts any more

    def feed(self, text: str, special: bool) -> list[Delta]:
        """A special token, or text between two of them or a part of it. Gives the text to be shown."""
        if self.stopped or not text:
            return []
        self._raw.append(text)
        if not special:
            return self._text(text)
        if text in STOP_TOKENS:
            shown = self._close()
            self.stopped, self._at = True, "end"
            return shown
        if self._at == "end":
            return []
        if text == "<|message|>":
            return self._open()
        if text == "<|channel|>" and self._at == "header":
            self._header += text
            return []
        if text in ("<|start|>", "<|channel|>", "<|end|>"):
            shown = self._close()
            self._header = {"<|start|>": "", "<|channel|>": "assistant<|channel|>", "<|end|>": "assistant"}[text]
            self._at = "border" if text == "<|end|>" else "header"
            return shown
        if self._at == "header":  # <|constrain|>
            self._header += text
        return []

    def _text(self, text: str) -> list[Delta]:
        if self._at == "text":
            channel, recipient, parts = self._messages[-1]
            parts.append(text)
            return [] if recipient else [Delta(channel, text, False)]
        if self._at == "header":
            self._header += text
        elif self._at == "border" and text.strip():
            return self._begin("final", None, text)
        return []

    def _begin(self, channel: str, recipient: str | None, text: str = "") -> list[Delta]:
        self._messages.append((channel, recipient, [text]))
        self._at = "text"
        return [] if recipient else [Delta(channel, text, True)]

    def _open(self) -> list[Delta]:
        """`<|message|>`: the header is complete."""
        role, _, channel = self._header.partition("<|channel|>")
        if not role.strip().startswith("assistant"):
            self._at = "end"
            return []
        name = (channel.split("<|")[0].split() or ["final"])[0]
        recipient = _RECIPIENT.search(self._header)
        return self._begin(name if name in CHANNELS else "commentary", recipient and recipient[1])

    def _close(self) -> list[Delta]:
        """The end of what was open. A header that holds only words, before any message, is an answer without header."""
        words = self._header.removeprefix("assistant") if self._at == "header" and not self._messages else ""
        self._header = "assistant"
        if not words.strip() or "<|" in words or _RECIPIENT.match(words.strip()):
            return []
        return self._begin("final", None, words)

    def finish(self) -> Answer:
        """The answer, as far as it was written. Nothing can be fed afterwards."""
        self._close()
        texts = {name: "\n".join("".join(parts) for channel, to, parts in self._messages if channel == name and not to) for name in CHANNELS}
        calls = tuple(Call(to, "".join(parts)) for _, to, parts in self._messages if to)
        return Answer(**texts, stopped=self.stopped, calls=calls, raw="".join(self._raw))


class TokenStream:
    """Token ids -> (text, special) as soon as the text is certain.

    The bytes of a character may be spread over several tokens of a byte-level vocabulary. A last character that is not whole decodes to one "\ufffd":
    it is held back until the next token tells, so nothing is shown that is not in the decoding of the whole.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        vocab = tokenizer.get_vocab()
        self._names = {vocab[name]: name for name in SPECIAL_TOKENS if name in vocab}
        self._pending: list[int] = []  # since the last character border at a token border
        self._shown = 0  # characters of them

    def feed(self, token: int) -> list[tuple[str, bool]]:
        if token in self._names:
            return [*self.flush(), (self._names[token], True)]
        self._pending.append(token)
        text = self._decode()
        certain = len(text) - text.endswith("\ufffd")
        new = text[self._shown : certain]
        self._pending, self._shown = ([], 0) if certain == len(text) else (self._pending, certain)
        return [(new, False)] if new else []

    def flush(self) -> list[tuple[str, bool]]:
        """What is held back, at the end of the answer or before a special token."""
        new = self._decode()[self._shown :]
        self._pending, self._shown = [], 0
        return [(new, False)] if new else []

    def _decode(self) -> str:
        return self.tokenizer.decode(self._pending, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def parse_answer(output: str | Sequence[int], tokenizer: Any = None) -> Answer:
    """The channels of an answer given as text or, with a tokenizer, as token ids (list or array)."""
    parser = AnswerParser()
    if isinstance(output, str):
        for i, piece in enumerate(_TAGS.split(output)):
            parser.feed(piece, i % 2 == 1)
        return parser.finish()
    stream = TokenStream(tokenizer)
    for token in np.asarray(output, np.int64).tolist():
        for piece in stream.feed(token):
            parser.feed(*piece)
    for piece in stream.flush():
        parser.feed(*piece)
    return parser.finish()
