"""DeviceWeights: resident units and the ring of streamed ones; copies run ahead of the computation.

    copy stream      |copy 3.mlp |copy 4.attn|copy 4.mlp |copy 5.attn|   each waits for the unit whose bytes it takes
    compute stream      |2.mlp|3.attn|    |3.mlp|4.attn|    |4.mlp|      each waits for its own copy

When a unit is released, the copies that now have room are asked for; those from page-locked memory are queued on the
spot, by the thread that computes, the others once reader threads have their bytes. No copy or layer synchronises the
device.

A unit that is coded lies coded in the ring, or among the residents, and is decoded into memory that all layers share
when it is waited for, in the compute stream: the layer before has been computed when that overwrites its weights. A
coded unit's place in the ring is free as soon as it is decoded.
"""

import atexit
import threading
import time
import weakref
from collections.abc import Collection, Sequence
from typing import Protocol

import torch

from streamer.architecture import Parameter, Unit, decoded_bytes, decoded_offsets
from streamer.errors import StreamerError
from streamer.ops.lossless.together import PartsDecoder
from streamer.schedule import schedule_ring


class UnitSource(Protocol):
    """Where the bytes of units come from (HostWeights).

    Attributes:
        arrived: for each unit, an event in the copy stream after its last load; empty on the CPU.
        is_settled: what is to be kept in memory is there. has_failed: a read has failed since the last restart.
    """

    arrived: list[torch.cuda.Event]

    @property
    def is_settled(self) -> bool: ...
    @property
    def has_failed(self) -> bool: ...
    def start(self, places: Sequence[torch.Tensor], stream: torch.cuda.Stream | None) -> None: ...
    def grant(self, unit: int, cycle: int) -> None: ...
    def is_queued(self, unit: int, loads: int) -> bool: ...
    def wait(self, unit: int, loads: int) -> None: ...
    def restart(self) -> None: ...
    def close(self) -> None: ...


