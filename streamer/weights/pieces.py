"""Units of the stream as pieces that are read at once, and the reading of one piece.

A piece is small enough that several threads read several pieces of one unit at a time, and large enough that the work
around a read costs nothing beside it.
"""

import ctypes
import mmap
import threading
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from streamer.architecture import Parameter, Unit, read_parameter
from streamer.checkpoint import DIRECT_BYTES, Checkpoint
from streamer.weights.packed import PackedWeights

# What a thread reads at once to cast it: small enough to be in its core's cache when the cast comes.
_CAST_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class _Range:
    """Bytes start <= b < stop of something that is read; `at` is where they lie in the unit."""

    start: int
    stop: int
    at: int

    @property
    def nbytes(self) -> int:
        """Length of the range."""
        return self.stop - self.start

    @property
    def room(self) -> int:
        """What it takes in a slot at most: reads around the page cache take whole blocks."""
        return -(-(self.nbytes + 2 * DIRECT_BYTES) // DIRECT_BYTES) * DIRECT_BYTES


@dataclass(frozen=True, slots=True)
class Part(_Range):
    """Bytes of a parameter, as it is run."""

    parameter: Parameter


@dataclass(frozen=True, slots=True)
class CodedBytes(_Range):
    """Bytes of a packed record, as they are stored. record: its name."""

    record: str


@dataclass(frozen=True, slots=True)
class Piece:
    """Parts of one unit that are read at once. unit: its index."""

    unit: int
    parts: tuple[Part | CodedBytes, ...]


def split(unit: Unit, index: int, slot_bytes: int) -> tuple[Piece, ...]:
    """A unit as pieces whose parts together take at most slot_bytes of a slot.

    Args:
        unit, index: the unit and its number. slot_bytes: at least 4 * DIRECT_BYTES.
    """
    longest = (slot_bytes - 3 * DIRECT_BYTES) // DIRECT_BYTES * DIRECT_BYTES
    pieces: list[Piece] = []
    parts: list[Part | CodedBytes] = []
    taken = 0
    for part in _parts(unit, longest):
        if parts and taken + part.room > slot_bytes:
            pieces.append(Piece(index, tuple(parts)))
            parts, taken = [], 0
        parts.append(part)
        taken += part.room
    if parts or not pieces:  # a unit without bytes is loaded too
        pieces.append(Piece(index, tuple(parts)))
    return tuple(pieces)


def _parts(unit: Unit, longest: int) -> Iterator[Part | CodedBytes]:
    """What a unit's stored bytes are made of, none longer than that."""
    if unit.code is not None:
        for record, part in zip(unit.code.records, unit.code.parts, strict=True):
            for start in range(0, part.stored_bytes, longest):
                stop = min(start + longest, part.stored_bytes)
                yield CodedBytes(start, stop, part.stored_at + start, record)
        return
    for parameter, offset in zip(unit.parameters, unit.offsets, strict=True):
        length = unit.part_bytes(parameter)
        first = 0 if unit.rows is None else parameter.nbytes // parameter.shape[0] * unit.rows[0]
        for start in range(0, length, longest):
            stop = min(start + longest, length)
            yield Part(first + start, first + stop, offset + start, parameter)


class PieceReader:
    """Reads pieces of units from a checkpoint; safe to use from several threads.

    Args:
        checkpoint: opened. model: the class on meta, asked by transformers' conversions; not kept alive by this.
        units: of a pass. slot_bytes: size of a piece at most.
        direct: read around the page cache; what transformers makes of several tensors is read from the files' maps
            all the same.
        packed: where coded units are read; stays open.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        model: PreTrainedModel,
        units: Sequence[Unit],
        slot_bytes: int,
        *,
        direct: bool = False,
        packed: PackedWeights | None = None,
    ):
        self.units, self.direct = units, direct
        self._packed = packed
        self.pieces = [split(unit, index, slot_bytes) for index, unit in enumerate(units)]
        self._checkpoint, self._model = checkpoint, weakref.ref(model)
        self._converting = threading.Lock()
        self._own = threading.local()  # of each thread: a buffer for casts
        # parameters that transformers makes of several tensors, while pieces of them are wanted: value, parts to come
        self._made: dict[tuple[int, str], tuple[torch.Tensor, int]] = {}

    def read(self, piece: Piece, slot: torch.Tensor, place: torch.Tensor | None) -> list[tuple[int, torch.Tensor]]:
        """Reads a piece.

        Args:
            piece: one of self.pieces.
            slot: [slot_bytes] uint8 on the host, page-aligned.
            place: [stored_bytes of the unit] uint8 on the host where the unit is kept; None = leave bytes in the slot.
        Returns:
            for each part its offset in the unit, and the bytes as a view of `place` or of `slot`.
        Raises:
            CheckpointError: the file ends early or cannot be read.
        """
        views = []
        taken = 0
        for part in piece.parts:
            own = None if place is None else place[part.at : part.at + part.nbytes]
            room = slot[taken : taken + part.room]
            taken += part.room
            if isinstance(part, Part) and not part.parameter.is_stored_as_run:
                target = room[: part.nbytes] if own is None else own
                self._convert(piece.unit, part, target)
            elif own is not None and not self.direct:
                target = self._read(part, own)
            else:
                target = self._read(part, room)
                if own is not None:
                    # not copy_, for which torch would start threads of its own beside each reader
                    ctypes.memmove(own.data_ptr(), target.data_ptr(), part.nbytes)
                    target = own
            views.append((part.at, target))
        return views

    def _read(self, part: Part | CodedBytes, buffer: torch.Tensor) -> torch.Tensor:
        if isinstance(part, CodedBytes):
            assert self._packed is not None  # noqa: S101  units are coded by what is packed
            return self._packed.read(part.record, part.start, part.stop, buffer, direct=self.direct)
        name = part.parameter.sources[-1]
        return self._checkpoint.read_part(name, part.start, part.stop, buffer, direct=self.direct)

    def _convert(self, unit: int, part: Part, target: torch.Tensor) -> None:
        """Bytes of a parameter that is not stored as it runs."""
        parameter = part.parameter
        item = parameter.dtype.itemsize
        first, last = part.start // item, part.stop // item
        if parameter.conversion is None:
            self._cast(parameter, first, target.view(parameter.dtype))
            return
        key = unit, parameter.name
        with self._converting:  # one at a time: each makes a whole parameter in memory
            value, left = self._made.pop(key, (None, 0))
            if value is None:
                model = self._model()
                if model is None:
                    raise RuntimeError("the model has been dropped while its weights were read")
                value = read_parameter(parameter, self._checkpoint, model).reshape(-1)
                parts = (p for piece in self.pieces[unit] for p in piece.parts if isinstance(p, Part))
                left = sum(p.parameter is parameter for p in parts)
            if left > 1:
                self._made[key] = value, left - 1
        target.view(parameter.dtype).copy_(value[first:last])

    def _cast(self, parameter: Parameter, first: int, target: torch.Tensor) -> None:
        """Elements of another dtype, from number `first` on; read, not mapped: a file that was cut is an error then."""
        name = parameter.sources[-1]
        stored = self._checkpoint.entry(name).dtype
        if not hasattr(self._own, "buffer"):
            pages = mmap.mmap(-1, _CAST_BYTES + 2 * DIRECT_BYTES)  # aligned for direct reads
            self._own.buffer = torch.frombuffer(pages, dtype=torch.uint8)
        step = _CAST_BYTES // stored.itemsize
        for start in range(0, target.numel(), step):
            stop = min(start + step, target.numel())
            begin, end = ((first + i) * stored.itemsize for i in (start, stop))
            read = self._checkpoint.read_part(name, begin, end, self._own.buffer, direct=self.direct)
            target[start:stop].copy_(_as_dtype(read, stored))

    def forget(self) -> None:
        """Drop what was made for pieces that will not be asked for: a pass was given up."""
        with self._converting:
            self._made.clear()


def _as_dtype(stored: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Bytes as elements; copied where a direct read has left them at an address that the dtype cannot be read from."""
    return (stored if stored.data_ptr() % dtype.itemsize == 0 else stored.clone()).view(dtype)
