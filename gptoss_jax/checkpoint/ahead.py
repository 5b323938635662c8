"""Work in threads, a few pieces ahead of where its results are used: files are read or written while devices decode or encode."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Result = TypeVar("Result")
# called with (bytes done, bytes in all), from the thread that uses the results
Tick = Callable[[int, int], None]


def in_order(calls: Iterable[Callable[[], Result]], *, threads: int, ahead: int) -> Iterator[Result]:
    """Results of `calls` in their order. At most `ahead` are called, or have a result, before they are asked for, so memory is bounded.

    What a call raises comes out in its place; those behind it are not called any more.
    """
    pool = ThreadPoolExecutor(threads)
    waiting = deque()
    try:
        for call in calls:
            waiting.append(pool.submit(call))
            if len(waiting) >= ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
