"""The host's side of the stream: from the files, through page-locked memory, to the device.

    files ──reader threads──> slots (page-locked, used again and again) ──copy──> a unit's place on the device
                         └──> segments (page-locked, kept)              ──copy──>

Every unit passes once, in the order of a pass, residents too: the first pass runs while the memory fills. Units that
the plan keeps go into segments as soon as those are page-locked, and come from there ever after; until then, and
units that are not kept in every pass, go through the slots. A pass therefore never waits for memory to be prepared.

A copy is queued when two things have happened, in either order: the piece has been read (by a reader thread), and its
place on the device is free in the copy stream (`grant`, called by the thread that computes). Whoever comes second
queues it. All state is under one lock; reads and copies run outside of it.
"""

import logging
import threading
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel

from streamer.architecture import Parameter, Unit, read_parameter, reason_of
from streamer.checkpoint import Checkpoint
from streamer.errors import StreamerError
from streamer.options import MIB, format_size
from streamer.rates import usable_cores
from streamer.weights.memory import HostMemory, current_device
from streamer.weights.pieces import Piece, PieceReader

logger = logging.getLogger("streamer")

# Pages of kept units are locked in segments of at least this: small enough that the first ones are ready at once.
_SEGMENT_BYTES = 256 * MIB


def reader_threads() -> int:
    """Threads that read files: 12 of 16 cores carry 42 GB/s from the page cache to the device, 8 or 16 less [H100]."""
    return max(4, min(12, usable_cores() * 3 // 4))


@dataclass
class _Filled:
    """Bytes that were read: offsets in the unit and views; the slot that holds them, or None."""

    views: list[tuple[int, torch.Tensor]]
    slot: int | None


@dataclass
class _Load:
    """One unit on its way to the device in one pass.

    Attributes:
        unit: its index. cycle: the pass. into: where its bytes are kept, or None.
        unread, unqueued: pieces still to be read, and to be queued for copying.
        is_granted: its place on the device is free in the copy stream.
        waiting: pieces that were read before that.
    """

    unit: int
    cycle: int
    into: torch.Tensor | None
    unread: int
    unqueued: int
    is_granted: bool
    waiting: list[_Filled] = field(default_factory=list)


class HostWeights:
    """Gives the bytes of units to the device, in the order of a pass, for ever.

    Args:
        reader: of the units' pieces.
        resident: units that go to the device once. kept: streamed units that stay in page-locked memory.
        staging_bytes: of the slots together. slot_bytes: of one; those of the reader's pieces.
        device: a CUDA device, or the CPU (nothing is page-locked and copies are synchronous).
        keeps_late: leave the first pass to the slots, and begin to page-lock memory for the kept units after it. New
            memory comes at 2 to 5 GB/s and slows readers down while it comes [H100]: a disk does not notice, the page
            cache does.
        threads: that read.
    """

    def __init__(
        self,
        reader: PieceReader,
        resident: Collection[int],
        kept: Collection[int],
        staging_bytes: int,
        slot_bytes: int,
        device: torch.device,
        *,
        keeps_late: bool = False,
        threads: int | None = None,
    ):
        units = reader.units
        self._reader, self._device, self._is_cuda = reader, device, device.type == "cuda"
        self._units = units
        self._is_resident = [i in resident for i in range(len(units))]
        self._streamed = [i for i in range(len(units)) if not self._is_resident[i]]
        self._kept = [i for i in self._streamed if i in kept]
        self._threads, self._keeps_late = threads or reader_threads(), keeps_late
        # one lock, and two kinds of waiting: readers for a slot or a place in the order, the others for progress.
        # Waking every reader at every step kept 16 of them busy with nothing else: 11 GB/s instead of 28 [H100].
        self._lock = threading.Lock()
        self._wakes, self._progress = threading.Condition(self._lock), threading.Condition(self._lock)
        self._workers: list[threading.Thread] = []
        self._stops = self._pauses = self._is_done = False
        self._alive = self._busy = 0  # reader threads, and those of them that have a piece in hand
        self._error: BaseException | None = None
        # memory
        self.staging = self._make_staging(max(staging_bytes, slot_bytes))
        count = self.staging.tensor.numel() // slot_bytes
        self._slots = [self.staging.tensor[i * slot_bytes : (i + 1) * slot_bytes] for i in range(count)]
        self._copied = [torch.cuda.Event(blocking=True) for _ in range(count)] if self._is_cuda else []
        self._free = deque(range(count))
        self._segments: list[HostMemory] = []
        self._ready_memory: dict[int, torch.Tensor] = {}  # kept unit -> its bytes, page-locked and not yet filled
        self._held: dict[int, torch.Tensor] = {}  # kept unit -> its bytes, filled
        self._queued = [0] * len(units)  # by unit: loads that are in the copy stream
        self._loads: dict[tuple[int, int], _Load] = {}
        self._decided: dict[tuple[int, int], bool] = {}
        self._begin()
        # the device's side, from `start` on
        self._places: Sequence[torch.Tensor] = ()
        self._stream: torch.cuda.Stream | None = None
        self.arrived = [torch.cuda.Event() for _ in units] if self._is_cuda else []

    def _make_staging(self, nbytes: int) -> HostMemory:
        memory = HostMemory(nbytes)
        memory.prepare()
        if self._is_cuda and not memory.pin():
            logger.warning("the driver refuses to page-lock host memory: copies go through its bounce buffer")
        return memory

    def _begin(self) -> None:
        """The readers' position: before the first unit of the first pass."""
        self._order = list(range(len(self._units)))
        self._at = self._pass = 0
        self._pieces: deque[tuple[_Load, Piece]] = deque()
        self._filling: set[int] = set()

    # ------------------------------------------------------------ for DeviceWeights
    @property
    def held_units(self) -> frozenset[int]:
        """Units that are in page-locked memory by now."""
        return frozenset(self._held)

    @property
    def is_settled(self) -> bool:
        """Whether all units that can be kept are in page-locked memory: passes are as fast from here on as they get."""
        return set(self._held) >= set(self._kept)

    @property
    def has_failed(self) -> bool:
        """Whether a read has failed since the last restart."""
        return self._error is not None

    def start(self, places: Sequence[torch.Tensor], stream: torch.cuda.Stream | None) -> None:
        """Begin to read; places: [stored_bytes] uint8 on the device for each unit. stream: where copies are queued."""
        self._places, self._stream = places, stream
        with self._lock:
            self._start_workers()
        if self._kept:
            thread = threading.Thread(target=self._run_memory, name="tq-stream-memory", daemon=True)
            try:
                thread.start()
            except RuntimeError:  # the system allows no more threads
                self._give_up(self._kept)
            else:
                self._workers.append(thread)

    def _has_all(self) -> bool:
        """Whether the files are not needed any more: residents have arrived, all others are in memory."""
        return all(self._queued[unit] if kept else unit in self._held for unit, kept in enumerate(self._is_resident))

    def _start_workers(self) -> None:
        for number in range(self._threads):
            name = f"tq-stream-reader-{number}"
            thread = threading.Thread(target=self._run_reader, name=name, daemon=True)
            try:
                thread.start()
            except RuntimeError as error:  # the system allows no more threads: fewer do as well
                if not self._alive:
                    raise StreamerError(f"no thread can be started to read weights ({error})") from error
                return
            self._alive += 1
            self._workers.append(thread)

    def grant(self, unit: int, cycle: int) -> None:
        """The load of a streamed unit for a pass may be copied to its place by whatever is queued from here on.

        Args:
            cycle: the pass, counted from 0 at the start and again at every restart. A unit's are granted in order.
        """
        filled: list[_Filled] = []
        with self._lock:
            self._resume()
            held = self._held[unit] if self._comes_from_memory(unit, cycle) else None
            if held is None:
                load = self._load(unit, cycle)
                load.is_granted = True
                filled, load.waiting = load.waiting, []
        if held is not None:
            self._copy(unit, [(0, held)])
            self._arrive(unit)
            return
        for item in filled:
            self._queue(load, item)

    def is_queued(self, unit: int, loads: int) -> bool:
        """Whether that many loads of the unit are in the copy stream."""
        return self._queued[unit] >= loads

    def wait(self, unit: int, loads: int) -> None:
        """Block until that many loads of the unit are in the copy stream.

        Raises:
            CheckpointError: a file could not be read.
        """
        with self._lock:
            self._resume()
            while self._queued[unit] < loads:
                if self._error is not None:
                    raise self._error
                if self._stops:
                    raise RuntimeError("a unit was waited for after the stream of weights was closed")
                self._progress.wait()

    def _resume(self) -> None:
        if self._pauses:
            self._pauses = False
            self._wakes.notify_all()

    def restart(self) -> None:
        """After an error in mid-pass: the next load of each streamed unit is its first again.

        Readers go on when the next pass asks for something: a fault of the files may be mended until then.
        """
        with self._lock:
            self._pauses = True
            while self._busy:
                self._progress.wait()
            for load in self._loads.values():
                if load.into is not None and load.unread:
                    self._ready_memory[load.unit] = load.into
            self._loads.clear()
            self._decided.clear()
            self._reader.forget()
            self._begin()
            for unit in range(len(self._units)):
                if not (self._is_resident[unit] and self._queued[unit]):
                    self._queued[unit] = 0
            self._free = deque(range(len(self._slots)))
            self._error = None
            if (self._is_done or not self._alive) and not self._has_all():
                self._is_done = False
                self._start_workers()
            self._wakes.notify_all()
            self._progress.notify_all()

    def close(self) -> None:
        """End the threads, wait for copies under way, and release the memory."""
        with self._lock:
            self._stops = True
            self._wakes.notify_all()
            self._progress.notify_all()
        for thread in self._workers:
            thread.join()
        if self._stream is not None:
            self._stream.synchronize()
        self._workers, self._places = [], ()
        self._loads.clear()
        self._reader.forget()
        self._held, self._ready_memory, self._slots = {}, {}, []
        for memory in (self.staging, *self._segments):
            memory.close()
        self._segments = []

    # ------------------------------------------------------------ page-locked memory
    def _prepare_segments(self) -> None:
        """Page-lock memory for the kept units, in the order of a pass, while passes run."""
        if self._keeps_late:
            with self._lock:
                while not self._stops and not all(self._queued):
                    self._progress.wait()
        groups: list[list[int]] = []
        size = _SEGMENT_BYTES
        for unit in self._kept:
            if size >= _SEGMENT_BYTES:
                groups.append([])
                size = 0
            groups[-1].append(unit)
            size += self._units[unit].stored_bytes
        for number, group in enumerate(groups):
            if self._stops:
                return
            memory = self._prepared(sum(self._units[unit].stored_bytes for unit in group))
            if memory is None:
                left = [unit for later in groups[number:] for unit in later]
                self._give_up(left)
                return
            at = 0
            with self._lock:
                self._segments.append(memory)
                for unit in group:
                    self._ready_memory[unit] = memory.tensor[at : at + self._units[unit].stored_bytes]
                    at += self._units[unit].stored_bytes

    def _prepared(self, nbytes: int) -> HostMemory | None:
        try:
            memory = HostMemory(nbytes)
            memory.prepare()
        except (OSError, RuntimeError, MemoryError) as error:  # torch says the last two in its own words
            logger.info("host memory: %s", error)
            return None
        if self._is_cuda and not memory.pin():
            memory.close()
            return None
        return memory

    def _give_up(self, units: Sequence[int]) -> None:
        """Units that there is no page-locked memory for are read from the files in every pass."""
        lost = sum(self._units[unit].stored_bytes for unit in units)
        had = sum(segment.tensor.nbytes for segment in self._segments)
        logger.warning(
            "the system page-locks no more than %s of host memory: %s of weights are read from the files in every pass",
            format_size(had + self.staging.tensor.nbytes),
            format_size(lost),
        )
        with self._lock:
            self._kept = [unit for unit in self._kept if unit not in set(units)]

    # ------------------------------------------------------------ reader threads
    def _run_reader(self) -> None:
        """A reader thread; what nobody foresaw is raised where units are waited for, instead of waiting for ever."""
        try:
            with current_device(self._device):
                self._work()
        except BaseException as error:  # noqa: BLE001  handed to the thread that computes, which raises it
            with self._lock:
                self._alive -= 1
                self._error = self._error or error
                self._progress.notify_all()

    def _run_memory(self) -> None:
        """The thread that prepares memory; without it a run is slower, not wrong."""
        try:
            with current_device(self._device):
                self._prepare_segments()
        except Exception as error:  # noqa: BLE001  torch and the driver have their own kinds
            logger.warning("preparing host memory failed: %s", reason_of(error))
            self._give_up([u for u in self._kept if u not in self._ready_memory and u not in self._held])

    def _work(self) -> None:
        while True:
            with self._lock:
                task = self._next_task()
                if task is not None:
                    self._busy += 1
                else:
                    self._alive -= 1
                    is_last = not self._alive
            if task is None:
                if is_last:
                    self._release_staging()
                return
            slot, load, piece = task
            try:
                self._read(slot, load, piece)
            except BaseException as error:  # noqa: BLE001  handed to the thread that computes, which raises it
                with self._lock:
                    self._error = self._error or error
                    self._progress.notify_all()
            finally:
                with self._lock:
                    self._busy -= 1
                    if self._pauses:
                        self._progress.notify_all()

    def _release_staging(self) -> None:
        """The files have been read for good: the slots go back to the system once no copy reads them."""
        with self._lock:
            while self._loads and self._is_done and not self._stops:
                self._progress.wait()
            if self._stops or not self._is_done:
                return
            self._slots = []
            self._free.clear()
        if self._stream is not None:
            self._stream.synchronize()
        self.staging.close()

    def _next_task(self) -> tuple[int, _Load, Piece] | None:
        """A free slot and the next piece, waited for under the lock; None when there is nothing more to do.

        The slot comes first: pieces then get their slots in the order of the pass, so the one that is waited for is
        never behind later ones that fill all slots.
        """
        while not self._stops and not self._is_done:
            if not self._pauses and self._error is None and self._free:
                found = self._next_piece()
                if found is not None:
                    return self._free.popleft(), *found
            if not self._is_done:
                self._wakes.wait()
        return None

    def _next_piece(self) -> tuple[_Load, Piece] | None:
        """The next piece in the order of the passes; None if the readers must wait, or have come to the end."""
        while not self._pieces:
            if self._at == len(self._order):
                if self._filling:
                    return None  # the next pass depends on what is being kept now
                if all(unit in self._held for unit in self._streamed):
                    self._is_done = True
                    self._wakes.notify_all()
                    return None
                self._order, self._at, self._pass = self._streamed, 0, self._pass + 1
            unit = self._order[self._at]
            if unit in self._filling:
                return None
            if self._is_resident[unit]:
                if not self._queued[unit]:
                    self._open(unit, 0, None)
            elif not self._comes_from_memory(unit, self._pass):
                self._open(unit, self._pass, self._ready_memory.pop(unit, None))
            self._at += 1
        return self._pieces.popleft()

    def _open(self, unit: int, cycle: int, into: torch.Tensor | None) -> None:
        load = self._load(unit, cycle)
        if into is not None:
            load.into = into
            self._filling.add(unit)
        self._pieces.extend((load, piece) for piece in self._reader.pieces[unit])

    def _load(self, unit: int, cycle: int) -> _Load:
        load = self._loads.get((unit, cycle))
        if load is None:
            pieces = len(self._reader.pieces[unit])
            load = _Load(unit, cycle, None, pieces, pieces, is_granted=self._is_resident[unit])
            self._loads[unit, cycle] = load
        return load

    def _comes_from_memory(self, unit: int, cycle: int) -> bool:
        """Whether a load is copied from kept memory: decided once, by the grant or by the readers, for both."""
        decided = self._decided.pop((unit, cycle), None)
        if decided is None:
            decided = unit in self._held
            if not self._is_done:
                self._decided[unit, cycle] = decided
        return decided

    def _read(self, slot: int, load: _Load, piece: Piece) -> None:
        keeps_slot = False
        try:
            if self._copied:
                self._copied[slot].synchronize()  # the copy that read it last; returns at once if there was none
            views = self._reader.read(piece, self._slots[slot], load.into)
            keeps_slot = load.into is None
        finally:
            if not keeps_slot:
                with self._lock:
                    self._free.append(slot)
                    self._wakes.notify()
        filled = _Filled(views, slot if keeps_slot else None)
        with self._lock:
            load.unread -= 1
            if not load.unread and load.into is not None:
                self._held[load.unit] = load.into
                self._filling.discard(load.unit)
                self._wakes.notify_all()  # readers may have waited for just this unit
            if not load.is_granted:
                load.waiting.append(filled)
                return
        self._queue(load, filled)

    def _queue(self, load: _Load, filled: _Filled) -> None:
        """Queue the copy of a piece to its unit's place."""
        self._copy(load.unit, filled.views)
        with self._lock:
            if filled.slot is not None:
                if self._stream is not None:
                    self._copied[filled.slot].record(self._stream)
                self._free.append(filled.slot)
                self._wakes.notify()
            load.unqueued -= 1
            if not load.unqueued:
                del self._loads[load.unit, load.cycle]
                self._arrive(load.unit)
                self._progress.notify_all()

    def _copy(self, unit: int, views: Sequence[tuple[int, torch.Tensor]]) -> None:
        place = self._places[unit]
        with torch.cuda.stream(self._stream):
            for at, view in views:
                place[at : at + view.numel()].copy_(view, non_blocking=True)

    def _arrive(self, unit: int) -> None:
        """All copies of a load are queued: what waits for `arrived` from here on reads the unit's bytes."""
        if self._stream is not None:
            self.arrived[unit].record(self._stream)
        self._queued[unit] += 1


class MappedWeights:
    """Weights of a run on the CPU: parameters are views on the map, so waiting and releasing are no work."""

    bytes_moved = 0
    blocked_s = 0.0
    is_settled = True

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

    def is_lent(self, unit: int) -> bool:
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
