"""CompressedKV: the keys and values of ONE layer, compressed: append, attend, crop, nbytes.

Every row (sequence) of the batch keeps its own tokens, without padding, in three parts:

    token   0 .. sinks-1 | sinks .. sinks+64*blocks-1       | ... length-1
            sinks        | blocks of 64 tokens, bit planes  | recent window (a ring)
            model dtype  | 2 to 4 bits and one fp16 scale   | model dtype

All parts hold rotated vectors, keys without their bias term, so one rotated query serves them all. A token is
rotated and rounded once, when it is appended: codes do not depend on how the tokens were split over calls.
"""

import itertools
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from turboquant.blocks import RecordPool, Side, read_records, rotation_bytes, side_layout, write_records
from turboquant.decay import DecaySchedule
from turboquant.device_tokens import DeviceTokens, device_tokens_bytes
from turboquant.errors import OptionError, ShapeError, StateError
from turboquant.key_bias import KeyBias
from turboquant.layout import BLOCK_TOKENS, BlockLayout, PackedTokens, SideLayout
from turboquant.ops.age import age_blocks, age_records
from turboquant.ops.append import rotate
from turboquant.ops.attend import Segment, attend, attend_packed
from turboquant.ops.devices import is_capturing, kernels_serve
from turboquant.ops.encode import encode_records
from turboquant.ops.unpack import unpack_records
from turboquant.policy import DecayStep, Precision
from turboquant.rotation import make_rotation

# Blocks decoded or coded at a time: bounds the float32 scratch of one call (4096 tokens) whatever the context.
_BLOCKS_PER_PIECE = 64

# Newest tokens that may be taken back without a trace after `record_past` (drafts of speculative decoding).
TENTATIVE_TOKENS = 128


