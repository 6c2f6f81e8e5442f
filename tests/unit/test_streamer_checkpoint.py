"""Safetensors files built byte by byte: each way one can be wrong, and what a right one gives."""

import errno
import json
import mmap
import os
import struct
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from streamer.checkpoint import DIRECT_BYTES, MAX_HEADER_BYTES, Checkpoint, Span
from streamer.errors import (
    CheckpointError,
    HeaderError,
    MissingShardError,
    MissingTensorError,
    OptionError,
    TensorMismatchError,
    TruncatedShardError,
)


def entry(begin: int, end: int, shape: Any = None, dtype: Any = "U8") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


def file_bytes(header: object, data: bytes = b"", header_text: bytes | None = None) -> bytes:
    text = json.dumps(header).encode() if header_text is None else header_text
    return struct.pack("<Q", len(text)) + text + data


def write_single(folder: Path, content: bytes) -> Path:
    path = folder / "model.safetensors"
    path.write_bytes(content)
    return path


def write_index(folder: Path, weight_map: object) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def write_two_shards(folder: Path) -> None:
    (folder / "a.safetensors").write_bytes(file_bytes({"x": entry(0, 4), "y": entry(4, 6)}, bytes(range(6))))
    (folder / "b.safetensors").write_bytes(file_bytes({"z": entry(0, 3)}, b"\x07\x08\x09"))
    write_index(folder, {"x": "a.safetensors", "y": "a.safetensors", "z": "b.safetensors"})


# Right files


def test_every_dtype_reads_as_the_formats_own_reader_does(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    dtypes = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16]
    dtypes += [torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.float8_e4m3fn]
    dtypes += [torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu, torch.complex64]
    tensors = {
        str(dtype): torch.randint(0, 256, (3, 2 * dtype.itemsize), generator=generator, dtype=torch.uint8).view(dtype)
        for dtype in dtypes
    }
    tensors["bool"] = torch.tensor([True, False, True])
    tensors["scalar"] = torch.tensor(2.5)
    tensors["empty"] = torch.empty(0, 3, dtype=torch.bfloat16)
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    with Checkpoint.open(tmp_path) as checkpoint:
        assert set(checkpoint.tensors) == set(tensors)
        assert checkpoint.total_bytes == sum(tensor.nbytes for tensor in tensors.values())
        assert checkpoint.config_path == tmp_path / "config.json"
        for name, expected in tensors.items():
            stored = checkpoint.tensor(name)
            assert (stored.dtype, stored.shape) == (expected.dtype, expected.shape), name
            assert stored.flatten().view(torch.uint8).tolist() == expected.flatten().view(torch.uint8).tolist(), name


def test_the_entry_says_where_the_bytes_are(tmp_path: Path) -> None:
    header = {"__metadata__": {"format": "pt"}, "later": entry(2, 6, [1, 2], "BF16"), "first": entry(0, 2)}
    content = file_bytes(header, b"\x01\x02\x80\x3f\x00\x40")
    path = write_single(tmp_path, content)
    checkpoint = Checkpoint.open(tmp_path)
    assert list(checkpoint.tensors) == ["first", "later"]
    later = checkpoint.entry("later")
    assert (later.name, later.dtype, later.shape, later.shard) == ("later", torch.bfloat16, (1, 2), path)
    assert (later.offset, later.nbytes) == (len(content) - 4, 4)
    checkpoint.close()


def test_a_header_may_be_padded_with_spaces(tmp_path: Path) -> None:
    write_single(tmp_path, file_bytes({}, b"\x05", header_text=json.dumps({"x": entry(0, 1)}).encode() + b"    "))
    with Checkpoint.open(tmp_path) as checkpoint:
        assert checkpoint.tensor("x").tolist() == [5]


def test_a_tensor_is_a_view_on_one_map(tmp_path: Path) -> None:
    write_two_shards(tmp_path)
    with Checkpoint.open(tmp_path) as checkpoint:
        first, second = checkpoint.tensor("x"), checkpoint.tensor("y")
        assert second.data_ptr() == first.data_ptr() + 4
        assert first.untyped_storage().data_ptr() == checkpoint.tensor("x").untyped_storage().data_ptr()


