"""The host's side of the stream: bytes of a unit, from the files to memory that the device can read.

A source fills units in the order of a pass. Which source serves a run is the plan's choice:
    MappedWeights   CPU runs: parameters are views on the files' maps; nothing is copied.
    PinnedSource    reads each unit once, by threads and ahead of its use, into page-locked memory, and keeps it.
    StagedSource    reads each unit each time, into a few page-locked slots: for hosts with less memory than model.
"""

import logging
import mmap
import weakref
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import torch
from transformers import PreTrainedModel

from streamer.architecture import Parameter, Unit, read_parameter
from streamer.checkpoint import Checkpoint

logger = logging.getLogger("streamer")

# Threads that read files: enough to keep one NVMe disk or the page cache busy (4 reach 4 to 6.6 GB/s, 1 reaches 2).
READER_THREADS = 4

_SEGMENT_BYTES = 2 << 30


class UnitSource(Protocol):
    """Gives the bytes of units to the device."""

    def is_ready(self, unit: int) -> bool:
        """Whether `send` would return without waiting for a read."""
        ...

    def send(self, unit: int, target: torch.Tensor) -> None:
        """Copy unit's bytes to target [nbytes] uint8, on the current stream if target is on a GPU."""
        ...

    def close(self) -> None:
        """End threads and release memory."""
        ...


class UnitReader:
    """Reads units from the checkpoint into host memory, laid out as the device wants them."""

    def __init__(self, checkpoint: Checkpoint, model: PreTrainedModel, units: Sequence[Unit]):
        self.checkpoint, self.model, self.units = checkpoint, model, units

    def values(self, unit: int) -> Iterator[tuple[int, torch.Tensor]]:
        """Offset in the unit and value of each parameter (a view on the map where it is stored as it runs)."""
        wanted = self.units[unit]
        for parameter, offset in zip(wanted.parameters, wanted.offsets, strict=True):
            value = read_parameter(parameter, self.checkpoint, self.model)
            yield offset, value if wanted.rows is None else value[wanted.rows[0] : wanted.rows[1]]

    def read(self, unit: int, target: torch.Tensor) -> None:
        """Fill target [nbytes] uint8 on the host with the unit's parameters at their offsets."""
        wanted = self.units[unit]
        if wanted.rows is None and all(p.conversion is None and p.is_stored_as_run for p in wanted.parameters):
            for parameter, offset in zip(wanted.parameters, wanted.offsets, strict=True):
                self.checkpoint.read_into(parameter.sources[-1], target[offset : offset + parameter.nbytes])
            return
        for offset, value in self.values(unit):
            part = target[offset : offset + value.nbytes]
            part.view(value.dtype).view(value.shape).copy_(value)


