"""DeviceWeights: resident units and the ring of streamed ones; copies run ahead of the computation.

    copy stream      |copy 3.mlp |copy 4.attn|copy 4.mlp |copy 5.attn|   each waits for the unit whose bytes it takes
    compute stream      |2.mlp|3.attn|    |3.mlp|4.attn|    |4.mlp|      each waits for its own copy

All copies are issued by the thread that computes: when a unit is released, the next copies that now have room are
queued. No copy or layer synchronises the device.
"""

from collections.abc import Collection, Sequence

import torch

from streamer.architecture import Parameter, Unit
from streamer.errors import StreamerError
from streamer.weights.host import UnitSource
from streamer.weights.schedule import schedule_ring


class DeviceWeights:
    """Bytes of all units on one device.

    Args:
        units: of a pass, in the order of use.
        resident: indices of units that stay; the others go through the ring.
        ring_bytes: size of the ring; at least the largest layer's streamed units together.
        streamed_source, resident_source: where bytes come from.
        device: a CUDA device, or the CPU (copies are then synchronous).
    """

    def __init__(
        self,
        units: Sequence[Unit],
        resident: Collection[int],
        ring_bytes: int,
        streamed_source: UnitSource,
        resident_source: UnitSource,
        device: torch.device,
    ):
        self._units, self._device = units, device
        self._sources = {True: resident_source, False: streamed_source}
        self._resident = [i in resident for i in range(len(units))]
        self._streamed = [i for i in range(len(units)) if not self._resident[i]]
        held_bytes = sum(units[i].nbytes for i in sorted(resident))
        self.resident_bytes = torch.empty(held_bytes, dtype=torch.uint8, device=device)
        self.ring = torch.empty(ring_bytes if self._streamed else 0, dtype=torch.uint8, device=device)
        sizes, groups = [units[i].nbytes for i in self._streamed], [units[i].group for i in self._streamed]
        self._schedule = schedule_ring(sizes, self.ring.nbytes, groups)
        self._slot = {unit: slot for slot, unit in enumerate(self._streamed)}
        self._places: list[torch.Tensor] = []
        at = 0
        for i, unit in enumerate(units):
            if self._resident[i]:
                self._places.append(self.resident_bytes[at : at + unit.nbytes])
                at += unit.nbytes
            else:
                start = self._schedule.offsets[self._slot[i]]
                self._places.append(self.ring[start : start + unit.nbytes])
        self._loaded = [False] * len(units)  # resident units that have arrived
        self._issued = [0] * len(self._streamed)  # copies queued so far, by slot
        self._released = [0] * len(self._streamed)
        self._next = 0
        self.bytes_moved = 0
        is_cuda = device.type == "cuda"
        self._copy_stream = torch.cuda.Stream(device) if is_cuda else None
        if self._copy_stream is not None:  # the ring was allocated on the stream that computes
            self._copy_stream.wait_stream(torch.cuda.current_stream(device))
        self._ready = [torch.cuda.Event() for _ in self._streamed] if is_cuda else []
        self._free = [torch.cuda.Event() for _ in self._streamed] if is_cuda else []

    def parameter(self, unit: int, parameter: Parameter) -> torch.Tensor:
        """The view that a parameter of a unit is bound to, once: its place never changes."""
        owner = self._units[unit]
        start = owner.offsets[owner.parameters.index(parameter)]
        part = self._places[unit][start : start + owner.part_bytes(parameter)]
        return part.view(parameter.dtype).view(owner.part_shape(parameter))

    def is_streamed(self, unit: int) -> bool:
        """Whether the unit goes through the ring: its bytes are there between wait and release only."""
        return not self._resident[unit]

    def wait(self, unit: int) -> None:
        """Let the compute stream wait until the unit's bytes have arrived; queue copies that are due.

        Raises:
            StreamerError: the engine has been closed.
        """
        if not self._sources:
            raise StreamerError("the engine of this model has been closed; ask it for its model again")
        if self._resident[unit]:
            if not self._loaded[unit]:
                self._load_resident(unit)
            return
        slot = self._slot[unit]
        while self._issued[slot] <= self._released[slot]:
            self._issue()
        if self._copy_stream is not None:
            torch.cuda.current_stream(self._device).wait_event(self._ready[slot])

    def release(self, unit: int) -> None:
        """The computation that reads the unit is queued; its bytes may be overwritten after it."""
        if self._resident[unit]:
            return
        slot = self._slot[unit]
        if self._copy_stream is not None:
            self._free[slot].record(torch.cuda.current_stream(self._device))
        self._released[slot] += 1
        self.run_ahead()

    def run_ahead(self) -> None:
        """Queue every copy whose place is free and whose bytes are at hand; past the end of a pass, the next one."""
        while self._streamed and self._has_room() and self._sources[False].is_ready(self._streamed[self._next]):
            self._issue()

    def _has_room(self) -> bool:
        count = self._issued[self._next]
        return all(
            self._released[other] >= count + (1 if other < self._next else 0)
            for other in self._schedule.conflicts[self._next]
        )

    def _issue(self) -> None:
        """Queue the next copy of the cycle."""
        slot = self._next
        if not self._has_room():
            raise RuntimeError("the ring is too small for a layer: a unit was waited for before its place was free")
        unit = self._streamed[slot]
        if self._copy_stream is None:
            self._sources[False].send(unit, self._places[unit])
        else:
            with torch.cuda.stream(self._copy_stream):
                for other in self._schedule.conflicts[slot]:
                    if self._released[other]:
                        self._copy_stream.wait_event(self._free[other])
                self._sources[False].send(unit, self._places[unit])
                self._ready[slot].record(self._copy_stream)
        self._issued[slot] += 1
        self.bytes_moved += self._units[unit].nbytes
        self._next = (slot + 1) % len(self._streamed)

    def _load_resident(self, unit: int) -> None:
        self._sources[True].send(unit, self._places[unit])
        self._loaded[unit] = True
        self.bytes_moved += self._units[unit].nbytes

    def abort(self) -> None:
        """After an error in mid-pass: forget what was queued, so that the next pass starts at the first unit."""
        if self._copy_stream is not None:
            torch.cuda.synchronize(self._device)
        self._issued = [0] * len(self._streamed)
        self._released = [0] * len(self._streamed)
        self._next = 0

    def close(self) -> None:
        """Wait for copies under way, then release host and device memory."""
        if self._copy_stream is not None:
            torch.cuda.synchronize(self._device)
        for source in self._sources.values():
            source.close()
        self._sources = {}  # they refer to the model, whose gates refer to this
        self._places = []
        self.ring = self.resident_bytes = torch.empty(0, dtype=torch.uint8)