def test_an_unaligned_tensor_is_read_whole(tmp_path: Path) -> None:
    for pad in range(4):
        header = json.dumps({"x": entry(1, 9, [2], "F32"), "pad": entry(0, 1)}).encode() + b" " * pad
        write_single(tmp_path, file_bytes({}, b"\x00" + struct.pack("<2f", 1.5, -2.0), header_text=header))
        with Checkpoint.open(tmp_path) as checkpoint:
            assert checkpoint.tensor("x").tolist() == [1.5, -2.0]


def test_a_view_outlives_the_checkpoint(tmp_path: Path) -> None:
    write_two_shards(tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    view = checkpoint.tensor("x")
    checkpoint.close()
    assert view.tolist() == [0, 1, 2, 3]


def test_a_closed_checkpoint_refuses_to_read(tmp_path: Path) -> None:
    write_two_shards(tmp_path)
    with Checkpoint.open(tmp_path) as checkpoint:
        checkpoint.tensor("x")
    checkpoint.close()
    with pytest.raises(CheckpointError, match="is closed: open it again"):
        checkpoint.tensor("x")
    with pytest.raises(CheckpointError, match="is closed: open it again"):
        checkpoint.read_part("x", 0, 4, torch.empty(4, dtype=torch.uint8))


def test_close_gives_the_file_handles_back(tmp_path: Path) -> None:
    write_two_shards(tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    checkpoint = Checkpoint.open(tmp_path)
    for name in checkpoint.tensors:
        checkpoint.tensor(name)
    assert len(os.listdir("/proc/self/fd")) > before
    checkpoint.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_mapping_a_file_is_silent_and_leaves_other_warnings_alone(tmp_path: Path) -> None:
    write_two_shards(tmp_path)
    with Checkpoint.open(tmp_path) as checkpoint, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        checkpoint.tensor("x")
        warnings.warn("another", stacklevel=1)
    assert [str(warning.message) for warning in caught] == ["another"]


def test_opening_reads_headers_only(tmp_path: Path) -> None:
    """Sparse files of 4 GB each open at once and stay sparse."""
    count, nbytes = 20, 4 * 10**9
    for shard in range(count):
        path = tmp_path / f"model-{shard}.safetensors"
        path.write_bytes(file_bytes({f"x{shard}": entry(0, nbytes)}))
        os.truncate(path, path.stat().st_size + nbytes)
    write_index(tmp_path, {f"x{shard}": f"model-{shard}.safetensors" for shard in range(count)})
    with Checkpoint.open(tmp_path) as checkpoint:
        assert checkpoint.total_bytes == count * nbytes
        assert checkpoint.tensor("x7")[-3:].tolist() == [0, 0, 0]
        before_bytes = sum(path.stat().st_blocks for path in tmp_path.iterdir()) * 512
    assert before_bytes < 2**20


def test_the_index_decides_which_files_count(tmp_path: Path) -> None:
    write_two_shards(tmp_path)
    (tmp_path / "adapter.safetensors").write_bytes(b"not read")
    with Checkpoint.open(tmp_path) as checkpoint:
        assert list(checkpoint.tensors) == ["x", "y", "z"]
        assert checkpoint.entry("z").shard == tmp_path / "b.safetensors"


def test_without_an_index_all_files_count(tmp_path: Path) -> None:
    write_two_shards(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    with Checkpoint.open(str(tmp_path)) as checkpoint:
        assert list(checkpoint.tensors) == ["x", "y", "z"]


def test_a_single_file_goes_before_the_index(tmp_path: Path) -> None:
    """transformers loads model.safetensors where both are there; another choice would run other weights."""
    write_two_shards(tmp_path)
    write_single(tmp_path, file_bytes({"x": entry(0, 1)}, b"\x63"))
    with Checkpoint.open(tmp_path) as checkpoint:
        assert checkpoint.tensor("x").tolist() == [99]
        assert list(checkpoint.tensors) == ["x"]


# Spans


def test_small_tensors_are_asked_for_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int, int, int]] = []

    def advise(file: int, start: int, size: int, advice: int) -> None:
        asked.append((os.fstat(file).st_ino, start, size, advice))
        raise OSError("no advice wanted")

    write_two_shards(tmp_path)
    with Checkpoint.open(tmp_path) as checkpoint:
        monkeypatch.setattr(os, "posix_fadvise", advise)
        checkpoint.will_need(["x", "z"])
        entries = [checkpoint.entry("x"), checkpoint.entry("z")]
    assert entries[0].shard != entries[1].shard
    assert asked == [
        (entry.shard.stat().st_ino, entry.offset, entry.nbytes, os.POSIX_FADV_WILLNEED) for entry in entries
    ]


def test_rows_that_will_be_needed_are_asked_for_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    safetensors.torch.save_file({"a": torch.zeros(3), "table": torch.zeros(100, 7)}, tmp_path / "model.safetensors")
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda file, start, nbytes, advice: asked.append((start, nbytes)))
    with Checkpoint.open(tmp_path) as checkpoint:
        start = checkpoint.entry("table").offset
        checkpoint.will_need_rows("table", torch.tensor([[99, 4, 5], [4, 0, 6]]))
        assert asked == [(start, 28), (start + 4 * 28, 3 * 28), (start + 99 * 28, 28)]
        checkpoint.will_need_rows("table", torch.tensor([], dtype=torch.int64))
        assert len(asked) == 3
        with pytest.raises(MissingTensorError):
            checkpoint.will_need_rows("tables", torch.tensor([1]))


