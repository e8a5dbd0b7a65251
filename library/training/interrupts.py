"""Ctrl-C, a scheduler's SIGTERM, a closed terminal's SIGHUP: the first is noted, so that a loop ends its step; a second ends at once."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

NAMES = ("SIGINT", "SIGTERM", "SIGHUP")  # Windows has no SIGHUP


class Interrupted(KeyboardInterrupt):
    """A signal came inside `Interrupts.at_once`."""


class Interrupts:
    """What `interruptible` notes.

    Attributes:
        received: the first signal that came; None so far.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._at_once = False

    def __bool__(self) -> bool:
        return self.received is not None

    @property
    def exit_code(self) -> int:
        """130 after SIGINT, 143 after SIGTERM (or where another process was interrupted), 129 after SIGHUP."""
        return 128 + (self.received or signal.SIGTERM)

    @contextlib.contextmanager
    def at_once(self, enabled: bool = True) -> Iterator[None]:
        """Within the block nothing is worth waiting for: a signal, also one that came before, raises `Interrupted`."""
        self._at_once = enabled
        try:
            if self and enabled:
                raise Interrupted
            yield
        finally:
            self._at_once = False

    def receive(self, number: int, frame: FrameType | None = None) -> None:
        """The handler of the signals."""
        self.received = signal.Signals(number)
        for handled in _handled():
            signal.signal(handled, signal.SIG_DFL)  # the second one
        _say(f"\n{self.received.name}: finishing this step and saving; a second one stops at once\n")
        if self._at_once:
            raise Interrupted


@contextlib.contextmanager
def interruptible() -> Iterator[Interrupts]:
    """Note the signals that come within the block, and exit with their code where one raised `Interrupted`.

    A signal that is ignored (nohup) stays ignored. Outside the main thread, where Python takes no handlers, nothing is noted.
    """
    interrupts = Interrupts()
    before = {number: signal.getsignal(number) for number in _handled()}
    try:
        for number in before:
            signal.signal(number, interrupts.receive)
        yield interrupts
    except Interrupted:
        raise SystemExit(interrupts.exit_code) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _handled() -> list[signal.Signals]:
    if threading.current_thread() is not threading.main_thread():
        return []
    numbers = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]
    return [number for number in numbers if signal.getsignal(number) not in (signal.SIG_IGN, None)]


def _say(text: str) -> None:
    """Write to the terminal from a handler, where Python's streams may be in use; if it is closed, later messages go nowhere."""
    try:
        os.write(2, text.encode())
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
