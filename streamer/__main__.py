"""python -m streamer: the command tq-stream."""

from streamer.cli import main

if __name__ == "__main__":
    main()
