"""Packed folders: the bytes on the page, the same files again, runs that were killed, files that were altered."""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from streamer import packed, packing
from streamer.checkpoint import TensorEntry
from streamer.errors import (
    CheckpointError,
    DoesNotFitError,
    HeaderError,
    MissingShardError,
    OptionError,
    TruncatedShardError,
    UnsupportedModelError,
)
from streamer.ops.lossless import CodedTensor, decode
from streamer.packed import PackedFile, SliceCoder
from streamer.packing import PackedFolder, pack, unpack

SLICE = 1 << 16  # what a record holds here, so that small tensors have several


@pytest.fixture(autouse=True)
def small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "SLICE_BYTES", SLICE)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Two shards: matrices of several slices, other dtypes, what is shorter than a block, an empty tensor."""
    folder = tmp_path / "model"
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    first = {
        "a.matrix": normal(130, 1001).bfloat16(),
        "b.norm": torch.ones(64).bfloat16(),
        "c.scale": normal(33, 7),
        "d.empty": torch.empty(0, 4).bfloat16(),
    }
    noise = torch.randint(-(2**15), 2**15, (5000,), generator=generator).to(torch.int16).view(torch.bfloat16)
    second = {"e.noise": noise, "f.matrix": normal(90, 1024).bfloat16(), "g.index": torch.arange(9)}
    save_file(first, folder / "model-00001-of-00002.safetensors", {"format": "pt"})
    save_file(second, tmp_path / "blob", {"format": "pt"})
    (folder / "model-00002-of-00002.safetensors").symlink_to(tmp_path / "blob")  # as in the hub's cache
    weight_map = {name: f"model-0000{i}-of-00002.safetensors" for i, of in ((1, first), (2, second)) for name in of}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"not packed")
    return folder


SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
SMALL = ("config.json", "model.safetensors.index.json")


def check_unpacked(packed_folder: PackedFolder, model: Path, target: Path) -> None:
    unpack(packed_folder, target, threads=2)
    assert sorted(path.name for path in target.iterdir()) == sorted((*SHARDS, *SMALL))
    for path in target.iterdir():
        assert path.read_bytes() == (model / path.name).read_bytes(), path.name


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_same_files_come_back(model: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    made = pack(model, tmp_path / "packed", threads=2, on_progress=lambda done, of: seen.append((done, of)))
    total = sum((model / name).stat().st_size for name in SHARDS)
    assert made.source_bytes == total
    assert seen[-1] == (total, total)
    assert seen == sorted(seen)
    check_unpacked(made, model, tmp_path / "out")


def test_bytes_are_those_of_the_page(model: Path, tmp_path: Path) -> None:
    """Reads a packed file as docs/format.md says, with no code of streamer/packed.py."""
    made = pack(model, tmp_path / "packed", threads=1)
    for name in SHARDS:
        stored, source = (made.folder / f"{name}.packed").read_bytes(), (model / name).read_bytes()
        magic, offset, nbytes, checksum = struct.unpack_from("<8sQQ32s", stored)
        assert magic == b"TQPACK01"
        assert stored[56:4096] == bytes(4040)
        assert (offset % 4096, offset + nbytes) == (0, len(stored))
        assert hashlib.sha256(stored[offset:]).digest() == checksum
        table = json.loads(stored[offset:])
        assert (table["source"]["name"], table["source"]["nbytes"]) == (name, len(source))
        at, free = 0, 4096
        for record in table["records"]:
            assert record["start"] == at
            assert record["offset"] == free
            at, end = record["stop"], free + record["nbytes"]
            free = -(-end // 4096) * 4096
            kept, original = stored[record["offset"] : end], source[record["start"] : at]
            assert not any(stored[end:free])
            assert hashlib.sha256(kept).hexdigest() == record["checksum"]
            assert hashlib.sha256(original).hexdigest() == record["digest"]
            if record["is_coded"]:
                coded = CodedTensor(torch.frombuffer(bytearray(kept), dtype=torch.uint8), (len(original) // 2,))
                kept = bytes(decode(coded).view(torch.uint8).tolist())
            assert kept == original
        assert (at, free) == (len(source), offset)
        # each slice of a matrix is a record, coded; weights of any pattern are not
        assert [r["is_coded"] for r in table["records"] if r["stop"] - r["start"] == SLICE][:1] == [True]
        assert any(r["nbytes"] == 10_000 and not r["is_coded"] for r in table["records"]) == (name == SHARDS[1])


def test_a_folder_is_named_by_its_content(model: Path, tmp_path: Path) -> None:
    cache = tmp_path / "packed"
    made = pack(model, cache, threads=2)
    other = tmp_path / "elsewhere"
    shutil.copytree(model, other)
    assert pack(other, cache, threads=1).folder == made.folder
    weights = bytearray((other / SHARDS[1]).read_bytes())
    weights[-1] ^= 1
    (other / SHARDS[1]).write_bytes(weights)
    changed = pack(other, cache, threads=1)
    assert changed.folder != made.folder
    assert not list(cache.glob("*.part"))
    unpack(changed, tmp_path / "out", threads=1)
    assert (tmp_path / "out" / SHARDS[1]).read_bytes() == weights
    (other / "config.json").write_text('{"other": 1}')
    assert pack(other, cache, threads=1).folder not in (made.folder, changed.folder)


def test_what_is_packed_is_not_read_again(model: Path, tmp_path: Path) -> None:
    made = pack(model, tmp_path / "packed", threads=2)

    def never(done: int, of: int) -> None:
        pytest.fail("it was packed again")

    assert pack(model, tmp_path / "packed", threads=2, on_progress=never) == made


KILLED = """
import os, signal, sys
from pathlib import Path
from streamer import packed, packing
from streamer.checkpoint import TensorEntry