@dataclass(frozen=True)
class StoreOptions:
    """What one layer's store keeps and how.

    Attributes:
        precision: bits of keys and values (2, 3, 4, or 16 for one of the two).
        window: newest tokens that stay in the model's dtype (up to 63 more wait for a whole block).
        sinks: oldest tokens of each row that stay in the model's dtype (Xiao et al. 2023, arXiv 2309.17453).
        rotation: "hadamard" or "qr".
        seed: of the rotations; keys and values of a layer use different ones.
        block_means: take the mean of each block of 64 out of its keys before coding.
        capacity_tokens: allocate the blocks for that many tokens a row at once, or None to grow in slabs.
        skip_below: kernels may leave out values of so small a weight, see `ops.attend.attend_packed`; 0 = none. Plain
            PyTorch leaves nothing out.
        decay: from which ages on blocks keep fewer bits, see `parse_decay`; sinks and window stay as they are.
    """

    precision: Precision
    window: int = 128
    sinks: int = 4
    rotation: str = "hadamard"
    seed: int = 0
    block_means: bool = True
    capacity_tokens: int | None = None
    skip_below: float = 0.0
    decay: tuple[DecayStep, ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.skip_below < 1:
            raise OptionError(f"skip_below must be at least 0 and less than 1; got {self.skip_below}")
        for name, value in (("window", self.window), ("sinks", self.sinks)):
            if value < 0:
                raise OptionError(f"{name} must be at least 0 tokens; got {value}")
        if self.capacity_tokens is not None and self.capacity_tokens < 0:
            raise OptionError(f"capacity_tokens must be at least 0, or None to grow; got {self.capacity_tokens}")
        make_rotation(self.rotation, BLOCK_TOKENS, self.seed)  # refuses an unknown kind now, not at the first token
        DecaySchedule(self.decay, self.window)


@dataclass
class _Row:
    """One sequence: its tokens, its columns of left padding, its coded blocks, oldest first, and those kept for it."""

    length: int = 0
    pad: int = 0
    blocks: list[int] = field(default_factory=list)
    reserved: list[int] = field(default_factory=list)  # the device knows them as the next blocks


class CompressedKV:
    """Keys and values of one layer, compressed.

    Args:
        options: StoreOptions.
        key_bias: the layer's KeyBias, or None.
    Heads, widths (multiples of 8), dtype, device and batch size come with the first append.
    """

    def __init__(self, options: StoreOptions, *, key_bias: KeyBias | None = None):
        self.options, self.key_bias = options, key_bias
        self._decay = DecaySchedule(options.decay, options.window)
        self._records_past = False
        self._ring_tokens = options.window + BLOCK_TOKENS
        self._rows: list[_Row] = []
        self._columns = 0
        self._sides: tuple[Side, Side] | None = None
        self._pool: RecordPool | None = None
        self._device_tokens: DeviceTokens | None = None  # where kernels serve the device

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy's records lie elsewhere: the device is told where (copy.deepcopy and pickle come here)."""
        vars(self).update(state)
        if self._device_tokens is not None:
            for b, row in enumerate(self._rows):
                self._name_on_device(self._device_tokens, b, 0, [*row.blocks, *row.reserved])

    # ------------------------------------------------------------------ size
    @property
    def batch_size(self) -> int:
        """Rows held; 0 before the first append."""
        return len(self._rows)

    @property
    def columns(self) -> int:
        """Tokens of every row with its padding: the sequence length as transformers counts it."""
        return self._columns

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens held by each row, padding not counted."""
        return tuple(row.length for row in self._rows)

    @property
    def coded_tokens(self) -> int:
        """Tokens of the longest row that are held as codes."""
        return BLOCK_TOKENS * max((len(row.blocks) for row in self._rows), default=0)

    @property
    def tensors(self) -> list[torch.Tensor]:
        """Every tensor held."""
        held: list[torch.Tensor] = []
        for side in self._sides or ():
            held += [side.tail, *(own for own in side.rotation.tensors if own.device == side.tail.device)]
        if self._pool is not None:
            held += self._pool.slabs
        if self._device_tokens is not None:
            held += self._device_tokens.tensors
        if self.key_bias is not None:
            held += [self.key_bias.bias, self.key_bias.inverse_frequencies]
        return held

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors held: dense tails, every slab (blocks in use and free), tables, rotations, key bias."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def bytes_by_part(self) -> dict[str, int]:
        """nbytes split into "codes" (planes), "scales", "means", "dense", "rotation", "bias" and "tables"."""
        sides = self._sides or ()
        codes = scales = means = 0
        for layout, records in self._pool.held() if self._pool is not None else ():
            for side in (layout.key, layout.value):
                codes += records * layout.heads * sum(side.plane_bytes)
                scales += records * layout.heads * side.scale_bytes
                means += records * layout.heads * side.mean_bytes
        return {
            "codes": codes,
            "scales": scales,
            "means": means,
            "dense": sum(side.tail.nbytes for side in sides),
            "rotation": sum(
                own.nbytes for side in sides for own in side.rotation.tensors if own.device == side.tail.device
            ),
            "bias": self.key_bias.nbytes if self.key_bias is not None else 0,
            "tables": sum(tensor.nbytes for tensor in self._device_tokens.tensors) if self._device_tokens else 0,
        }

    @property
    def dense_nbytes(self) -> int:
        """Bytes that the same columns take uncompressed, in the model's dtype."""
        return sum(side.tail.nbytes // side.tail.shape[2] * self._columns for side in self._sides or ())

    # ---------------------------------------------------------------- append
    def append(self, keys: torch.Tensor, values: torch.Tensor, pads: Sequence[int] | None = None) -> None:
        """Add tokens to every row; tokens older than the window are coded, in blocks of 64.

        Args:
            keys: [B, G, T, Dk] as the model made them (after the rotary embedding), float16, bfloat16 or float32.
            values: [B, G, T, Dv], same dtype and device.
            pads: how many of each row's first columns (earlier calls included) are padding, which is not stored;
                None = as before. A row that holds tokens keeps the padding it has (`accepts_padding`).
        Raises:
            ShapeError: a shape differs from that of earlier tokens. StateError: a row cannot have that padding.
        """
        if not self.accepts_padding(pads):
            raise StateError(
                f"padding of {list(pads or ())} columns was asked for rows whose padding is "
                f"{[row.pad for row in self._rows]} and fixed since they hold tokens; reset the store first"
            )
        if keys.shape[:3] != values.shape[:3]:
            raise ShapeError(
                f"keys {tuple(keys.shape)} and values {tuple(values.shape)} differ in batch, heads or tokens"
            )
        if pads is not None and len(pads) != keys.shape[0]:
            raise ShapeError(f"padding of {len(pads)} rows was given for a batch of {keys.shape[0]}")
        if self._sides is None:
            self._start(keys, values)
        for name, new, side in zip(("keys", "values"), (keys, values), self._both(), strict=True):
            batch, heads, _, width = side.tail.shape
            if (new.shape[0], new.shape[1], new.shape[3]) != (batch, heads, width):
                raise ShapeError(
                    f"the store holds {batch} rows of {heads} heads of {width}; got {name} {tuple(new.shape)}"
                )
        for row, pad in zip(self._rows, pads or [row.pad for row in self._rows], strict=True):
            row.pad = pad
        if (keys.is_cuda or self._device_tokens is not None) and is_capturing():
            self._append_captured(keys, values)
            return
        if self._records_past:
            self.commit()
        piece = BLOCK_TOKENS * _BLOCKS_PER_PIECE
        for start in range(0, keys.shape[2], piece):
            self._append_columns(keys[:, :, start : start + piece], values[:, :, start : start + piece])

    def set_aside(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Allocate the blocks of the stated capacity now: in one place for all layers, before a prompt's activations.

        Args:
            keys: [B, G, T, Dk], values: [B, G, T, Dv], like those to come; T may be 0. A store that holds tokens, and
                blocks that were set aside for such keys and values, stay as they are.
        Raises:
            ShapeError: the store cannot code vectors of that width.
        """
        if self._sides is not None:
            return
        bits = self.options.precision
        layout = BlockLayout(
            keys.shape[1],
            side_layout(bits.key_bits, keys, self.options.block_means),
            side_layout(bits.value_bits, values, False),
        )
        blocks = blocks_for(self.options.capacity_tokens or 0, self.options)
        pool = self._pool
        if pool is None or (pool.layout, pool.device, len(pool)) != (layout, keys.device, keys.shape[0] * blocks):
            self._pool = RecordPool(layout, keys.device)
            for own, count in self._decay.records(blocks, layout).items():
                self._pool.grow(keys.shape[0] * count, own)

    def accepts_padding(self, pads: Sequence[int] | None) -> bool:
        """Whether the first `pads[b]` columns of each row b can be padding: no token may be stored for them."""
        if pads is None or not self._rows:
            return True
        return len(pads) == len(self._rows) and all(
            pad == row.pad or (row.length == 0 and pad >= row.pad) for pad, row in zip(pads, self._rows, strict=True)
        )

    def _both(self) -> tuple[Side, Side]:
        if self._sides is None:
            raise StateError("the store is empty: append tokens first")
        return self._sides

    def _start(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        options, slots = self.options, self.options.sinks + self._ring_tokens
        self.set_aside(keys, values)
        rotations = (
            make_rotation(options.rotation, keys.shape[-1], 2 * options.seed),
            make_rotation(options.rotation, values.shape[-1], 2 * options.seed + 1),
        )
        layout = self._records().layout
        self._sides = (
            Side(layout.key, rotations[0], slots, keys),
            Side(layout.value, rotations[1], slots, values),
        )
        self._rows = [_Row() for _ in range(keys.shape[0])]
        if self.key_bias is not None:
            self.key_bias = self.key_bias.to(keys.device)
        if kernels_serve(keys.device, keys.shape[-1], values.shape[-1]):
            self._device_tokens = DeviceTokens(len(self._rows), rotations, self.key_bias, keys.device)
        if options.capacity_tokens is not None and self._device_tokens is not None:
            self._device_tokens.make_room(blocks_for(options.capacity_tokens, options))

    def _append_columns(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        first, tokens = self._columns, keys.shape[2]
        key_side, value_side = self._both()
        self._columns += tokens
        skips = [min(max(row.pad - first, 0), tokens) for row in self._rows]  # columns of this call that are padding
        if self._device_tokens is None:
            if self.key_bias is not None:
                keys = keys.float() - self._key_bias_vectors(self.key_bias, first, tokens, keys.device)
            keys, values = key_side.rotate(keys), value_side.rotate(values)
        else:
            on_device = self._device_tokens
            if tokens == 1 and not any(skips):
                self._append_one(on_device, keys, values)
                return
            positions = on_device.lengths
            if any(skips):  # rows that are still in their padding hold no token to count from
                positions = torch.tensor([first - row.pad for row in self._rows], dtype=torch.int32).to(keys.device)
            out = key_side.tail.new_empty(keys.shape), value_side.tail.new_empty(values.shape)
            rotate(keys, values, on_device.matrices, on_device.bias, positions, out)
            keys, values = out
        for b, (row, skip) in enumerate(zip(self._rows, skips, strict=True)):
            self._append_row(b, row, (keys[b, :, skip:], values[b, :, skip:]))
        self._count_on_device()

    def _append_one(self, on_device: DeviceTokens, keys: torch.Tensor, values: torch.Tensor) -> None:
        """One token for every row, by kernels that read what they need to know on the device."""
        packed = self._put_one(on_device, keys, values)
        for b, row in enumerate(self._rows):
            row.length += 1
            blocks = (row.length - self.options.sinks - packed.window) // BLOCK_TOKENS
            if blocks > len(row.blocks):
                self._code(b, row, blocks, row.length - self.options.sinks, None)

    def _put_one(self, on_device: DeviceTokens, keys: torch.Tensor, values: torch.Tensor) -> PackedTokens:
        """One token of every row into its slot, and counted, on the device alone; gives what the kernel was shown."""
        packed = self._packed(on_device)
        tails = packed.key_tail, packed.value_tail
        rotate(keys, values, on_device.matrices, on_device.bias, on_device.lengths, tails, packed)
        on_device.lengths.add_(1)
        return packed

    def reserve(self, tokens: int) -> None:
        """Set aside blocks for that many more tokens of every row, so that a captured graph can append them.

        A graph is good until the next call of anything but `advance`: others may move the tables that it reads.

        Raises:
            StateError: the store is empty, or its device is not served by kernels.
        """
        if self._device_tokens is None:
            raise StateError(
                "blocks are reserved for the kernels of a GPU, on tokens that are there: append some first"
            )
        for b, row in enumerate(self._rows):
            wanted = blocks_for(row.length + tokens, self.options) - len(row.blocks) - len(row.reserved)
            if wanted > 0:
                ids = self._records().take(wanted)
                self._name_on_device(self._device_tokens, b, len(row.blocks) + len(row.reserved), ids)
                row.reserved += ids

    def advance(self, tokens: int) -> None:
        """Take note that captured graphs have appended that many tokens to every row."""
        self._columns += tokens
        for row in self._rows:
            row.length += tokens
            coded = max(len(row.blocks), blocks_for(row.length, self.options)) - len(row.blocks)
            if coded > len(row.reserved):
                raise StateError(f"{tokens} tokens were appended by graphs and room was reserved for fewer")
            for _ in range(coded):
                self._age_due(row, len(row.blocks) + 1)
                row.blocks.append(row.reserved.pop(0))
        self._count_on_device()

    def _append_captured(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """One token a row, for a graph: all that depends on how many there are is left to the device."""
        on_device = self._device_tokens
        if on_device is None or keys.shape[2] != 1 or self._records_past:
            raise StateError("a graph can hold steps of one token, on a GPU that kernels serve, with no past recorded")
        self._put_one(on_device, keys, values)
        if not any(row.reserved for row in self._rows):
            return  # no step of the graph fills a block
        due = on_device.lengths, self.options.sinks, self.options.window
        for index, side in enumerate(self._both()):
            encode_records(
                side.tail,
                self._records().layout,
                index,
                on_device.anchor,
                on_device.table,
                first_block=0,
                blocks=1,
                first_slot=self.options.sinks,
                ring=self._ring_tokens,
                when_due=due,
            )

    def _packed(self, on_device: DeviceTokens) -> PackedTokens:
        key_side, value_side = self._both()
        pool = self._records()
        # while recording, a token that a crop may take back must not push an older one into codes
        window = self.options.window + (TENTATIVE_TOKENS if self._records_past else 0)
        return PackedTokens(
            pool.layout,
            on_device.anchor,
            on_device.table,
            on_device.lengths,
            on_device.coded,
            key_side.tail,
            value_side.tail,
            self.options.sinks,
            window,
        )

    def _records(self) -> RecordPool:
        if self._pool is None:
            raise StateError("the store is empty: append tokens first")
        return self._pool

    def _count_on_device(self) -> None:
        if self._device_tokens is not None:
            self._device_tokens.set_counts([row.length for row in self._rows], [len(row.blocks) for row in self._rows])

    def _key_bias_vectors(self, bias: KeyBias, first: int, tokens: int, device: torch.device) -> torch.Tensor:
        columns = torch.arange(first, first + tokens, device=device)
        pads = [row.pad for row in self._rows]
        if len(set(pads)) == 1:
            return bias.vectors(columns - pads[0])
        return bias.vectors(columns - torch.tensor(pads, device=device)[:, None])

    def _append_row(self, b: int, row: _Row, new: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Add rotated tokens [G, t, D] (keys, values) to row b: sinks, then codes, then the window."""
        sinks, tokens = self.options.sinks, new[0].shape[1]
        to_sinks = min(max(sinks - row.length, 0), tokens)
        if to_sinks:
            self._write_tail(b, row.length, new, 0, to_sinks)
            row.length += to_sinks
        if to_sinks == tokens:
            return
        start = row.length - sinks  # tokens after the sinks, so far and in the end
        end = start + tokens - to_sinks
        # while recording, a token that a crop may take back must not push an older one into codes
        tentative = TENTATIVE_TOKENS if self._records_past else 0
        blocks = max(len(row.blocks), (end - self.options.window - tentative) // BLOCK_TOKENS)
        if blocks > len(row.blocks):
            self._code(b, row, blocks, start, (new[0][:, to_sinks:], new[1][:, to_sinks:]))
        for at, count in self._ring_runs(max(start, BLOCK_TOKENS * blocks), end):
            self._write_tail(b, sinks + at % self._ring_tokens, new, to_sinks + at - start, count)
        row.length = sinks + end

    def _code(self, b: int, row: _Row, blocks: int, start: int, new: tuple[torch.Tensor, torch.Tensor] | None) -> None:
        """Code row b up to `blocks` blocks; tokens before `start` lie in its ring, later ones in new [G, t, D]."""
        first, last = BLOCK_TOKENS * len(row.blocks), BLOCK_TOKENS * blocks
        piece_tokens = BLOCK_TOKENS * min(_BLOCKS_PER_PIECE, self._decay.most_blocks or _BLOCKS_PER_PIECE)
        for piece in range(first, last, piece_tokens):
            stop = min(piece + piece_tokens, last)
            count = (stop - piece) // BLOCK_TOKENS
            self._age_due(row, stop // BLOCK_TOKENS)
            ids, row.reserved = row.reserved[:count], row.reserved[count:]
            ids += self._records().take(count - len(ids))
            if self._device_tokens is not None:
                self._name_on_device(self._device_tokens, b, len(row.blocks), ids)
            for i, side in enumerate(self._both()):
                if self._device_tokens is not None and (new is None or stop <= start):
                    self._encode_on_device(self._device_tokens, b, i, piece, ids, None, len(row.blocks))
                    continue
                parts = [
                    side.tail[b, :, self.options.sinks + at % self._ring_tokens :][:, :count]
                    for at, count in self._ring_runs(piece, min(stop, start))
                ]
                if new is not None and stop > start:
                    parts.append(new[i][:, max(piece - start, 0) : stop - start])
                tokens = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
                if self._device_tokens is not None:
                    self._encode_on_device(self._device_tokens, b, i, piece, ids, tokens, len(row.blocks))
                    continue
                for at, records, layout in self._records().runs(ids):
                    part = tokens[:, BLOCK_TOKENS * at : BLOCK_TOKENS * (at + records.shape[0])]
                    write_records(records, layout, i, part)
            row.blocks.extend(ids)

    def _age_due(self, row: _Row, blocks: int) -> None:
        """Age what a row gives up before it has that many blocks: new ones then find room where old ones were."""
        for first, last, bits in self._decay.due(len(row.blocks), blocks):
            self._age(row.blocks[first:last], first, last, bits, bits)

    def _name_on_device(self, on_device: DeviceTokens, b: int, first: int, ids: Sequence[int]) -> None:
        # room for a quarter more: a table that grew by every block would be copied by every block
        if first + len(ids) > on_device.table.shape[1]:
            on_device.make_room((first + len(ids)) * 5 // 4)
        on_device.name_blocks(b, first, self._records().offsets(ids, on_device.anchor))

    def _encode_on_device(
        self,
        on_device: DeviceTokens,
        b: int,
        index: int,
        first_token: int,
        ids: Sequence[int],
        tokens: torch.Tensor | None,
        first_block: int,
    ) -> None:
        """Blocks of row b from tokens [G, n * 64, D], or from its ring where they begin at token `first_token`."""
        pool, side = self._records(), self._both()[index]
        encode_records(
            side.tail[b : b + 1] if tokens is None else tokens[None],
            pool.layout,
            index,
            on_device.anchor,
            on_device.table[b : b + 1],
            first_block=first_block,
            blocks=len(ids),
            first_slot=self.options.sinks if tokens is None else 0,
            first_token=first_token if tokens is None else 0,
            ring=self._ring_tokens if tokens is None else 1 << 30,
        )

    def _read(self, index: int, ids: Sequence[int]) -> torch.Tensor:
        """Blocks `ids` of keys (0) or values (1) as tokens [G, n * 64, D] float32, means added."""
        pool, side = self._records(), self._both()[index]
        on_device = self._device_tokens
        if on_device is None or not side.layout.num_planes:
            read = [read_records(records, layout, index) for _, records, layout in pool.runs(ids)]
            return read[0] if len(read) == 1 else torch.cat(read, dim=1)
        entries = torch.tensor(pool.offsets(ids, on_device.anchor), dtype=torch.int64).to(side.tail.device)
        out = side.tail.new_empty(side.tail.shape[1], BLOCK_TOKENS * len(ids), side.layout.dim, dtype=torch.float32)
        start = 0
        for layout, group in itertools.groupby(ids, pool.layout_of):
            stop = start + len(list(group))
            to = out[:, BLOCK_TOKENS * start : BLOCK_TOKENS * stop]
            unpack_records(layout, index, on_device.anchor, entries[start:stop], to)
            start = stop
        return out

    def _turn_back(self, index: int, rotated: torch.Tensor) -> torch.Tensor:
        """Rotated vectors [..., D] float32 as the model made them."""
        if self._device_tokens is not None:
            return rotated @ self._device_tokens.matrices[index]
        return self._both()[index].rotation.invert(rotated)

    def _ring_runs(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Token ranges of [start, stop) that are contiguous in the ring: (first token, count)."""
        while start < stop:
            count = min(stop - start, self._ring_tokens - start % self._ring_tokens)
            yield start, count
            start += count

    def _write_tail(self, b: int, slot: int, new: tuple[torch.Tensor, torch.Tensor], source: int, count: int) -> None:
        for side, tokens in zip(self._both(), new, strict=True):
            side.tail[b, :, slot : slot + count] = tokens[:, source : source + count]

    def record_past(self) -> None:
        """From here on the newest 128 tokens may be taken back by crop without a trace.

        Tokens that they push out of the window are coded by the next append, or by commit.
        """
        if self._records_past:
            return
        self._records_past = True
        old_ring, sinks = self._ring_tokens, self.options.sinks
        self._ring_tokens += TENTATIVE_TOKENS
        for side in self._sides or ():
            wide = side.tail.new_zeros(*side.tail.shape[:2], sinks + self._ring_tokens, side.tail.shape[-1])
            wide[:, :, :sinks] = side.tail[:, :, :sinks]
            for b, row in enumerate(self._rows):
                for token in range(BLOCK_TOKENS * len(row.blocks), row.length - sinks):
                    wide[b, :, sinks + token % self._ring_tokens] = side.tail[b, :, sinks + token % old_ring]
            side.tail = wide
        self._count_on_device()  # the device sees a wider window from here on

    def commit(self) -> None:
        """Code every block that has left the window: what was appended will not be taken back."""
        for b, row in enumerate(self._rows):
            end = row.length - self.options.sinks
            blocks = (end - self.options.window) // BLOCK_TOKENS
            if blocks > len(row.blocks):
                self._code(b, row, blocks, end, None)
        self._count_on_device()

    # ------------------------------------------------------------------ read
    def attend(
        self,
        q: torch.Tensor,
        *,
        scale: float,
        softcap: float | None = None,
        sink_logits: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention of the newest T tokens of each row over all its tokens, codes read in pieces.

        Args:
            q: [B, H, T, Dk], queries of the last T appended tokens as the model made them; H a multiple of G.
            scale: factor on the scores. softcap, sink_logits [H]: see ops.attend.
        Returns:
            [B, H, T, Dv], dtype of q; a row that holds no token gives zeros.
        Raises:
            StateError: the store is empty. ShapeError: q does not fit the store.
        """
        key_side, value_side = self._both()
        batch, heads, tokens, width = q.shape
        rows, kv_heads, _, key_dim = key_side.tail.shape
        if batch != rows or heads % kv_heads or width != key_dim:
            raise ShapeError(f"queries {tuple(q.shape)} do not fit {rows} rows of {kv_heads} KV heads of {key_dim}")
        if self._device_tokens is not None:
            return attend_packed(
                q,
                self._packed(self._device_tokens),
                self._device_tokens.matrices,
                self._device_tokens.bias,
                scale=scale,
                softcap=softcap,
                sink_logits=sink_logits,
                skip_below=self.options.skip_below,
                most_blocks=max(len(row.blocks) + len(row.reserved) for row in self._rows),
                # blocks may age while a graph lives that was made before
                is_mixed=self._records().is_mixed
                or (bool(self.options.decay) and any(row.reserved for row in self._rows)),
            )
        groups = heads // kv_heads
        plain = q.float().unflatten(1, (kv_heads, groups))  # [B, G, H / G, T, D]
        rotated = key_side.rotation.apply(plain)
        logits = None
        if sink_logits is not None:
            logits = sink_logits.float().view(kv_heads, groups, 1).expand(-1, -1, tokens).flatten(1)
        out = q.new_zeros(batch, heads, tokens, value_side.tail.shape[-1])
        for b, row in enumerate(self._rows):
            if row.length == 0:
                continue
            result = attend(
                rotated[b].flatten(1, 2),
                self._segments(b, row, plain[b].flatten(1, 2), tokens),
                scale=scale,
                softcap=softcap,
                sink_logits=logits,
            )  # [G, H / G * T, Dv]
            result = value_side.rotation.invert(result)
            out[b] = result.unflatten(1, (groups, tokens)).flatten(0, 1).to(q.dtype)
        return out

    def _segments(self, b: int, row: _Row, plain_q: torch.Tensor, tokens: int) -> Iterator[Segment]:
        groups = plain_q.shape[1] // tokens
        for index, keys, values in self._pieces(b, row):
            terms = self.key_bias.scores(plain_q, index) if self.key_bias is not None else None
            visible = None
            if tokens > 1:
                # query i of the call is the row's token length - T + i; a query that was padding sees the first token
                query = torch.arange(row.length - tokens, row.length, device=index.device).clamp_min(0)
                visible = (index[None, :] <= query[:, None]).repeat(groups, 1)
            yield Segment(keys, values, terms, visible)

    def _pieces(self, b: int, row: _Row) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """The tokens of row b in order: indices [n], rotated keys and values [G, n, D] float32, a piece at a time."""
        keys, values = self._both()
        device, sinks = keys.tail.device, self.options.sinks

        def dense(token: int, slot: int, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            slots = slice(slot, slot + count)
            index = torch.arange(token, token + count, device=device)
            return index, keys.tail[b, :, slots].float(), values.tail[b, :, slots].float()

        if sinks and row.length:
            yield dense(0, 0, min(sinks, row.length))
        for first in range(0, len(row.blocks), _BLOCKS_PER_PIECE):
            ids = row.blocks[first : first + _BLOCKS_PER_PIECE]
            start = sinks + BLOCK_TOKENS * first
            index = torch.arange(start, start + BLOCK_TOKENS * len(ids), device=device)
            yield index, self._read(0, ids), self._read(1, ids)
        for at, count in self._ring_runs(BLOCK_TOKENS * len(row.blocks), row.length - sinks):
            yield dense(sinks + at, sinks + at % self._ring_tokens, count)

    def unpacked(self, extra_columns: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """All keys and values as the model made them, for the length of one call.

        Args:
            extra_columns: room to leave at the end of the sequence axis, uninitialised.
        Returns:
            keys [B, G, S + extra, Dk] and values [B, G, S + extra, Dv] in the model's dtype, S = columns, padding
            zero; new tensors that the caller owns.
        """
        keys, values = (
            side.tail.new_empty(*side.tail.shape[:2], self._columns + extra_columns, side.tail.shape[-1])
            for side in self._both()
        )
        for b, row in enumerate(self._rows):
            at = row.pad
            keys[b, :, :at], values[b, :, :at] = 0, 0
            for index, rotated_keys, rotated_values in self._pieces(b, row):
                plain = self._turn_back(0, rotated_keys)
                if self.key_bias is not None:
                    plain = plain + self.key_bias.vectors(index)
                keys[b, :, at : at + len(index)] = plain.to(keys.dtype)
                values[b, :, at : at + len(index)] = self._turn_back(1, rotated_values).to(values.dtype)
                at += len(index)
        return keys, values

    # ------------------------------------------------------------------ edit
    def crop(self, tokens_to_remove: int) -> None:
        """Drop the newest tokens of every row; what stays is unchanged while the cut lies in the window.

        A deeper crop cuts codes: the tokens left of a cut block go back to the window as their codes decode.

        Args:
            tokens_to_remove: 0 or more.
        """
        if tokens_to_remove < 0:
            raise OptionError(f"tokens_to_remove must be 0 or more; got {tokens_to_remove}")
        if tokens_to_remove >= self._columns:
            self.reset()
            return
        self._columns -= tokens_to_remove
        for b, row in enumerate(self._rows):
            row.length = max(row.length - tokens_to_remove, 0)
            row.pad = min(row.pad, self._columns)
            after_sinks = max(row.length - self.options.sinks, 0)
            blocks = after_sinks // BLOCK_TOKENS
            if blocks < len(row.blocks):
                self._back_to_ring(b, row.blocks[blocks], BLOCK_TOKENS * blocks, after_sinks)
                self._records().give_back([*row.blocks[blocks:], *row.reserved])
                row.reserved.clear()
                del row.blocks[blocks:]
        self._count_on_device()

    def _back_to_ring(self, b: int, block: int, start: int, stop: int) -> None:
        """Decode the tokens [start, stop) of a block whose first token is `start` into row b's ring."""
        keys, values = (self._read(i, [block]) for i in (0, 1))
        for at, count in self._ring_runs(start, stop):
            slot = self.options.sinks + at % self._ring_tokens
            self._write_tail(b, slot, (keys, values), at - start, count)

    def age(self, first: int, last: int, *, key_bits: int | None = None, value_bits: int | None = None) -> None:
        """Give up planes of the blocks [first, last) of every row, 0 being the oldest; their memory is free again.

        Blocks that have no more bits than that stay as they are, and so do uncompressed sides.

        Args:
            first, last: numbers of blocks of 64 tokens after the sinks; beyond a row's blocks there is nothing to do.
            key_bits, value_bits: 2 or 3, to keep; None = all.
        Raises:
            OptionError: another width, or a range that is none.
        """
        for name, bits in (("key_bits", key_bits), ("value_bits", value_bits)):
            if bits not in (None, 2, 3):
                raise OptionError(f"aged codes keep 2 or 3 bits, got {name} {bits}")
        if not 0 <= first <= last:
            raise OptionError(f"blocks [first, last) were asked for, got first {first} and last {last}")
        if self._pool is not None:
            blocks = {block for row in self._rows for block in row.blocks[first:last]}
            self._age(blocks, first, last, key_bits or 4, value_bits or 4)

    def _age(self, blocks: Collection[int], first: int, last: int, key_bits: int, value_bits: int) -> None:
        """Age `blocks`, in every row that has them at [first, last): rows that share a block share the aged one."""
        pool = self._records()
        moved: dict[int, int] = {}
        for layout, group in itertools.groupby(sorted(blocks), pool.layout_of):
            ids, to = list(group), layout.at_most(key_bits, value_bits)
            for start in range(0, len(ids) if to != layout else 0, _BLOCKS_PER_PIECE):
                piece = ids[start : start + _BLOCKS_PER_PIECE]
                moved.update(zip(piece, self._aged(piece, layout, to), strict=True))
        for b, row in enumerate(self._rows):
            old = [block for block in row.blocks[first:last] if block in moved]
            pool.share([moved[block] for block in old])
            pool.give_back(old)
            row.blocks[first:last] = [moved.get(block, block) for block in row.blocks[first:last]]
            if old and self._device_tokens is not None:
                self._name_on_device(self._device_tokens, b, first, row.blocks[first:last])
        pool.give_back(list(moved.values()))  # by whoever took them

    def _aged(self, ids: Sequence[int], layout: BlockLayout, to: BlockLayout) -> list[int]:
        """New records of layout `to` with what the records `ids` of `layout` hold, each used once."""
        pool = self._records()
        new = pool.take(len(ids), to)
        if self._device_tokens is not None:
            anchor = self._device_tokens.anchor
            entries = [pool.offsets(ids, anchor), pool.offsets(new, anchor)]
            # without waiting for the device: ageing comes in the middle of a step
            old, aged = torch.tensor(entries, dtype=torch.int64).to(anchor.device, non_blocking=True)
            age_blocks(layout, to, anchor, old, aged)
            return new
        records = torch.cat([view for _, view, _ in pool.runs(ids)])
        for at, view, _ in pool.runs(new):
            age_records(records[at : at + view.shape[0]], layout, view, to)
        return new

    def select_rows(self, rows: Sequence[int]) -> None:
        """Keep the given rows in the given order; a row may be named more than once (beam search, repeats).

        Blocks are shared between copies of a row, not copied: codes never change once written.

        Raises:
            ShapeError: a row that does not exist.
        """
        if self._sides is None:
            return
        if any(not 0 <= i < len(self._rows) for i in rows):
            raise ShapeError(f"rows 0 to {len(self._rows) - 1} exist; got {list(rows)}")
        chosen = [self._rows[i] for i in rows]
        for row in chosen:
            self._records().share(row.blocks)
        for row in self._rows:
            self._records().give_back([*row.blocks, *row.reserved])
        self._rows = [_Row(row.length, row.pad, list(row.blocks)) for row in chosen]
        index = torch.tensor(list(rows), device=self._sides[0].tail.device)
        for side in self._sides:
            side.tail = side.tail.index_select(0, index)
        if self._device_tokens is not None:
            self._device_tokens.select_rows(index)

    def reset(self) -> None:
        """Forget all tokens and give back all memory."""
        self._rows, self._columns = [], 0
        self._sides = self._pool = self._device_tokens = None


def blocks_for(tokens: int, options: StoreOptions) -> int:
    """Coded blocks of a row of `tokens` tokens: those that have left the window."""
    return max(0, (tokens - options.sinks - options.window) // BLOCK_TOKENS)


def store_bytes(
    tokens: int,
    batch: int,
    num_kv_heads: int,
    key_dim: int,
    value_dim: int,
    options: StoreOptions,
    dtype: torch.dtype,
    *,
    has_kernels: bool = False,
) -> int:
    """Bytes that a CompressedKV with room for `tokens` tokens a row holds (its nbytes), before it exists.

    The key bias, where there is one, comes on top (KeyBias.nbytes, with kernels also KeyBias.table_nbytes).

    Args:
        has_kernels: whether kernels serve the device (`ops.devices.kernels_serve`), which read tables of their own.
    """
    slots = options.sinks + options.window + BLOCK_TOKENS
    dense = batch * num_kv_heads * slots * (key_dim + value_dim) * dtype.itemsize
    blocks = blocks_for(tokens, options)
    key = SideLayout(options.precision.key_bits, key_dim, dtype, options.block_means)
    value = SideLayout(options.precision.value_bits, value_dim, dtype, False)
    if has_kernels:
        fixed = device_tokens_bytes(batch, blocks, key_dim, value_dim)
    else:
        fixed = rotation_bytes(options.rotation, key_dim) + rotation_bytes(options.rotation, value_dim)
    records = DecaySchedule(options.decay, options.window).records(blocks, BlockLayout(num_kv_heads, key, value))
    return dense + batch * sum(layout.nbytes * count for layout, count in records.items()) + fixed
