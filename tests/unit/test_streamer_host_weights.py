"""The host's side of the stream without a GPU: threads, slots and kept memory are the same, copies are synchronous.

Every read writes over poisoned bytes, and every unit is compared with the checkpoint whenever a pass has waited for it.
"""

import errno
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from streamer import packed
from streamer.architecture import Architecture, read_architecture, read_parameter
from streamer.benchmark import unmapped_host_bytes
from streamer.checkpoint import Checkpoint
from streamer.errors import CheckpointError, StreamerError
from streamer.packing import find_packed, pack
from streamer.weights import DeviceWeights, HostWeights, PackedWeights, PieceReader
from streamer.weights.memory import HostMemory

CPU = torch.device("cpu")
SLOT_BYTES = 32 << 10


@pytest.fixture
def architecture(random_checkpoint: Callable[..., Path]) -> Iterator[tuple[Architecture, Checkpoint]]:
    folder = random_checkpoint("llama", num_hidden_layers=6, hidden_size=128, intermediate_size=352)
    with Checkpoint.open(folder) as checkpoint:
        yield read_architecture(folder, checkpoint), checkpoint


class Stream:
    """All units of a small model, and what a pass over them must find."""

    def __init__(
        self,
        architecture: Architecture,
        checkpoint: Checkpoint,
        resident: set[int],
        kept: set[int],
        *,
        slots: int = 4,
        threads: int = 3,
        direct: bool = False,
        keeps_late: bool = False,
        packed: PackedWeights | None = None,
    ):
        self.units = [unit for layer in architecture.layers for unit in layer]
        reader = PieceReader(checkpoint, architecture.model, self.units, SLOT_BYTES, direct=direct, packed=packed)
        self.host = HostWeights(
            reader, resident, kept, slots * SLOT_BYTES, SLOT_BYTES, CPU, threads=threads, keeps_late=keeps_late
        )
        layer = max(sum(unit.stored_bytes for unit in layer) for layer in architecture.layers)
        self.weights = DeviceWeights(self.units, resident, 2 * layer, self.host, CPU)
        self.weights.ring.fill_(0xFF)
        self.wanted = [
            [read_parameter(p, checkpoint, architecture.model) for p in unit.parameters] for unit in self.units
        ]

    def run(self, passes: int = 1, pause_s: float = 0.0) -> None:
        for _ in range(passes):
            for index, unit in enumerate(self.units):
                self.weights.wait(index)
                for parameter, wanted in zip(unit.parameters, self.wanted[index], strict=True):
                    assert torch.equal(self.weights.parameter(index, parameter), wanted), parameter.name
                if unit.code is not None:
                    self.weights._decoded[index].fill_(0xFF)  # nobody may count on it after this
                elif self.weights.is_lent(index):
                    self.weights._places[index].fill_(0xFF)
                self.weights.release(index)
                time.sleep(pause_s)

    def settle(self) -> None:
        """Wait until the readers have nothing more to do."""
        deadline = time.monotonic() + 20
        while self.host._alive and time.monotonic() < deadline:
            time.sleep(0.01)


def reader_names() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("tq-stream-")]


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert [thread.name for thread in set(threading.enumerate()) - before if thread.name.startswith("tq-stream-")] == []


ALL = set(range(12))


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("threads", [1, 3, 8])
@pytest.mark.parametrize(
    ("resident", "kept"),
    [
        (set(), ALL),
        (set(), set()),
        (set(), {0, 3, 4, 9}),
        ({2, 3, 7}, ALL - {2, 3, 7}),
        ({2, 3, 7}, {0, 11}),
        (ALL, set()),
    ],
    ids=["kept", "staged", "partly-kept", "resident-kept", "resident-staged", "resident"],
)
def test_every_pass_finds_the_checkpoints_bytes(
    architecture: tuple[Architecture, Checkpoint], resident: set[int], kept: set[int], threads: int, direct: bool
) -> None:
    stream = Stream(*architecture, resident, kept, threads=threads, direct=direct)
    stream.weights.start()
    stream.run(passes=6)
    if kept | resident == ALL:
        stream.settle()
        assert reader_names() == [], "threads end when the files are not needed any more"
        assert stream.host.held_units == kept
        assert stream.host.staging.tensor.numel() == 0, "the slots go back to the system"
        stream.run(passes=3)
    stream.weights.close()