left = int(sys.argv[3])

def count(done, of):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)

packed.SLICE_BYTES = 1 << 16
packing.pack(Path(sys.argv[1]), Path(sys.argv[2]), threads=2, on_progress=count)
"""


class Stopped(BaseException):
    """As unforeseen as a signal."""


def stop_after(records: int, model: Path, cache: Path) -> None:
    """Packs until so many records are written; what is on the disk then is what a killed process leaves there."""
    left = iter(range(records - 1, -1, -1))

    def count(done: int, of: int) -> None:
        if next(left) == 0:
            raise Stopped

    with pytest.raises(Stopped):
        pack(model, cache, threads=2, on_progress=count)


@pytest.fixture
def coded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Where the slices begin that are coded from here on."""
    starts: list[int] = []

    def counting(file: int, path: Path, piece: packed.Slice, coder: SliceCoder) -> object:
        starts.append(piece.start)
        return packed.pack_slice(file, path, piece, coder)

    monkeypatch.setattr(packing, "pack_slice", counting)
    return starts


@pytest.fixture
def whole(model: Path, tmp_path: Path) -> PackedFolder:
    """The model packed without a break."""
    return pack(model, tmp_path / "whole", threads=2)


def number_of_records(whole: PackedFolder) -> int:
    return sum(len(file.records) for file in whole.files)


