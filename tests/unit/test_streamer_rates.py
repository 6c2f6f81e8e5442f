"""Rates of the machine: what is copied and read, how often, and that bytes over seconds come out."""

import ctypes
import itertools
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from streamer import rates
from streamer.checkpoint import Checkpoint
from streamer.errors import CheckpointError, OptionError, TruncatedShardError

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Buffers and pieces of a size for tests."""
    monkeypatch.setattr(rates, "_HOST_BYTES", 64 << 10)
    monkeypatch.setattr(rates, "PIECE_BYTES", 4096)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that each look moves by a quarter of a second; the times it gave."""
    given = [0.0]

    def look() -> float:
        given.append(given[-1] + 0.25)
        return given[-1]

    monkeypatch.setattr(rates, "time", SimpleNamespace(perf_counter=look))
    return given


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int, bool, int]]:
    """What every Checkpoint is asked to read, and the thread that asks; each read is done."""
    asked: list[tuple[str, int, int, bool, int]] = []
    read_part = Checkpoint.read_part

    def counted(
        self: Checkpoint, name: str, start: int, stop: int, buffer: torch.Tensor, *, direct: bool = False
    ) -> torch.Tensor:
        part = read_part(self, name, start, stop, buffer, direct=direct)
        stored = self.tensor(name).reshape(-1).view(torch.uint8)[start:stop]
        assert part.equal(stored)
        assert part.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr()
        asked.append((name, start, stop, direct, threading.get_ident()))
        return part

    monkeypatch.setattr(Checkpoint, "read_part", counted)
    return asked


@pytest.fixture
def checkpoint(random_checkpoint: Callable[..., Path]) -> Iterator[Checkpoint]:
    with Checkpoint.open(random_checkpoint("llama", max_shard_size="100KB")) as opened:
        yield opened


# ------------------------------------------------------------------------------------------------------------- link


def test_the_link_rate_is_the_median_after_the_first_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    times, seen = iter([9.0] + [9.0, 4.0, 1.0, 2.0, 3.0, 5.0]), []

    def copy_s(source: torch.Tensor, target: torch.Tensor, *, is_pinned: bool) -> float:
        seen.append((source.nbytes, target.nbytes, is_pinned))
        return next(times)

    monkeypatch.setattr(rates, "_copy_s", copy_s)
    monkeypatch.setattr(rates, "_WARM_UP_S", 0)
    source, target = torch.zeros(1500, dtype=torch.uint8), torch.zeros(1200, dtype=torch.uint8)
    # one to warm up; of six the first does not count: the median of 4, 1, 2, 3, 5 is 3
    assert rates.link_rate(GPU, source=source, target=target, is_pinned=False, copies=6) == 1200 / 3
    assert seen == [(1200, 1200, False)] * 7


def test_copies_warm_the_link_up_for_a_while(monkeypatch: pytest.MonkeyPatch, clock: list[float]) -> None:
    copies = []
    monkeypatch.setattr(rates, "_copy_s", lambda *tensors, is_pinned: copies.append(is_pinned) or 1.0)
    monkeypatch.setattr(rates, "_WARM_UP_S", 1.0)
    memory = torch.zeros(8, dtype=torch.uint8)
    rates.link_rate(GPU, source=memory, target=memory, copies=2)
    assert copies == [True] * (4 + 2)  # a second of looks at the clock, then those that are timed


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"device": CPU}, "the link is measured to a GPU; got device cpu"),
        ({"device": GPU, "copies": 1}, "at least 2 copies are timed, for the first one does not count; got 1"),
        ({"device": GPU, "source": torch.empty(0), "target": torch.empty(0)}, "got an empty tensor"),
    ],
)
def test_a_link_that_cannot_be_measured(arguments: dict[str, Any], expected: str) -> None:
    with pytest.raises(OptionError, match=expected):
        rates.link_rate(**arguments)


