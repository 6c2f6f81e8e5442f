"""A checkpoint folder -> a folder of packed files in the cache, keyed by content; and the same files from it again.

    packed/<key>/            finished: a packed file for each safetensors file, copies of the small files, packed.json
    packed/<place>.part/     being written; a file that is not finished has .part behind its name, and beside it a
                             list of the records that it holds (.records)
    packed/<place>.json      what the folder at a place held when it was packed, and its key

A place is a digest of the path. A run that was killed is taken up where the list ends: its records are checked, and
the next ones are coded.
"""

import errno
import fcntl
import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from streamer.checkpoint import Checkpoint, TensorEntry
from streamer.devices import find_device
from streamer.errors import (
    CheckpointError,
    DoesNotFitError,
    HeaderError,
    MissingShardError,
    OptionError,
    UnsupportedModelError,
)
from streamer.ops.lossless import least_coded_bytes
from streamer.options import format_size
from streamer.packed import (
    SUFFIX,
    PackedFile,
    Record,
    Slice,
    SliceCoder,
    Source,
    check_stored,
    digest_of,
    end_of,
    open_file,
    pack_slice,
    slices_of,
    unpack_record,
    write_bytes,
    write_end,
)

MANIFEST = "packed.json"

# Host memory for each thread that packs, and two more (see `pack`).
THREAD_BYTES = 80 << 20

_CPU = torch.device("cpu")

_PART = ".part"
_LIST = ".records"

# Beside the weights a checkpoint folder has these; weights of other kinds are left where they are.
_SMALL_FILES = ("*.json", "tokenizer*", "*.jinja", "*.model", "*.txt")

_ELSEWHERE = "TQ_STREAM_CACHE, for this run and those that are to find it"

_Result = TypeVar("_Result")
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class PackedFolder:
    """A finished folder of packed files.

    Attributes:
        folder: of them. files: with front and table checked. copies: name -> digest of each small file.
    """

    folder: Path
    files: tuple[PackedFile, ...]
    copies: dict[str, str]

    @classmethod
    def open(cls, folder: Path) -> "PackedFolder":
        """Reads and checks all but the records.

        Raises:
            MissingShardError: no packed folder, or a file of it is missing. CheckpointError and its children: see
                `PackedFile.open`; a file is not the one that was packed into this folder.
        Source: own.
        """
        manifest = folder / MANIFEST
        if not manifest.is_file():
            raise MissingShardError(
                f"{folder} holds no {MANIFEST}: give the folder that tq-stream pack has printed", path=folder
            )
        try:
            content = json.loads(manifest.read_bytes())
            packed, copies = dict(content["packed"]), dict(content["copied"])
            if any(Path(name).name != name for name in (*packed, *copies)):
                raise ValueError("names of files with a path in them")  # they could point anywhere on the machine
        except (ValueError, KeyError, TypeError) as error:
            raise HeaderError(f"{manifest} cannot be read ({error!r}).\n  {_again(folder)}", path=manifest) from error
        files = []
        for name, digest in packed.items():
            file = PackedFile.open(_present(folder / f"{name}{SUFFIX}"))
            if (file.source.name, file.digest) != (name, digest):
                raise CheckpointError(f"{file.path} is not the file that {MANIFEST} names.", path=file.path)
            files.append(file)
        for name in copies:
            _present(folder / name)
        return cls(folder, tuple(files), copies)

    @property
    def source_bytes(self) -> int:
        """Bytes of the safetensors files."""
        return sum(file.source.nbytes for file in self.files)

    @property
    def nbytes(self) -> int:
        """Bytes of the packed files."""
        return sum(file.nbytes for file in self.files)

    def line(self) -> str:
        """Both sizes in a line for users."""
        share = 100 * self.nbytes / self.source_bytes
        return f"{format_size(self.source_bytes)} of safetensors are {format_size(self.nbytes)} packed ({share:.1f} %)"


def coding_device(name: str | None, *, on_line: Callable[[str], None]) -> torch.device:
    """The device that codes weights: the current GPU if there is one, else the CPU; says which.

    Args:
        name: as `find_device` takes it. on_line: told in one line.
    Raises:
        OptionError: no such device.
    """
    device = find_device(name)
    if device.type == "cpu":
        on_line("the CPU codes the weights")
    else:
        on_line(f"{torch.cuda.get_device_name(device)} codes the weights")
    return device


