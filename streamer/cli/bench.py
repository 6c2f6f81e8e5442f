"""tq-stream bench: the rates of this machine, the speed of a model on it, and how close that comes to the limit."""

import json
import statistics
import time
from typing import TYPE_CHECKING, Any

import click

from streamer.cli.group import CONTEXT_SETTINGS
from streamer.cli.parameters import TOKENS, engine_options, import_engine, quiet_libraries, refuse_gpu_options
from streamer.cli.screen import Screen
from streamer.errors import ContextLengthError, DoesNotFitError
from streamer.options import GB, RAW, format_size

if TYPE_CHECKING:
    from streamer.checkpoint import Checkpoint
    from streamer.engine import StreamingEngine
    from streamer.rates import FileRate, MachineRates


# Generations of one token whose median is the time to the first token.
_FIRST_TOKENS = 3

# Share of its limit from which on a run counts as bound by it.
_BOUND_SHARE = 0.85


@click.command(context_settings=CONTEXT_SETTINGS)
@click.argument("model")
@click.option("--prompt-tokens", type=TOKENS, default=512, help="Length of the prompt, which is random tokens.")
@click.option("--new-tokens", type=click.IntRange(min=2), default=32, help="Tokens to generate, exactly.")
@engine_options
@click.option("--json", "as_json", is_flag=True, allow_from_autoenv=False, help="Print JSON; bytes, seconds, shares.")
def bench(model: str, prompt_tokens: int, new_tokens: int, as_json: bool, **engine_arguments: Any) -> None:
    """Time MODEL, and say how close it comes to what this machine allows.

    First the rates of the machine: the link to the GPU, copies in host memory, the checkpoint's files from the page
    cache and around it. Then MODEL, greedy, with random token ids: the time to the first token and the tokens per
    second after it, beside the limit that the link and the files set. MODEL and TQ_STREAM_<OPTION> are as in
    tq-stream run.

    \b
    Examples:
      tq-stream bench Qwen2.5-14B --bits 3 --vram 8GiB
      tq-stream bench ./my-model --prompt-tokens 8192 --new-tokens 64 --resident 0 --json
    """
    context = engine_arguments["context"]
    if context is not None and context < prompt_tokens + new_tokens:
        raise click.UsageError(
            f"--context {context} has no room for {prompt_tokens} prompt tokens and {new_tokens} new ones: "
            f"give --context {prompt_tokens + new_tokens} or more, or fewer --prompt-tokens or --new-tokens"
        )
    refuse_gpu_options()
    import_engine()
    from streamer.checkpoint import Checkpoint

    with (
        Screen(shows_progress=True) as screen,
        quiet_libraries(hide_progress=False),
        _engine(model, prompt_tokens, new_tokens, screen, engine_arguments) as engine,
        Checkpoint.open(engine.folder) as checkpoint,
    ):
        screen.line("measuring the machine: link, host memory, files")
        rates = _rates(engine, checkpoint)
        if not as_json:
            click.echo(_described_rates(rates))
        found = _timed(engine, checkpoint, rates, prompt_tokens, new_tokens, screen)
    if as_json:
        click.echo(json.dumps({"model": str(engine.folder), "rates": rates.as_dict()} | found))
    else:
        click.echo("\n" + _described(found))


def _engine(
    model: str, prompt_tokens: int, new_tokens: int, screen: Screen, engine_arguments: dict[str, Any]
) -> "StreamingEngine":
    from streamer.engine import StreamingEngine

    needed = prompt_tokens + new_tokens
    try:
        return StreamingEngine(
            model, on_note=screen.line, **(engine_arguments | {"context": engine_arguments["context"] or needed})
        )
    except (ContextLengthError, DoesNotFitError) as error:
        largest = error.largest_context
        if largest is None or largest >= needed:  # what the error says to type will do
            raise
        fewer = (
            f"--prompt-tokens {largest - new_tokens} or fewer"
            if largest > new_tokens
            else f"--prompt-tokens and --new-tokens of {largest} together"
        )
        if isinstance(error, ContextLengthError):
            raise ContextLengthError(
                f"{prompt_tokens} prompt tokens and {new_tokens} new ones were asked for and the model was made for "
                f"{largest} tokens: give {fewer}",
                largest_context=largest,
            ) from error
        raise DoesNotFitError(f"{error} That context takes {fewer}.", largest_context=largest) from error