def test_a_process_that_was_killed_is_taken_up(
    model: Path, whole: PackedFolder, tmp_path: Path, coded: list[int]
) -> None:
    cache = tmp_path / "packed"
    command = [sys.executable, "-c", KILLED, model, cache, "6"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    made = pack(model, cache, threads=2)
    assert len(coded) == number_of_records(whole) - 6
    assert contents(made.folder) == contents(whole.folder)


@pytest.mark.parametrize("records", range(1, 13))
def test_a_run_that_was_stopped_goes_on(
    records: int, model: Path, whole: PackedFolder, tmp_path: Path, coded: list[int]
) -> None:
    cache = tmp_path / "packed"
    stop_after(records, model, cache)
    del coded[:]
    with pytest.raises(MissingShardError, match="holds no packed.json: give the folder that tq-stream pack"):
        PackedFolder.open(next(cache.glob("*.part")))
    made = pack(model, cache, threads=2)
    assert len(coded) == number_of_records(whole) - records
    assert contents(made.folder) == contents(whole.folder)
    assert not list(cache.glob("*.part"))
    check_unpacked(made, model, tmp_path / "out")


@pytest.mark.parametrize("moment", ["file finished", "all finished", "folder named"])
def test_a_run_that_was_stopped_between_renames_goes_on(
    moment: str, model: Path, whole: PackedFolder, tmp_path: Path, coded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "packed"
    rename = Path.rename

    def stopping(path: Path, target: Path) -> Path:
        is_file, is_folder = path.name.endswith(".packed.part"), path.is_dir()
        if (moment == "file finished" and is_file) or (moment == "all finished" and is_folder):
            raise Stopped
        renamed = rename(path, target)
        if moment == "folder named" and is_folder:
            raise Stopped
        return renamed

    monkeypatch.setattr(Path, "rename", stopping)
    with pytest.raises(Stopped):
        pack(model, cache, threads=2)
    monkeypatch.setattr(Path, "rename", rename)
    made = pack(model, cache, threads=2)
    assert len(coded) == number_of_records(whole)
    assert contents(made.folder) == contents(whole.folder)


def edit_first_part(cache: Path, name: str, edit: Callable[[bytearray], None]) -> None:
    path = next(cache.glob(f"*.part/*.packed{name}"))
    content = bytearray(path.read_bytes())
    edit(content)
    path.write_bytes(content)


def flip(content: bytearray, at: int) -> None:
    content[at] ^= 0x10


@pytest.mark.parametrize(
    ("name", "edit", "kept"),
    [
        (".part", lambda content: flip(content, 3 * 4096), 2),  # where the third record begins
        (".part", lambda content: content.__delitem__(slice(len(content) - 1, None)), 3),
        (".records", lambda content: content.__delitem__(slice(len(content) - 9, None)), 3),
        (".records", lambda content: flip(content, 2), 0),
        (".records", lambda content: content.clear(), 0),
        (".records", lambda content: content.__setitem__(slice(-20, None), b"nothing like a list\n"), 0),
    ],
    ids=["altered", "cut", "line cut", "other file", "no list", "no JSON"],
)
def test_what_is_not_whole_of_a_killed_run_is_written_again(
    name: str,
    edit: Callable[[bytearray], None],
    kept: int,
    model: Path,
    whole: PackedFolder,
    tmp_path: Path,
    coded: list[int],
) -> None:
    """As after a power failure: the list is on the disk and some of the records are not."""
    cache = tmp_path / "packed"
    stop_after(4, model, cache)
    del coded[:]
    edit_first_part(cache, name, edit)
    made = pack(model, cache, threads=2)
    assert len(coded) == number_of_records(whole) - kept
    assert contents(made.folder) == contents(whole.folder)


def test_a_killed_run_of_other_weights_is_started_over(model: Path, tmp_path: Path, coded: list[int]) -> None:
    cache = tmp_path / "packed"
    stop_after(3, model, cache)
    del coded[:]
    weights = bytearray((model / SHARDS[0]).read_bytes())
    weights[5000:-5000:2] = bytes(len(weights[5000:-5000:2]))  # fewer escapes, shorter records
    (model / SHARDS[0]).write_bytes(weights)
    made = pack(model, cache, threads=2)
    assert len(coded) == number_of_records(made)
    assert contents(made.folder) == contents(pack(model, tmp_path / "whole", threads=2).folder)
    check_unpacked(made, model, tmp_path / "out")


def test_a_run_that_was_stopped_again_and_again_goes_on(
    model: Path, whole: PackedFolder, tmp_path: Path, coded: list[int]
) -> None:
    """What was cut off the list of the first run must not stand in the middle of the second's."""
    cache = tmp_path / "packed"
    stop_after(4, model, cache)
    edit_first_part(cache, ".records", lambda content: content.__delitem__(slice(len(content) - 9, None)))  # 3 are left
    stop_after(2, model, cache)
    del coded[:]
    made = pack(model, cache, threads=2)
    assert len(coded) == number_of_records(whole) - 5
    assert contents(made.folder) == contents(whole.folder)


def test_files_of_a_killed_run_that_the_checkpoint_no_longer_has(
    model: Path, whole: PackedFolder, tmp_path: Path
) -> None:
    cache = tmp_path / "packed"
    stop_after(number_of_records(whole) - 1, model, cache)
    (model / SHARDS[0]).rename(model / "model.safetensors")  # which is then the whole checkpoint
    made = pack(model, cache, threads=2)
    assert sorted(contents(made.folder)) == sorted(["model.safetensors.packed", "packed.json", *SMALL])


def test_slices_of_files_with_gaps() -> None:
    """Every byte is in one slice, whatever lies between tensors, and wherever an empty one is said to lie."""

    def entry(dtype: torch.dtype, offset: int, nbytes: int) -> TensorEntry:
        return TensorEntry("", dtype, (), Path("x"), offset, nbytes)

    bf16 = torch.bfloat16
    entries = [entry(bf16, 10, SLICE + 2), entry(bf16, 90, 0), entry(torch.float16, SLICE + 12, 6)]
    entries.append(entry(bf16, SLICE + 28, 4))
    assert packed.slices_of(SLICE + 40, entries) == [
        packed.Slice(0, 10, False),
        packed.Slice(10, SLICE + 10, True),
        packed.Slice(SLICE + 10, SLICE + 12, True),
        packed.Slice(SLICE + 12, SLICE + 18, False),
        packed.Slice(SLICE + 18, SLICE + 28, False),
        packed.Slice(SLICE + 28, SLICE + 32, True),
        packed.Slice(SLICE + 32, SLICE + 40, False),
    ]


def test_a_full_disk_is_named_and_the_next_run_goes_on(
    model: Path, whole: PackedFolder, tmp_path: Path, coded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, written = tmp_path / "packed", os.pwrite

    def full(file: int, content: bytes, offset: int) -> int:
        if offset > 3 * SLICE:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return written(file, content[:5000], offset)  # as the system may: fewer bytes than asked for

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(
        DoesNotFitError, match=r"the disk of .* is full; .* goes on from there: free some, .* TQ_STREAM"
    ):
        pack(model, cache, threads=1)
    monkeypatch.undo()
    monkeypatch.setattr(packed, "SLICE_BYTES", SLICE)
    assert contents(pack(model, cache, threads=2).folder) == contents(whole.folder)
    assert 0 < len(coded) <= number_of_records(whole) + 4


def records_of(whole: PackedFolder) -> Iterator[tuple[int, int]]:
    for record in whole.files[0].records:
        yield record.offset, record.offset + record.nbytes


def test_altered_records_are_refused_by_name(model: Path, whole: PackedFolder, tmp_path: Path) -> None:
    path = whole.files[0].path
    original = path.read_bytes()
    for start, stop in records_of(whole):
        altered = bytearray(original)
        flip(altered, (start + stop) // 2)
        path.write_bytes(altered)
        opened = PackedFolder.open(whole.folder)
        with pytest.raises(
            CheckpointError, match=rf"{path} has been altered: bytes {start} to {stop} are not"
        ) as caught:
            unpack(opened, tmp_path / "out", threads=2)
        assert caught.value.path == path
        assert f"Delete {whole.folder}, and write it again: tq-stream pack MODEL." in str(caught.value)
        assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(SMALL)
        shutil.rmtree(tmp_path / "out")


def write_as_if_whole(file: PackedFile, number: int, stored: bytes, **changes: object) -> None:
    """A record's bytes, and a table that fits them: what no accident does."""
    records = list(file.records)
    record = records[number]
    records[number] = replace(record, checksum=packed.digest_of(stored), **changes)  # type: ignore[arg-type]
    with packed.open_file(file.path, os.O_RDWR) as handle:
        packed.write_bytes(handle, file.path, stored, record.offset)
        os.ftruncate(handle, packed.end_of(records))
        packed.write_end(handle, file.path, file.source, records)


@pytest.mark.parametrize(("at", "bit"), [(100, 0x10), (-300, 0x10), (5632 * 8 + 1, 0x40), (5632 * 8 + 7, 0x80)])
def test_weights_that_do_not_come_back_are_refused(
    at: int, bit: int, model: Path, whole: PackedFolder, tmp_path: Path
) -> None:
    """Signs, escapes and entries of a slice of 8 blocks, altered before they were written, as by a broken machine."""
    file = whole.files[0]
    number, record = next((i, record) for i, record in enumerate(file.records) if record.stop - record.start == SLICE)
    stored = bytearray(file.path.read_bytes()[record.offset : record.offset + record.nbytes])
    stored[at] ^= bit
    write_as_if_whole(file, number, stored)
    said = f"{file.path} has been altered: the weights in bytes {record.offset} to"
    with pytest.raises(CheckpointError, match=said):
        unpack(PackedFolder.open(whole.folder), tmp_path / "out", threads=1)


@pytest.mark.parametrize(
    "changes",
    [{"start": 5}, {"offset": 0}, {"stop": 1 << 40}, {"nbytes": 1 << 40}, {"nbytes": "1"}, {"offset": 1 << 40}],
)
def test_tables_that_contradict_themselves(changes: dict[str, object], whole: PackedFolder) -> None:
    """A table with a checksum that fits could have a reader allocate and read anything."""
    write_as_if_whole(whole.files[0], 1, b"", **changes)
    with pytest.raises(HeaderError, match=rf"{whole.files[0].path} has a table that contradicts itself"):
        PackedFolder.open(whole.folder)


def test_a_table_without_its_last_record(whole: PackedFolder) -> None:
    file = whole.files[0]
    with packed.open_file(file.path, os.O_RDWR) as handle:
        os.ftruncate(handle, packed.end_of(file.records[:-1]))
        packed.write_end(handle, file.path, file.source, file.records[:-1])
    with pytest.raises(HeaderError, match=rf"{file.path} has a table that contradicts itself"):
        PackedFolder.open(whole.folder)


def test_truncated_files_are_refused_by_name(model: Path, whole: PackedFolder) -> None:
    path = whole.files[1].path
    original = path.read_bytes()
    for length in (0, 55, 4095, 4096, len(original) // 2, len(original) - 1):
        path.write_bytes(original[:length])
        with pytest.raises(TruncatedShardError, match=rf"{path} ends at byte {length}, and goes on to byte") as caught:
            PackedFolder.open(whole.folder)
        assert caught.value.path == path
    path.write_bytes(original + b"more")
    with pytest.raises(
        CheckpointError, match=rf"{path} has been altered: bytes {len(original)} to {len(original) + 4}"
    ):
        PackedFolder.open(whole.folder)


@pytest.mark.parametrize(
    ("at", "error", "message"),
    [
        (0, HeaderError, r"begins with b'.QPACK01'; a packed file of this version begins with b'TQPACK01'"),
        (7, HeaderError, r"begins with b'TQPACK0!'; a packed file of this version begins with b'TQPACK01'"),
        (30, CheckpointError, r"has been altered: bytes \d+ to \d+, its table, are not what was written"),
        (-5, CheckpointError, r"has been altered: bytes \d+ to \d+, its table, are not what was written"),
    ],
)
def test_fronts_and_tables_that_were_altered(
    at: int, error: type[Exception], message: str, model: Path, whole: PackedFolder
) -> None:
    path = whole.files[0].path
    altered = bytearray(path.read_bytes())
    flip(altered, at)
    path.write_bytes(altered)
    with pytest.raises(error, match=message):
        PackedFolder.open(whole.folder)


def test_a_folder_that_is_not_whole_is_refused(model: Path, whole: PackedFolder, tmp_path: Path) -> None:
    first, second = (file.path for file in whole.files)
    kept = second.read_bytes()
    second.unlink()
    with pytest.raises(MissingShardError, match=rf"{second} is missing; packed.json beside it names it"):
        PackedFolder.open(whole.folder)
    shutil.copy(first, second)
    with pytest.raises(CheckpointError, match=rf"{second} is not the file that packed.json names"):
        PackedFolder.open(whole.folder)
    second.write_bytes(kept)
    (whole.folder / "config.json").write_text("{ }")
    with pytest.raises(CheckpointError, match="config.json has been altered since it was copied"):
        unpack(PackedFolder.open(whole.folder), tmp_path / "out", threads=1)
    (whole.folder / "packed.json").write_text('{"packed": {}, "copied": {"../x": "0"}}')
    with pytest.raises(HeaderError, match="packed.json cannot be read .*names of files with a path in them"):
        PackedFolder.open(whole.folder)
    (whole.folder / "packed.json").write_text('{"packed": 3}')
    with pytest.raises(HeaderError, match=r"packed.json cannot be read \(TypeError"):
        PackedFolder.open(whole.folder)


def test_a_damaged_folder_is_not_taken_for_packed(model: Path, tmp_path: Path) -> None:
    made = pack(model, tmp_path / "packed", threads=1)
    made.files[0].path.write_bytes(b"")
    with pytest.raises(TruncatedShardError, match=f"Delete {made.folder}, and write it again: tq-stream pack MODEL"):
        pack(model, tmp_path / "packed", threads=1)
    shutil.rmtree(made.folder)
    assert pack(model, tmp_path / "packed", threads=1).files[0].nbytes > 0


def test_nothing_is_overwritten(whole: PackedFolder, tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / SHARDS[1]).write_bytes(b"mine")
    with pytest.raises(OptionError, match=rf"{target / SHARDS[1]} exists: give another folder, nothing is overwritten"):
        unpack(whole, target, threads=1)
    assert contents(target) == {SHARDS[1]: b"mine"}


def test_weights_that_cannot_shrink_are_not_packed(tmp_path: Path) -> None:
    save_file({"a": torch.ones(9), "b": torch.ones(9).half()}, tmp_path / "model.safetensors")
    with pytest.raises(UnsupportedModelError, match="holds float16, float32, and only bfloat16 weights get smaller"):
        pack(tmp_path, tmp_path / "packed", threads=1)
    assert not (tmp_path / "packed").exists()


def test_one_process_at_a_time(model: Path, tmp_path: Path) -> None:
    cache = tmp_path / "packed"

    def again(done: int, of: int) -> None:
        with pytest.raises(OptionError, match=rf"another process is packing {model}: wait until it has ended"):
            pack(model, cache, threads=1)

    pack(model, cache, threads=1, on_progress=again)
    with next(cache.glob("*.lock")).open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # given back


def test_a_file_that_changes_while_it_is_packed(model: Path, tmp_path: Path) -> None:
    def touch(done: int, of: int) -> None:
        os.utime(model / SHARDS[0], ns=(1, 1))

    with pytest.raises(CheckpointError, match=rf"{SHARDS[0]} was changed while it was packed: pack it again"):
        pack(model, tmp_path / "packed", threads=1, on_progress=touch)


def test_a_file_that_becomes_shorter_while_it_is_packed(model: Path, tmp_path: Path) -> None:
    def cut(done: int, of: int) -> None:
        os.truncate(model / SHARDS[1], 5000)

    with pytest.raises(TruncatedShardError, match=rf"{model / SHARDS[1]} ends at byte 5000") as caught:
        pack(model, tmp_path / "packed", threads=1, on_progress=cut)
    assert "Delete" not in str(caught.value)  # the model


def test_the_disk_is_busy_while_others_are_coded(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What has been written is handed to the disk at once; a file system that does not take the advice is no error."""
    handed: list[tuple[int, int]] = []

    def advise(file: int, offset: int, nbytes: int, advice: int) -> None:
        handed.append((offset, nbytes))
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(os, "posix_fadvise", advise, raising=False)
    made = pack(model, tmp_path / "packed", threads=2)
    assert {(record.offset, record.nbytes) for file in made.files for record in file.records} <= set(handed)


@pytest.mark.gpu
def test_a_gpu_makes_the_same_files(model: Path, tmp_path: Path) -> None:
    """By several threads, with slices that stay raw among them, and nothing of the file in page-locked memory lost."""
    made = [
        pack(model, tmp_path / name, threads=3, device=torch.device(device))
        for name, device in (("a", "cpu"), ("b", "cuda"))
    ]
    assert contents(made[0].folder) == contents(made[1].folder)
    unpack(made[1], tmp_path / "out", threads=2)
    for name in SHARDS:
        assert (tmp_path / "out" / name).read_bytes() == (model / name).read_bytes()


def test_a_gpu_without_memory_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object, **options: object) -> CodedTensor:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(packed, "encode", full)
    with pytest.raises(DoesNotFitError, match="meta has no memory for coding 16 bytes .* tq-stream pack --device cpu"):
        SliceCoder(torch.device("meta")).encode(torch.ones(8).bfloat16())
    monkeypatch.setattr(torch, "empty", full)
    with pytest.raises(
        DoesNotFitError, match=r"cuda needs 9 more bytes of page-locked memory \(out of memory\): tq-stream pack"
    ):
        SliceCoder(torch.device("cuda")).room(9)


def test_a_disk_without_room_is_said_before_anything_is_coded(
    model: Path, tmp_path: Path, coded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an earlier run has written already needs no more room."""
    cache = tmp_path / "cache"
    whole = pack(model, tmp_path / "elsewhere", threads=1)
    coded.clear()

    def leave(free: int) -> None:
        usage = shutil.disk_usage(tmp_path)._replace(free=free)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)

    leave(1000)
    with pytest.raises(DoesNotFitError, match=r"packing takes .* 1000 B are free there: .* TQ_STREAM_CACHE"):
        pack(model, cache, threads=1)
    assert not coded
    (lock,) = cache.iterdir()
    part = lock.with_suffix(".part")
    part.mkdir()
    for file in whole.files:
        shutil.copy(file.path, part)
    assert pack(model, cache, threads=1).folder.name == whole.folder.name
    assert not coded


def test_few_slices_are_in_memory_at_a_time() -> None:
    """However many there are: a slow disk does not fill the memory with what is waiting to be written."""
    started: list[int] = []

    def jobs() -> Iterator[Callable[[], int]]:
        for number in range(50):
            started.append(number)
            yield lambda number=number: number  # type: ignore[misc]

    for number, result in enumerate(packing._in_order(jobs(), threads=3)):
        assert result == number
        assert len(started) <= number + 5


@pytest.mark.slow
def test_the_demo_model_takes_71_percent_on_the_disk(
    demo_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything included: headers, tables, checksums, room up to the next multiple of 4096."""
    monkeypatch.setattr(packed, "SLICE_BYTES", 32 << 20)
    made = pack(demo_model, tmp_path / "packed", threads=2)
    assert made.nbytes <= 0.709 * made.source_bytes  # the issue asks for 0.715
    unpack(made, tmp_path / "out", threads=2)
    for name in (file.source.name for file in made.files):
        assert (tmp_path / "out" / name).read_bytes() == (demo_model / name).read_bytes()
