"""tq-stream eval: what a compressed cache costs a model's answers, on the user's own text."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from streamer.cli.group import CONTEXT_SETTINGS
from streamer.cli.parameters import (
    LENGTHS,
    TOKENS,
    as_given,
    import_engine,
    is_given,
    machine_options,
    quiet_libraries,
    read_text,
    refuse_gpu_options,
    text_option,
)
from streamer.cli.screen import Screen

if TYPE_CHECKING:
    from streamer.passkey import Retrieval
    from streamer.quality import Quality


# Beside each text of --passkey; the question and the answer take less.
_QUESTION_ROOM_TOKENS = 64


@click.command("eval", context_settings=CONTEXT_SETTINGS)
@click.argument("model")
@text_option
@click.option(
    "--setting",
    "settings",
    multiple=True,
    default=("4", "3", "2"),
    help="A cache to judge, given once for each: bits, or options of TurboQuantCache as in key_bits=4,value_bits=2.",
)
@click.option(
    "--windows",
    type=click.IntRange(min=0),
    default=4,
    help="Pieces of the text, each with a new cache; 0 with --passkey looks for pass keys alone.",
)
@click.option("--window-tokens", type=click.IntRange(min=3), default=1024, help="Tokens of each.")
@click.option("--skip-characters", type=click.IntRange(min=0), default=0, help="Characters of the text to leave out.")
@click.option("--prefill", type=TOKENS, default=128, help="Tokens that are read as a prompt, before those that count.")
@click.option("--step", type=TOKENS, default=1, help="Tokens of each call after that; 1 is decoding.")
@click.option(
    "--passkey",
    "lengths",
    type=LENGTHS,
    default=(),
    show_default=False,
    help="Look as well for a number that the text is made to mention, in pieces of that many tokens, e.g. 1024,2048.",
)
@click.option("--trials", type=click.IntRange(min=1), default=20, help="Pieces for each length of --passkey.")
@machine_options
@click.option("--json", "as_json", is_flag=True, allow_from_autoenv=False, help="Print JSON; nats, bytes, shares.")
def evaluate(
    model: str,
    text: Path,
    settings: tuple[str, ...],
    windows: int,
    window_tokens: int,
    skip_characters: int,
    prefill: int,
    step: int,
    lengths: tuple[int, ...],
    trials: int,
    as_json: bool,
    **engine_arguments: Any,
) -> None:
    """Compare MODEL with a compressed cache to MODEL with an uncompressed one, on a text.

    The text is read token by token, by MODEL with an uncompressed cache and with each setting; what is predicted is
    compared at every position: KL is the divergence from the uncompressed prediction, in nats. With --passkey, MODEL is
    also asked for a number that it has read once in a longer piece, and its answers are counted. MODEL and
    TQ_STREAM_<OPTION> are as in tq-stream run.

    \b
    Examples:
      tq-stream eval Qwen2.5-14B --text book.txt
      tq-stream eval ./my-model --text book.txt --setting 3 --setting key_bits=4,value_bits=2
      tq-stream eval Qwen2.5-14B --text book.txt --windows 0 --passkey 4096,16384
    """
    _refuse_idle_options(click.get_current_context())
    longest = max((window_tokens if windows else 0, *(length + _QUESTION_ROOM_TOKENS for length in lengths)))
    context = engine_arguments.pop("context")
    if context is not None and context < longest:
        raise click.UsageError(
            f"--context {context} has no room for {longest} tokens, the longest piece that would be read: leave "
            "--context out, or give fewer --window-tokens or a smaller --passkey"
        )
    refuse_gpu_options()
    words = read_text(text)[skip_characters:]
    import_engine()
    from streamer.engine import StreamingEngine
    from streamer.passkey import measure_passkeys, passkey_trials
    from streamer.quality import measure_quality, parse_setting, text_windows

    wanted = [parse_setting(setting) for setting in settings]
    with (
        Screen(shows_progress=True) as screen,
        quiet_libraries(hide_progress=False),
        StreamingEngine(model, bits=16, on_note=screen.line, **engine_arguments) as engine,
    ):
        ids = engine.encode(words, chat_template=False)
        pieces = text_windows(ids, windows, window_tokens, bos=engine.tokenizer.bos_token_id)
        searched = [passkey_trials(ids, engine.tokenizer, length, trials) for length in lengths]
        engine.stats.on_progress = screen.advance
        # room for the uncompressed cache and, as if they were no smaller, all others
        assembled = engine.assemble(longest, 1 + len(wanted))
        engine.stats.on_progress = None
        dtype = str(assembled.dtype).removeprefix("torch.")
        found: list[Quality] = []
        if windows:
            counted = "1 window" if windows == 1 else f"{windows} windows"
            screen.line(f"reading {counted} of {window_tokens} tokens, {prefill} of each as a prompt")
            found = measure_quality(
                assembled,
                pieces,
                wanted,
                prefill=prefill,
                step=step,
                on_progress=lambda read, of: screen.advance("reading the text", read / of),
            )
        keys: list[Retrieval] = []
        for length, texts in zip(lengths, searched, strict=True):
            screen.line(f"looking for pass keys in {trials} texts of {length} tokens")
            keys += measure_passkeys(
                assembled,
                engine.tokenizer,
                texts,
                wanted,
                on_progress=lambda done, of: screen.advance("looking for pass keys", done / of),
            )
    if as_json:
        how = {"windows": windows, "window_tokens": window_tokens, "prefill": prefill, "step": step, "dtype": dtype}
        rows = {"settings": [asdict(quality) for quality in found], "passkeys": [asdict(key) for key in keys]}
        click.echo(json.dumps({"model": model, "text": str(text)} | how | rows))
    else:
        tables = [_described(found, window_tokens, dtype)] if found else []
        tables += [_passkeys_described(keys)] if keys else []
        click.echo("\n\n".join(tables))


def _refuse_idle_options(context: click.Context) -> None:
    """Options that would have no effect are wrong usage."""
    windows, lengths = context.params["windows"], context.params["lengths"]
    if not windows and not lengths:
        raise click.UsageError("--windows 0 leaves nothing to measure: add --passkey 1024, or give more windows")
    of_windows = () if windows else ("window_tokens", "prefill", "step")
    of_passkeys = () if lengths else ("trials",)
    for name in (*of_windows, *of_passkeys):
        if is_given(context, name):
            why = "with --windows 0" if name in of_windows else "without --passkey"
            raise click.UsageError(f"{as_given(context, name)} has no effect {why}: leave it out")


def _described(found: list["Quality"], window_tokens: int, dtype: str) -> str:
    """A table to read, one line for each setting."""
    first = found[0]
    width = max(len("setting"), *(len(quality.setting) for quality in found))
    lines = [
        f"{first.positions} positions, {dtype}; uncompressed: perplexity {first.reference_perplexity:.3f}, "
        f"{first.uncompressed_nbytes / window_tokens:.0f} bytes/token",
        f"{'setting':{width}}  {'KL mean':>8} {'KL p99':>8} {'perplexity':>10} {'same top token':>14} "
        f"{'bytes/token':>11} {'held in all':>11}",
    ]
    lines += [
        f"{q.setting:{width}}  {q.kl_mean:8.5f} {q.kl_p99:8.4f} {q.perplexity:10.3f} {100 * q.top1:12.2f} % "
        f"{q.bytes_per_token:11.0f} {100 * q.nbytes / q.uncompressed_nbytes:9.0f} %"
        for q in found
    ]
    return "\n".join(lines)


def _passkeys_described(keys: list["Retrieval"]) -> str:
    """A table to read, one line for each length and setting."""
    width = max(len("setting"), *(len(key.setting) for key in keys))
    depths = " ".join(f"{100 * depth:3.0f} %" for depth in keys[0].found_by_depth)
    lines = [f"tokens  {'setting':{width}}  pass keys found, in all and behind {depths} of the text"]
    lines += [
        f"{key.tokens:6}  {key.setting:{width}}  {f'{key.found} of {key.trials}':27} "
        + " ".join(f"{found:7}" for found in key.found_by_depth.values())
        for key in keys
    ]
    return "\n".join(lines)
