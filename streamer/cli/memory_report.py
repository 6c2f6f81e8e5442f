"""tq-stream memory-report: where the bytes of a run would be, before any is taken; and where they were, measured."""

import json
import random
import sys
from typing import TYPE_CHECKING, Any

import click

from streamer.cli.group import CONTEXT_SETTINGS
from streamer.cli.parameters import RATE, engine_options, import_engine, quiet_libraries, refuse_gpu_options
from streamer.cli.screen import Screen
from streamer.options import GB, format_size

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
@click.option(
    "--link-gbps",
    type=RATE,
    metavar="G",
    help="Rate of the link to the GPU in GB/s (10^9 bytes), 0.01 to 10000, to predict tokens per second from.  "
    "[default: measured, if this machine has that GPU]",
)
@click.option("--json", "as_json", is_flag=True, allow_from_autoenv=False, help="Print JSON; sizes are bytes.")
def memory_report(model: str, measure: bool, link_gbps: float | None, as_json: bool, **engine_arguments: Any) -> None:
    """Show where the bytes of a run of MODEL would be, and how fast it could be.

    Only the headers of the checkpoint are read. With --vram the plan is for a GPU of that size, whether this machine
    has one or not; without it, for this machine. With the rate of the link, what other sizes would buy stands below.
    MODEL and TQ_STREAM_<OPTION> are as in tq-stream run.

    \b
    Examples:
      tq-stream memory-report Qwen2.5-14B --context 32768 --bits 3 --vram 24GiB
      tq-stream memory-report Qwen2.5-14B --vram 24GiB --link-gbps 25
      tq-stream memory-report ./my-model --device cpu --measure
    """
    if not _needs_no_gpu(measure, engine_arguments):
        is_measure_too_much = engine_arguments["vram"] is not None and engine_arguments["device"] is None
        other = "leave out --measure" if is_measure_too_much else "give --vram SIZE, without --device cpu,"
        refuse_gpu_options(f", or {other} for a report on a GPU that is not here")
    import_engine()
    with Screen(shows_progress=True) as screen, quiet_libraries(hide_progress=False):
        report, peak_host_bytes, notes = _report(model, measure, link_gbps, screen, engine_arguments)
    if as_json:
        click.echo(json.dumps(report.as_dict() | {"peak_host_bytes": peak_host_bytes, "notes": notes}))
        return
    _print_tables(report)
    if peak_host_bytes is not None:
        click.echo(
            f"measured peak of the process in host memory, mapped files included: {format_size(peak_host_bytes)}"
        )


def _needs_no_gpu(measure: bool, engine_arguments: dict[str, Any]) -> bool:
    """Whether the report is the plan for a GPU of a stated size, be there one or not."""
    device = engine_arguments["device"] or "cuda"
    return engine_arguments["vram"] is not None and not measure and device.startswith("cuda")


def _report(
    model: str, measure: bool, link_gbps: float | None, screen: Screen, engine_arguments: dict[str, Any]
) -> tuple["MemoryReport", int | None, list[str]]:
    """The report, the measured peak of host memory if there is one, and the automatic choices made."""
    device = engine_arguments["device"]
    from streamer.engine import StreamingEngine, plan_report

    given = link_gbps * GB if link_gbps is not None else None
    if _needs_no_gpu(measure, engine_arguments):
        notes: list[str] = []

        def note(line: str) -> None:
            notes.append(line)
            screen.line(line)

        wanted = {name: value for name, value in engine_arguments.items() if name != "device"}
        link = given if given is not None else _link_here(device, engine_arguments["vram"])
        return plan_report(model, on_note=note, link_bytes_per_s=link, **wanted), None, notes
    if measure and engine_arguments["context"] is None:
        engine_arguments = engine_arguments | {"context": _MEASURED_CONTEXT}
    with StreamingEngine(model, on_note=screen.line, **engine_arguments) as engine:
        peak = _measured(engine, engine_arguments["context"], screen) if measure else None
        link = given if given is not None else engine.link_bytes_per_s
        if link is None and device != "cpu":
            link = _link_here(device, 0)
        return engine.memory_report(link_bytes_per_s=link), peak, engine.stats.notes


def _link_here(device: str | None, vram_bytes: int) -> float | None:
    """The link of this machine's GPU, measured; None without a GPU, or if the report is for a larger one."""
    import torch

    if not torch.cuda.is_available():
        return None
    here = torch.device(device or "cuda")
    if (here.index or 0) >= torch.cuda.device_count() or vram_bytes > torch.cuda.mem_get_info(here)[1]:
        return None
    from streamer.rates import link_rate

    try:
        return link_rate(here)
    except RuntimeError:  # no memory left for a copy, or page-locked memory refused: the plan is still worth showing
        return None


def _measured(engine: "StreamingEngine", context: int, screen: Screen) -> int:
    """Runs the model; the peak of host memory, in bytes."""
    from streamer.cli.summary import peak_host_bytes

    context = min(context, engine.max_context)
    new_tokens = min(_MEASURED_NEW_TOKENS, context // 2)
    if new_tokens == 0:
        raise click.UsageError("--measure needs room for a prompt and an answer: give a --context of 2 or more")
    engine.stats.on_progress = screen.advance
    vocab_size = engine.model.config.get_text_config(decoder=True).vocab_size
    ids = random.Random(0).choices(range(vocab_size), k=context - new_tokens)
    engine.generate_ids(ids, max_new_tokens=new_tokens, temperature=0)
    return peak_host_bytes()


def _print_tables(report: "MemoryReport") -> None:
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else _WIDTH_WITHOUT_TERMINAL)
    for part in report.parts():
        console.print(part)