class PinnedSegment:
    """Anonymous host memory of exactly the size asked for, page-locked if the driver allows.

    torch's pinned allocator rounds each block up to a power of two; registering an anonymous map does not.
    """

    def __init__(self, nbytes: int):
        # private: a shared anonymous map is shmem, which gets no huge pages
        self._map = mmap.mmap(-1, max(nbytes, mmap.PAGESIZE), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            try:
                self._map.madvise(mmap.MADV_HUGEPAGE)
            except OSError as error:
                logger.info("huge pages are not available (%s)", error)
        self.tensor = torch.frombuffer(self._map, dtype=torch.uint8)[:nbytes]
        self._registered_bytes = 0

    @property
    def is_pinned(self) -> bool:
        """Whether the device reads it without a bounce buffer."""
        return bool(self._registered_bytes)

    def pin(self) -> bool:
        """Page-lock the memory; call once it is filled (faulting it in first is faster). False if refused."""
        code = int(torch.cuda.cudart().cudaHostRegister(self.tensor.data_ptr(), len(self._map), 1))  # 1 = portable
        if code == 0:
            self._registered_bytes = len(self._map)
            self._unpin = weakref.finalize(self, torch.cuda.cudart().cudaHostUnregister, self.tensor.data_ptr())
        else:
            _clear_cuda_error()
        return code == 0

    def close(self) -> None:
        """Unlock and unmap; views of the tensor must be gone."""
        if self._registered_bytes:
            self._unpin()
            self._registered_bytes = 0
        self.tensor = torch.empty(0, dtype=torch.uint8)


def _clear_cuda_error() -> None:
    """A refused call leaves its error for the next launch to report: let one report it here."""
    try:
        torch.zeros(1, device="cuda")
    except RuntimeError as error:
        logger.debug("after a refused registration: %s", error)


class PinnedSource:
    """Keeps the units it is asked to keep in page-locked memory; reader threads fill it in the order of a pass.

    The first pass runs while the memory fills: no load phase before the first token. Until a segment is full it is
    not locked yet, and its copies are synchronous.
    """

    def __init__(self, reader: UnitReader, kept: Sequence[int]):
        sizes = [reader.units[u].nbytes for u in kept]
        self._places: dict[int, tuple[int, int, int]] = {}  # unit -> segment, offset, bytes
        segments: list[list[int]] = []
        at = _SEGMENT_BYTES
        for unit, size in zip(kept, sizes, strict=True):
            if at + size > _SEGMENT_BYTES:
                segments.append([])
                at = 0
            self._places[unit] = (len(segments) - 1, at, size)
            segments[-1].append(unit)
            at += size
        self._segments = [PinnedSegment(sum(reader.units[u].nbytes for u in inside)) for inside in segments]
        self._left = [len(inside) for inside in segments]
        self._refused = False
        self._pool = ThreadPoolExecutor(READER_THREADS, thread_name_prefix="tq-stream-reader")
        self._filled: dict[int, Future[None]] = {
            unit: self._pool.submit(reader.read, unit, self._bytes_of(unit)) for unit in kept
        }
        self._counted: set[int] = set()

    @property
    def nbytes(self) -> int:
        """Host memory held."""
        return sum(segment.tensor.nbytes for segment in self._segments)

    @property
    def is_pinned(self) -> bool:
        """Whether every segment is page-locked by now."""
        return all(segment.is_pinned for segment in self._segments)

    def _bytes_of(self, unit: int) -> torch.Tensor:
        segment, at, size = self._places[unit]
        return self._segments[segment].tensor[at : at + size]

    def is_ready(self, unit: int) -> bool:
        """Whether the unit has been read."""
        return self._filled[unit].done()

    def send(self, unit: int, target: torch.Tensor) -> None:
        """Copy to the device; waits for the read in the first pass only."""
        if unit not in self._counted:
            self._filled[unit].result()
            self._counted.add(unit)
            segment = self._places[unit][0]
            self._left[segment] -= 1
            if not self._left[segment] and target.is_cuda and not self._segments[segment].pin() and not self._refused:
                self._refused = True
                logger.warning("the driver refuses to page-lock host memory: copies go through its bounce buffer")
        target.copy_(self._bytes_of(unit), non_blocking=True)

    def close(self) -> None:
        """End the readers and release the memory."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        for segment in self._segments:
            segment.close()
        self._segments, self._places, self._filled = [], {}, {}


class StagedSource:
    """Reads each unit each time, through a few page-locked slots.

    For hosts with less memory than streamed weights, and for units that are copied once and stay on the device.
    """

    SLOTS, SLOT_BYTES = 4, 64 << 20  # a power of two each: torch's pinned allocator rounds up to one

    def __init__(self, reader: UnitReader):
        self._reader = reader
        self._slots: list[torch.Tensor] = []  # taken at the first send: not every run sends anything this way
        self._copied: list[torch.cuda.Event] = []
        self._next = 0

    @property
    def nbytes(self) -> int:
        """Host memory held."""
        return sum(slot.nbytes for slot in self._slots)

    def is_ready(self, unit: int) -> bool:
        """Never: every send reads."""
        return False

    def send(self, unit: int, target: torch.Tensor) -> None:
        """Copy the unit to the device, a slot at a time; a slot is filled again when its last copy has ended."""
        if not self._slots:
            self._slots = [torch.empty(self.SLOT_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(self.SLOTS)]
            self._copied = [torch.cuda.Event() for _ in range(self.SLOTS)]
        for offset, value in self._reader.values(unit):
            source = value.reshape(-1).view(torch.uint8)
            for start in range(0, source.numel(), self.SLOT_BYTES):
                piece = source[start : start + self.SLOT_BYTES]
                index, self._next = self._next, (self._next + 1) % self.SLOTS
                self._copied[index].synchronize()
                slot = self._slots[index][: piece.numel()]
                slot.copy_(piece)
                target[offset + start : offset + start + piece.numel()].copy_(slot, non_blocking=True)
                self._copied[index].record(torch.cuda.current_stream(target.device))

    def close(self) -> None:
        """Release the slots."""
        for event in self._copied:
            event.synchronize()
        self._slots, self._copied = [], []


class MappedWeights:
    """Weights of a run on the CPU: parameters are views on the map, so waiting and releasing are no work."""

    bytes_moved = 0

    def __init__(
        self,
        checkpoint: Checkpoint,
        model: PreTrainedModel,
        units: Sequence[Unit],
        known: Mapping[str, torch.Tensor],
    ):
        self._checkpoint, self._model, self._units, self._known = checkpoint, model, units, known

    def parameter(self, unit: int, parameter: Parameter) -> torch.Tensor:
        """The value of one parameter of a unit; `known` ones (a tied head) are not made a second time."""
        value = self._known.get(parameter.name)
        if value is None:
            value = read_parameter(parameter, self._checkpoint, self._model)
        rows = self._units[unit].rows
        return value if rows is None else value[rows[0] : rows[1]]

    def is_streamed(self, unit: int) -> bool:
        """Never: the bytes stay where they are."""
        return False

    def wait(self, unit: int) -> None:
        """Nothing to wait for: a page is read when it is touched."""

    def release(self, unit: int) -> None:
        """Nothing to release."""

    def abort(self) -> None:
        """Nothing is under way."""

    def close(self) -> None:
        """The checkpoint owns its maps; the model may be used on, for they stay."""