def pack(
    folder: Path, cache: Path, *, threads: int, device: torch.device = _CPU, on_progress: Progress | None = None
) -> PackedFolder:
    """A checkpoint's safetensors files as packed files in the cache.

    Memory: some 80 MiB for each thread and two more, whatever the size of the model; about 200 MiB of a GPU.

    Args:
        folder: of the checkpoint; only read. cache: the folder in which packed folders are kept.
        threads: that read, code and check; one more writes. device: that codes; the files are the same.
        on_progress: called with the source bytes done and their sum.
    Returns:
        the packed folder. One that was made of the same files before is given as it is.
    Raises:
        UnsupportedModelError: no weight is bfloat16: nothing would get smaller.
        OptionError: another process is packing this checkpoint. CheckpointError and its children: a file of the
            checkpoint is wrong, or a packed one that exists already is damaged. DoesNotFitError: the GPU has no memory
            for coding, or the disk of the cache no room. OSError: the system cannot write there.
    Source: own.
    """
    with Checkpoint.open(folder) as checkpoint:
        entries = list(checkpoint.tensors.values())
    if not any(entry.dtype == torch.bfloat16 for entry in entries):
        found = ", ".join(sorted({str(entry.dtype).removeprefix("torch.") for entry in entries})) or "nothing"
        raise UnsupportedModelError(
            f"{folder} holds {found}, and only bfloat16 weights get smaller without loss: there is nothing to pack"
        )
    shards, small = _files_of(folder, entries)
    place = _place(folder, cache)
    cache.mkdir(parents=True, exist_ok=True)
    with _locked(place, folder):
        sources = _sources(shards, small)
        known = _packed_before(place)
        if known is not None and known[0] == sources and (cache / known[1]).is_dir():
            return PackedFolder.open(cache / known[1])
        part = place.with_suffix(_PART)
        _check_room(entries, part)
        part.mkdir(exist_ok=True)
        coder = SliceCoder(device)
        done, total = 0, sum(shard.stat().st_size for shard in shards)
        for shard in shards:
            report = partial(_report, on_progress, done, total)
            own = [entry for entry in entries if entry.shard == shard]
            source = Source.of(shard)
            try:
                _pack_file(shard, source, slices_of(source.nbytes, own), part, threads, coder, report)
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                raise DoesNotFitError(
                    f"the disk of {cache} is full; what has been packed stays, and the same command goes on from "
                    f"there: free some, or name a folder of another disk in {_ELSEWHERE}"
                ) from error
            done += source.nbytes
        key = _finish(part, shards, small)
        # before the folder has its name: a run that is killed in between finds all files finished
        _write_json(place.with_suffix(".json"), {"sources": sources, "key": key})
        if (cache / key).is_dir():  # the same content has been packed from another place
            shutil.rmtree(part)
        else:
            part.rename(cache / key)
    return PackedFolder.open(cache / key)


def find_packed(checkpoint: Checkpoint, cache: Path) -> PackedFolder | None:
    """The packed folder that `pack` has made of a checkpoint's weights as they are now; None if there is none.

    Of the small files beside them nothing is asked: a run reads the checkpoint's own.

    Args:
        checkpoint: opened. cache: as for `pack`.
    Raises:
        CheckpointError and its children: there is one, and it is damaged.
    Source: own.
    """
    known = _packed_before(_place(checkpoint.folder, cache))
    if known is None or not (cache / known[1]).is_dir():
        return None
    shards, _ = _files_of(checkpoint.folder, checkpoint.tensors.values())
    if known[0][: len(shards)] != _sources(shards, ()):
        return None
    return PackedFolder.open(cache / known[1])


def was_packed(checkpoint: Checkpoint, cache: Path) -> bool:
    """Whether `pack` has packed a checkpoint at this path before, be it as it is now or not."""
    return _packed_before(_place(checkpoint.folder, cache)) is not None


