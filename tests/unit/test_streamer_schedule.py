"""The ring's schedule against a simulation that writes every byte: no unit is overwritten before it was used."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamer.weights.schedule import schedule_ring


@given(st.lists(st.integers(1, 40), min_size=1, max_size=12), st.integers(0, 60), st.integers(1, 4))
def test_no_unit_is_overwritten_before_it_was_used(sizes: list[int], slack: int, passes: int) -> None:
    capacity = max(sizes) + slack
    schedule = schedule_ring(sizes, capacity)
    owner: list[tuple[int, int] | None] = [None] * capacity
    used = [0] * len(sizes)
    for cycle in range(passes):
        for unit, size in enumerate(sizes):
            start = schedule.offsets[unit]
            assert start + size <= capacity
            overlapped = {owner[b] for b in range(start, start + size)} - {None}
            # what the schedule makes the copy wait for: each conflict's use in this pass, or in the one before
            waited = {(other, cycle if other < unit else cycle - 1) for other in schedule.conflicts[unit]}
            assert overlapped <= waited
            for byte in range(start, start + size):
                owner[byte] = (unit, cycle)
            assert used[unit] == cycle
            used[unit] += 1


def test_conflicts_name_no_unit_that_lies_elsewhere() -> None:
    schedule = schedule_ring([30, 30, 30], 70)
    assert schedule.offsets == (0, 30, 0)
    assert schedule.conflicts == ((2, 0), (1,), (0, 2))


def test_a_unit_larger_than_the_ring_is_refused() -> None:
    with pytest.raises(ValueError, match="does not fit"):
        schedule_ring([10, 100], 50)