def test_spans_merge_what_touches(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(
        file_bytes({name: entry(2 * i, 2 * i + 2) for i, name in enumerate("abcde")}, bytes(10))
    )
    (tmp_path / "b.safetensors").write_bytes(file_bytes({"f": entry(0, 2), "none": entry(0, 0)}, bytes(2)))
    with Checkpoint.open(tmp_path) as checkpoint:
        a, b = checkpoint.entry("a"), checkpoint.entry("f")
        assert checkpoint.spans(["e", "b", "a", "f", "none", "a"]) == [
            Span(a.shard, a.offset, a.offset + 4),
            Span(a.shard, a.offset + 8, a.offset + 10),
            Span(b.shard, b.offset, b.offset + 2),
        ]
        assert sum(span.nbytes for span in checkpoint.spans("abcde")) == 10
        assert len(checkpoint.spans("dcbae")) == 1
        assert checkpoint.spans([]) == []


@pytest.mark.parametrize("ask", [lambda c: c.tensor("xx"), lambda c: c.spans(["xx"]), lambda c: c.will_need(["xx"])])
def test_an_unknown_tensor_names_the_nearest(tmp_path: Path, ask: Callable[[Checkpoint], object]) -> None:
    write_two_shards(tmp_path)
    with Checkpoint.open(tmp_path) as checkpoint:
        with pytest.raises(MissingTensorError, match="has no tensor xx; the nearest are x") as caught:
            ask(checkpoint)
        with pytest.raises(MissingTensorError, match="has no tensor lm_head.weight; it has 3 others"):
            checkpoint.tensor("lm_head.weight")
    assert caught.value.path == tmp_path


# Reading into memory


def test_read_part_fills_part_of_a_larger_buffer(tmp_path: Path) -> None:
    write_two_shards(tmp_path)
    buffer = torch.full((8,), 0xFF, dtype=torch.uint8)
    with Checkpoint.open(tmp_path) as checkpoint:
        checkpoint.read_part("y", 0, 2, buffer[2:4])
        checkpoint.read_part("z", 0, 3, buffer[4:7])
    assert buffer.tolist() == [255, 255, 4, 5, 7, 8, 9, 255]


def test_read_part_goes_on_after_a_short_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_single(tmp_path, file_bytes({"x": entry(0, 10)}, bytes(range(10))))
    whole = os.preadv
    monkeypatch.setattr(os, "preadv", lambda file, parts, offset: whole(file, [parts[0][:3]], offset))
    buffer = torch.zeros(10, dtype=torch.uint8)
    with Checkpoint.open(tmp_path) as checkpoint:
        checkpoint.read_part("x", 0, 10, buffer)
    assert buffer.tolist() == list(range(10))


def test_read_part_of_nothing(tmp_path: Path) -> None:
    write_single(tmp_path, file_bytes({"x": entry(0, 0, [0, 3])}))
    with Checkpoint.open(tmp_path) as checkpoint:
        assert checkpoint.read_part("x", 0, 0, torch.empty(0, dtype=torch.uint8)).numel() == 0
        assert checkpoint.tensor("x").shape == (0, 3)


@pytest.mark.parametrize(
    "buffer",
    [
        torch.zeros(3, dtype=torch.uint8),
        torch.zeros(4, dtype=torch.int8),
        torch.zeros(1, dtype=torch.float32),
        torch.zeros(8, dtype=torch.uint8)[::2],
        torch.zeros(2, 2, dtype=torch.uint8),
        torch.zeros(4, dtype=torch.uint8, device="meta"),
    ],
    ids=["short", "int8", "float32", "strided", "2-D", "meta"],
)
def test_read_part_refuses_another_buffer(tmp_path: Path, buffer: torch.Tensor) -> None:
    write_two_shards(tmp_path)
    with (
        Checkpoint.open(tmp_path) as checkpoint,
        pytest.raises(
            OptionError, match="4 bytes of tensor x are read into contiguous CPU memory of 4 uint8 or more, got"
        ),
    ):
        checkpoint.read_part("x", 0, 4, buffer)


def test_read_part_from_a_file_cut_after_it_was_opened(tmp_path: Path) -> None:
    path = write_single(tmp_path, file_bytes({"x": entry(0, 10)}, bytes(10)))
    with Checkpoint.open(tmp_path) as checkpoint:
        os.truncate(path, path.stat().st_size - 4)
        with pytest.raises(TruncatedShardError, match="inside tensor x, which goes to byte") as caught:
            checkpoint.read_part("x", 0, 10, torch.zeros(10, dtype=torch.uint8))
    assert caught.value.path == path


@pytest.mark.parametrize(("start", "stop"), [(-1, 3), (3, 2), (2, 11)])
def test_read_part_refuses_bytes_outside_of_the_tensor(tmp_path: Path, start: int, stop: int) -> None:
    write_single(tmp_path, file_bytes({"x": entry(0, 10)}, bytes(10)))
    with Checkpoint.open(tmp_path) as checkpoint, pytest.raises(OptionError, match="tensor x has 10"):
        checkpoint.read_part("x", start, stop, torch.zeros(20, dtype=torch.uint8))


def test_a_disk_that_fails_is_named_with_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_single(tmp_path, file_bytes({"x": entry(0, 10)}, bytes(10)))

    def fail(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail)
    with Checkpoint.open(tmp_path) as checkpoint, pytest.raises(CheckpointError, match="Input/output error") as caught:
        checkpoint.read_part("x", 0, 10, torch.zeros(10, dtype=torch.uint8))
    assert caught.value.path == path


def page_aligned(size_bytes: int) -> torch.Tensor:
    return torch.frombuffer(mmap.mmap(-1, size_bytes), dtype=torch.uint8)


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize(
    ("start", "stop"), [(0, 1), (0, 30_000), (1, 4096), (4095, 4097), (12_345, 23_456), (29_999, 30_000)]
)
def test_read_part_gives_the_bytes_asked_for(tmp_path: Path, start: int, stop: int, direct: bool) -> None:
    content = bytes(i * 7 % 251 for i in range(30_000))
    write_single(tmp_path, file_bytes({"x": entry(0, 30_000)}, content))
    buffer = page_aligned(30_000 + 2 * DIRECT_BYTES + 100)
    with Checkpoint.open(tmp_path) as checkpoint:
        got = checkpoint.read_part("x", start, stop, buffer, direct=direct)
        assert bytes(got.tolist()) == content[start:stop]
        if direct:
            assert checkpoint._direct_files, "the file system of the tests refuses direct reads"


def test_direct_reads_leave_the_page_cache_alone(tmp_path: Path) -> None:
    """What the process has read from the disk grows by the bytes read, each time."""
    path = write_single(tmp_path, file_bytes({"x": entry(0, 1 << 20)}, bytes(1 << 20)))
    with path.open("rb") as file:
        os.fsync(file.fileno())

    def from_disk() -> int:
        lines = Path("/proc/self/io").read_text(encoding="utf-8").splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith("read_bytes")))

    buffer = page_aligned((1 << 20) + 2 * DIRECT_BYTES)
    with Checkpoint.open(tmp_path) as checkpoint:
        checkpoint.read_part("x", 0, 1 << 20, buffer, direct=True)
        if checkpoint._direct_files[path] is None:
            pytest.skip("this file system has no direct reads")
        before = from_disk()
        for _ in range(3):
            checkpoint.read_part("x", 0, 1 << 20, buffer, direct=True)
        if from_disk() == before:
            pytest.skip("this system does not count what it reads")
        assert from_disk() - before >= 3 << 20


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not say what is cached")
def test_cached_share_sees_what_the_page_cache_holds_and_changes_nothing(tmp_path: Path) -> None:
    path = write_single(tmp_path, file_bytes({"x": entry(0, 4 << 20)}, bytes(4 << 20)))
    with Checkpoint.open(tmp_path) as checkpoint:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            file.read()
            assert checkpoint.cached_share() == 1.0
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        for _ in range(3):
            assert checkpoint.cached_share() < 0.5


