"""tq-stream calibrate: which layers of a model need their bits, on the user's own text."""

import json
from pathlib import Path
from typing import Any

import click

from streamer.cli.group import CONTEXT_SETTINGS
from streamer.cli.parameters import (
    import_engine,
    machine_options,
    quiet_libraries,
    read_text,
    refuse_gpu_options,
    text_option,
)
from streamer.cli.screen import Screen


@click.command(context_settings=CONTEXT_SETTINGS)
@click.argument("model")
@text_option
@click.option(
    "--target-avg-bits",
    type=click.FloatRange(min=2, max=4),
    required=True,
    help="Bits to give, on the average of keys and values of all layers that are coded.",
)
@click.option("--windows", type=click.IntRange(min=1), default=1, help="Pieces of the text, each with a new cache.")
@click.option("--window-tokens", type=click.IntRange(min=192), default=448, help="Tokens of each.")
@machine_options
@click.option("--json", "as_json", is_flag=True, allow_from_autoenv=False, help="Print JSON; sensitivities in nats.")
def calibrate(
    model: str,
    text: Path,
    target_avg_bits: float,
    windows: int,
    window_tokens: int,
    as_json: bool,
    **engine_arguments: Any,
) -> None:
    """Find the bits of each layer of MODEL that cost its answers least, at an average width.

    The text is read with 2-bit keys, then with 2-bit values, of one layer after the other; how far what is predicted
    moves says what that side needs. What is printed is the --layer-bits for run, bench and memory-report. MODEL and
    TQ_STREAM_<OPTION> are as in tq-stream run.

    \b
    Examples:
      tq-stream calibrate Qwen2.5-14B --text book.txt --target-avg-bits 3
    """
    context = engine_arguments.pop("context")
    if context is not None and context < window_tokens:
        raise click.UsageError(
            f"--context {context} has no room for windows of {window_tokens} tokens: leave --context out, or give "
            f"--window-tokens {context} or fewer"
        )
    refuse_gpu_options()
    words = read_text(text)
    import_engine()
    from streamer.engine import StreamingEngine
    from streamer.quality import CALIBRATION_CACHES, measure_sensitivities, text_windows
    from turboquant.hf import CompressedLayer, TurboQuantCache
    from turboquant.policy import Precision, assign_bits, format_layer_bits

    with (
        Screen(shows_progress=True) as screen,
        quiet_libraries(hide_progress=False),
        StreamingEngine(model, bits=16, on_note=screen.line, **engine_arguments) as engine,
    ):
        pieces = text_windows(engine.encode(words, chat_template=False), windows, window_tokens)
        engine.stats.on_progress = screen.advance
        assembled = engine.assemble(window_tokens, CALIBRATION_CACHES)
        engine.stats.on_progress = None
        caches = TurboQuantCache(assembled.config, 2).layers
        coded = [i for i, layer in enumerate(caches) if isinstance(layer, CompressedLayer)]
        found = measure_sensitivities(
            assembled, pieces, coded, on_progress=lambda done, of: screen.advance("measuring layers", done / of)
        )
    assigned = dict(zip(coded, assign_bits(found, target_avg_bits), strict=True))
    layer_bits = format_layer_bits([assigned.get(i, Precision(16, 16)) for i in range(len(caches))])
    if as_json:
        sensitivities = [{"layer": i, "keys": k, "values": v} for i, (k, v) in zip(coded, found, strict=True)]
        click.echo(json.dumps({"model": model, "layer_bits": layer_bits, "sensitivities": sensitivities}))
    else:
        click.echo(f"--layer-bits {layer_bits}")
