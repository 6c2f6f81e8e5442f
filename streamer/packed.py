"""One safetensors file as coded records: how they lie in a file of ours, and reading it back; docs/format.md draws it.

A packed file covers every byte of its source, header and gaps included: what is unpacked is the same file.
"""

import hashlib
import json
import os
import struct
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from streamer.checkpoint import DIRECT_BYTES, TensorEntry
from streamer.errors import CheckpointError, DoesNotFitError, HeaderError, OptionError, TruncatedShardError
from streamer.ops.lossless import CodedTensor, decode, encode

SUFFIX = ".packed"

_MAGIC = b"TQPACK01"  # the digits are the version of the format
_FRONT = struct.Struct("<8sQQ32s")  # magic; offset, length and checksum of the table

# Source bytes of a record at most: a worker holds one and its codes. A matrix of 2^24 weights has one.
SLICE_BYTES = 32 << 20


@dataclass(frozen=True, slots=True)
class Slice:
    """Bytes start <= b < stop of a safetensors file that become one record; is_bf16: weights of one tensor."""

    start: int
    stop: int
    is_bf16: bool


@dataclass(frozen=True, slots=True)
class Source:
    """What a safetensors file was when it was read. modified_ns: its time of modification."""

    name: str
    nbytes: int
    modified_ns: int

    @classmethod
    def of(cls, path: Path) -> "Source":
        """As the file is now."""
        status = path.stat()
        return cls(path.name, status.st_size, status.st_mtime_ns)


@dataclass(frozen=True, slots=True)
class Record:
    """A slice as it is stored.

    Attributes:
        start, stop: its bytes in the source. offset, nbytes: its bytes in the packed file.
        is_coded: they are those of `streamer.ops.lossless`; else the source's own.
        digest: of the source's bytes. checksum: of the stored ones; both by `digest_of`, in hexadecimal digits.
    """

    start: int
    stop: int
    offset: int
    nbytes: int
    is_coded: bool
    digest: str
    checksum: str


