"""Where each streamed unit lies in the ring, and whose bytes it takes over.

The units of a pass are used in a fixed order, pass after pass, so their places are fixed too: laid one after the
other, back to the start when the end is reached. A unit's bytes may be copied once every unit that lay there before
is done with. Fixed places mean that parameters are bound to the ring once, not once per layer and token.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class RingSchedule:
    """Places of the streamed units in the ring.

    Attributes:
        capacity_bytes: size of the ring.
        offsets: first byte of each unit.
        conflicts: for each unit, the units before it (cyclically, nearest first) whose bytes it takes over, up to
            and including itself one pass earlier.
    """

    capacity_bytes: int
    offsets: tuple[int, ...]
    conflicts: tuple[tuple[int, ...], ...]


def schedule_ring(sizes_bytes: Sequence[int], capacity_bytes: int, groups: Sequence[int]) -> RingSchedule:
    """Places for units of the given sizes, used cyclically in this order.

    Args:
        sizes_bytes: aligned sizes.
        capacity_bytes: size of the ring; at least the sum of each group.
        groups: for each unit a number, equal for neighbours that are needed at the same time (a layer's units, which
            a prompt of several chunks holds together): they never overlap.
    """
    offsets = _places(sizes_bytes, capacity_bytes, groups)
    count = len(sizes_bytes)
    conflicts = []
    for unit in range(count):
        start, stop = offsets[unit], offsets[unit] + sizes_bytes[unit]
        before = [(unit - back) % count for back in range(1, count + 1)]
        conflicts.append(tuple(u for u in before if offsets[u] < stop and start < offsets[u] + sizes_bytes[u]))
    return RingSchedule(capacity_bytes, tuple(offsets), tuple(conflicts))


def ring_extent(sizes_bytes: Sequence[int], capacity_bytes: int, groups: Sequence[int]) -> int:
    """Bytes that the units of schedule_ring really take, from the first to behind the last, capacity_bytes at most.

    A ring of that size has the same places.
    """
    offsets = _places(sizes_bytes, capacity_bytes, groups)
    return max((at + size for at, size in zip(offsets, sizes_bytes, strict=True)), default=0)


def _places(sizes_bytes: Sequence[int], capacity_bytes: int, groups: Sequence[int]) -> list[int]:
    offsets: list[int] = []
    at = 0
    for _, members in itertools.groupby(range(len(sizes_bytes)), key=lambda unit: groups[unit]):
        group = [sizes_bytes[unit] for unit in members]
        if sum(group) > capacity_bytes:
            raise ValueError(f"units of {sum(group)} bytes do not fit a ring of {capacity_bytes} together")
        placed = _place(group, at, capacity_bytes)
        # a group that cannot go round the end without meeting itself starts over at the beginning
        placed = placed if placed is not None else [sum(group[:i]) for i in range(len(group))]
        offsets += placed
        at = placed[-1] + group[-1]
    return offsets


def _place(sizes: Sequence[int], start: int, capacity: int) -> list[int] | None:
    """Offsets of units one after the other from `start`, round the end if need be; None if they would overlap."""
    offsets: list[int] = []
    at, limit = start, capacity
    for size in sizes:
        if at + size > limit:
            if limit < capacity:
                return None
            # behind the end: up to where this group began, or anywhere if nothing of it lies before the end
            at, limit = 0, offsets[0] if offsets else capacity
            if at + size > limit:
                return None
        offsets.append(at)
        at += size
    return offsets
