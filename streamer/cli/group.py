"""CommandGroup: a click group whose commands end with one clear message and the right exit status.

    0    done                          1    an error of ours, or of the system
    2    wrong usage                   130  interrupted (Ctrl-C)      143  terminated (SIGTERM)

While libraries are imported the last two come from the system (streamer/interrupts.py): a shell shows the same numbers.
An exception that nobody foresaw passes through with its traceback (exit status 1): it is a bug.
"""

import errno
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

import click

from streamer.errors import OptionError, StreamerError

INTERRUPTED, TERMINATED = 128 + 2, 128 + 15

# Variables TQ_STREAM_<OPTION> give the defaults of options, the same for every command.
ENVIRONMENT_PREFIX = "TQ_STREAM"

CONTEXT_SETTINGS: dict[str, Any] = {
    "help_option_names": ["-h", "--help"],
    "show_default": True,
    "max_content_width": 100,
    "auto_envvar_prefix": ENVIRONMENT_PREFIX,
}


class Terminated(KeyboardInterrupt):
    """The process was asked to end by SIGTERM; unwinds as Ctrl-C does, so that a terminal is left in order."""


class _OptionFault(click.ClickException):
    """An option that the parser let through and the engine cannot honour."""

    exit_code = 2


class CommandGroup(click.Group):
    """The group of all commands.

    Args:
        name, help: as click takes them. commands: its sub-commands.
    """

    def __init__(self, name: str, help: str, commands: Sequence[click.Command]):
        super().__init__(name, help=help, commands=commands, context_settings=CONTEXT_SETTINGS)
        click.version_option(package_name="tq-stream")(self)

    def invoke(self, ctx: click.Context) -> Any:
        """Runs the command; every error that a user can meet leaves as a click exception."""
        try:
            with _terminable():
                return super().invoke(ctx)
        except KeyboardInterrupt as interrupt:
            # the message of a command that had something to say about it, else the bare word
            click.echo(str(interrupt) or "Interrupted.", err=True)
            raise click.exceptions.Exit(TERMINATED if isinstance(interrupt, Terminated) else INTERRUPTED) from interrupt
        except Exception as error:
            known = as_click_error(error)
            if known is None:
                raise
            raise known from error


def as_click_error(error: Exception) -> click.ClickException | None:
    """The message and exit status of an error that a user can meet.

    Args:
        error: any exception.
    Returns:
        an exception that click prints as one `Error: ...` message; None when it is not one to translate (a bug, an
        exception of click's own, or a closed pipe, which click ends quietly).
    Source: own.
    """
    if isinstance(error, click.ClickException | click.exceptions.Exit | click.Abort):
        return None
    # These are imported by the code that raises them: an import here would make every command wait for torch.
    quantizer = sys.modules.get("turboquant.errors")
    torch = sys.modules.get("torch")
    usage_errors: tuple[type[Exception], ...] = (OptionError, *([quantizer.OptionError] if quantizer else []))
    own_errors: tuple[type[Exception], ...] = (StreamerError, *([quantizer.TurboQuantError] if quantizer else []))
    if isinstance(error, own_errors):
        return (_OptionFault if isinstance(error, usage_errors) else click.ClickException)(str(error))
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        reason = str(error).strip().splitlines()[0]
        return click.ClickException(
            f"the GPU has less free memory than the plan counted on ({reason})\n"
            "  Another program may have taken some: give a smaller --vram or --context, or end that program."
        )
    if isinstance(error, OSError) and error.errno not in (None, errno.EPIPE):
        place = f"{error.filename}: " if error.filename else ""
        return click.ClickException(f"{place}{error.strerror or error}")
    return None


@contextmanager
def _terminable() -> Iterator[None]:
    """Within this, SIGTERM unwinds the program as Ctrl-C does."""

    def terminate(number: int, frame: FrameType | None) -> None:
        raise Terminated

    before: Callable[[int, FrameType | None], Any] | int | None
    try:
        before = signal.signal(signal.SIGTERM, terminate)
    except ValueError:  # not the main thread, in which alone Python takes signals
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
