"""Where each streamed unit lies in the ring, and whose bytes it takes over.

The units of a pass are used in a fixed order, pass after pass, so their places are fixed too: laid one after the
other, back to the start when the end is reached. A unit's bytes may be copied once every unit that lay there before
is done with. Fixed places mean that parameters are bound to the ring once, not once per layer and token.
"""

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


def schedule_ring(sizes_bytes: Sequence[int], capacity_bytes: int) -> RingSchedule:
    """Places for units of the given sizes, used cyclically in this order.

    Args:
        sizes_bytes: aligned sizes; none larger than the capacity.
        capacity_bytes: size of the ring.
    """
    if any(size > capacity_bytes for size in sizes_bytes):
        raise ValueError(f"a unit of {max(sizes_bytes)} bytes does not fit a ring of {capacity_bytes}")
    offsets, at = [], 0
    for size in sizes_bytes:
        if at + size > capacity_bytes:
            at = 0
        offsets.append(at)
        at += size
    count = len(sizes_bytes)
    conflicts = []
    for unit in range(count):
        start, stop = offsets[unit], offsets[unit] + sizes_bytes[unit]
        before = [(unit - back) % count for back in range(1, count + 1)]
        conflicts.append(tuple(u for u in before if offsets[u] < stop and start < offsets[u] + sizes_bytes[u]))
    return RingSchedule(capacity_bytes, tuple(offsets), tuple(conflicts))
