"""Ctrl-C: one line and status 130, whatever is being imported, and whoever would swallow it."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

STATUS = 130


def say_interrupted() -> None:
    """The one line."""
    print("afcache: interrupted", file=sys.stderr, flush=True)


@contextmanager
def leaving_at_once() -> Iterator[None]:
    """Inside the block Ctrl-C ends the process without more ado, until `raise_from_now_on`.

    While the command starts there is nothing to clean up, and libraries in the middle of their import swallow an exception or
    make another one of it. Where somebody else handles Ctrl-C, or where it is ignored, as of processes in the background, it
    stays so.
    """
    is_ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if is_ours:
        signal.signal(signal.SIGINT, _leave)
    try:
        yield
    finally:
        if is_ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def raise_from_now_on() -> None:
    """Begin what must be able to clean up: Ctrl-C is KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _leave(number: int, frame: Any) -> None:
    del number, frame
    sys.stdout.flush()
    say_interrupted()
    os._exit(STATUS)
