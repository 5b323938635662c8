"""Keys of more tokens than the queries: those of other devices, when a row is cut."""

from typing import NamedTuple

from jaxtyping import Array, Int


class Keys(NamedTuple):
    """Query t is token `start + t` of the keys; `start` None is 0, known at compile time. Keys before `start + t` of the same segment are seen."""

    segment_ids_BS: Int[Array, "B S"]
    start: Int[Array, ""] | None = None
