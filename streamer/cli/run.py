"""tq-stream run: a prompt in, the model's answer out, piece by piece."""

import json
import select
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import click

from streamer.cli.group import CONTEXT_SETTINGS
from streamer.cli.parameters import TOKENS, engine_options, import_engine, quiet_libraries, refuse_gpu_options
from streamer.cli.screen import Screen

if TYPE_CHECKING:
    from streamer.engine import StreamingEngine

# A pipe beside a prompt that stays empty this long is not waited for.
_PIPE_WAIT_S = 3


@click.command(context_settings=CONTEXT_SETTINGS)
@click.argument("model")
@click.argument("prompt", required=False)
@click.option(
    "--prompt-file",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    allow_from_autoenv=False,
    help="Read the prompt from this file (UTF-8).",
)
@click.option("--max-new-tokens", type=TOKENS, default=256, help="End the answer after this many tokens.")
@click.option("--temperature", type=click.FloatRange(min=0), help="0 is greedy.  [default: the model's own]")
@click.option(
    "--top-p",
    type=click.FloatRange(min=0, max=1, min_open=True),
    help="Draw from the likeliest tokens with this total probability.  [default: the model's own]",
)
@click.option("--top-k", type=click.IntRange(min=1), help="Draw from this many tokens.  [default: the model's own]")
@click.option("--seed", type=click.IntRange(min=0, max=2**63 - 1), help="Makes a drawn answer repeatable.")
@engine_options
@click.option("--no-chat-template", is_flag=True, help="Give the model the bare prompt.")
@click.option(
    "--json", "as_json", is_flag=True, allow_from_autoenv=False, help="Print one JSON object when the answer is done."
)
@click.option("--quiet", is_flag=True, help="Show no progress; notes and the closing line still come.")
def run(
    model: str,
    prompt: str | None,
    prompt_file: Path | None,
    max_new_tokens: int,
    temperature: float | None,
    top_p: float | None,
    top_k: int | None,
    seed: int | None,
    no_chat_template: bool,
    as_json: bool,
    quiet: bool,
    **engine_arguments: Any,
) -> None:
    """Answer PROMPT with MODEL.

    MODEL is a folder, a hub id (org/name) or a short name (Qwen2.5-14B). PROMPT comes from the command line, from
    --prompt-file, or from standard input; one line end behind a file's or standard input's text is dropped. Text on
    standard input beside a PROMPT or a file goes before it, with an empty line between; a pipe that stays empty for 3 s
    is not waited for, and < /dev/null keeps a script's own input out. The answer goes to standard output, all else to
    standard error. A variable TQ_STREAM_<OPTION> (such as TQ_STREAM_VRAM) gives an option's default.

    \b
    Examples:
      tq-stream run Qwen2.5-14B "Explain the tides" --bits 3 --vram 8GiB
      tq-stream run ./my-model --prompt-file report.txt --max-new-tokens 500
      git diff | tq-stream run Qwen/Qwen2.5-7B-Instruct "Explain this change" --json
    """
    text = _read_prompt(prompt, prompt_file, on_note=lambda line: click.echo(line, err=True))
    refuse_gpu_options()
    import_engine()
    from streamer.engine import StreamingEngine

    sampling: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "seed": seed}
    with (
        Screen(shows_progress=not quiet) as screen,
        quiet_libraries(hide_progress=quiet),
        StreamingEngine(model, on_note=screen.line, **engine_arguments) as engine,
    ):
        engine.stats.on_progress = screen.advance
        ids = engine.encode(text, chat_template=not no_chat_template)
        _answer(engine, ids, screen, as_json=as_json, max_new_tokens=max_new_tokens, **sampling)


def _read_prompt(prompt: str | None, prompt_file: Path | None, on_note: Callable[[str], None]) -> str:
    """The prompt, behind the text on standard input if there is any."""
    if prompt is not None and prompt_file is not None:
        raise click.UsageError("a prompt was given twice, as an argument and by --prompt-file: give one of them")
    if prompt is not None:
        text, source = prompt, "the argument"
    elif prompt_file is not None:
        text, source = _decoded(prompt_file.read_bytes(), str(prompt_file)), str(prompt_file)
    elif sys.stdin is not None and not sys.stdin.isatty():
        text, source = _decoded(sys.stdin.buffer.read(), "standard input"), "standard input"
    else:
        raise click.UsageError("no prompt: give PROMPT, --prompt-file FILE, or text on standard input")
    if not text.strip():
        raise click.UsageError(f"the prompt from {source} is empty: give PROMPT, --prompt-file FILE, or pipe text in")
    if prompt is None and prompt_file is None:
        return text
    piped = _decoded(_piped(on_note), "standard input")
    return f"{piped}\n\n{text}" if piped.strip() else text


def _piped(on_note: Callable[[str], None]) -> bytes:
    """What standard input holds beside a prompt; nothing where it is a terminal, closed or cannot be read."""
    if sys.stdin is None or sys.stdin.isatty():
        return b""
    try:
        if not _is_ready(sys.stdin):
            on_note(f"standard input is open and nothing came in {_PIPE_WAIT_S} s: the prompt is taken without it")
            return b""
        return sys.stdin.buffer.read()
    except OSError:  # nohup opens it for writing only
        return b""


def _is_ready(stream: TextIO) -> bool:
    """Whether a stream has bytes or its end: who starts programs may give them a pipe that it never writes to."""
    try:
        return bool(select.select([stream], [], [], _PIPE_WAIT_S)[0])
    except (OSError, ValueError):  # no such question here: Windows asks sockets only, and a test's stream is no file
        return True


def _decoded(content: bytes, source: str) -> str:
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise click.UsageError(f"{source} is not UTF-8 text (byte {error.start}): convert it first") from error
    return text.removesuffix("\n").removesuffix("\r")


def _answer(engine: "StreamingEngine", ids: list[int], screen: Screen, *, as_json: bool, **generation: Any) -> None:
    from streamer.cli.summary import summarize

    pieces: list[str] = []

    def show(piece: str) -> None:
        screen.end_progress()
        pieces.append(piece)
        if not as_json:
            click.echo(piece, nl=False)  # echo flushes

    interrupt: KeyboardInterrupt | None = None
    try:
        engine.generate_ids(ids, on_text=show, **generation)
    except KeyboardInterrupt as error:
        interrupt = error
    finally:
        screen.end_progress()
        text = "".join(pieces)
        if not as_json and text and not text.endswith("\n"):
            click.echo()
    if interrupt is not None and not engine.stats.prompt_tokens:
        raise interrupt  # before there was anything to sum up
    summary = summarize(engine)
    if as_json:
        run_facts = {"model": str(engine.folder), "text": text, "interrupted": interrupt is not None}
        click.echo(json.dumps(run_facts | summary.as_dict() | {"notes": engine.stats.notes}, ensure_ascii=False))
    if interrupt is not None:
        raise type(interrupt)(f"Interrupted after {summary.new_tokens} new tokens.") from interrupt
    screen.line(summary.line())
