"""tq-stream pack and unpack: bf16 weights in fewer bytes, kept in the cache, and the same files from them again."""

from pathlib import Path

import click

from streamer.cli.group import CONTEXT_SETTINGS
from streamer.cli.screen import Screen
from streamer.interrupts import ends_at_once
from streamer.options import packed_dir


@click.command(context_settings=CONTEXT_SETTINGS)
@click.argument("model")
@click.option("--offline", is_flag=True, help="Never use the network; HF_HUB_OFFLINE=1 does the same.")
@click.option(
    "--device",
    help="What codes the weights, cuda, cuda:1 or cpu; the files are the same.  [default: cuda if there is one]",
)
def pack(model: str, offline: bool, device: str | None) -> None:
    """Write MODEL's bf16 weights in about 70 % of their bytes, without loss.

    The packed files go to a folder of the cache (TQ_STREAM_CACHE), whose path is printed; its name stands for what is
    in it. MODEL stays as it is; runs on a GPU use what is packed wherever fewer bytes stream for it (--codec). The same
    command goes on where one that was interrupted has stopped. MODEL is as in tq-stream run.

    \b
    Examples:
      tq-stream pack Qwen2.5-14B
      tq-stream pack ./my-model
    """
    with ends_at_once():
        from streamer.packing import coding_device
        from streamer.packing import pack as pack_folder
        from streamer.rates import usable_cores
        from streamer.resolve import resolve_model
    with Screen(shows_progress=True) as screen:
        folder = resolve_model(model, offline=offline, on_line=screen.line).folder
        try:
            packed = pack_folder(
                folder,
                packed_dir(),
                threads=usable_cores(),
                device=coding_device(device, on_line=screen.line),
                on_progress=lambda done, of: screen.advance("packing", done / of),
            )
        except KeyboardInterrupt as interrupt:
            raise type(interrupt)("Interrupted; the same command goes on from here.") from interrupt
        screen.line(packed.line())
    click.echo(packed.folder)


@click.command(context_settings=CONTEXT_SETTINGS)
@click.argument("packed", type=click.Path(path_type=Path))
@click.argument("folder", type=click.Path(path_type=Path))
def unpack(packed: Path, folder: Path) -> None:
    """Write the files that were packed into FOLDER, byte for byte.

    PACKED is a folder that tq-stream pack has printed. Everything in it is checked; a file that was truncated or
    altered is named. FOLDER is made if there is none, and no file in it is overwritten.

    \b
    Examples:
      tq-stream unpack ~/.cache/tq-stream/packed/9f86d081884c7d659a2feaa0c55ad015 ./my-model
    """
    with ends_at_once():
        from streamer.packing import PackedFolder
        from streamer.packing import unpack as unpack_folder
        from streamer.rates import usable_cores
    with Screen(shows_progress=True) as screen:
        unpack_folder(
            PackedFolder.open(packed),
            folder,
            threads=usable_cores(),
            on_progress=lambda done, of: screen.advance("unpacking", done / of),
        )
    click.echo(folder)