def digest_of(content: bytes | bytearray | memoryview) -> str:
    """SHA-256, in hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()


def slices_of(nbytes: int, entries: Sequence[TensorEntry]) -> list[Slice]:
    """A safetensors file cut into what becomes a record each.

    Args:
        nbytes: of the file. entries: all of its tensors, in the order of their bytes.
    Returns:
        slices in order that cover every byte once; none is longer than SLICE_BYTES or crosses the end of a tensor.
    """
    slices: list[Slice] = []

    def cut(start: int, stop: int, *, is_bf16: bool) -> None:
        for first in range(start, stop, SLICE_BYTES):
            slices.append(Slice(first, min(first + SLICE_BYTES, stop), is_bf16))

    at = 0
    for entry in entries:
        if entry.nbytes:  # what is empty may be said to lie anywhere
            cut(at, entry.offset, is_bf16=False)
            at = entry.offset + entry.nbytes
            cut(entry.offset, at, is_bf16=entry.dtype == torch.bfloat16)
    cut(at, nbytes, is_bf16=False)
    return slices


class SliceCoder:
    """Codes weights for threads that share it: each its own on the CPU; on a GPU one after another.

    Args:
        device: that codes.
    """

    def __init__(self, device: torch.device):
        self._device = device
        # bounds the GPU's memory, whatever the number of threads
        self._turn = threading.Lock()

    def room(self, nbytes: int) -> Tensor:
        """[nbytes] uint8 in host memory, page-locked for a GPU, which copies from and to it without a detour.

        Raises:
            DoesNotFitError: the system page-locks no more.
        """
        if self._device.type != "cuda":
            return torch.empty(nbytes, dtype=torch.uint8)
        try:
            return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
        except RuntimeError as error:
            raise DoesNotFitError(
                f"coding on {self._device} needs {nbytes} more bytes of page-locked memory ({error}): "
                "tq-stream pack --device cpu codes without"
            ) from error

    def encode(self, weights: Tensor) -> CodedTensor:
        """Weights in host memory, coded, in host memory: the same bytes whatever the device.

        Raises:
            DoesNotFitError: the GPU has no memory for it.
        """
        if self._device.type == "cpu":
            return encode(weights)
        with self._turn:
            try:
                coded = encode(weights.to(self._device, non_blocking=True))
            except torch.OutOfMemoryError as error:
                raise DoesNotFitError(
                    f"{self._device} has no memory for coding {weights.nbytes} bytes of weights, which takes seven "
                    "times as much: free some, or code without: tq-stream pack --device cpu"
                ) from error
            if coded.is_raw:
                return CodedTensor(weights.view(torch.uint8), coded.shape)
            return CodedTensor(self.room(coded.nbytes).copy_(coded.stored), coded.shape)


def pack_slice(file: int, path: Path, piece: Slice, coder: SliceCoder) -> tuple[Record, memoryview]:
    """A slice as it will be stored; its offset is still 0.

    Args:
        file: handle of the source. path: of it, for messages. coder: of the weights.
    Raises:
        TruncatedShardError, CheckpointError: the source ends early or cannot be read. DoesNotFitError: see the coder.
    """
    room = coder.room(piece.stop - piece.start)
    content = stored = room.numpy().data
    read_into(content, file, path, piece.start)
    is_coded = False
    if piece.is_bf16:
        coded = coder.encode(room.view(torch.bfloat16))
        if not coded.is_raw:
            stored, is_coded = coded.stored.numpy().data, True
    digest = digest_of(content)
    checksum = digest_of(stored) if is_coded else digest
    return Record(piece.start, piece.stop, 0, stored.nbytes, is_coded, digest, checksum), stored


def check_stored(file: int, path: Path, record: Record) -> bytearray:
    """A record's bytes as stored.

    Raises:
        TruncatedShardError: the file ends early. CheckpointError: they are not those that were written.
    """
    stored = read_bytes(file, path, record.offset, record.offset + record.nbytes)
    if digest_of(stored) != record.checksum:
        raise altered(path, f"bytes {record.offset} to {record.offset + record.nbytes}")
    return stored


def unpack_record(file: int, path: Path, record: Record) -> bytearray:
    """The source's bytes start <= b < stop of a record.

    Raises:
        TruncatedShardError: the file ends early. CheckpointError: the bytes are not those that were written.
    """
    content = check_stored(file, path, record)
    place = f"the weights in bytes {record.offset} to {record.offset + record.nbytes}"
    if record.is_coded:
        stored = torch.frombuffer(content, dtype=torch.uint8)
        content = bytearray(record.stop - record.start)
        weights = torch.frombuffer(content, dtype=torch.bfloat16)
        try:
            decode(CodedTensor(stored, tuple(weights.shape)), weights)
        except (OptionError, RuntimeError) as error:  # entries that fit neither each other nor the escapes
            raise altered(path, place) from error
    if digest_of(content) != record.digest:
        raise altered(path, place)
    return content


def end_of(records: Sequence[Record]) -> int:
    """Where the next record begins, or the table: around the page cache whole blocks are read."""
    end = records[-1].offset + records[-1].nbytes if records else _FRONT.size
    return -(-end // DIRECT_BYTES) * DIRECT_BYTES


def write_end(file: int, path: Path, source: Source, records: Sequence[Record]) -> None:
    """The table, and then the front, without which the file is none of ours; on the disk when this returns."""
    table = json.dumps({"source": asdict(source), "records": [asdict(record) for record in records]}).encode()
    offset = end_of(records)
    write_bytes(file, path, table, offset)
    write_bytes(file, path, _FRONT.pack(_MAGIC, offset, len(table), bytes.fromhex(digest_of(table))), 0)
    os.fsync(file)


@dataclass(frozen=True)
class PackedFile:
    """A finished packed file: its front and table are read and checked, its records are not.

    Attributes:
        path: of it. source: what was packed. records: in the order of the source's bytes, all of them.
    """

    path: Path
    source: Source
    records: tuple[Record, ...]

    @classmethod
    def open(cls, path: Path) -> "PackedFile":
        """Reads and checks front and table.

        Raises:
            TruncatedShardError: the file ends early. HeaderError: it is no packed file, or one of another version.
            CheckpointError: its table is not the one that was written, or the file cannot be read.
        Source: own.
        """
        with open_file(path) as file:
            found_bytes = os.fstat(file).st_size
            if found_bytes < DIRECT_BYTES:
                raise TruncatedShardError(_shorter(path, found_bytes, DIRECT_BYTES), path=path)
            magic, offset, nbytes, checksum = _FRONT.unpack(read_bytes(file, path, 0, _FRONT.size))
            if magic != _MAGIC:
                raise HeaderError(
                    f"{path} begins with {magic!r}; a packed file of this version begins with {_MAGIC!r}.\n"
                    f"  {advice(path)}",
                    path=path,
                )
            if found_bytes < offset + nbytes:
                raise TruncatedShardError(_shorter(path, found_bytes, offset + nbytes), path=path)
            if found_bytes > offset + nbytes:
                raise altered(path, f"bytes {offset + nbytes} to {found_bytes}")
            table = read_bytes(file, path, offset, offset + nbytes)
        if digest_of(table) != checksum.hex():
            raise altered(path, f"bytes {offset} to {offset + nbytes}, its table,")
        try:
            content = json.loads(table)
            source, records = Source(**content["source"]), [Record(**record) for record in content["records"]]
            is_whole = _is_cover(records, source.nbytes)
        except (ValueError, KeyError, TypeError):
            is_whole = False
        if not is_whole:  # with a checksum that fits: nobody's accident, and followed blindly it could ask for anything
            raise HeaderError(f"{path} has a table that contradicts itself.\n  {advice(path)}", path=path)
        return cls(path, source, tuple(records))

    @property
    def digest(self) -> str:
        """Of the source's bytes, cut as they were."""
        return digest_of(json.dumps([[r.start, r.stop, r.digest] for r in self.records]).encode())

    @property
    def nbytes(self) -> int:
        """Bytes of the packed file."""
        return self.path.stat().st_size


