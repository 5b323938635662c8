"""SIGTERM and SIGINT in a training run: the first asks for a stop after the step in progress, the second ends the process at once."""

import signal
import threading
from types import FrameType

from gptoss_jax.errors import GptOssError

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interrupted(GptOssError):
    """A run that a signal ended after its state was saved. Exit code 128 + signal: 143 or 130."""

    everywhere = True

    def __init__(self, message: str, signum: int):
        super().__init__(message)
        self.exit_code = 128 + signum


class StopRequest:
    """While open, `signum` is the signal that came first, or None. Does nothing outside the main thread, where signals cannot be handled."""

    def __init__(self):
        self.signum: int | None = None
        self._previous: dict[int, object] = {}

    def _handle(self, signum: int, _: FrameType | None) -> None:
        self.signum = signum
        self._restore()

    def _restore(self) -> None:
        for signum in self._previous:
            signal.signal(signum, signal.SIG_DFL if self.signum else self._previous[signum])

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            self._previous = {signum: signal.getsignal(signum) for signum in SIGNALS}
            for signum in SIGNALS:
                signal.signal(signum, self._handle)
        return self

    def __exit__(self, *_) -> None:
        for signum, previous in self._previous.items():
            signal.signal(signum, previous)