def test_cached_share_of_other_peoples_files_is_not_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_single(tmp_path, file_bytes({"x": entry(0, 4 << 20)}, bytes(4 << 20)))
    with Checkpoint.open(tmp_path) as checkpoint:
        monkeypatch.setattr(os, "geteuid", lambda: 1 << 20)
        monkeypatch.setattr(os, "access", lambda *_: False)
        assert checkpoint.cached_share() == 0.0


def test_a_file_system_without_direct_reads_is_read_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write_single(tmp_path, file_bytes({"x": entry(0, 10)}, bytes(range(10))))
    opened = os.open

    def refuse(path: Path, flags: int, *rest: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return opened(path, flags, *rest)

    monkeypatch.setattr(os, "open", refuse)
    with Checkpoint.open(tmp_path) as checkpoint:
        for _ in range(2):
            got = checkpoint.read_part("x", 2, 9, page_aligned(3 * DIRECT_BYTES), direct=True)
            assert got.tolist() == [2, 3, 4, 5, 6, 7, 8]
    assert [record.message for record in caplog.records] == [
        "model.safetensors cannot be read around the page cache (Invalid argument): it is read through it"
    ]


def test_direct_reads_from_a_file_cut_after_it_was_opened(tmp_path: Path) -> None:
    path = write_single(tmp_path, file_bytes({"x": entry(0, 10_000)}, bytes(10_000)))
    with Checkpoint.open(tmp_path) as checkpoint:
        os.truncate(path, path.stat().st_size - 4)
        with pytest.raises(TruncatedShardError, match="inside tensor x, which goes to byte"):
            checkpoint.read_part("x", 0, 10_000, page_aligned(10_000 + 2 * DIRECT_BYTES), direct=True)


def test_mapping_a_file_cut_after_it_was_opened(tmp_path: Path) -> None:
    path = write_single(tmp_path, file_bytes({"x": entry(0, 10)}, bytes(10)))
    with Checkpoint.open(tmp_path) as checkpoint:
        os.truncate(path, path.stat().st_size - 4)
        with pytest.raises(TruncatedShardError, match="has become shorter since it was opened"):
            checkpoint.tensor("x")


def test_threads_share_one_map_and_one_handle(tmp_path: Path) -> None:
    write_single(tmp_path, file_bytes({"x": entry(0, 1000)}, bytes(range(250)) * 4))
    read: list[list[int]] = []
    with Checkpoint.open(tmp_path) as checkpoint:

        def work() -> None:
            buffer = torch.zeros(1000, dtype=torch.uint8)
            checkpoint.read_part("x", 0, 1000, buffer)
            read.append((buffer + checkpoint.tensor("x")).tolist())

        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(checkpoint._files) == len(checkpoint._maps) == 1
    assert read == [[(2 * (i % 250)) % 256 for i in range(1000)]] * 8


# Wrong files


@pytest.mark.parametrize(
    ("content", "kind", "message"),
    [
        (b"", TruncatedShardError, "has 0 bytes; a safetensors file begins with 8"),
        (b"\x02\x00\x00\x00\x00\x00\x00", TruncatedShardError, "has 7 bytes"),
        (struct.pack("<Q", 100) + b"{}", TruncatedShardError, "ends inside its header: 10 bytes.* to byte 108"),
        (struct.pack("<Q", MAX_HEADER_BYTES + 1), HeaderError, "header of 100000001 bytes, and 100000000 is the limit"),
        (b"version https://git-lfs.github.com/spec/v1\n", HeaderError, "a git-lfs pointer: type git lfs pull"),
        (b"<!DOCTYPE html><html>", HeaderError, "not a safetensors file"),
        (file_bytes({}, header_text=b""), HeaderError, "JSON cannot be read"),
        (file_bytes({}, header_text=b'{"x": '), HeaderError, "JSON cannot be read"),
        (file_bytes({}, header_text=b'{"\xff": 1}'), HeaderError, "JSON cannot be read"),
        (file_bytes({}, header_text=b"[" * 100_000), HeaderError, "JSON cannot be read"),
        (file_bytes({}, header_text=b"[]"), HeaderError, "not an object but list"),
        (file_bytes({"__metadata__": []}), HeaderError, "__metadata__ is .*, expected an object"),
        (file_bytes({"x": 3}), HeaderError, "tensor x has the entry 3"),
        (file_bytes({"x": {}}), HeaderError, "tensor x has dtype None"),
        (
            file_bytes({"x": entry(0, 1, dtype="F4")}, b"\0"),
            HeaderError,
            "tensor x has dtype 'F4', expected one of BOOL",
        ),
        (file_bytes({"x": entry(0, 1, dtype=["U8"])}, b"\0"), HeaderError, "tensor x has dtype"),
        (file_bytes({"x": entry(0, 1, shape=-1)}, b"\0"), HeaderError, "tensor x has shape -1"),
        (file_bytes({"x": entry(0, 1, shape=[-1])}, b"\0"), HeaderError, r"tensor x has shape \[-1\]"),
        (file_bytes({"x": entry(0, 1, shape=[1.0])}, b"\0"), HeaderError, r"tensor x has shape \[1\.0\]"),
        (file_bytes({"x": entry(0, 1, shape=[True])}, b"\0"), HeaderError, r"tensor x has shape \[True\]"),
        (file_bytes({"x": entry(0, 0, shape=[0, 2**63])}), HeaderError, "tensor x has shape"),
        (file_bytes({"x": {**entry(0, 1), "data_offsets": [0]}}, b"\0"), HeaderError, "tensor x has data_offsets"),
        (file_bytes({"x": {**entry(0, 1), "data_offsets": 1}}, b"\0"), HeaderError, "tensor x has data_offsets"),
        (file_bytes({"x": {**entry(0, 1), "data_offsets": [-1, 0]}}, b"\0"), HeaderError, "tensor x has data_offsets"),
        (file_bytes({"x": {**entry(0, 1), "data_offsets": [0, 1.5]}}, b"\0"), HeaderError, "tensor x has data_offsets"),
        (file_bytes({"x": entry(3, 1, shape=[1])}, bytes(4)), HeaderError, "expected begin <= end"),
        (
            file_bytes({"x": entry(0, 4, shape=[3], dtype="F32")}, bytes(4)),
            TensorMismatchError,
            r"x has 4 bytes; F32 .*12",
        ),
        (file_bytes({"x": entry(0, 4), "y": entry(3, 5)}, bytes(5)), HeaderError, "tensors x and y overlap"),
        (
            file_bytes({"x": entry(0, 4), "no": entry(2, 2), "y": entry(3, 5)}, bytes(5)),
            HeaderError,
            "tensors x and y overlap",
        ),
        (file_bytes({"x": entry(0, 4)}, bytes(3)), TruncatedShardError, "tensor x goes to byte"),
        (
            file_bytes({}, bytes(2), header_text=b'{"x": %b, "x": %b}' % ((json.dumps(entry(0, 1)).encode(),) * 2)),
            HeaderError,
            "the name x is given twice",
        ),
    ],
)
def test_a_wrong_file_is_named_with_its_fault(
    tmp_path: Path, content: bytes, kind: type[CheckpointError], message: str
) -> None:
    path = write_single(tmp_path, content)
    with pytest.raises(CheckpointError, match=message) as caught:
        Checkpoint.open(tmp_path)
    assert type(caught.value) is kind
    assert caught.value.path == path
    assert str(path) in str(caught.value)
    assert "\n  Download the file again." in str(caught.value) or "git lfs pull" in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 3


def test_bytes_behind_the_tensors_do_no_harm(tmp_path: Path) -> None:
    write_single(tmp_path, file_bytes({"x": entry(0, 2), "y": entry(4, 5)}, b"\x01\x02\xff\xff\x03\xff"))
    with Checkpoint.open(tmp_path) as checkpoint:
        assert checkpoint.tensor("y").tolist() == [3]


def test_a_folder_without_safetensors(tmp_path: Path) -> None:
    with pytest.raises(MissingShardError, match=r"holds no \*\.safetensors file") as caught:
        Checkpoint.open(tmp_path)
    assert caught.value.path == tmp_path


def test_a_missing_shard(tmp_path: Path) -> None:
    write_two_shards(tmp_path)
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(
        MissingShardError, match=r"(?s)b\.safetensors is missing; .* holds tensor z.* 1 of 2 files"
    ) as caught:
        Checkpoint.open(tmp_path)
    assert caught.value.path == tmp_path / "b.safetensors"


def test_a_tensor_of_the_index_that_its_file_lacks(tmp_path: Path) -> None:
    write_two_shards(tmp_path)
    write_index(tmp_path, {"x": "a.safetensors", "w": "b.safetensors"})
    with pytest.raises(MissingTensorError, match=r"b\.safetensors holds tensor w, and it does not\.\n"):
        Checkpoint.open(tmp_path)


def test_a_tensor_of_the_index_that_is_in_another_file(tmp_path: Path) -> None:
    write_two_shards(tmp_path)
    write_index(tmp_path, {"x": "b.safetensors", "y": "a.safetensors"})
    with pytest.raises(MissingTensorError, match=r"b\.safetensors holds tensor x, and it does not; it is in a\.saf"):
        Checkpoint.open(tmp_path)


def test_a_tensor_in_two_files(tmp_path: Path) -> None:
    write_two_shards(tmp_path)
    (tmp_path / "b.safetensors").write_bytes(file_bytes({"z": entry(0, 3), "x": entry(3, 7)}, bytes(7)))
    with pytest.raises(TensorMismatchError, match=r"tensor x is in two files, .*a\.safetensors and b\.safetensors"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("shard", ["../a.safetensors", "/etc/passwd", "sub/a.safetensors", "a.bin", 3, None])
def test_an_index_that_points_elsewhere(tmp_path: Path, shard: object) -> None:
    write_two_shards(tmp_path)
    write_index(tmp_path, {"x": shard})
    with pytest.raises(HeaderError, match="tensor x is in .*, which is no safetensors file of this folder"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("weight_map", [None, {}, [], "a.safetensors"])
def test_an_index_without_its_table(tmp_path: Path, weight_map: object) -> None:
    write_two_shards(tmp_path)
    write_index(tmp_path, weight_map)
    with pytest.raises(HeaderError, match='has no table "weight_map"') as caught:
        Checkpoint.open(tmp_path)
    assert caught.value.path == tmp_path / "model.safetensors.index.json"


@pytest.mark.parametrize("text", ["", "[]", "{", '{"weight_map": {"x": "a.safetensors", "x": "b.safetensors"}}'])
def test_an_unreadable_index(tmp_path: Path, text: str) -> None:
    write_two_shards(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(HeaderError, match=r"index\.json: its JSON"):
        Checkpoint.open(tmp_path)


def test_the_demo_model_reads_as_safetensors_reads_it(demo_model: Path) -> None:
    with Checkpoint.open(demo_model) as checkpoint:
        name = "model.layers.17.self_attn.k_proj.weight"
        entry = checkpoint.entry(name)
        with safetensors.safe_open(entry.shard, framework="pt") as shard:
            assert torch.equal(checkpoint.tensor(name), shard.get_tensor(name))
        buffer = torch.zeros(entry.nbytes, dtype=torch.uint8)
        checkpoint.read_part(name, 0, entry.nbytes, buffer)
        assert torch.equal(buffer.view(entry.dtype).reshape(entry.shape), checkpoint.tensor(name))
