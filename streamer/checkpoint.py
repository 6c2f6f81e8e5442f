"""A folder of safetensors files -> the names, shapes and byte ranges of its tensors, and views on them; no GPU.

Format of one file (safetensors): 8 bytes, the header's length as an unsigned little-endian integer; the header, a JSON
object from tensor name to {"dtype", "shape", "data_offsets": [begin, end]}; the tensors' bytes, where the offsets count
from the end of the header. Opening a checkpoint reads headers only, and believes none of them unchecked.
"""

import bisect
import contextlib
import ctypes
import difflib
import itertools
import json
import logging
import math
import mmap
import os
import struct
import sys
import threading
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any

import torch

from streamer.errors import (
    CheckpointError,
    HeaderError,
    MissingShardError,
    MissingTensorError,
    OptionError,
    TensorMismatchError,
    TruncatedShardError,
)

logger = logging.getLogger("streamer")

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
# Limit of the format's own reader: a longer header is a file of another kind.
MAX_HEADER_BYTES = 100_000_000
# Direct reads begin and end at multiples of this: the page size, and no disk's block is larger.
DIRECT_BYTES = 4096
_MAX_AXIS = 2**63 - 1  # sizes of a torch tensor are signed 64-bit integers

_DTYPES: Mapping[str, torch.dtype] = MappingProxyType({
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F64": torch.float64,
    "C64": torch.complex64,
})
_AGAIN = "Download the file again."


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor lies.

    Attributes:
        name: as the checkpoint spells it.
        dtype: as stored.
        shape: as stored.
        shard: the file that holds it.
        offset: of its first byte, from the beginning of the file.
        nbytes: its length; equal to the number of elements times the size of one.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    shard: Path
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes start <= b < end of one file."""

    shard: Path
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        """Length of the span."""
        return self.end - self.start


class Checkpoint:
    """The tensors of one checkpoint folder; owns the maps and file handles of its shards until `close`.

    Usable from several threads at once. A context manager that closes at its end.

    Args:
        folder, tensors, shard_bytes: as `open` finds them.
        advice: what to do about a file that is not as it was when it was opened, a sentence.
    """

    def __init__(
        self,
        folder: Path,
        tensors: Mapping[str, TensorEntry],
        shard_bytes: Mapping[Path, int],
        *,
        advice: str = _AGAIN,
    ) -> None:
        self.folder = folder
        self._advice = advice
        self._tensors = tensors
        self._shard_bytes = shard_bytes
        self._maps: dict[Path, torch.Tensor] = {}
        self._files: dict[Path, int] = {}
        self._direct_files: dict[Path, int | None] = {}
        self._lock = threading.Lock()
        self._is_closed = False

    @classmethod
    def open(cls, folder: Path | str) -> "Checkpoint":
        """The checkpoint in a folder, with every header read and checked; no tensor byte is read.

        The files are model.safetensors if there is one (transformers prefers it too), else those that
        model.safetensors.index.json names, else all *.safetensors.

        Args:
            folder: an existing folder.
        Returns:
            an open Checkpoint that the caller closes.
        Raises:
            MissingShardError: no safetensors file, or one that the index names is not there.
            TruncatedShardError: a file ends before its header or its last tensor does.
            HeaderError: a header or the index is unreadable or contradicts itself.
            MissingTensorError: the index names a tensor that its file does not hold.
            TensorMismatchError: a tensor's bytes do not fit its shape, or two files hold the same name.
        Source: own; format of https://github.com/huggingface/safetensors (README, "Format").
        """
        folder = Path(folder)
        weight_map = _read_weight_map(folder)
        shards = sorted({folder / shard for shard in weight_map.values()}) if weight_map else _unindexed_shards(folder)
        tensors: dict[str, TensorEntry] = {}
        shard_bytes: dict[Path, int] = {}
        for shard in shards:
            entries, shard_bytes[shard] = _read_header(shard)
            for entry in entries:
                twin = tensors.setdefault(entry.name, entry)
                if twin is not entry:
                    raise TensorMismatchError(
                        f"tensor {entry.name} is in two files, {twin.shard} and {shard.name}.\n"
                        f"  Remove the file that is left over from another download, or download the folder again.",
                        path=shard,
                    )
        for name, shard_name in weight_map.items():
            if name not in tensors or tensors[name].shard.name != shard_name:
                place = f"; it is in {tensors[name].shard.name}" if name in tensors else ""
                raise MissingTensorError(
                    f"{INDEX_NAME} says that {shard_name} holds tensor {name}, and it does not{place}.\n"
                    f"  Index and files are of different downloads: download both again.",
                    path=folder / shard_name,
                )
        return cls(folder, MappingProxyType(tensors), MappingProxyType(shard_bytes))

    @property
    def tensors(self) -> Mapping[str, TensorEntry]:
        """Every tensor by name, file after file, in the order of its bytes; read-only."""
        return self._tensors

    @property
    def config_path(self) -> Path:
        """The model's config.json, which need not exist for a folder of tensors alone."""
        return self.folder / "config.json"

    @property
    def total_bytes(self) -> int:
        """Sum of the bytes of all tensors."""
        return sum(entry.nbytes for entry in self._tensors.values())

    def entry(self, name: str) -> TensorEntry:
        """Where a tensor lies.

        Args:
            name: as the checkpoint spells it.
        Returns:
            its entry.
        Raises:
            MissingTensorError: no such tensor; names the nearest ones.
        Source: own.
        """
        entry = self._tensors.get(name)
        if entry is None:
            close = difflib.get_close_matches(name, self._tensors, n=3)
            hint = f"the nearest are {', '.join(close)}" if close else f"it has {len(self._tensors)} others"
            raise MissingTensorError(f"checkpoint {self.folder} has no tensor {name}; {hint}", path=self.folder)
        return entry

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor as it lies in the file, without a copy.

        Args:
            name: as the checkpoint spells it.
        Returns:
            a CPU tensor of the stored dtype and shape on a read-only map of the file: writing to it kills the process.
            It stays valid after `close`. Only where the file keeps it at an offset that its dtype cannot be
            read from in place is it a copy.
        Raises:
            MissingTensorError: no such tensor.
            TruncatedShardError: the file has become shorter since it was opened.
        Source: own.
        """
        entry = self.entry(name)
        stored = self._map(entry.shard)[entry.offset : entry.offset + entry.nbytes]
        if entry.offset % entry.dtype.itemsize:
            stored = stored.clone()
        return stored.view(entry.dtype).reshape(entry.shape)

    def spans(self, names: Iterable[str]) -> list[Span]:
        """The byte ranges that hold some tensors, touching ones merged.

        Args:
            names: any of the tensors, in any order; a name given twice counts once.
        Returns:
            spans sorted by file and start that cover the bytes of these tensors and no others.
        Raises:
            MissingTensorError: no such tensor.
        Source: own.
        """
        merged: list[Span] = []
        entries = {name: self.entry(name) for name in names}.values()
        for entry in sorted(entries, key=lambda entry: (entry.shard, entry.offset)):
            if entry.nbytes == 0:
                continue
            end = entry.offset + entry.nbytes
            if merged and merged[-1].shard == entry.shard and merged[-1].end == entry.offset:
                merged[-1] = Span(entry.shard, merged[-1].start, end)
            else:
                merged.append(Span(entry.shard, entry.offset, end))
        return merged

    def will_need(self, names: Iterable[str]) -> None:
        """Ask the system to read some tensors into its page cache, all at once instead of one after another.

        For small ones, of which each would wait for the disk by itself. Does nothing where the system takes no advice.

        Raises:
            MissingTensorError: no such tensor.
        Source: own; posix_fadvise(2).
        """
        for span in self.spans(names):
            self._will_need(span.shard, span.start, span.nbytes)

    def will_need_rows(self, name: str, rows: torch.Tensor) -> None:
        """The same for rows of one tensor: gathered from a map, each would be waited for by itself.

        512 rows of 7 KB from a disk take 15 to 45 ms after this, 1.0 to 1.2 s without it.

        Args:
            name: of a tensor with two axes or more. rows: [N] integers, in any order, those given twice counting once.
        Raises:
            MissingTensorError: no such tensor.
        Source: own; posix_fadvise(2).
        """
        entry = self.entry(name)
        row_bytes = entry.nbytes // max(1, entry.shape[0])
        own = rows.flatten().unique()  # in order
        ends = torch.cat([(own.diff() > 1).nonzero().flatten(), own.new_tensor([len(own) - 1])]) if len(own) else own
        first = 0
        for last in ends.tolist():
            start, stop = int(own[first]), int(own[last]) + 1
            self._will_need(entry.shard, entry.offset + start * row_bytes, (stop - start) * row_bytes)
            first = last + 1

    def _will_need(self, shard: Path, start: int, nbytes: int) -> None:
        if hasattr(os, "posix_fadvise"):
            with contextlib.suppress(OSError):  # only advice
                os.posix_fadvise(self._file(shard), start, nbytes, os.POSIX_FADV_WILLNEED)

    def read_part(
        self, name: str, start: int, stop: int, buffer: torch.Tensor, *, direct: bool = False
    ) -> torch.Tensor:
        """Copies bytes start <= b < stop of a tensor from the file to memory, with Python's lock released meanwhile.

        Args:
            name: as the checkpoint spells it.
            start, stop: bytes of the tensor; 0 <= start <= stop <= its length.
            buffer: [N] uint8 on the CPU, contiguous, writable, N >= stop - start. With `direct` it begins at a multiple
                of DIRECT_BYTES and N >= stop - start + 2 * DIRECT_BYTES.
            direct: read around the page cache. Where the file system refuses that (a file in memory, say), the read
                goes through the page cache, and a log line says so once per file.
        Returns:
            the view [stop - start] of the buffer that holds the bytes; it begins at the buffer's start unless `direct`.
        Raises:
            MissingTensorError: no such tensor.
            OptionError: a range outside of the tensor, or a buffer of another length, dtype, layout or device.
            TruncatedShardError: the file ends early.
            CheckpointError: the system cannot read it.
        Source: own.
        """
        entry = self.entry(name)
        wanted = stop - start
        slack = 2 * DIRECT_BYTES if direct else 0
        is_plain = buffer.dtype == torch.uint8 and buffer.device.type == "cpu" and buffer.is_contiguous()
        if not is_plain or buffer.ndim != 1 or buffer.numel() < wanted + slack:
            raise OptionError(
                f"{wanted} bytes of tensor {name} are read into contiguous CPU memory of {wanted + slack} uint8 "
                f"or more, got {tuple(buffer.shape)} {buffer.dtype} on {buffer.device}"
            )
        if not 0 <= start <= stop <= entry.nbytes:
            raise OptionError(f"bytes {start} to {stop} were asked for, and tensor {name} has {entry.nbytes}")
        if wanted == 0:
            return buffer[:0]
        first = entry.offset + start
        file = self._direct_file(entry.shard) if direct else None
        # around the page cache only whole blocks can be read: those that the wanted bytes lie in
        ahead = first % DIRECT_BYTES if file is not None else 0
        length = ahead + wanted
        if file is None:
            file = self._file(entry.shard)
        else:
            if buffer.data_ptr() % DIRECT_BYTES:
                raise OptionError(f"memory for a direct read begins at a multiple of {DIRECT_BYTES} bytes")
            length = -(-length // DIRECT_BYTES) * DIRECT_BYTES
        memory = memoryview((ctypes.c_char * length).from_address(buffer.data_ptr())).cast("B")
        done_bytes = 0
        while done_bytes < ahead + wanted:
            # One call reads 2 GiB at most, and fewer bytes than asked for is no error.
            try:
                read_bytes = os.preadv(file, [memory[done_bytes:]], first - ahead + done_bytes)
            except OSError as error:
                raise CheckpointError(
                    f"{entry.shard} cannot be read at byte {first - ahead + done_bytes} ({error.strerror}).\n"
                    f"  Check the disk. {self._advice}",
                    path=entry.shard,
                ) from error
            if read_bytes == 0:
                raise TruncatedShardError(
                    f"{entry.shard} ends at byte {first - ahead + done_bytes}, inside tensor {name}, "
                    f"which goes to byte {entry.offset + entry.nbytes}.\n  {self._advice}",
                    path=entry.shard,
                )
            done_bytes += read_bytes
            if done_bytes % DIRECT_BYTES:  # no direct read can go on from here: it has met the end of the file
                file = self._file(entry.shard)
        return buffer[ahead : ahead + wanted]

    def cached_share(self, samples: int = 64) -> float:
        """Share of the files' bytes that the page cache holds, from samples; 0 where the system does not say.

        Args:
            samples: pages that are asked for, spread evenly over all files; asking loads none.
        Source: own; mincore(2), which tells the truth about files that the process owns or may write.
        """
        total = sum(self._shard_bytes.values())
        if sys.platform != "linux" or not total or not all(_may_ask(shard) for shard in self._shard_bytes):
            return 0.0
        libc = ctypes.CDLL(None, use_errno=True)
        ends = list(itertools.accumulate(self._shard_bytes.values()))
        shards = list(self._shard_bytes)
        answer, found = ctypes.c_ubyte(), 0
        for sample in range(samples):
            at = total * sample // samples
            number = bisect.bisect_right(ends, at)
            start = at - (ends[number] - self._shard_bytes[shards[number]])
            page = self._map(shards[number]).data_ptr() + start // mmap.PAGESIZE * mmap.PAGESIZE
            if libc.mincore(ctypes.c_void_p(page), ctypes.c_size_t(1), ctypes.byref(answer)):
                return 0.0
            found += answer.value & 1
        return found / samples

    def close(self) -> None:
        """Gives the file handles and maps back; a map that a returned tensor still shows goes with that tensor."""
        with self._lock:
            self._is_closed = True
            self._maps.clear()
            for file in (*self._files.values(), *self._direct_files.values()):
                if file is not None:
                    os.close(file)
            self._files.clear()
            self._direct_files.clear()

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _file(self, shard: Path) -> int:
        with self._lock:
            return self._locked_file(shard)

    def _direct_file(self, shard: Path) -> int | None:
        """A handle whose reads go around the page cache; None where there is none."""
        with self._lock:
            self._locked_file(shard)  # refuses when closed
            if shard not in self._direct_files:
                self._direct_files[shard] = _open_direct(shard)
            return self._direct_files[shard]

    def _locked_file(self, shard: Path) -> int:
        if self._is_closed:
            raise CheckpointError(f"checkpoint {self.folder} is closed: open it again to read from it", path=shard)
        if shard not in self._files:
            try:
                self._files[shard] = os.open(shard, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                raise CheckpointError(
                    f"{shard} cannot be opened any more ({error.strerror}).\n  {self._advice}", path=shard
                ) from error
        return self._files[shard]

    def _map(self, shard: Path) -> torch.Tensor:
        """The whole file as uint8, mapped at first use."""
        with self._lock:
            file = self._locked_file(shard)
            expected_bytes, found_bytes = self._shard_bytes[shard], os.fstat(file).st_size
            if found_bytes < expected_bytes:  # touching pages past the end would kill the process
                raise TruncatedShardError(
                    f"{shard} has become shorter since it was opened: {found_bytes} bytes of {expected_bytes}.\n"
                    f"  {self._advice}",
                    path=shard,
                )
            if shard not in self._maps:
                mapped = mmap.mmap(file, expected_bytes, access=mmap.ACCESS_READ)
                with warnings.catch_warnings():
                    # torch has no read-only tensors and says so once for such a buffer; our docstring says so as well.
                    warnings.filterwarnings("ignore", message="The given buffer is not writable", category=UserWarning)
                    self._maps[shard] = torch.frombuffer(mapped, dtype=torch.uint8)
            return self._maps[shard]


def _may_ask(shard: Path) -> bool:
    """Whether the system says which pages of a file are cached; it does not tell about other people's files."""
    return shard.stat().st_uid == os.geteuid() or os.access(shard, os.W_OK)


