"""Documents of any length -> rows of one length, several documents to a row, none seeing another.

    row       | doc 1          | doc 2    | padding |
    tokens      a0 a1 a2 a3      b0 b1 b2    pad pad
    targets     a1 a2 a3 pad     b1 b2 pad   pad pad      the label of the next token of the same document: no label crosses a border
    weights     .  .  .  0       .  .  0     0   0        the weight of the target, 0 where it is not trained
    segments    1  1  1  1       2  2  2     0   0        attention stays inside a segment; 0 is padding
    positions   0  1  2  3       0  1  2     0   0        restart with every document

Best fit: each document, in the given order, goes into the fullest row that still has room for it. The order of documents decides everything, so the
same documents give the same rows. Sorting them by length first packs a little tighter, but puts documents of one kind into one row.
"""

import bisect
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from gptoss_jax.data.documents import Documents
from gptoss_jax.data.harmony import Encoded
from gptoss_jax.errors import UsageError

TooLong = Literal["error", "truncate", "drop"]


class Batch(NamedTuple):
    """Rows for one step; as `Packed.rows`, all rows of a data set. Arrays of numpy or of JAX."""

    tokens_BT: np.ndarray  # int32
    targets_BT: np.ndarray  # int32
    loss_weights_BT: np.ndarray  # float32
    segment_ids_BT: np.ndarray  # int32
    positions_BT: np.ndarray  # int32


class Packed(NamedTuple):
    """Packed documents. Document i lies in row `row_of[i]` from column `start_of[i]` on; row -1 where it was dropped."""

    rows: Batch
    row_of: np.ndarray  # int32 [documents]
    start_of: np.ndarray  # int32 [documents]
    length_of: np.ndarray  # int32 [documents], after truncation
    num_truncated: int
    num_dropped: int

    def describe(self) -> str:
        num_rows, row_length = self.rows.tokens_BT.shape
        tokens, trained = int(self.length_of.sum()), int((self.rows.loss_weights_BT > 0).sum())
        text = f"{len(self.row_of) - self.num_dropped} documents in {num_rows} rows of {row_length}: {tokens} tokens"
        text += f" ({tokens / (num_rows * row_length):.1%} of the room), {trained} trained ({trained / tokens:.1%})"
        return text + "".join(f", {n} {what}" for n, what in ((self.num_truncated, "truncated"), (self.num_dropped, "dropped")) if n)


def best_fit(lengths: Sequence[int], row_length: int) -> tuple[np.ndarray, np.ndarray]:
    """(row, start) of each document, int32 [documents] each. Every length must be in 1..row_length."""
    rows_with_room: dict[int, list[int]] = {}  # room left -> rows, the newest last
    rooms: list[int] = []  # the keys of rows_with_room, ascending
    row_of, start_of, num_rows = [], [], 0
    for length in lengths:
        i = bisect.bisect_left(rooms, length)
        if i == len(rooms):
            row, room, num_rows = num_rows, row_length, num_rows + 1
        else:
            room = rooms[i]
            row = rows_with_room[room].pop()
            if not rows_with_room[room]:
                del rows_with_room[room], rooms[i]
        row_of.append(row)
        start_of.append(row_length - room)
        left = room - length
        if left:
            if left not in rows_with_room:
                bisect.insort(rooms, left)
            rows_with_room.setdefault(left, []).append(row)
    return np.array(row_of, np.int32), np.array(start_of, np.int32)


def pack(documents: Sequence[Encoded], row_length: int, *, pad_id: int = 0, packed: bool = True, too_long: TooLong = "error") -> Packed:
    """Rows [N, row_length] of all documents. With `packed=False` each document has a row of its own.

    `too_long` says what happens to documents of more than `row_length` tokens: "error" (UsageError), "truncate" (the end is lost) or "drop".
    Raises UsageError when nothing is left to train on.
    """
    if not documents:
        raise UsageError("the data set is empty: no document to train on")
    lengths = documents.lengths if isinstance(documents, Documents) else np.array([len(document.ids) for document in documents], np.int32)
    over = lengths > row_length
    if over.any() and too_long == "error":
        raise UsageError(
            f"{over.sum()} of {len(documents)} documents are longer than the rows of {row_length} tokens (the longest has {lengths.max()}): "
            "make the rows longer, or choose to truncate or to drop them"
        )
    keep = np.flatnonzero(~over & (lengths > 0)) if too_long == "drop" else np.flatnonzero(lengths > 0)
    if not len(keep):
        raise UsageError(f"no document is left: all {len(documents)} are empty or longer than the rows of {row_length} tokens")
    lengths = np.minimum(lengths, row_length)
    rows, starts = best_fit(lengths[keep].tolist(), row_length) if packed else (np.arange(len(keep), dtype=np.int32), np.zeros(len(keep), np.int32))
    num_rows = int(rows.max()) + 1
    out = Batch(*(np.zeros((num_rows, row_length), dtype) for dtype in (np.int32, np.int32, np.float32, np.int32, np.int32)))
    out.tokens_BT.fill(pad_id)
    out.targets_BT.fill(pad_id)
    segments_in_row = np.zeros(num_rows, np.int32)
    for i, row, start in zip(keep.tolist(), rows.tolist(), starts.tolist()):
        n = int(lengths[i])
        ids, labels, weights = (array[:n] for array in documents[i])
        segments_in_row[row] += 1
        out.tokens_BT[row, start : start + n] = ids
        out.targets_BT[row, start : start + n - 1] = labels[1:]
        out.loss_weights_BT[row, start : start + n - 1] = weights[1:]
        out.segment_ids_BT[row, start : start + n] = segments_in_row[row]
        out.positions_BT[row, start : start + n] = np.arange(n)
    if not out.loss_weights_BT.any():
        raise UsageError(
            f"none of the {len(keep)} documents has a token to train on: are there assistant messages within the first {row_length} tokens?"
        )
    row_of, start_of, length_of = (np.full(len(documents), fill, np.int32) for fill in (-1, 0, 0))
    row_of[keep], start_of[keep], length_of[keep] = rows, starts, lengths[keep]
    truncated = int(over.sum()) if too_long == "truncate" else 0
    return Packed(out, row_of, start_of, length_of, truncated, len(documents) - len(keep))
