"""Rates of this machine, measured, in bytes per second: the link to a GPU, copies in host memory, reads of files.

A run cannot be faster than these allow; `tq-stream bench` and the closing line of a run say how close it came.
"""

import ctypes
import mmap
import os
import statistics
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from streamer.checkpoint import DIRECT_BYTES, Checkpoint
from streamer.errors import CheckpointError, OptionError

# Pieces in which the files are read: of the order of the staged path's slots (streamer/plan.py), by as many threads.
PIECE_BYTES = 16 << 20

# One copy over the link: starting it costs nothing beside it, and a power of two is what torch's page-locked
# allocator takes without rounding up.
LINK_BYTES = 64 << 20

# An idle GPU lets its link fall to a slower rate, and raises it again within milliseconds of traffic.
_WARM_UP_S = 0.05

# Source and target of a copy in host memory together: more than any cache of one socket's share of the threads.
_HOST_BYTES = 512 << 20
_HOST_COPIES = 5

# Files of a large checkpoint are read this far: seconds on a slow disk.
_FILE_BYTES = 2 << 30

# More threads than this do not make copies in host memory faster on the machines measured.
_MAX_COPY_THREADS = 16


def link_rate(
    device: torch.device,
    *,
    is_pinned: bool = True,
    source: torch.Tensor | None = None,
    target: torch.Tensor | None = None,
    copies: int = 9,
) -> float:
    """Rate of copies from host memory to a GPU.

    Args:
        device: a CUDA device. is_pinned: from page-locked memory, else from pageable memory.
        source: [N] uint8 in host memory, of the kind that is_pinned says; default: 64 MiB, allocated for this.
        target: [M] uint8 on the device, overwritten; default: as many bytes as the source has, allocated for this
            (torch's allocator keeps them).
        copies: how many are timed, at least 2, each of min(N, M) bytes.
    Returns:
        bytes per second: the median over the copies after the first. Some 50 ms of untimed copies go before them.
    Raises:
        OptionError: a device that is no GPU, empty tensors, fewer than 2 copies. RuntimeError (torch's): no memory
        left on the device, or page-locked memory refused.
    Source: own.
    """
    if device.type != "cuda":
        raise OptionError(f"the link is measured to a GPU; got device {device}")
    if copies < 2:
        raise OptionError(f"at least 2 copies are timed, for the first one does not count; got {copies}")
    if source is None:
        nbytes = LINK_BYTES if target is None else target.nbytes
        source = torch.zeros(nbytes, dtype=torch.uint8, pin_memory=is_pinned)
    if target is None:
        target = torch.empty(source.nbytes, dtype=torch.uint8, device=device)
    nbytes = min(source.nbytes, target.nbytes)
    if nbytes == 0:
        raise OptionError("the link is measured by copying bytes; got an empty tensor")
    source, target = source[:nbytes], target[:nbytes]
    warm = time.perf_counter() + _WARM_UP_S
    _copy_s(source, target, is_pinned=is_pinned)
    while time.perf_counter() < warm:
        _copy_s(source, target, is_pinned=is_pinned)
    times_s = [_copy_s(source, target, is_pinned=is_pinned) for _ in range(copies)]
    return nbytes / statistics.median(times_s[1:])


def _copy_s(source: torch.Tensor, target: torch.Tensor, *, is_pinned: bool) -> float:
    """Seconds of one copy to the target's device, by the device's clock."""
    with torch.cuda.device(target.device):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        target.copy_(source, non_blocking=is_pinned)
        end.record()
        end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def host_copy_rate(threads: int) -> float:
    """Rate of copies within host memory, from buffers larger than the caches.

    Args:
        threads: that copy at the same time, each between two buffers of its own; together they take 512 MiB.
    Returns:
        bytes copied per second (the memory moves each twice, read and written), by all threads: the median of five.
    Raises:
        OptionError: fewer than 1 thread.
    Source: own.
    """
    if threads < 1:
        raise OptionError(f"at least 1 thread copies; got {threads}")
    nbytes = _HOST_BYTES // 2 // threads
    buffers = [(_touched(nbytes), _touched(nbytes)) for _ in range(threads)]

    def copy(index: int) -> None:
        source, target = buffers[index]
        # not Tensor.copy_: it would use torch's own threads; ctypes releases Python's lock
        ctypes.memmove(target.data_ptr(), source.data_ptr(), nbytes)

    times_s = []
    with ThreadPoolExecutor(threads, thread_name_prefix="tq-stream-rate") as pool:
        for _ in range(1 + _HOST_COPIES):  # the first starts the threads
            start = time.perf_counter()
            list(pool.map(copy, range(threads)))
            times_s.append(time.perf_counter() - start)
    return threads * nbytes / statistics.median(times_s[1:])