def unpack(packed: PackedFolder, target: Path, *, threads: int, on_progress: Progress | None = None) -> None:
    """The files that were packed, byte for byte; every record is checked before and after it is decoded.

    Args:
        packed: opened. target: the folder to write to; made if there is none.
        threads, on_progress: as for `pack`.
    Raises:
        OptionError: a file of a name that would be written is there. CheckpointError and its children: a packed file
            is truncated or altered; files that were whole are written, and nothing of the one that is not.
    Source: own.
    """
    names = [*(file.source.name for file in packed.files), *packed.copies]
    present = [name for name in names if (target / name).exists()]
    if present:
        raise OptionError(f"{target / present[0]} exists: give another folder, nothing is overwritten")
    target.mkdir(parents=True, exist_ok=True)
    done = 0
    for name, digest in packed.copies.items():
        content = (packed.folder / name).read_bytes()
        if digest_of(content) != digest:
            path = packed.folder / name
            raise CheckpointError(f"{path} has been altered since it was copied.\n  {_again(packed.folder)}", path=path)
        (target / name).write_bytes(content)
    for file in packed.files:
        part = target / f"{file.source.name}{_PART}"
        try:
            with open_file(file.path) as stored, open_file(part, os.O_RDWR | os.O_CREAT | os.O_TRUNC) as out:
                jobs = (partial(_unpack_to, out, part, stored, file.path, record) for record in file.records)
                for record in _in_order(jobs, threads):
                    done += record.stop - record.start
                    if on_progress is not None:
                        on_progress(done, packed.source_bytes)
                os.fsync(out)
            part.rename(target / file.source.name)
        finally:
            part.unlink(missing_ok=True)


def _unpack_to(out: int, part: Path, stored: int, path: Path, record: Record) -> Record:
    write_bytes(out, part, unpack_record(stored, path, record), record.start)
    return record


