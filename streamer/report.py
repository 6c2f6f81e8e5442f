"""MemoryReport: the plan and what was measured, side by side, as a table and as JSON."""

from dataclasses import asdict, dataclass, replace
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from streamer.architecture import Architecture
from streamer.options import format_size
from streamer.plan import CacheSettings, Plan, cache_bytes
from turboquant.hf import TurboQuantCache

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
        layers_resident, num_layers, streamed_bytes: what stays on the device and what crosses the link per pass.
    """

    rows: tuple[MemoryRow, ...]
    device_peak: MemoryRow | None
    kv_tokens: int
    kv_bits: tuple[int, int]
    uncompressed_kv_bytes: int
    layers_resident: int
    num_layers: int
    streamed_bytes: int
    prefill_chunk: int

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON; bytes are integers."""
        return asdict(self)

    def __str__(self) -> str:
        console = Console(width=100, no_color=True, highlight=False)
        with console.capture() as capture:
            console.print(self.table())
        return capture.get().rstrip()

    def table(self) -> Table:
        """The report as a table."""
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, caption=self._caption(), caption_justify="left")
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

    def _caption(self) -> str:
        kv = next(row for row in self.rows if row.name == "KV cache")
        size = kv.predicted_bytes if kv.measured_bytes is None else kv.measured_bytes
        lines = [
            f"KV cache for {self.kv_tokens} tokens: {format_size(size)} at {self.kv_bits[0]}-bit keys and "
            f"{self.kv_bits[1]}-bit values; {format_size(self.uncompressed_kv_bytes)} uncompressed"
        ]
        if self.device_peak is not None:
            lines.append(
                f"{self.layers_resident} of {self.num_layers} layers stay on the GPU; "
                f"{format_size(self.streamed_bytes)} cross the link per pass"
            )
            lines.append(f"prompts go through a layer in chunks of {self.prefill_chunk} tokens")
        return "\n".join(lines)


def build_report(
    architecture: Architecture,
    plan: Plan,
    device_peak_bytes: int | None,
    cache: TurboQuantCache | None,
    cache_tokens: int | None = None,
) -> MemoryReport:
    """The report of a plan, with what was measured where there is a measurement.

    Args:
        device_peak_bytes: of the process, or None. cache: of the last generation, made for cache_tokens tokens a row
            (its row then predicts that many, not the plan's context), or None.
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
    dense = replace(request, context=kv_tokens, cache=CacheSettings(bits=16))
    peak = None
    if request.vram_bytes is not None:
        peak = MemoryRow("peak of the process", "device", plan.device_bytes, device_peak_bytes)
    return MemoryReport(
        rows=rows,
        device_peak=peak,
        kv_tokens=kv_tokens,
        kv_bits=(settings.key_bits or settings.bits, settings.value_bits or settings.bits),
        uncompressed_kv_bytes=cache_bytes(architecture, dense),
        layers_resident=plan.layers_resident,
        num_layers=architecture.num_layers,
        streamed_bytes=plan.streamed_bytes,
        prefill_chunk=plan.prefill_chunk,
    )