class DeviceWeights:
    """Bytes of all units on one device.

    Args:
        units: of a pass, in the order of use.
        resident: indices of units that stay; the others go through the ring.
        ring_bytes: size of the ring; at least the largest layer's streamed units together.
        source: where bytes come from.
        device: a CUDA device, or the CPU (copies are then synchronous).

    Attributes:
        bytes_moved: to the device so far, as they are stored.
        blocked_s: seconds for which the computing thread has waited until bytes had been read.
        resident_bytes, ring, decoded: uint8 on the device: units that stay, units that stream, and a decoded layer.
    """

    def __init__(
        self,
        units: Sequence[Unit],
        resident: Collection[int],
        ring_bytes: int,
        source: UnitSource,
        device: torch.device,
    ):
        self._units, self._device = units, device
        self._source: UnitSource | None = source
        self._resident = [i in resident for i in range(len(units))]
        self._streamed = [i for i in range(len(units)) if not self._resident[i]]
        held_bytes = sum(units[i].stored_bytes for i in sorted(resident))
        self.resident_bytes = torch.empty(held_bytes, dtype=torch.uint8, device=device)
        self.ring = torch.empty(ring_bytes if self._streamed else 0, dtype=torch.uint8, device=device)
        self.decoded = torch.empty(decoded_bytes(units), dtype=torch.uint8, device=device)
        self._decoders = [PartsDecoder(unit.code.parts, device) if unit.code else None for unit in units]
        self._decoded = [
            self.decoded[at : at + unit.nbytes] for at, unit in zip(decoded_offsets(units), units, strict=True)
        ]
        sizes, groups = [units[i].stored_bytes for i in self._streamed], [units[i].group for i in self._streamed]
        self._schedule = schedule_ring(sizes, self.ring.nbytes, groups)
        self._slot = {unit: slot for slot, unit in enumerate(self._streamed)}
        self._places: list[torch.Tensor] = []
        at = 0
        for i, unit in enumerate(units):
            if self._resident[i]:
                self._places.append(self.resident_bytes[at : at + unit.stored_bytes])
                at += unit.stored_bytes
            else:
                start = self._schedule.offsets[self._slot[i]]
                self._places.append(self.ring[start : start + unit.stored_bytes])
        self._loaded = [False] * len(units)  # resident units that have arrived
        self._issued = [0] * len(self._streamed)  # copies asked for so far, by slot
        self._released = [0] * len(self._streamed)
        self._next = 0
        self.bytes_moved = 0
        self.blocked_s = 0.0
        is_cuda = device.type == "cuda"
        self._copy_stream = torch.cuda.Stream(device) if is_cuda else None
        self._free = [torch.cuda.Event() for _ in self._streamed] if is_cuda else []
        # threads of the source would keep it, and the ring, for ever if nobody called close
        self._end_source = weakref.finalize(self, _abandon, source)
        self._end_source.atexit = False
        _LIVE.add(source)
        self._is_aborting = False

    def start(self) -> None:
        """Begin to fill the residents and the ring."""
        if self._copy_stream is not None:  # both were allocated on the stream that computes
            self._copy_stream.wait_stream(torch.cuda.current_stream(self._device))
        if self._source is not None:
            self._source.start(self._places, self._copy_stream)
        self.run_ahead()

    @property
    def is_settled(self) -> bool:
        """Whether the source has all units in memory that it is to keep there."""
        return self._source is not None and self._source.is_settled

    def parameter(self, unit: int, parameter: Parameter) -> torch.Tensor:
        """The view that a parameter of a unit is bound to, once: its place never changes."""
        owner = self._units[unit]
        start = owner.offsets[owner.parameters.index(parameter)]
        place = self._places[unit] if owner.code is None else self._decoded[unit]
        part = place[start : start + owner.part_bytes(parameter)]
        return part.view(parameter.dtype).view(owner.part_shape(parameter))

    def is_lent(self, unit: int) -> bool:
        """Whether the unit's bytes are there between wait and release only: it goes through the ring, or is coded."""
        return not self._resident[unit] or self._decoders[unit] is not None

    def wait(self, unit: int) -> None:
        """Let the compute stream wait for the unit's bytes, and decode them; ask for copies that are due.

        Raises:
            StreamerError: the engine has been closed.
            CheckpointError: a file could not be read.
        """
        if self._source is None:
            raise StreamerError("the engine of this model has been closed; ask it for its model again")
        # an abort was interrupted itself; or readers that ran ahead of the last pass met a fault, which may be mended
        if self._is_aborting or (unit == 0 and self._source.has_failed):
            self.abort()
        if not self._loaded[unit]:
            self._wait_for_copy(unit)
        decoder = self._decoders[unit]
        if decoder is not None:
            decoder.decode(self._places[unit], self._decoded[unit])
            self._give_back(unit)

    def _wait_for_copy(self, unit: int) -> None:
        """Let the compute stream wait until the copy of a unit has ended."""
        assert self._source is not None  # noqa: S101  wait says that it was closed
        loads = 1
        if not self._resident[unit]:
            slot = self._slot[unit]
            while self._issued[slot] <= self._released[slot]:
                self._issue()
            loads = self._issued[slot]
        if not self._source.is_queued(unit, loads):
            start = time.perf_counter()
            self._source.wait(unit, loads)
            self.blocked_s += time.perf_counter() - start
        if self._copy_stream is not None:
            torch.cuda.current_stream(self._device).wait_event(self._source.arrived[unit])
        if self._resident[unit]:
            self._loaded[unit] = True
            self.bytes_moved += self._units[unit].stored_bytes

    def release(self, unit: int) -> None:
        """The computation that reads the unit is queued; its bytes may be overwritten after it."""
        if self._decoders[unit] is None:
            self._give_back(unit)

    def _give_back(self, unit: int) -> None:
        """What reads the unit's place in the ring is queued; copies to it may come after that."""
        if self._resident[unit]:
            return
        slot = self._slot[unit]
        if self._copy_stream is not None:
            self._free[slot].record(torch.cuda.current_stream(self._device))
        self._released[slot] += 1
        self.run_ahead()

    def run_ahead(self) -> None:
        """Ask for every copy whose place is free; past the end of a pass, for those of the next one."""
        while self._streamed and self._has_room():
            self._issue()

    def _has_room(self) -> bool:
        count = self._issued[self._next]
        return all(
            self._released[other] >= count + (1 if other < self._next else 0)
            for other in self._schedule.conflicts[self._next]
        )

    def _issue(self) -> None:
        """Ask for the next copy of the cycle."""
        slot = self._next
        if not self._has_room():
            raise RuntimeError("the ring is too small for a layer: a unit was waited for before its place was free")
        assert self._source is not None  # noqa: S101  wait says that it was closed
        if self._copy_stream is not None:
            for other in self._schedule.conflicts[slot]:
                if self._released[other]:
                    self._copy_stream.wait_event(self._free[other])
        unit = self._streamed[slot]
        self._source.grant(unit, self._issued[slot])
        self._issued[slot] += 1
        self.bytes_moved += self._units[unit].stored_bytes
        self._next = (slot + 1) % len(self._streamed)

    def abort(self) -> None:
        """After an error in mid-pass: forget what was asked for, so that the next pass starts at the first unit."""
        if self._source is None:
            return
        self._is_aborting = True
        self._source.restart()
        if self._copy_stream is not None:
            torch.cuda.synchronize(self._device)
        self._issued = [0] * len(self._streamed)
        self._released = [0] * len(self._streamed)
        self._next = 0
        self._is_aborting = False

    def close(self) -> None:
        """Wait for copies under way, then release host and device memory."""
        if self._copy_stream is not None:
            torch.cuda.synchronize(self._device)
        if self._source is not None:
            self._end_source.detach()
            _LIVE.discard(self._source)
            self._source.close()
        self._source = None
        self._places, self._decoded, self._decoders = [], [], []
        self.ring = self.resident_bytes = self.decoded = torch.empty(0, dtype=torch.uint8)


def _abandon(source: UnitSource) -> None:
    """Close a source that nobody closed; in a thread of its own, for the collector may run in one that close joins."""
    threading.Thread(target=source.close, name="tq-stream-close").start()


# Sources whose threads must have ended when the interpreter does: it would pull torch away under them.
_LIVE: weakref.WeakSet[UnitSource] = weakref.WeakSet()


@atexit.register
def _close_live() -> None:
    for source in list(_LIVE):
        source.close()
