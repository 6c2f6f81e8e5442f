"""MemoryReport: the plan and what was measured, side by side, and how fast that can be, as tables and as JSON."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from streamer.architecture import Architecture
from streamer.forecast import BudgetRow, Forecast, Lever, Machine, budget_rows, format_rate, predict
from streamer.options import GB, GIB, LOSSLESS, RAW, format_coded_share, format_size
from streamer.plan import CacheSettings, Plan, Request, cache_bytes
from turboquant.hf import TurboQuantCache
from turboquant.policy import parse_decay, usual_precision

_PLACES = {"device": "GPU", "host": "host memory", "file": "files (page cache)"}


@dataclass(frozen=True)
class MemoryRow:
    """One line: what, where ("device", "host", "file"), predicted bytes, measured bytes (None = not measured)."""

    name: str
    where: str
    predicted_bytes: int
    measured_bytes: int | None


@dataclass(frozen=True)
class MemoryReport:
    """Where the bytes of a run are.

    Attributes:
        rows: parts. device_peak: predicted and measured peak of the process on the device, None without one.
        kv_tokens: tokens that the KV row is for. kv_bits, uncompressed_kv_bytes: its width and 16-bit size.
        kv_layer_bits: of layers with another width, as it was asked for, such as "0-3:4,-1:4/3", or empty.
        kv_decay: as it was asked for, such as "4096:3,32768:2", or "off".
        layers_resident, num_layers, streamed_bytes: what stays on the device and what crosses the link per pass.
        staged_bytes: of these, read from the files again in every pass.
        codec: "lossless" where weights of layers are kept and moved coded, else "raw". coded_share: of their bytes.
        is_coded_share_likely: that is an estimate, because they have not been packed.
        link_bytes_per_s: rate of the link that the rest is for; None without one, and on the CPU.
        reader_bytes_per_s: at which files were read in every pass, where a generation waited for them.
        forecast: least time of a decode pass; its fields are None where the link is not known.
        first_token_s: least time to a prompt's first token, one sweep over the link; None like the rate.
        budgets: what this GPU budget and others buy; empty if it was not asked for.
        lever: after a generation on a GPU, the change of one option that would gain most; else None.
    """

    rows: tuple[MemoryRow, ...]
    device_peak: MemoryRow | None
    kv_tokens: int
    kv_bits: tuple[int, int]
    kv_layer_bits: str
    kv_decay: str
    uncompressed_kv_bytes: int
    layers_resident: int
    num_layers: int
    streamed_bytes: int
    prefill_chunk: int
    staged_bytes: int
    codec: str
    coded_share: float
    is_coded_share_likely: bool
    link_bytes_per_s: float | None
    reader_bytes_per_s: float | None
    forecast: Forecast
    first_token_s: float | None
    budgets: tuple[BudgetRow, ...]
    lever: Lever | None

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON; bytes are integers."""
        return asdict(self)

    def __str__(self) -> str:
        console = Console(width=100, no_color=True, highlight=False)
        with console.capture() as capture:
            for part in self.parts():
                console.print(part)
        return capture.get().rstrip()

    def parts(self) -> list[Table | Text]:
        """What a console prints: the table of parts, sentences about it, and, where there are any, the budgets."""
        return [self._parts(), Text(self._sentences() + "\n"), *([self._budgets()] if self.budgets else [])]

    def _parts(self) -> Table:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("part", overflow="fold")
        table.add_column("where")
        table.add_column("predicted", justify="right")
        table.add_column("measured", justify="right")
        rows = [row for row in self.rows if row.predicted_bytes or row.measured_bytes]
        for row in [*rows, *([self.device_peak] if self.device_peak else [])]:
            measured = "" if row.measured_bytes is None else format_size(row.measured_bytes)
            is_total = row is self.device_peak
            table.add_row(
                row.name,
                _PLACES[row.where],
                format_size(row.predicted_bytes),
                measured,
                end_section=not is_total and row is rows[-1],
            )
        return table

    def _sentences(self) -> str:
        kv = next(row for row in self.rows if row.name == "KV cache")
        size = kv.predicted_bytes if kv.measured_bytes is None else kv.measured_bytes
        bits = format_kv_bits(self.kv_bits, self.kv_layer_bits, self.kv_decay)
        lines = [
            f"KV cache for {self.kv_tokens} tokens: {format_size(size)} at {bits}; "
            f"{format_size(self.uncompressed_kv_bytes)} uncompressed"
        ]
        if self.device_peak is not None:
            lines.append(
                f"{self.layers_resident} of {self.num_layers} layers stay on the GPU; "
                f"{format_size(self.streamed_bytes)} cross the link per pass"
            )
            if self.codec != RAW:
                share = format_coded_share(self.coded_share, is_likely=self.is_coded_share_likely)
                lines.append(f"weights of layers are kept and moved coded, without loss: {share}")
            lines.append(f"prompts go through a layer in chunks of {self.prefill_chunk} tokens")
            lines += self._speed()
        return "\n".join(lines)

    def _speed(self) -> list[str]:
        """What is known of the speed on a GPU."""
        if not self.streamed_bytes:
            return ["nothing streams: the link does not bound the speed"]
        rate, first_token_s = self.forecast.tokens_per_s, self.first_token_s
        if self.link_bytes_per_s is None or rate is None or first_token_s is None:
            return ["--link-gbps 25 predicts tok/s: PCIe 4.0 x16 reaches about 25, PCIe 5.0 x16 about 55"]
        lines = [
            f"at most {format_rate(rate)} tok/s over a link of {self.link_bytes_per_s / GB:.1f} GB/s; "
            f"a prompt's first token takes {first_token_s:.2g} s or more"
        ]
        if self.forecast.bound_by == "launches":
            lines.append("that is the time of launching kernels; the link alone would allow more")
        if self.forecast.bound_by == "reader" and self.reader_bytes_per_s is not None:
            files = f"reading the files at {self.reader_bytes_per_s / GB:.1f} GB/s"
            lines.append(f"that is the time of {files}; the link alone would allow more")
        if self.staged_bytes and self.reader_bytes_per_s is None:
            lines.append(
                f"{format_size(self.staged_bytes)} are read from the files in every pass: "
                f"slower than {self.staged_bytes * rate / GB:.1f} GB/s, they allow less"
            )
        return lines

    def _budgets(self) -> Table:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("--vram")
        has_staged = any(row.staged_bytes for row in self.budgets)
        staged = ["from the files per pass"] if has_staged else []
        for name in ("layers on the GPU", "over the link per pass", *staged):
            table.add_column(name, justify="right")
        table.add_column("tok/s at most", justify="right", no_wrap=True)
        for row in self.budgets:
            sizes = [row.streamed_bytes, row.staged_bytes] if has_staged else [row.streamed_bytes]
            table.add_row(
                f"{row.vram_bytes / GIB:.4g}GiB",
                f"{row.layers_resident} of {self.num_layers}",
                *(format_size(size) if size else "nothing" for size in sizes),
                self._at_most(row),
            )
        return table

    def _at_most(self, row: BudgetRow) -> str:
        """Tokens per second of a budget, with what is not known about them."""
        if row.tokens_per_s is None:
            return "not bound by the link"
        is_open = row.staged_bytes and self.reader_bytes_per_s is None
        return format_rate(row.tokens_per_s) + (" if the files keep up" if is_open else "")


