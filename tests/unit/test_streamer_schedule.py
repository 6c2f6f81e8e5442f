"""The ring's schedule against a simulation that writes every byte: no unit is overwritten before it was used."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamer.schedule import schedule_ring


@st.composite
def rings(draw: st.DrawFn) -> tuple[list[int], list[int], int]:
    """Sizes of units, their groups (one to three neighbours each), and a capacity that holds every group."""
    sizes, groups = list[int](), list[int]()
    for group in range(draw(st.integers(1, 6))):
        members = draw(st.lists(st.integers(1, 40), min_size=1, max_size=3))
        sizes += members
        groups += [group] * len(members)
    largest = max(sum(s for s, g in zip(sizes, groups, strict=True) if g == group) for group in groups)
    return sizes, groups, largest + draw(st.integers(0, 60))


@given(rings(), st.integers(1, 4))
def test_no_unit_is_overwritten_before_it_was_used(ring: tuple[list[int], list[int], int], passes: int) -> None:
    sizes, groups, capacity = ring
    schedule = schedule_ring(sizes, capacity, groups)
    owner: list[tuple[int, int] | None] = [None] * capacity
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


@given(rings())
def test_units_that_are_in_use_together_never_overlap(ring: tuple[list[int], list[int], int]) -> None:
    """A prompt of several chunks holds all units of a layer: one that waited for another would wait for ever."""
    sizes, groups, capacity = ring
    schedule = schedule_ring(sizes, capacity, groups)
    for unit, conflicts in enumerate(schedule.conflicts):
        assert not [other for other in conflicts if groups[other] == groups[unit] and other != unit]


def test_conflicts_name_no_unit_that_lies_elsewhere() -> None:
    schedule = schedule_ring([30, 30, 30], 70, [0, 1, 2])
    assert schedule.offsets == (0, 30, 0)
    assert schedule.conflicts == ((2, 0), (1,), (0, 2))


def test_a_layer_that_would_wrap_onto_itself_starts_over() -> None:
    """Attention streams alone in one layer, then a whole layer follows: its MLP must not take its attention's place."""
    schedule = schedule_ring([23, 23, 77], 120, [0, 1, 1])
    assert schedule.offsets == (0, 0, 23)


def test_a_group_larger_than_the_ring_is_refused() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        schedule_ring([10, 45, 45], 80, [0, 1, 1])
