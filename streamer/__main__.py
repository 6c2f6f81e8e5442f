"""The command tq-stream, also as python -m streamer."""

from streamer.interrupts import ends_at_once


def main() -> None:
    """Import the command and run it; Ctrl-C in between leaves no traceback."""
    with ends_at_once():
        from streamer.cli import main as command
    command()


if __name__ == "__main__":
    main()
