"""A conversation -> the documents that train every turn of the model, each with exactly the context that it has in use.

In use the model writes turn k behind `render(messages[:k], prompt=True)`: old thoughts are gone, old answers end with `<|end|>`, an open tool loop
still has its thoughts. No single text has that context for all turns at once, so a conversation becomes one or more documents:

    user1  [analysis1 final1 <|return|>]                                              ends here: later contexts do not have analysis1
    user1  final1 <|end|>  user2  [analysis2 call <|call|>]  result  [analysis3 final2 <|return|>]       what is in brackets is trained

A turn continues the document of the one before wherever its context is that document's text, and opens a new one otherwise; every turn is trained
once. This is the smallest number of documents: a turn whose thoughts are dropped before the next one must be the last of its document.
Where a document goes on behind an answer, `<|end|>` stands in its ids, and the label there is the `<|return|>` that the model writes.

`train_on`: channels whose tokens are trained, of what the model itself writes:

    analysis     <|channel|>analysis<|message|>THINKING<|end|>
    commentary   to=functions.NAME<|channel|>commentary json<|message|>ARGUMENTS<|call|>    (preambles as well)
    final        <|channel|>final<|message|>TEXT<|return|>

"assistant" is all three, a tuple some of them. The `<|start|>assistant` in front of a turn is given; between two messages of one turn the model
writes it, and it belongs to the second. "all": every token, given ones too (what NVIDIA's recipe does), those of a repeated context once.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from gptoss_jax.data.rendering import (
    Channel,
    Message,
    Piece,
    System,
    assistant_start,
    is_final,
    is_preamble,
    last_final,
    opening,
    past,
    thought,
    written_by_model,
    written_channels,
)
from gptoss_jax.errors import UsageError

CHANNELS: tuple[Channel, ...] = get_args(Channel)
TrainOn = Literal["assistant", "all"] | Channel | Sequence[Channel]


def trained_channels(train_on: TrainOn) -> frozenset[Channel | None]:
    """The channels that carry the loss; None among them stands for tokens which are given to the model. UsageError for an unknown name."""
    if train_on == "all":
        return frozenset((None, *CHANNELS))
    names = CHANNELS if train_on == "assistant" else (train_on,) if isinstance(train_on, str) else tuple(train_on)
    for name in names:
        if name not in CHANNELS:
            raise UsageError(f'train_on: {name!r} is none of assistant, all, {", ".join(CHANNELS)}')
    if not names:
        raise UsageError("train_on names no channel: nothing would be trained")
    return frozenset(names)


def _turns(messages: Sequence[Message], channels: frozenset[Channel | None], only_last: bool) -> list[int]:
    """Indices of the messages that are trained."""
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if only_last and turns:
        first = turns[-1]
        while first and is_preamble(messages[first - 1]):  # the model wrote it in the same turn
            first -= 1
        turns = [i for i in turns if i >= first]
    trained = (i for i in turns if messages[i].get("weight", 1) > 0)
    return [i for i in trained if channels.intersection(written_channels(messages[i]))]


def _weigh(pieces: Sequence[Piece], channels: frozenset[Channel | None], weight: float) -> list[Piece]:
    return [piece._replace(weight=weight) if piece.channel in channels else piece for piece in pieces]


def training_examples(
    row: Mapping[str, Any], *, system: System | str | None = None, train_on: TrainOn = "assistant", only_last: bool = False
) -> list[list[Piece]]:
    """The documents of a row that passed `messages.check_row`; none if none of its messages has anything to train.

    `only_last`: one document, which trains the last turn alone (for evaluation).
    Raises UsageError as `trained_channels` and `rendering.opening` do.
    """
    channels = trained_channels(train_on)
    head, messages = opening(row, system)
    row_weight = row.get("weight", 1)
    documents: list[list[Piece]] = []
    done = 0  # messages[:done] are trained, or shown, in the documents so far; the newest document ends behind message done - 1
    # whether the newest document shows thoughts that the next answer makes disappear, or thoughts that have disappeared already
    open_thoughts, stale = False, True
    for k in _turns(messages, channels, only_last) if row_weight else ():
        message, answered = messages[k], last_final(messages, k)
        if stale or (open_thoughts and answered >= done):
            document = _weigh(head, channels, 0 if documents else row_weight) + past(messages, 0, done, answered)
            documents.append(document)
            open_thoughts = False
        elif is_final(messages[done - 1]):
            document[-1] = document[-1]._replace(text="<|end|>", label="<|return|>")
        for i in range(done, k):
            document += _weigh(past(messages, i, i + 1, answered), channels, row_weight * messages[i].get("weight", 1))
        written = written_by_model(message)
        start = assistant_start(written[0].channel if k and is_preamble(messages[k - 1]) else None)
        document += _weigh([*start, *written], channels, row_weight * message.get("weight", 1))
        open_thoughts |= any(thought(shown) for shown in messages[answered + 1 : k + 1])
        stale = open_thoughts and is_final(message)
        done = k + 1
    return documents