def _rates(engine: "StreamingEngine", checkpoint: "Checkpoint") -> "MachineRates":
    from streamer.rates import measure_machine
    from streamer.weights.host import reader_threads

    return measure_machine(checkpoint, engine.device, reader_threads=reader_threads())


def _timed(
    engine: "StreamingEngine",
    checkpoint: "Checkpoint",
    rates: "MachineRates",
    prompt_tokens: int,
    new_tokens: int,
    screen: Screen,
) -> dict[str, Any]:
    """Every figure of the model's part, in bytes, seconds, and shares of 1."""
    from streamer.benchmark import HostPeak, random_ids, settle, timed_generate
    from streamer.forecast import Machine, predict
    from streamer.rates import file_rate

    engine.stats.on_progress = screen.advance
    engine.pack()  # is not part of what is timed
    with HostPeak() as host_peak:
        screen.line("assembling the model")
        start = time.perf_counter()
        model, plan = engine.model, engine.plan
        assembly_s = time.perf_counter() - start
        assert plan is not None  # noqa: S101  the model is assembled by a plan
        vocab_size = model.config.get_text_config(decoder=True).vocab_size
        ids = random_ids(vocab_size, prompt_tokens).to(engine.device)
        screen.line(f"first generation: a prompt of {prompt_tokens} tokens")
        cold = timed_generate(model, ids, 1)
        screen.end_progress()
        engine.stats.on_progress = None
        weights = engine._runtime.weights if engine._runtime is not None else None
        if weights is not None and not weights.is_settled:
            screen.line("filling host memory")
            settle(model, ids, weights)
        screen.line(f"timing the first token, {_FIRST_TOKENS} times")
        first_token_s = statistics.median(timed_generate(model, ids, 1).first_token_s for _ in range(_FIRST_TOKENS))
        screen.line(f"timing {new_tokens} tokens")
        timing = timed_generate(model, ids, new_tokens)
    reader_rate = None
    if plan.staged_bytes:
        screen.line("measuring the files again, as this plan reads them")
        # the page cache is by now what the run has made it
        files = engine._runtime.files if engine._runtime is not None else checkpoint
        reader_rate = file_rate(files, direct=plan.direct_io, threads=rates.reader_threads).bytes_per_s
    limit = predict(plan, Machine(rates.pinned_link_bytes_per_s, reader_rate))
    tokens_per_s = timing.tokens_per_s
    assert tokens_per_s is not None  # noqa: S101  at least 2 tokens were made
    share = tokens_per_s / limit.tokens_per_s if limit.tokens_per_s is not None else None
    report = engine.memory_report()
    return {
        "device": str(engine.device),
        "device_name": _device_name(engine),
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "assembly_s": assembly_s,
        "cold_first_token_s": cold.first_token_s,
        "first_token_s": first_token_s,
        "tokens_per_s": tokens_per_s,
        "tokens_per_s_p20": timing.tokens_per_s_p20,
        "tokens_per_s_p80": timing.tokens_per_s_p80,
        "step_s": list(timing.step_s),
        "streamed_bytes": plan.streamed_bytes,
        "staged_bytes": plan.staged_bytes,
        "host": plan.host,
        "direct_io": plan.direct_io,
        "layers_resident": plan.layers_resident,
        "num_layers": report.num_layers,
        "codec": report.codec,
        "coded_share": report.coded_share,
        "prefill_chunk": plan.prefill_chunk,
        "kv_bits": report.kv_bits,
        "kv_layer_bits": report.kv_layer_bits,
        "kv_decay": report.kv_decay,
        "reader_bytes_per_s": reader_rate,
        "limit_tokens_per_s": limit.tokens_per_s,
        "share_of_limit": share,
        "bound_by": limit.bound_by if share is not None and share >= _BOUND_SHARE else "computing",
        "device_peak_bytes": report.device_peak.measured_bytes if report.device_peak is not None else None,
        "predicted_device_bytes": report.device_peak.predicted_bytes if report.device_peak is not None else None,
        "host_peak_bytes": host_peak.peak_bytes,
        "predicted_host_bytes": plan.bytes_at("host"),
        "notes": engine.stats.notes,
    }


def _device_name(engine: "StreamingEngine") -> str:
    import torch

    device = engine.device
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"


