"""The command tq-stream: one file per sub-command, each of which parses, calls one function and prints.

Importing this imports neither torch nor transformers: the commands do when they run.
"""

from streamer.cli.bench import bench
from streamer.cli.calibrate import calibrate
from streamer.cli.doctor import doctor
from streamer.cli.evaluate import evaluate
from streamer.cli.group import CommandGroup
from streamer.cli.memory_report import memory_report
from streamer.cli.pack import pack, unpack
from streamer.cli.run import run

__all__ = ["main"]

main = CommandGroup(
    name="tq-stream",
    help="""Run language models larger than the GPU, layer by layer, with a compressed KV cache.

    \b
    Examples:
      tq-stream run Qwen2.5-14B "Explain the tides" --bits 3 --vram 8GiB
      tq-stream memory-report Qwen2.5-14B --context 32768 --vram 24GiB
      tq-stream bench Qwen2.5-14B --vram 8GiB
      tq-stream eval Qwen2.5-14B --text book.txt
      tq-stream pack Qwen2.5-14B
      tq-stream doctor
    """,
    commands=[run, memory_report, bench, evaluate, calibrate, pack, unpack, doctor],
)
