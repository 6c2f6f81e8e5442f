"""tq-stream memory-report: where the bytes of a run would be, before any is taken; and where they were, measured."""

import json
import random
import sys
from typing import TYPE_CHECKING, Any

import click

from streamer.cli.group import CONTEXT_SETTINGS
from streamer.cli.parameters import engine_options, quiet_libraries
from streamer.cli.screen import Screen
from streamer.options import format_size

if TYPE_CHECKING:
    from streamer.engine import StreamingEngine
    from streamer.report import MemoryReport

# What --measure generates: a few steps are enough to hold every buffer once.
_MEASURED_NEW_TOKENS = 8

# Context of --measure when none is asked for: seconds rather than minutes on a processor.
_MEASURED_CONTEXT = 512

# Columns of a table that goes into a file or a pipe.
_WIDTH_WITHOUT_TERMINAL = 100


@click.command("memory-report", context_settings=CONTEXT_SETTINGS)
@click.argument("model")
@engine_options
@click.option(
    "--measure",
    is_flag=True,
    allow_from_autoenv=False,
    help=f"Also run random tokens that fill --context ({_MEASURED_CONTEXT} if not given), and print what it took.",
)
@click.option("--json", "as_json", is_flag=True, allow_from_autoenv=False, help="Print JSON; sizes are bytes.")
def memory_report(model: str, measure: bool, as_json: bool, **engine_arguments: Any) -> None:
    """Show where the bytes of a run of MODEL would be.

    Only the headers of the checkpoint are read. With --vram the plan is for a GPU of that size, whether this machine
    has one or not; without it, for this machine. MODEL and TQ_STREAM_<OPTION> are as in tq-stream run.

    \b
    Examples:
      tq-stream memory-report Qwen2.5-14B --context 32768 --bits 3 --vram 24GiB
      tq-stream memory-report ./my-model --device cpu --measure
    """
    with Screen(shows_progress=True) as screen, quiet_libraries(hide_progress=False):
        report, peak_host_bytes, notes = _report(model, measure, screen, engine_arguments)
    if as_json:
        click.echo(json.dumps(report.as_dict() | {"peak_host_bytes": peak_host_bytes, "notes": notes}))
        return
    _print_table(report)
    if peak_host_bytes is not None:
        click.echo(
            f"measured peak of the process in host memory, mapped files included: {format_size(peak_host_bytes)}"
        )


def _report(
    model: str, measure: bool, screen: Screen, engine_arguments: dict[str, Any]
) -> tuple["MemoryReport", int | None, list[str]]:
    """The report, the measured peak of host memory if there is one, and the automatic choices made."""
    from streamer.engine import StreamingEngine, plan_report

    device, vram = engine_arguments["device"], engine_arguments["vram"]
    if vram is not None and (device or "cuda").startswith("cuda") and not measure:
        notes: list[str] = []

        def note(line: str) -> None:
            notes.append(line)
            screen.line(line)

        wanted = {name: value for name, value in engine_arguments.items() if name != "device"}
        return plan_report(model, on_note=note, **wanted), None, notes
    if measure and engine_arguments["context"] is None:
        engine_arguments = engine_arguments | {"context": _MEASURED_CONTEXT}
    with StreamingEngine(model, on_note=screen.line, **engine_arguments) as engine:
        if not measure:
            return engine.memory_report(), None, engine.stats.notes
        return (*_measured(engine, engine_arguments["context"], screen), engine.stats.notes)


def _measured(engine: "StreamingEngine", context: int, screen: Screen) -> tuple["MemoryReport", int]:
    from streamer.cli.summary import peak_host_bytes

    context = min(context, engine.max_context)
    new_tokens = min(_MEASURED_NEW_TOKENS, context // 2)
    if new_tokens == 0:
        raise click.UsageError("--measure needs room for a prompt and an answer: give a --context of 2 or more")
    vocab_size = engine.model.config.get_text_config(decoder=True).vocab_size
    ids = random.Random(0).choices(range(vocab_size), k=context - new_tokens)
    engine.stats.on_progress = screen.prefill
    engine.generate_ids(ids, max_new_tokens=new_tokens, temperature=0)
    return engine.memory_report(), peak_host_bytes()


def _print_table(report: "MemoryReport") -> None:
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else _WIDTH_WITHOUT_TERMINAL).print(report.table())
