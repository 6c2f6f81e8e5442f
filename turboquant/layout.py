"""How a block of 64 tokens of one layer lies in memory: a record of bytes that kernels and PyTorch read in place.

    record  head 0 | head 1 | ...                      heads of the KV groups
    head    keys | values
    side    scales 64 x float16 | mean D x float16 (keys, if kept) | plane 0 | plane 1 | plane 2
            or, at 16 bits, 64 x D numbers of the model's dtype

Each plane has the bytes of token 0, token 1, ...; docs/format.md draws their bits. Every part begins at a multiple of
16 bytes.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import torch

from turboquant import planes

BLOCK_TOKENS = 64


@dataclass(frozen=True)
class SideLayout:
    """Keys or values of one head in a record.

    Attributes:
        bits: 2, 3, 4, or 16 for the model's dtype. dim: width of a head. dtype: of the model.
        has_mean: the block's mean is kept.
    """

    bits: int
    dim: int
    dtype: torch.dtype
    has_mean: bool

    @property
    def num_planes(self) -> int:
        """Bit planes; 0 at 16 bits."""
        return 0 if self.bits == 16 else self.bits - 1

    @property
    def scale_bytes(self) -> int:
        """Bytes of the scales of 64 tokens."""
        return 0 if self.bits == 16 else 2 * BLOCK_TOKENS

    @property
    def mean_bytes(self) -> int:
        """Bytes of the mean."""
        return 2 * self.dim if self.has_mean and self.bits != 16 else 0

    @cached_property
    def plane_bytes(self) -> tuple[int, ...]:
        """Bytes of 64 tokens in each plane; at 16 bits one entry for the numbers themselves."""
        if self.bits == 16:
            return (BLOCK_TOKENS * self.dim * self.dtype.itemsize,)
        return tuple(BLOCK_TOKENS * size for size in planes.plane_bytes(self.dim, self.bits))

    @property
    def nbytes(self) -> int:
        """Bytes of the side."""
        return self.scale_bytes + self.mean_bytes + sum(self.plane_bytes)


@dataclass(frozen=True)
class BlockLayout:
    """A record: 64 tokens of all KV heads. heads: G. key, value: the two sides of each head."""

    heads: int
    key: SideLayout
    value: SideLayout

    @property
    def head_bytes(self) -> int:
        """Bytes from one head to the next."""
        return self.key.nbytes + self.value.nbytes

    @property
    def nbytes(self) -> int:
        """Bytes of a record."""
        return self.heads * self.head_bytes

    def with_bits(self, key_bits: int, value_bits: int) -> "BlockLayout":
        """The same with other widths."""
        return BlockLayout(self.heads, replace(self.key, bits=key_bits), replace(self.value, bits=value_bits))

    def at_most(self, key_bits: int, value_bits: int) -> "BlockLayout":
        """The same with no more bits than these; uncompressed sides stay."""
        wanted = ((self.key, key_bits), (self.value, value_bits))
        return self.with_bits(*(side.bits if side.bits == 16 else min(side.bits, bits) for side, bits in wanted))

    def side(self, index: int) -> tuple[SideLayout, int]:
        """Keys (0) or values (1), and where they begin within a head."""
        return (self.value, self.key.nbytes) if index else (self.key, 0)


@dataclass(frozen=True)
class SideParts:
    """Views of the parts of one side in n records [n, record bytes].

    Attributes:
        planes: uint8 [n, G, 64, bytes of a token], most significant first; at 16 bits one tensor of the model's
            dtype [n, G, 64, D].
        scales: [n, G, 64] float16, or None at 16 bits. mean: [n, G, D] float16, or None.
    """

    planes: tuple[torch.Tensor, ...]
    scales: torch.Tensor | None
    mean: torch.Tensor | None


def side_parts(records: torch.Tensor, layout: BlockLayout, index: int) -> SideParts:
    """Views of the keys (0) or values (1) in records [n, layout.nbytes] uint8; writing to them writes the records."""
    side, at = layout.side(index)
    heads: torch.Tensor = records.unflatten(1, (layout.heads, layout.head_bytes))  # [n, G, head_bytes]

    def part(nbytes: int) -> torch.Tensor:
        nonlocal at
        view: torch.Tensor = heads[..., at : at + nbytes]
        at += nbytes
        return view

    scales = part(side.scale_bytes).view(torch.float16) if side.scale_bytes else None
    mean = part(side.mean_bytes).view(torch.float16) if side.mean_bytes else None
    views = [part(nbytes).unflatten(-1, (BLOCK_TOKENS, -1)) for nbytes in side.plane_bytes]
    if side.bits == 16:
        views = [view.view(side.dtype) for view in views]
    return SideParts(tuple(views), scales, mean)


@dataclass(frozen=True, eq=False)
class PackedTokens:
    """One layer's tokens as the kernels read them; everything that changes from step to step lies on the device.

    Attributes:
        layout: of a record.
        anchor: uint8 tensor; addresses of records are counted from its first byte.
        table: [B, blocks] int64, for each block of 64 tokens of each row the offset of its record from `anchor`.
        lengths: [B] int32, tokens of each row.
        coded: [B] int32, blocks of each row; more where `lengths` says that more tokens have left the window.
        key_tail, value_tail: [B, G, slots, D], sinks, then a ring of recent tokens, in the model's dtype, rotated.
        sinks: slots of sinks. window: newest tokens that stay in the ring.
    """

    layout: BlockLayout
    anchor: torch.Tensor
    table: torch.Tensor
    lengths: torch.Tensor
    coded: torch.Tensor
    key_tail: torch.Tensor
    value_tail: torch.Tensor
    sinks: int
    window: int