@pytest.mark.gpu
def test_the_link_of_a_gpu() -> None:
    pinned, pageable = rates.link_rate(GPU), rates.link_rate(GPU, is_pinned=False)
    assert 1e9 < pageable < pinned < 1e12
    source = torch.arange(256, dtype=torch.uint8).repeat(1 << 16).pin_memory()  # 16 MiB
    target = torch.zeros_like(source, device=GPU)
    assert 1e9 < rates.link_rate(GPU, source=source, target=target) < 1e12
    assert target.cpu().equal(source)


# ------------------------------------------------------------------------------------------------------ host memory


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("threads", [1, 3])
def test_host_copies_are_counted_once(threads: int, clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    copied, ranges = [], set()
    memmove = ctypes.memmove

    def counted(target: int, source: int, nbytes: int) -> None:
        memmove(target, source, nbytes)
        copied.append(nbytes)
        ranges.add((target, source))

    monkeypatch.setattr(rates.ctypes, "memmove", counted)
    each = (32 << 10) // threads
    assert rates.host_copy_rate(threads) == threads * each / 0.25
    assert copied == [each] * threads * 6
    places = sorted(place for pair in ranges for place in pair)
    assert len(places) == 2 * threads  # every thread has buffers of its own, and they do not overlap
    assert all(later - earlier >= each for earlier, later in itertools.pairwise(places))


def test_host_copies_take_a_thread() -> None:
    with pytest.raises(OptionError, match="at least 1 thread copies; got 0"):
        rates.host_copy_rate(0)


# ------------------------------------------------------------------------------------------------------------ files


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("direct", [False, True])
def test_every_byte_is_read_once_in_file_order(
    direct: bool, checkpoint: Checkpoint, clock: list[float], reads: list[tuple[str, int, int, bool, int]]
) -> None:
    rate = rates.read_rate(checkpoint, direct=direct, threads=1, max_bytes=1 << 40)
    assert rate == checkpoint.total_bytes / 0.25
    position = iter((name, at) for name, entry in checkpoint.tensors.items() for at in range(entry.nbytes))
    for name, start, stop, was_direct, _ in reads:
        assert 0 < stop - start <= 4096
        assert [next(position) for _ in range(start, stop)] == [(name, at) for at in range(start, stop)]
        assert was_direct is direct
    assert next(position, None) is None


@pytest.mark.usefixtures("small")
def test_threads_share_the_pieces(
    checkpoint: Checkpoint, reads: list[tuple[str, int, int, bool, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    both = threading.Barrier(2, timeout=10)
    counted, met = Checkpoint.read_part, threading.local()

    def meeting(self: Checkpoint, *arguments: Any, **options: Any) -> torch.Tensor:
        if not hasattr(met, "yes"):
            met.yes = both.wait()
        return counted(self, *arguments, **options)

    monkeypatch.setattr(Checkpoint, "read_part", meeting)
    assert rates.read_rate(checkpoint, direct=False, threads=2, max_bytes=1 << 40) > 0
    assert sum(stop - start for _, start, stop, _, _ in reads) == checkpoint.total_bytes
    assert len({(name, start) for name, start, _, _, _ in reads}) == len(reads)
    assert len({thread for *_, thread in reads}) == 2


@pytest.mark.usefixtures("small")
def test_max_bytes_ends_the_reading(
    checkpoint: Checkpoint, clock: list[float], reads: list[tuple[str, int, int, bool, int]]
) -> None:
    assert rates.read_rate(checkpoint, direct=False, threads=1, max_bytes=10_000) == 10_000 / 0.25
    assert [stop - start for _, start, stop, _, _ in reads] == [4096, 4096, 10_000 - 2 * 4096]


@pytest.mark.usefixtures("small")
def test_a_file_that_has_become_shorter_ends_all_readers(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    second_has_failed = threading.Event()

    def read_part(self: Checkpoint, name: str, *arguments: Any, **options: Any) -> None:
        asked.append(name)
        if len(asked) == 1:
            assert second_has_failed.wait(10)
            time.sleep(0.2)  # for the second to end
        elif len(asked) == 2:
            second_has_failed.set()
            raise TruncatedShardError(f"inside tensor {name}", path=self.folder)

    monkeypatch.setattr(Checkpoint, "read_part", read_part)
    with pytest.raises(TruncatedShardError, match="inside tensor"):
        rates.read_rate(checkpoint, direct=False, threads=2, max_bytes=1 << 40)
    assert len(asked) == 2  # the first goes no further


@pytest.mark.parametrize(("threads", "max_bytes"), [(0, 1), (1, 0)])
def test_reading_takes_a_thread_and_a_byte(checkpoint: Checkpoint, threads: int, max_bytes: int) -> None:
    with pytest.raises(OptionError, match=f"got {threads} threads and {max_bytes} bytes"):
        rates.read_rate(checkpoint, direct=False, threads=threads, max_bytes=max_bytes)


def test_a_checkpoint_without_bytes() -> None:
    nothing = cast(Checkpoint, SimpleNamespace(tensors={}, folder=Path("there")))
    with pytest.raises(CheckpointError, match="there holds no bytes to read"):
        rates.read_rate(nothing, direct=False, threads=1, max_bytes=1)


# ------------------------------------------------------------------------------------------------------- all of them


@pytest.mark.parametrize(("counted", "share"), [((100, 100), 0.0), ((None, None), None), ((100, 1 << 40), 1.0)])
def test_the_share_of_the_disk(
    counted: tuple[int | None, int | None],
    share: float | None,
    checkpoint: Checkpoint,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answers = iter(counted)
    monkeypatch.setattr(rates, "disk_bytes_read", lambda: next(answers))
    found = rates.file_rate(checkpoint, direct=False, threads=1)
    assert (found.disk_share, found.bytes_per_s > 0) == (share, True)


def test_half_of_the_bytes_from_the_disk(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([7, 7 + 5000])
    monkeypatch.setattr(rates, "disk_bytes_read", lambda: next(answers))
    assert rates.file_rate(checkpoint, direct=False, threads=1, max_bytes=10_000).disk_share == 0.5


def test_storage_counts_for_this_process() -> None:
    counters = Path("/proc/self/io")
    if not counters.is_file():
        pytest.skip("this system has no /proc/self/io")
    found = rates.disk_bytes_read()
    counted = re.search(r"^read_bytes: (\d+)$", counters.read_text(), re.MULTILINE)
    assert found is not None
    assert counted is not None
    assert 0 <= found <= int(counted[1])
    assert int(counted[1]) - found < 1 << 30  # not another line of the same file, such as what was ever read


@pytest.mark.usefixtures("small")
def test_a_machine_without_a_gpu(
    checkpoint: Checkpoint, reads: list[tuple[str, int, int, bool, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rates, "usable_cores", lambda: 2)
    found = rates.measure_machine(checkpoint, CPU, reader_threads=3)
    assert (found.pinned_link_bytes_per_s, found.pageable_link_bytes_per_s) == (None, None)
    assert found.host_copy_bytes_per_s > 0
    assert found.host_copy_all_bytes_per_s is not None
    assert found.host_copy_all_bytes_per_s > 0
    assert (found.copy_threads, found.reader_threads) == (2, 3)
    for direct in (False, True):
        assert sum(stop - start for _, start, stop, was, _ in reads if was is direct) == checkpoint.total_bytes
    monkeypatch.setattr(rates, "usable_cores", lambda: 1)
    assert rates.measure_machine(checkpoint, CPU, reader_threads=1).host_copy_all_bytes_per_s is None


@pytest.mark.usefixtures("small")
def test_a_refused_link_is_left_out(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    def link_rate(device: torch.device, *, is_pinned: bool) -> float:
        if is_pinned:
            raise RuntimeError("page-locked memory refused")
        return 7.0

    monkeypatch.setattr(rates, "link_rate", link_rate)
    assert rates._link_or_none(GPU, is_pinned=True) is None
    assert rates._link_or_none(GPU, is_pinned=False) == 7.0