def _described_rates(rates: "MachineRates") -> str:
    """The table of the machine's rates; what does not exist here is left out."""
    threads = f"{rates.reader_threads} threads"
    rows = [
        ("host to GPU, page-locked memory", rates.pinned_link_bytes_per_s, ""),
        ("host to GPU, pageable memory", rates.pageable_link_bytes_per_s, ""),
        ("copies in host memory, 1 thread", rates.host_copy_bytes_per_s, ""),
        (f"copies in host memory, {rates.copy_threads} threads", rates.host_copy_all_bytes_per_s, ""),
        (f"files as the system serves them, {threads}", rates.files.bytes_per_s, _origin(rates.files)),
        (f"files around the page cache, {threads}", rates.files_direct.bytes_per_s, _origin(rates.files_direct)),
    ]
    lines = ["rates of this machine, GB/s"]
    lines += [
        f"  {name:46}{rate / GB:8.2f}{f'   {origin}' if origin else ''}"
        for name, rate, origin in rows
        if rate is not None
    ]
    return "\n".join(lines)


def _origin(rate: "FileRate") -> str:
    """Where the bytes came from, as the system counts it."""
    if rate.disk_share is None:
        return ""
    if 0.05 < rate.disk_share < 0.95:
        return f"{100 * rate.disk_share:.0f} % from the disk, the rest from the page cache"
    return "from the disk" if rate.disk_share >= 0.95 else "from the page cache"


def _described(found: dict[str, Any]) -> str:
    """The model's figures as lines to read."""
    from streamer.report import format_kv_bits

    on_cpu = found["device"] == "cpu"
    sweep = f"{found['prompt_tokens'] / found['first_token_s']:.0f} prompt tok/s"
    rows = [
        ("first token", f"{found['first_token_s']:.2f} s, median of {_FIRST_TOKENS} ({sweep})"),
        (
            "first generation",
            f"{found['cold_first_token_s']:.2f} s to its first token, {found['assembly_s']:.2f} s before it",
        ),
        (
            "decode",
            f"{found['tokens_per_s']:.2f} tok/s, median of {len(found['step_s'])} tokens "
            f"(p20 {found['tokens_per_s_p20']:.2f}, p80 {found['tokens_per_s_p80']:.2f})",
        ),
        ("bytes per pass", _described_pass(found, on_cpu=on_cpu)),
    ]
    if found["limit_tokens_per_s"] is not None:
        share = 100 * found["share_of_limit"]
        rows.append(("limit", f"{found['limit_tokens_per_s']:.2f} tok/s; {share:.1f} % of it achieved"))
    rows.append(("bound by", _described_bound(found, on_cpu=on_cpu)))
    if found["device_peak_bytes"] is not None:
        predicted = format_size(found["predicted_device_bytes"])
        rows.append(("GPU memory", f"peak {format_size(found['device_peak_bytes'])}, predicted {predicted}"))
    if found["host_peak_bytes"] is not None:
        planned = format_size(found["predicted_host_bytes"])
        rows.append((
            "host memory",
            f"peak of the process {format_size(found['host_peak_bytes'])}, pages of files not counted; "
            f"planned for the model: {planned}",
        ))
    bits = format_kv_bits(found["kv_bits"], found["kv_layer_bits"], found["kv_decay"])
    head = (
        f"prompt of {found['prompt_tokens']} tokens, {found['new_tokens']} new ones, on {found['device_name']}; "
        f"KV cache of {bits}"
    )
    return "\n".join([head, *(f"  {name:18}{text}" for name, text in rows)])


def _described_pass(found: dict[str, Any], *, on_cpu: bool) -> str:
    if on_cpu:
        return "nothing streams: on the CPU the weights are read where the files are mapped"
    coded = "" if found["codec"] == RAW else f", coded to {100 * found['coded_share']:.1f} % of their bytes"
    if not found["streamed_bytes"]:
        return f"nothing streams: all layers stay on the GPU{coded}"
    layers = f"{found['layers_resident']} of {found['num_layers']} layers stay on the GPU{coded}"
    staged = f", {found['staged_bytes'] / GB:.2f} GB of them from the files" if found["staged_bytes"] else ""
    return f"{found['streamed_bytes'] / GB:.2f} GB over the link{staged}; {layers}"


def _described_bound(found: dict[str, Any], *, on_cpu: bool) -> str:
    if found["bound_by"] == "link":
        return "the link to the GPU"
    if found["bound_by"] == "reader":
        return "reading the files"
    return "the processor and host memory" if on_cpu else "computation on the GPU, or starting it"