@pytest.fixture
def packed_architecture(
    random_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Architecture, Checkpoint, PackedWeights]]:
    """Matrices of one to six records, some of which need several slots; norms and biases among them."""
    monkeypatch.setattr(packed, "SLICE_BYTES", 64 << 10)
    folder = random_checkpoint("qwen2", num_hidden_layers=6, hidden_size=128, intermediate_size=352, dtype="bfloat16")
    pack(folder, tmp_path / "packed", threads=1)
    with Checkpoint.open(folder) as checkpoint:
        found = find_packed(checkpoint, tmp_path / "packed")
        assert found is not None
        weights = PackedWeights(found, checkpoint)
        yield weights.coded(read_architecture(folder, checkpoint)), checkpoint, weights
        weights.close()


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize(
    ("resident", "kept"),
    [(set(), ALL), (set(), {0, 3, 4, 9}), ({2, 3, 7}, {0, 11}), (ALL, set())],
    ids=["kept", "partly-kept", "resident-staged", "resident"],
)
def test_coded_units_are_decoded_into_the_checkpoints_bytes(
    packed_architecture: tuple[Architecture, Checkpoint, PackedWeights],
    resident: set[int],
    kept: set[int],
    direct: bool,
) -> None:
    coded, checkpoint, packed_weights = packed_architecture
    stream = Stream(coded, checkpoint, resident, kept, direct=direct, packed=packed_weights)
    assert all(unit.stored_bytes < 0.75 * unit.nbytes for unit in stream.units)
    layer = max(sum(unit.nbytes for unit in layer) for layer in coded.layers)
    assert stream.weights.decoded.nbytes == layer
    stream.weights.start()
    stream.run(passes=6)
    assert all(stream.weights.is_lent(index) for index in ALL), "all layers share the memory that they are decoded to"
    sizes = [unit.stored_bytes for unit in stream.units]
    streamed = sum(size for index, size in enumerate(sizes) if index not in resident)
    assert 0 <= stream.weights.bytes_moved - sum(sizes) - 5 * streamed <= streamed
    stream.weights.close()


def test_a_units_place_is_free_when_it_is_decoded(
    packed_architecture: tuple[Architecture, Checkpoint, PackedWeights],
) -> None:
    """A prompt in chunks holds a whole layer: the copies of the next one must not wait for its end."""
    coded, checkpoint, packed_weights = packed_architecture
    stream = Stream(coded, checkpoint, set(), ALL, packed=packed_weights)
    stream.weights.start()
    for index in range(6):
        stream.weights.wait(index)
    slots = stream.weights
    assert slots._released[:6] == [1] * 6
    assert sum(slots._issued) >= 6 + 3
    stream.weights.close()


def test_decoded_units_of_a_layer_are_there_together(
    packed_architecture: tuple[Architecture, Checkpoint, PackedWeights],
) -> None:
    """Chunks of a prompt read the first unit again after the second one has been decoded."""
    coded, checkpoint, packed_weights = packed_architecture
    stream = Stream(coded, checkpoint, {2, 3}, ALL, packed=packed_weights)
    stream.weights.start()
    for layer in range(6):
        units = 2 * layer, 2 * layer + 1
        for index in units:
            stream.weights.wait(index)
        for index in units:
            for parameter, wanted in zip(stream.units[index].parameters, stream.wanted[index], strict=True):
                assert torch.equal(stream.weights.parameter(index, parameter), wanted), parameter.name
    stream.weights.close()


