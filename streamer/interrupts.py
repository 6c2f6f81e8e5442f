"""What Ctrl-C and SIGTERM do while modules are imported: they end the process at once."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def ends_at_once() -> Iterator[None]:
    """Within this, Ctrl-C and SIGTERM end the process as the system does it, without an exception.

    An exception in the middle of an import may be swallowed by the library, come out as another error, or mark the
    interpreter as interrupted although it was handled. There is nothing to be put in order yet.

    Source: own.
    """
    before = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        handler = signal.getsignal(number)
        if not callable(handler):  # what the caller ignores stays ignored
            continue
        try:
            signal.signal(number, signal.SIG_DFL)
        except ValueError:  # not the main thread, in which alone Python takes signals
            break
        before[number] = handler
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
