"""PackedWeights: the records of a packed folder as the source of coded units."""

import threading
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

import torch

from streamer.architecture import Architecture, Parameter, Unit, UnitCode, aligned
from streamer.checkpoint import Checkpoint, TensorEntry
from streamer.ops.lossless.together import CodedPart
from streamer.packed import Record, advice, altered, digest_of
from streamer.packing import PackedFolder


class PackedWeights:
    """Reads records of a packed folder; safe to use from several threads.

    Args:
        folder: opened. source: the checkpoint that it was packed from.
    """

    def __init__(self, folder: PackedFolder, source: Checkpoint):
        self._records: dict[str, Record] = {}
        self._of_shard: dict[str, list[tuple[str, Record]]] = defaultdict(list)
        entries: dict[str, TensorEntry] = {}
        for file in folder.files:
            for number, record in enumerate(file.records):
                name = f"{file.source.name}, record {number}"
                entries[name] = TensorEntry(
                    name, torch.uint8, (record.nbytes,), file.path, record.offset, record.nbytes
                )
                self._records[name] = record
                self._of_shard[file.source.name].append((name, record))
        self._source = source
        self._unchecked, self._lock = set(self._records), threading.Lock()
        # records are bytes at a place of a file, as tensors are: all that reads those reads these
        sizes = {file.path: file.nbytes for file in folder.files}
        self.checkpoint = Checkpoint(folder.folder, entries, sizes, advice=advice(folder.files[0].path))

    def coded(self, architecture: Architecture) -> Architecture:
        """The same architecture with every unit coded whose bytes are in the records and get fewer."""
        layers = tuple(tuple(self._coded(unit) for unit in layer) for layer in architecture.layers)
        return replace(architecture, layers=layers)

    def _coded(self, unit: Unit) -> Unit:
        names: list[str] = []
        parts: list[CodedPart] = []
        stored_at = 0
        if not all(p.is_stored_as_run for p in unit.parameters):
            return unit  # made of other bytes than those that are packed
        for parameter, offset in zip(unit.parameters, unit.offsets, strict=True):
            records = self._records_of(parameter)
            if sum(record.stop - record.start for _, record, _ in records) != parameter.nbytes:
                return unit  # another cut than ours
            for name, record, at in records:
                names.append(name)
                parts.append(CodedPart(stored_at, record.nbytes, offset + at, record.stop - record.start))
                stored_at += aligned(record.nbytes)
        return replace(unit, code=UnitCode(tuple(names), tuple(parts), stored_at)) if stored_at < unit.nbytes else unit

    def _records_of(self, parameter: Parameter) -> Sequence[tuple[str, Record, int]]:
        """Records of a parameter's one tensor, and where each begins in it; a record never holds parts of two."""
        entry = self._source.entry(parameter.sources[-1])
        stop = entry.offset + entry.nbytes
        own = self._of_shard[entry.shard.name]
        return [(name, r, r.start - entry.offset) for name, r in own if entry.offset <= r.start and r.stop <= stop]

    def read(self, name: str, start: int, stop: int, buffer: torch.Tensor, *, direct: bool) -> torch.Tensor:
        """Bytes start <= b < stop of a record, as Checkpoint.read_part gives them.

        A record that is read as a whole is checked the first time: the kernel that decodes it believes what it says.

        Raises:
            TruncatedShardError, CheckpointError: the file ends early, cannot be read, or is not what was written.
        """
        stored = self.checkpoint.read_part(name, start, stop, buffer, direct=direct)
        record = self._records[name]
        if name in self._unchecked and stop - start == record.nbytes:
            if digest_of(stored.numpy().data) != record.checksum:
                raise altered(self.checkpoint.entry(name).shard, f"bytes {record.offset} to {record.offset + stop}")
            with self._lock:
                self._unchecked.discard(name)
        return stored

    def close(self) -> None:
        """Gives the file handles back."""
        self.checkpoint.close()