def format_kv_bits(kv_bits: Sequence[int], layer_bits: str, decay: str) -> str:
    """The widths of a cache in words: "4-bit keys and 4-bit values, layers 0-3:3, 2 bits beyond 4096 tokens"."""
    layers = [f"layers {layer_bits}"] if layer_bits else []
    older = [f"{step.bits} bits beyond {step.age_tokens} tokens" for step in parse_decay(decay)]
    return ", ".join([f"{kv_bits[0]}-bit keys and {kv_bits[1]}-bit values", *layers, *older])


def build_report(
    architecture: Architecture,
    plan: Plan,
    device_peak_bytes: int | None,
    cache: TurboQuantCache | None,
    cache_tokens: int | None = None,
    *,
    machine: Machine | None = None,
    planned: Callable[[Request], Plan] | None = None,
    lever: Lever | None = None,
) -> MemoryReport:
    """The report of a plan, with what was measured where there is a measurement.

    Args:
        device_peak_bytes: of the process, or None. cache: of the last generation, made for cache_tokens tokens a row
            (its row then predicts that many, not the plan's context), or None.
        machine: rates to predict the speed from. planned: says what other budgets would buy, if the link is known: see
            budget_rows; None = not wanted.
        lever: shown as it is.
    """
    request, settings = plan.request, plan.request.cache
    kv_bytes, kv_tokens = plan.kv_bytes, request.context
    measured_kv = cache.nbytes if cache is not None else None
    if cache is not None and cache_tokens is not None:
        biases = sum(row.parts["bias"] for row in cache.report())
        kv_tokens = cache_tokens
        kv_bytes = cache_bytes(architecture, replace(request, context=kv_tokens)) + biases
    rows = tuple(
        MemoryRow(term.name, term.where, kv_bytes, measured_kv)
        if term.name == "KV cache"
        else MemoryRow(term.name, term.where, term.nbytes, None)
        for term in plan.terms
    )
    usual = usual_precision(settings.bits, settings.key_bits, settings.value_bits)
    dense = replace(request, context=kv_tokens, cache=CacheSettings(bits=16))
    peak = None
    if request.vram_bytes is not None:
        peak = MemoryRow("peak of the process", "device", plan.device_bytes, device_peak_bytes)
    machine = machine or Machine()
    link = machine.link_bytes_per_s if peak is not None else None
    budgets: tuple[BudgetRow, ...] = ()
    if planned is not None and link is not None:
        budgets = budget_rows(planned, request, machine)
    return MemoryReport(
        rows=rows,
        device_peak=peak,
        kv_tokens=kv_tokens,
        kv_bits=(usual.key_bits, usual.value_bits),
        kv_layer_bits=settings.layer_bits,
        kv_decay=settings.decay,
        uncompressed_kv_bytes=cache_bytes(architecture, dense),
        layers_resident=plan.layers_resident,
        num_layers=architecture.num_layers,
        streamed_bytes=plan.streamed_bytes,
        prefill_chunk=plan.prefill_chunk,
        staged_bytes=plan.staged_bytes,
        codec=LOSSLESS if plan.is_coded else RAW,
        coded_share=plan.coded_share,
        is_coded_share_likely=plan.is_share_likely,
        link_bytes_per_s=link,
        reader_bytes_per_s=machine.reader_bytes_per_s,
        forecast=predict(plan, machine),
        first_token_s=plan.streamed_bytes / link if link is not None else None,
        budgets=budgets,
        lever=lever,
    )