def _check_room(entries: Iterable[TensorEntry], part: Path) -> None:
    """Packing takes minutes: a disk that is too small for it is said before."""
    needed = sum(least_coded_bytes(e.nbytes // 2) if e.dtype == torch.bfloat16 else e.nbytes for e in entries)
    written = sum(path.stat().st_size for path in part.iterdir()) if part.is_dir() else 0
    free = shutil.disk_usage(part.parent).free
    if needed - written > free:
        raise DoesNotFitError(
            f"packing takes {format_size(needed - written)} or a little more in {part.parent}, and {format_size(free)} "
            f"are free there: free some, or name a folder of another disk in {_ELSEWHERE}"
        )


def _pack_file(
    shard: Path,
    source: Source,
    slices: Sequence[Slice],
    folder: Path,
    threads: int,
    coder: SliceCoder,
    report: Callable[[int], None],
) -> None:
    """One packed file; what an earlier run has written of it stays."""
    target = folder / f"{shard.name}{SUFFIX}"
    part, listed = Path(f"{target}{_PART}"), Path(f"{target}{_LIST}")
    if target.is_file() and PackedFile.open(target).source == source:
        report(source.nbytes)
        return
    with open_file(shard) as file, open_file(part, os.O_RDWR | os.O_CREAT) as out:
        records = _records_so_far(listed, source, slices, out, part, threads)
        os.ftruncate(out, end_of(records) if records else 0)
        _write_lines(listed, [source, *records])
        with listed.open("a", encoding="utf-8") as lines:
            for found, stored in _in_order(
                (partial(pack_slice, file, shard, piece, coder) for piece in slices[len(records) :]), threads
            ):
                record = replace(found, offset=end_of(records))
                write_bytes(out, part, stored, record.offset)
                records.append(record)
                lines.write(_line(record))  # after its bytes: what the list names is there
                lines.flush()
                report(record.stop)
        if Source.of(shard) != source:
            raise CheckpointError(f"{shard} was changed while it was packed: pack it again", path=shard)
        write_end(out, part, source, records)
    part.rename(target)
    listed.unlink()


def _records_so_far(
    listed: Path, source: Source, slices: Sequence[Slice], out: int, part: Path, threads: int
) -> list[Record]:
    """The records that an earlier run has written of this very file, as far as they are whole."""
    lines = listed.read_text(encoding="utf-8").splitlines(keepends=True) if listed.is_file() else []
    if lines[:1] != [_line(source)]:
        return []
    whole: list[Record] = []
    try:
        records = [Record(**json.loads(line)) for line in lines[1:] if line.endswith("\n")]
        if [(r.start, r.stop) for r in records] != [(piece.start, piece.stop) for piece in slices[: len(records)]]:
            return []  # of another version, which cut files otherwise
        for record in _in_order((partial(_check, out, part, record) for record in records), threads):
            whole.append(record)
    except (ValueError, TypeError, CheckpointError):  # the system went down before these were on the disk
        return whole
    return whole


def _check(out: int, part: Path, record: Record) -> Record:
    check_stored(out, part, record)
    return record


def _finish(part: Path, shards: Sequence[Path], small: Sequence[Path]) -> str:
    """Copies of the small files, and the list of all; what an earlier run left over goes. Gives the key."""
    copies = {}
    for path in small:
        content = path.read_bytes()
        copies[path.name] = digest_of(content)
        (part / path.name).write_bytes(content)
    packed = {shard.name: PackedFile.open(part / f"{shard.name}{SUFFIX}").digest for shard in shards}
    manifest = {"packed": packed, "copied": copies}
    _write_json(part / MANIFEST, manifest)
    wanted = {MANIFEST, *copies, *(f"{name}{SUFFIX}" for name in packed)}
    for path in part.iterdir():
        if path.name not in wanted:
            path.unlink()
    return _name(json.dumps(manifest).encode())


def _in_order(jobs: Iterable[Callable[[], _Result]], threads: int) -> Iterator[_Result]:
    """Results of jobs done by threads, in their order; as many are in hand as there are threads, and two."""
    # torch would have each of them use all cores for one slice
    pool = ThreadPoolExecutor(threads, "tq-stream-pack", initializer=partial(torch.set_num_threads, 1))
    waiting: deque[Future[_Result]] = deque()
    try:
        for job in jobs:
            waiting.append(pool.submit(job))
            if len(waiting) > threads + 1:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _locked(place: Path, folder: Path) -> Iterator[None]:
    """One process at a time packs a checkpoint; the system takes the lock back from one that was killed."""
    with open_file(place.with_suffix(".lock"), os.O_RDWR | os.O_CREAT) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OptionError(f"another process is packing {folder}: wait until it has ended") from error
        yield


def _files_of(folder: Path, entries: Iterable[TensorEntry]) -> tuple[list[Path], list[Path]]:
    """The safetensors files of a checkpoint, and the small files beside them."""
    shards = sorted({entry.shard for entry in entries})
    found = {path for pattern in _SMALL_FILES for path in folder.glob(pattern) if path.is_file()}
    return shards, sorted(found - {*shards})


def _sources(shards: Iterable[Path], small: Iterable[Path]) -> list[dict[str, Any]]:
    """What tells whether files are what they were: times of modification. Only reading them all would be surer."""
    return [asdict(Source.of(path)) for path in (*shards, *small)]


def _place(folder: Path, cache: Path) -> Path:
    """Where a run keeps what it knows of a checkpoint's folder, without a suffix."""
    return cache / _name(os.fsencode(folder.resolve()))


def _name(content: bytes) -> str:
    """The name of a folder or file in the cache that stands for some content."""
    return digest_of(content)[:32]


def _report(on_progress: Progress | None, before: int, total: int, done: int) -> None:
    if on_progress is not None:
        on_progress(before + done, total)


def _line(content: Source | Record) -> str:
    return json.dumps(asdict(content)) + "\n"


def _present(path: Path) -> Path:
    if not path.is_file():
        raise MissingShardError(
            f"{path} is missing; {MANIFEST} beside it names it.\n  {_again(path.parent)}", path=path
        )
    return path


def _again(folder: Path) -> str:
    return f"Delete {folder}, and write it again: tq-stream pack MODEL."


def _packed_before(place: Path) -> tuple[list[Any], str] | None:
    """What the folder at a place held when it was packed, and the key; None if that is not known, or damaged."""
    try:
        known = json.loads(place.with_suffix(".json").read_bytes())
        return list(known["sources"]), str(known["key"])
    except (OSError, ValueError, KeyError, TypeError):  # it can be made again
        return None


def _write_json(path: Path, content: Any) -> None:
    _write_text(path, json.dumps(content, indent=1))


def _write_lines(path: Path, contents: Sequence[Source | Record]) -> None:
    _write_text(path, "".join(_line(content) for content in contents))


def _write_text(path: Path, text: str) -> None:
    """A file that is there as a whole or not at all."""
    neighbour = path.with_name(path.name + _PART)
    neighbour.write_text(text, encoding="utf-8")
    neighbour.rename(path)
