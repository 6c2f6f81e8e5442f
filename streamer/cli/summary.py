"""RunSummary: what a generation took, as the closing line on stderr and as the JSON object on stdout."""

import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from streamer.forecast import format_rate
from streamer.options import GB, format_size

if TYPE_CHECKING:
    from streamer.engine import StreamingEngine


@dataclass(frozen=True)
class RunSummary:
    """Figures of the last generation of an engine.

    Attributes:
        prefill_s, decode_s: to the first new token, and from there to the last.
        decode_tokens_per_s: new tokens after the first over decode_s; 0 with fewer than two.
        link_bytes: over the link to the GPU; 0 on the CPU. decode_link_bytes: of these, in decode_s.
        peak_device_bytes: peak of the process on the GPU (allocator and CUDA context); None on the CPU.
        peak_host_bytes: peak resident memory of the process, pages of the files' maps included.
        kv_cache_bytes: the tensors of the KV cache at the end; None when it was not reached.
        passes: forward passes.
        link_bytes_per_s: rate of the link as measured when the model was assembled; None where nothing streams.
        link_share: share of it that the decode reached; None without a decode over the link.
        reader_bytes_per_s: at which files were read in every pass, if the decode waited for them.
        layer_s: host time of a layer in a one-token pass on a GPU.
        bound_by: "link", "reader" (reading the files), "launches" (starting kernels) or "computing" (anything else);
            None on the CPU, and where it is not known.
        next_lever: the one change of an option that gains most, next_lever_effect: what it does,
            next_lever_tokens_per_s: with it. Without such an option, the effect is why nothing gains.
    """

    prompt_tokens: int
    new_tokens: int
    prefill_s: float
    decode_s: float
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    link_bytes: int
    peak_device_bytes: int | None
    peak_host_bytes: int
    kv_cache_bytes: int | None
    passes: int
    decode_link_bytes: int = 0
    link_bytes_per_s: float | None = None
    link_share: float | None = None
    reader_bytes_per_s: float | None = None
    layer_s: float | None = None
    bound_by: str | None = None
    next_lever: str | None = None
    next_lever_effect: str | None = None
    next_lever_tokens_per_s: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)

    def line(self) -> str:
        """The closing line of a run, and on a second one what it was bound by or what would make it faster."""
        parts = [
            f"prompt {_tokens(self.prompt_tokens)} in {self.prefill_s:.2f} s, {self.prefill_tokens_per_s:.1f} tok/s"
            if self.prefill_s
            else f"prompt {_tokens(self.prompt_tokens)}",
            f"answer {_tokens(self.new_tokens)}"
            + (f", {self.decode_tokens_per_s:.2f} tok/s" if self.decode_tokens_per_s else ""),
        ]
        if self.decode_link_bytes and self.decode_s:
            of_measured = ""
            if self.link_share is not None and self.link_bytes_per_s is not None:
                of_measured = f", {100 * self.link_share:.0f} % of the {self.link_bytes_per_s / GB:.1f} measured"
            parts.append(f"link {self.decode_link_bytes / self.decode_s / GB:.1f} GB/s{of_measured}")
        if self.peak_device_bytes is not None:
            parts.append(f"peak GPU memory {format_size(self.peak_device_bytes)}")
        else:
            parts.append(f"peak memory {format_size(self.peak_host_bytes)}")
        if self.kv_cache_bytes is not None:
            parts.append(f"KV cache {format_size(self.kv_cache_bytes)}")
        return "\n".join([" | ".join(parts), *self._next()])

    def _next(self) -> list[str]:
        if self.bound_by is None or self.next_lever_effect is None:
            return []
        bound = (
            "bound by "
            + {
                "link": "the link",
                "reader": f"reading the files ({(self.reader_bytes_per_s or 0) / GB:.1f} GB/s)",
                "launches": f"launching kernels ({1000 * (self.layer_s or 0):.2g} ms a layer on the host)",
                "computing": "computing",
            }[self.bound_by]
        )
        if self.next_lever is None or self.next_lever_tokens_per_s is None:
            return [f"{bound}: {self.next_lever_effect}"]
        lever = f"{self.next_lever} {self.next_lever_effect}: about {format_rate(self.next_lever_tokens_per_s)} tok/s"
        # that the link binds is what the line above says
        return [f"next: {lever}" if self.bound_by == "link" else f"{bound}: {lever}"]


def _tokens(count: int) -> str:
    return f"{count} token" if count == 1 else f"{count} tokens"


def summarize(engine: "StreamingEngine") -> RunSummary:
    """The figures of an engine's last generation."""
    stats, report = engine.stats, engine.memory_report()
    kv = next(row for row in report.rows if row.name == "KV cache")
    lever, link, share, is_gpu = report.lever, engine.link_bytes_per_s, None, report.device_peak is not None
    if link is not None and stats.decode_bytes and stats.decode_s:
        share = stats.decode_bytes / stats.decode_s / link
    return RunSummary(
        prompt_tokens=stats.prompt_tokens,
        new_tokens=stats.new_tokens,
        prefill_s=stats.prefill_s,
        decode_s=stats.decode_s,
        prefill_tokens_per_s=stats.prefill_tokens_per_s,
        decode_tokens_per_s=stats.decode_tokens_per_s,
        link_bytes=stats.bytes_moved,
        peak_device_bytes=report.device_peak.measured_bytes if report.device_peak is not None else None,
        peak_host_bytes=peak_host_bytes(),
        kv_cache_bytes=kv.measured_bytes,
        passes=stats.passes,
        decode_link_bytes=stats.decode_bytes,
        link_bytes_per_s=link,
        link_share=share,
        reader_bytes_per_s=report.reader_bytes_per_s,
        layer_s=stats.layer_s if is_gpu else None,
        bound_by=lever.bound_by if lever is not None else None,
        next_lever=lever.option if lever is not None else None,
        next_lever_effect=lever.reason if lever is not None else None,
        next_lever_tokens_per_s=lever.tokens_per_s if lever is not None else None,
    )


def peak_host_bytes() -> int:
    """Largest resident memory of this process so far, in bytes; pages of mapped files count."""
    status = Path("/proc/self/status")
    if status.is_file():  # Linux: getrusage would count the process that started this one
        kib = next(line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(kib) * 1024
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS: bytes already
