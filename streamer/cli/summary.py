"""RunSummary: what a generation took, as the closing line on stderr and as the JSON object on stdout."""

import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from streamer.options import format_size

if TYPE_CHECKING:
    from streamer.engine import StreamingEngine

_GB = 10**9  # link rates are given in decimal units, as data sheets give them


@dataclass(frozen=True)
class RunSummary:
    """Figures of the last generation of an engine.

    Attributes:
        prefill_s, decode_s: to the first new token, and from there to the last.
        link_bytes: over the link to the GPU; 0 on the CPU.
        peak_device_bytes: peak of the process on the GPU (allocator and CUDA context); None on the CPU.
        peak_host_bytes: peak resident memory of the process, pages of the files' maps included.
        kv_cache_bytes: the tensors of the KV cache at the end; None when it was not reached.
        passes: forward passes.
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

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)

    def line(self) -> str:
        """The closing line of a run."""
        parts = [
            f"prompt {self.prompt_tokens} tokens, {self.prefill_tokens_per_s:.1f} tok/s",
            f"answer {self.new_tokens} tokens, {self.decode_tokens_per_s:.2f} tok/s",
        ]
        if self.peak_device_bytes is not None:
            rate = self.link_bytes / (self.prefill_s + self.decode_s) / _GB if self.prefill_s else 0.0
            parts.append(f"link {format_size(self.link_bytes)}, {rate:.1f} GB/s")
            parts.append(f"peak GPU memory {format_size(self.peak_device_bytes)}")
        else:
            parts.append(f"peak memory {format_size(self.peak_host_bytes)}")
        if self.kv_cache_bytes is not None:
            parts.append(f"KV cache {format_size(self.kv_cache_bytes)}")
        return " | ".join(parts)


def summarize(engine: "StreamingEngine") -> RunSummary:
    """The figures of an engine's last generation."""
    stats, report = engine.stats, engine.memory_report()
    kv = next(row for row in report.rows if row.name == "KV cache")
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