def _open_direct(shard: Path) -> int | None:
    """A handle for reads around the page cache; None, and a log line, where the file system has none."""
    flag = getattr(os, "O_DIRECT", None)  # Linux and FreeBSD
    if flag is None:
        logger.warning("this system cannot read around its page cache: %s is read through it", shard.name)
        return None
    file = None
    try:
        file = os.open(shard, os.O_RDONLY | os.O_CLOEXEC | flag)
        # some file systems refuse at the first read only
        probe = mmap.mmap(-1, DIRECT_BYTES)
        os.preadv(file, [probe], 0)
        probe.close()
        return file
    except OSError as error:
        if file is not None:
            os.close(file)
        logger.warning(
            "%s cannot be read around the page cache (%s): it is read through it", shard.name, error.strerror
        )
        return None


def _read_weight_map(folder: Path) -> dict[str, str]:
    """Tensor name -> file name, as the index says; empty where no index counts."""
    index = folder / INDEX_NAME
    if (folder / SINGLE_NAME).is_file() or not index.is_file():
        return {}
    weight_map = _parse_json(index.read_bytes(), index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise HeaderError(f'{index} has no table "weight_map" of tensors and files.\n  {_AGAIN}', path=index)
    for name, shard in weight_map.items():
        # A name with a path in it could point anywhere on the machine.
        if not isinstance(shard, str) or not shard.endswith(".safetensors") or Path(shard).name != shard:
            raise HeaderError(
                f"{index} says that tensor {name} is in {shard!r}, which is no safetensors file of this folder.\n"
                f"  {_AGAIN}",
                path=index,
            )
        if not (folder / shard).is_file():
            present = sorted(entry.name for entry in folder.glob("*.safetensors"))
            raise MissingShardError(
                f"{folder / shard} is missing; {INDEX_NAME} says that it holds tensor {name}. "
                f"The folder has {len(present)} of {len(set(weight_map.values()))} files.\n"
                f"  Download the missing file, or the model again.",
                path=folder / shard,
            )
    return weight_map


def _unindexed_shards(folder: Path) -> list[Path]:
    single = folder / SINGLE_NAME
    shards = [single] if single.is_file() else sorted(folder.glob("*.safetensors"))
    if not shards:
        raise MissingShardError(
            f"{folder} holds no *.safetensors file; give the folder that does, or download the model again", path=folder
        )
    return shards


def _read_header(shard: Path) -> tuple[list[TensorEntry], int]:
    """The checked entries of one file, in the order of their bytes, and the length of the file."""
    with shard.open("rb") as file:
        file_bytes = os.fstat(file.fileno()).st_size
        prefix = file.read(8)
        if len(prefix) < 8:
            raise TruncatedShardError(
                f"{shard} has {file_bytes} bytes; a safetensors file begins with 8 for the length of its header.\n"
                f"  {_AGAIN}",
                path=shard,
            )
        (header_bytes,) = struct.unpack("<Q", prefix)
        if header_bytes > MAX_HEADER_BYTES:
            is_pointer = prefix == b"version "  # a git-lfs pointer begins "version https://git-lfs"
            advice = "It is a git-lfs pointer: type git lfs pull in its folder." if is_pointer else _AGAIN
            raise HeaderError(
                f"{shard} is not a safetensors file: its first 8 bytes give a header of {header_bytes} bytes, "
                f"and {MAX_HEADER_BYTES} is the limit.\n  {advice}",
                path=shard,
            )
        data_start = 8 + header_bytes
        if data_start > file_bytes:
            raise TruncatedShardError(
                f"{shard} ends inside its header: {file_bytes} bytes, and the header alone goes to byte {data_start}.\n"
                f"  {_AGAIN}",
                path=shard,
            )
        header = _parse_json(file.read(header_bytes), shard)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        raise HeaderError(f"{shard}: __metadata__ is {metadata!r}, expected an object.\n  {_AGAIN}", path=shard)
    entries = [_read_entry(name, value, shard, data_start, file_bytes) for name, value in header.items()]
    entries.sort(key=lambda entry: (entry.offset, entry.offset + entry.nbytes))
    before: TensorEntry | None = None
    for entry in entries:
        if entry.nbytes == 0:
            continue
        if before is not None and entry.offset < before.offset + before.nbytes:
            raise HeaderError(
                f"{shard}: tensors {before.name} and {entry.name} overlap (bytes {before.offset} to "
                f"{before.offset + before.nbytes}, and from {entry.offset}).\n  {_AGAIN}",
                path=shard,
            )
        before = entry
    return entries, file_bytes


def _read_entry(name: str, value: Any, shard: Path, data_start: int, file_bytes: int) -> TensorEntry:
    def fault(found: str, expected: str) -> HeaderError:
        return HeaderError(f"{shard}: tensor {name} has {found}, expected {expected}.\n  {_AGAIN}", path=shard)

    if not isinstance(value, dict):
        raise fault(f"the entry {value!r}", 'an object with "dtype", "shape" and "data_offsets"')
    dtype_name, shape, offsets = value.get("dtype"), value.get("shape"), value.get("data_offsets")
    dtype = _DTYPES.get(dtype_name) if isinstance(dtype_name, str) else None
    if dtype is None:
        raise fault(f"dtype {dtype_name!r}", f"one of {', '.join(_DTYPES)}")
    if not isinstance(shape, list) or not all(_is_count(axis) for axis in shape):
        raise fault(f"shape {shape!r}", "a list of integers from 0 to 2^63 - 1")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_count(offset) for offset in offsets):
        raise fault(f"data_offsets {offsets!r}", "two integers, begin and end")
    begin, end = offsets
    if begin > end:
        raise fault(f"data_offsets {offsets!r}", "begin <= end")
    if math.prod(shape) * dtype.itemsize != end - begin:
        raise TensorMismatchError(
            f"{shard}: tensor {name} has {end - begin} bytes; {dtype_name} of shape {shape} takes "
            f"{math.prod(shape) * dtype.itemsize}.\n  {_AGAIN}",
            path=shard,
        )
    if data_start + end > file_bytes:
        raise TruncatedShardError(
            f"{shard} has {file_bytes} bytes, and tensor {name} goes to byte {data_start + end}.\n  {_AGAIN}",
            path=shard,
        )
    return TensorEntry(name, dtype, tuple(shape), shard, data_start + begin, end - begin)


def _is_count(value: object) -> bool:
    # True is an int to Python, and not to the format.
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MAX_AXIS


def _parse_json(text: bytes, path: Path) -> dict[str, Any]:
    try:
        parsed = json.loads(text.decode("utf-8"), object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise HeaderError(f"{path}: its JSON cannot be read ({error}).\n  {_AGAIN}", path=path) from error
    if not isinstance(parsed, dict):
        raise HeaderError(f"{path}: its JSON is not an object but {type(parsed).__name__}.\n  {_AGAIN}", path=path)
    return parsed


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in table if names.count(name) > 1)
        raise ValueError(f"the name {twice} is given twice")
    return table