@contextmanager
def open_file(path: Path, flags: int = os.O_RDONLY) -> Iterator[int]:
    """A handle of a file; one that cannot be opened is an error that names it.

    Args:
        path: of it. flags: as os.open takes them.
    """
    try:
        file = os.open(path, flags | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be opened ({error.strerror}).\n  {advice(path)}", path=path) from error
    try:
        yield file
    finally:
        os.close(file)


def read_bytes(file: int, path: Path, start: int, stop: int) -> bytearray:
    """Bytes start <= b < stop of a file; see `read_into`."""
    content = bytearray(stop - start)
    read_into(memoryview(content), file, path, start)
    return content


def read_into(memory: memoryview, file: int, path: Path, start: int) -> None:
    """Fills memory with bytes of a file, with Python's lock released meanwhile.

    Raises:
        TruncatedShardError: the file ends early. CheckpointError: the system cannot read it.
    """
    done = 0
    while done < len(memory):  # one call reads 2 GiB at most
        try:
            read = os.preadv(file, [memory[done:]], start + done)
        except OSError as error:
            raise CheckpointError(
                f"{path} cannot be read at byte {start + done} ({error.strerror}).\n  {advice(path)}", path=path
            ) from error
        if read == 0:
            raise TruncatedShardError(_shorter(path, start + done, start + len(memory)), path=path)
        done += read


def write_bytes(file: int, path: Path, content: bytes | bytearray | memoryview, offset: int) -> None:
    """All of some bytes at a place of a file; the system begins to bring them to the disk.

    Raises:
        OSError: the system cannot write them, a full disk for instance; names the file.
    """
    memory, done = memoryview(content), 0
    while done < len(memory):
        try:
            done += os.pwrite(file, memory[done:], offset + done)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from error
    if hasattr(os, "posix_fadvise"):
        # its side effect on Linux: left to itself the system keeps gigabytes, and the end of each file waits for them
        with suppress(OSError):  # file systems may refuse
            os.posix_fadvise(file, offset, done, os.POSIX_FADV_DONTNEED)


def _is_cover(records: Sequence[Record], source_bytes: int) -> bool:
    """Whether records cover the source from its first byte to its last, and lie one after the other."""
    at, free = 0, DIRECT_BYTES
    for record in records:
        length = record.stop - record.start
        if record.start != at or record.offset < free or not 0 < record.nbytes <= length <= SLICE_BYTES:
            return False
        at, free = record.stop, record.offset + record.nbytes
    return at == source_bytes


def altered(path: Path, what: str) -> CheckpointError:
    """The error of a packed file that is not as it was written. what: names its bytes."""
    return CheckpointError(f"{path} has been altered: {what} are not what was written.\n  {advice(path)}", path=path)


def advice(path: Path) -> str:
    """What to do about a file that is not as it should be: packed ones can be made again."""
    if SUFFIX in path.suffixes:
        return f"Delete {path.parent}, and write it again: tq-stream pack MODEL."
    return "Check the disk and the file's permissions; a file of a checkpoint can be downloaded again."


def _shorter(path: Path, found: int, wanted: int) -> str:
    return f"{path} ends at byte {found}, and goes on to byte {wanted} by its own account.\n  {advice(path)}"