def test_packed_bytes_are_checked_when_they_are_read_for_the_first_time(
    packed_architecture: tuple[Architecture, Checkpoint, PackedWeights], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, _, weights = packed_architecture
    name, entry = next(iter(weights.checkpoint.tensors.items()))
    with entry.shard.open("r+b") as file:
        file.seek(entry.offset)
        byte = file.read(1)
        file.seek(entry.offset)
        file.write(bytes([byte[0] ^ 1]))
    buffer = torch.empty(entry.nbytes, dtype=torch.uint8)
    with pytest.raises(CheckpointError, match=rf"{entry.shard.name} has been altered: bytes {entry.offset} to"):
        weights.read(name, 0, entry.nbytes, buffer, direct=False)
    with entry.shard.open("r+b") as file:
        file.seek(entry.offset)
        file.write(byte)
    assert weights.read(name, 0, entry.nbytes, buffer, direct=False)[0] == byte[0]
    monkeypatch.setattr("streamer.weights.packed.digest_of", pytest.fail)
    weights.read(name, 0, entry.nbytes, buffer, direct=False)  # a core hashes more slowly than a disk reads


@pytest.mark.parametrize("is_deleted", [False, True])
def test_a_packed_file_that_is_gone_is_to_be_packed_again(
    packed_architecture: tuple[Architecture, Checkpoint, PackedWeights], is_deleted: bool
) -> None:
    """Not to be downloaded, as a checkpoint's."""
    _, _, weights = packed_architecture
    name, entry = list(weights.checkpoint.tensors.items())[-1]
    if is_deleted:
        entry.shard.unlink()
    else:
        os.truncate(entry.shard, entry.offset + 10)
    buffer = torch.empty(entry.nbytes, dtype=torch.uint8)
    advice = f"\n  Delete {entry.shard.parent}, and write it again: tq-stream pack MODEL.$"
    with pytest.raises(CheckpointError, match=f"(?s){entry.shard.name}.*{advice}"):
        weights.read(name, 0, entry.nbytes, buffer, direct=False)


def test_units_with_bytes_that_are_not_packed_as_they_run_stay_as_they_are(
    random_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    folder = random_checkpoint("qwen2", num_hidden_layers=2, dtype="bfloat16")
    pack(folder, tmp_path / "packed", threads=1)
    with Checkpoint.open(folder) as checkpoint:
        found = find_packed(checkpoint, tmp_path / "packed")
        assert found is not None
        cast = PackedWeights(found, checkpoint).coded(read_architecture(folder, checkpoint, dtype="float32"))
        assert not any(unit.code for layer in cast.layers for unit in layer)


def test_kept_units_are_read_once_and_the_others_in_every_pass(architecture: tuple[Architecture, Checkpoint]) -> None:
    kept = {0, 1, 6, 7}
    stream = Stream(*architecture, {4}, kept)
    read: list[int] = []
    inner = stream.host._reader.read

    def count(piece: Any, slot: torch.Tensor, place: torch.Tensor | None) -> Any:
        read.append(piece.unit)
        return inner(piece, slot, place)

    stream.host._reader.read = count  # type: ignore[method-assign]
    stream.host._prepare_segments()  # before the readers begin: no unit of the first pass comes too early for it
    stream.host._kept = []
    stream.weights.start()
    stream.run(passes=5)
    stream.weights.close()
    pieces = [len(pieces) for pieces in stream.host._reader.pieces]
    for unit in range(12):
        passes = read.count(unit) / pieces[unit]
        if unit in kept or unit == 4:
            assert passes == 1, unit
        else:
            assert 5 <= passes <= 6, unit


def test_memory_that_is_ready_late_is_used_from_then_on(
    architecture: tuple[Architecture, Checkpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first passes do not wait for page-locked memory: they go through the slots."""
    may_prepare = threading.Event()
    prepare = HostMemory.prepare
    is_first = [True]

    def late(memory: HostMemory) -> None:
        if not is_first[0]:
            may_prepare.wait()
        is_first[0] = False
        prepare(memory)

    monkeypatch.setattr(HostMemory, "prepare", late)
    stream = Stream(*architecture, set(), ALL)
    stream.weights.start()
    stream.run(passes=2)
    assert stream.host.held_units == set()
    may_prepare.set()
    deadline = time.monotonic() + 20
    while stream.host._alive and time.monotonic() < deadline:
        stream.run()
    assert stream.host.held_units == ALL
    stream.weights.close()


def test_a_warm_start_leaves_the_first_pass_to_the_slots(architecture: tuple[Architecture, Checkpoint]) -> None:
    stream = Stream(*architecture, {3}, ALL - {3}, keeps_late=True)
    stream.weights.start()
    for index in range(7):  # the ring holds two layers: no room for the last unit yet
        stream.weights.wait(index)
        stream.weights.release(index)
        assert not stream.host._segments
    for index in range(7, 12):
        stream.weights.wait(index)
        stream.weights.release(index)
    deadline = time.monotonic() + 20
    while stream.host._alive and time.monotonic() < deadline:
        stream.run()
    assert stream.host.held_units == ALL - {3}
    stream.weights.close()


@pytest.mark.parametrize("allowed", [0, 1, 3])
def test_refused_memory_leaves_units_to_be_read_in_every_pass(
    architecture: tuple[Architecture, Checkpoint],
    allowed: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The system refuses after some segments: what is kept stays kept, and one line says how much is not."""
    monkeypatch.setattr("streamer.weights.host._SEGMENT_BYTES", 1)  # a segment for each unit
    prepare, count = HostMemory.prepare, [0]

    def refuse(memory: HostMemory) -> None:
        count[0] += 1
        if count[0] > 1 + allowed:  # the first are the slots
            raise OSError(errno.ENOMEM, "Cannot allocate memory")
        prepare(memory)

    monkeypatch.setattr(HostMemory, "prepare", refuse)
    stream = Stream(*architecture, set(), ALL)
    stream.weights.start()
    stream.run(passes=6)
    assert len(stream.host.held_units) == allowed
    lines = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert len(lines) == 1
    assert "are read from the files in every pass" in lines[0]
    stream.weights.close()


@pytest.mark.parametrize("kept", [set(), ALL, {1, 5}], ids=["staged", "kept", "partly-kept"])
def test_a_reader_that_fails_is_reported_and_the_next_pass_starts_anew(
    architecture: tuple[Architecture, Checkpoint], kept: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = Stream(*architecture, {2}, kept)
    read, fails = Checkpoint.read_part, threading.Event()

    def fail_later(checkpoint: Checkpoint, name: str, *args: Any, **options: Any) -> Any:
        if fails.is_set() and "layers.4.mlp" in name:
            raise CheckpointError("planted", path=Path("x"))
        return read(checkpoint, name, *args, **options)

    monkeypatch.setattr(Checkpoint, "read_part", fail_later)
    fails.set()
    stream.weights.start()
    for _ in range(2):  # it fails again while the fault lasts
        with pytest.raises(CheckpointError, match="planted"):
            stream.run(passes=3)
        stream.weights.abort()
    fails.clear()
    stream.weights.abort()
    stream.run(passes=3)
    stream.weights.close()


def test_readers_that_die_are_reported_and_replaced(
    architecture: tuple[Architecture, Checkpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bug of ours must not make a pass wait for ever."""

    def fail(self: HostWeights) -> None:
        raise AssertionError("planted")

    next_piece = HostWeights._next_piece
    monkeypatch.setattr(HostWeights, "_next_piece", fail)
    stream = Stream(*architecture, set(), ALL)
    stream.weights.start()
    for _ in range(2):
        with pytest.raises(AssertionError, match="planted"):
            stream.run()
        stream.weights.abort()
    monkeypatch.setattr(HostWeights, "_next_piece", next_piece)
    stream.weights.abort()
    stream.run(passes=2)
    stream.weights.close()


def test_memory_that_cannot_be_prepared_is_said_and_done_without(
    architecture: tuple[Architecture, Checkpoint], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(self: HostWeights) -> None:
        raise AssertionError("planted")

    monkeypatch.setattr(HostWeights, "_prepare_segments", fail)
    stream = Stream(*architecture, set(), ALL)
    stream.weights.start()
    stream.run(passes=3)
    assert stream.weights.is_settled
    assert "planted" in caplog.records[0].message
    assert "are read from the files in every pass" in caplog.records[1].message
    stream.weights.close()


def test_a_shard_cut_in_mid_stream_is_named(architecture: tuple[Architecture, Checkpoint]) -> None:
    stream = Stream(*architecture, set(), set())
    stream.weights.start()
    stream.run(passes=2)
    path = next(iter(architecture[1].tensors.values())).shard
    content = path.read_bytes()
    with path.open("r+b") as file:
        file.truncate(len(content) // 2)
    with pytest.raises(CheckpointError, match="ends at byte") as caught:
        stream.run(passes=5)
    assert caught.value.path == path
    stream.weights.abort()
    path.write_bytes(content)
    stream.run(passes=2)
    stream.weights.close()


@pytest.mark.parametrize("after", range(0, 30, 3))
def test_a_pass_that_is_given_up_anywhere_can_be_followed_by_another(
    architecture: tuple[Architecture, Checkpoint], after: int
) -> None:
    """Including while the first pass loads residents and kept memory."""
    stream = Stream(*architecture, {2, 9}, {0, 1, 6}, threads=4)
    stream.weights.start()
    for _ in range(3):
        for step in range(after):
            index = step % 12
            stream.weights.wait(index)
            if step < after - 1:
                stream.weights.release(index)
        stream.weights.abort()
    stream.run(passes=3)
    stream.weights.close()


def test_closing_while_readers_are_busy_ends_them(architecture: tuple[Architecture, Checkpoint]) -> None:
    for after in range(6):
        stream = Stream(*architecture, {2}, {0, 1})
        stream.weights.start()
        for index in range(after):
            stream.weights.wait(index)
            stream.weights.release(index)
        stream.weights.close()
        assert reader_names() == []


def test_weights_that_nobody_closed_end_their_threads(architecture: tuple[Architecture, Checkpoint]) -> None:
    stream = Stream(*architecture, set(), set())
    stream.weights.start()
    stream.run()
    assert reader_names()
    del stream
    deadline = time.monotonic() + 20
    while reader_names() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert reader_names() == []


def test_a_script_that_just_ends_ends_well(tmp_path: Path, random_checkpoint: Callable[..., Path]) -> None:
    """Readers inside a copy when the interpreter ends would abort it, after a good answer."""
    folder = random_checkpoint("llama", num_hidden_layers=6)
    program = tmp_path / "program.py"
    program.write_text(
        f"""
import sys, time, torch
from pathlib import Path
sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parent.parent)]!r}
from test_streamer_host_weights import ALL, Stream
from streamer.architecture import read_architecture
from streamer.checkpoint import Checkpoint
checkpoint = Checkpoint.open({str(folder)!r})
stream = Stream(read_architecture(Path({str(folder)!r}), checkpoint), checkpoint, set(), set(), threads=6)
read = stream.host._reader.read
def slow(*arguments):
    end = time.monotonic() + 0.3
    while time.monotonic() < end:
        torch.ones(1 << 20).sum()
    return read(*arguments)
stream.host._reader.read = slow
stream.weights.start()
time.sleep(0.2)
print("answer")
""",
        encoding="utf-8",
    )
    done = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stdout) == (0, "answer\n"), done.stderr[-1000:]


def test_memory_goes_back_to_the_system() -> None:
    memory = HostMemory(64 << 20)
    before = unmapped_host_bytes()
    if before is None:
        pytest.skip("this system does not say what a process holds")
    memory.prepare()
    held = unmapped_host_bytes()
    memory.close()
    assert held is not None
    assert held - before > 60 << 20
    assert held - (unmapped_host_bytes() or 0) > 60 << 20


def test_a_thread_that_cannot_be_started_leaves_the_others_to_work(
    architecture: tuple[Architecture, Checkpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    start = threading.Thread.start
    for allowed in (0, 1):
        begun = [0]

        def limited(thread: threading.Thread, begun: list[int] = begun, allowed: int = allowed) -> None:
            begun[0] += thread.name.startswith("tq-stream-reader")
            if thread.name.startswith("tq-stream-reader") and begun[0] > allowed:
                raise RuntimeError("can't start new thread")
            start(thread)

        monkeypatch.setattr(threading.Thread, "start", limited)
        stream = Stream(*architecture, set(), set())
        if allowed:
            stream.weights.start()
            stream.run(passes=2)
        else:
            with pytest.raises(StreamerError, match="no thread can be started"):
                stream.weights.start()
        stream.weights.close()


def test_without_a_thread_for_memory_units_are_read_in_every_pass(
    architecture: tuple[Architecture, Checkpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    start = threading.Thread.start

    def limited(thread: threading.Thread) -> None:
        if thread.name == "tq-stream-memory":
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", limited)
    stream = Stream(*architecture, {2}, {0, 1})
    stream.weights.start()
    stream.run(passes=3)
    assert not stream.host.held_units
    assert stream.host.is_settled
    stream.weights.close()


def test_an_abort_that_is_interrupted_is_made_up_for(
    architecture: tuple[Architecture, Checkpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = Stream(*architecture, {2}, {0, 1})
    stream.weights.start()
    for index in range(5):
        stream.weights.wait(index)
    restart = stream.host.restart

    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(stream.host, "restart", interrupted)
    with pytest.raises(KeyboardInterrupt):
        stream.weights.abort()
    monkeypatch.setattr(stream.host, "restart", restart)
    stream.run(passes=2)
    stream.weights.close()


def test_a_cast_from_a_file_that_was_cut_is_an_error_not_the_end_of_the_process(
    random_checkpoint: Callable[..., Path],
) -> None:
    folder = random_checkpoint("llama", dtype="bfloat16", num_hidden_layers=6, hidden_size=128)
    with Checkpoint.open(folder) as checkpoint:
        read = read_architecture(folder, checkpoint, dtype="float32")
        stream = Stream(read, checkpoint, set(), set())
        stream.weights.start()
        stream.run()
        path = next(iter(checkpoint.tensors.values())).shard
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size // 2)
        with pytest.raises(CheckpointError, match="ends at byte"):
            stream.run(passes=5)
        stream.weights.close()


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("dtypes", [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_a_cast_goes_in_steps(
    random_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, dtypes: tuple[str, str], direct: bool
) -> None:
    """Also where steps neither divide the parameters nor begin at a block of the disk."""
    monkeypatch.setattr("streamer.weights.pieces._CAST_BYTES", 3000)
    stored, run = dtypes
    folder = random_checkpoint("llama", dtype=stored, num_hidden_layers=3, hidden_size=128)
    with Checkpoint.open(folder) as checkpoint:
        stream = Stream(read_architecture(folder, checkpoint, dtype=run), checkpoint, {0}, {1, 2}, direct=direct)
        stream.weights.start()
        stream.run(passes=4)
        stream.weights.close()


def test_the_first_pass_does_not_wait_for_whole_units(architecture: tuple[Architecture, Checkpoint]) -> None:
    """Slots for less than a unit are enough: its pieces are copied while others are read."""
    stream = Stream(*architecture, set(), set(), slots=1, threads=2)
    assert max(len(pieces) for pieces in stream.host._reader.pieces) > 1
    stream.weights.start()
    stream.run(passes=3)
    stream.weights.close()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_that_are_not_stored_as_they_run(random_checkpoint: Callable[..., Path], dtype: str) -> None:
    """Another dtype, and experts that transformers merges from one tensor each."""
    for model_type in ("llama", "qwen3_moe"):
        folder = random_checkpoint(model_type, dtype="bfloat16" if dtype == "float32" else "float32")
        with Checkpoint.open(folder) as checkpoint:
            read = read_architecture(folder, checkpoint, dtype=dtype)
            count = sum(len(layer) for layer in read.layers)
            for kept in (set(), set(range(count))):
                stream = Stream(read, checkpoint, {0}, kept)
                stream.weights.start()
                stream.run(passes=4)
                if kept:
                    stream.settle()
                    assert not stream.host._reader._made, "made parameters are dropped after their last piece"
                assert len(stream.host._reader._made) <= 1
                stream.weights.close()
                assert not stream.host._reader._made