def read_rate(checkpoint: Checkpoint, *, direct: bool, threads: int, max_bytes: int) -> float:
    """Rate at which threads read a checkpoint's tensors, the way weights are read that host memory cannot keep.

    Tensors are read in the order of the files, in pieces of 16 MiB, each thread into one buffer of its own.

    Args:
        checkpoint: any; it stays open.
        direct: around the page cache, so that the disk answers (where the file system refuses that, the page cache
            may); False: the page cache answers for whatever it holds, and takes in the rest.
        threads: that read at the same time.
        max_bytes: reading ends when this many bytes have been asked for; each byte is read once at most.
    Returns:
        bytes per second, by all threads.
    Raises:
        OptionError: fewer than 1 thread or byte. CheckpointError: the files cannot be read, or hold no bytes.
    Source: own.
    """
    if threads < 1 or max_bytes < 1:
        raise OptionError(f"at least 1 thread reads at least 1 byte; got {threads} threads and {max_bytes} bytes")
    pieces, planned_bytes = deque[tuple[str, int, int]](), 0
    for entry in checkpoint.tensors.values():
        for start in range(0, entry.nbytes, PIECE_BYTES):
            stop = min(entry.nbytes, start + PIECE_BYTES, start + max_bytes - planned_bytes)
            if stop > start:
                pieces.append((entry.name, start, stop))
                planned_bytes += stop - start
    if not pieces:
        raise CheckpointError(f"{checkpoint.folder} holds no bytes to read", path=checkpoint.folder)
    buffers = [_touched(PIECE_BYTES + 2 * DIRECT_BYTES) for _ in range(threads)]

    def read(buffer: torch.Tensor) -> None:
        while True:
            try:
                name, start, stop = pieces.popleft()  # atomic; the readers share the queue
            except IndexError:
                return
            try:
                checkpoint.read_part(name, start, stop, buffer, direct=direct)
            except BaseException:
                pieces.clear()  # the other readers end as well
                raise

    with ThreadPoolExecutor(threads, thread_name_prefix="tq-stream-rate") as pool:
        try:
            begin = time.perf_counter()
            list(pool.map(read, buffers))
            return planned_bytes / (time.perf_counter() - begin)
        finally:
            pieces.clear()  # after an interrupt the readers end with the piece that they are at


def _touched(nbytes: int) -> torch.Tensor:
    """[nbytes] uint8 zeros that begin on a page; every page has been written, so that no later write faults."""
    return torch.frombuffer(mmap.mmap(-1, nbytes), dtype=torch.uint8).zero_()


def disk_bytes_read() -> int | None:
    """Bytes that storage has delivered for this process so far; None where the system does not count them."""
    counters = Path("/proc/self/io")
    if not counters.is_file():
        return None
    try:
        lines = counters.read_text(encoding="ascii").splitlines()
    except OSError:  # a container may forbid it
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith("read_bytes:")), None)


@dataclass(frozen=True)
class FileRate:
    """Rate at which a checkpoint's files are read.

    Attributes:
        bytes_per_s: by all reader threads.
        disk_share: of these bytes, the part that storage delivered (0 to 1; the page cache had the rest); None where
            the system does not count.
    """

    bytes_per_s: float
    disk_share: float | None


@dataclass(frozen=True)
class MachineRates:
    """What bounds a run on this machine; None where there is no such path.

    Attributes:
        pinned_link_bytes_per_s, pageable_link_bytes_per_s: host to GPU, from page-locked and from pageable memory.
        host_copy_bytes_per_s: within host memory, 1 thread. host_copy_all_bytes_per_s: by copy_threads of them; None
            with one core.
        files: the checkpoint as the system serves it. files_direct: around the page cache. Both by reader_threads.
    """

    pinned_link_bytes_per_s: float | None
    pageable_link_bytes_per_s: float | None
    host_copy_bytes_per_s: float
    host_copy_all_bytes_per_s: float | None
    copy_threads: int
    files: FileRate
    files_direct: FileRate
    reader_threads: int

    def as_dict(self) -> dict[str, object]:
        """Plain data, for JSON."""
        return asdict(self)


def measure_machine(checkpoint: Checkpoint, device: torch.device, *, reader_threads: int) -> MachineRates:
    """Every rate that bounds a run of a checkpoint; takes seconds, and 512 MiB of host memory while it lasts.

    Args:
        checkpoint: whose files are read, up to 2 GiB of them; that part is in the page cache afterwards.
        device: of the run; the link is measured to a GPU only, with 64 MiB there that are given back.
        reader_threads: that read the files.
    Returns:
        the rates; None for a link that the driver refuses to measure.
    Raises:
        CheckpointError: the files cannot be read.
    Source: own.
    """
    # the link before the host's copies, which leave the memory warm and the processor hot
    pinned = _link_or_none(device, is_pinned=True)
    pageable = _link_or_none(device, is_pinned=False)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.empty_cache()
    threads = min(_MAX_COPY_THREADS, usable_cores())
    return MachineRates(
        pinned_link_bytes_per_s=pinned,
        pageable_link_bytes_per_s=pageable,
        host_copy_bytes_per_s=host_copy_rate(1),
        host_copy_all_bytes_per_s=host_copy_rate(threads) if threads > 1 else None,
        copy_threads=threads,
        files=file_rate(checkpoint, direct=False, threads=reader_threads),
        files_direct=file_rate(checkpoint, direct=True, threads=reader_threads),
        reader_threads=reader_threads,
    )


def file_rate(checkpoint: Checkpoint, *, direct: bool, threads: int, max_bytes: int = _FILE_BYTES) -> FileRate:
    """`read_rate` with the share of the bytes that came from the disk; arguments and errors as there."""
    before = disk_bytes_read()
    rate = read_rate(checkpoint, direct=direct, threads=threads, max_bytes=max_bytes)
    after = disk_bytes_read()
    if before is None or after is None:
        return FileRate(rate, None)
    # whole blocks are read, and ahead: a little more than was asked for
    return FileRate(rate, min(1.0, (after - before) / min(checkpoint.total_bytes, max_bytes)))


def usable_cores() -> int:
    """Cores that this process may use."""
    affinity: Callable[[int], set[int]] | None = getattr(os, "sched_getaffinity", None)  # Linux only
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1


def _link_or_none(device: torch.device, *, is_pinned: bool) -> float | None:
    if device.type != "cuda":
        return None
    try:
        return link_rate(device, is_pinned=is_pinned)
    except RuntimeError:  # page-locked memory refused, or no memory left: a run may still find another way
        return None
