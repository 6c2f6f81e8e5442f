"""Blocks: records of 64 tokens in slabs, and the keys or values of one layer as PyTorch writes and reads them."""

import bisect
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache

import torch

from turboquant.errors import ShapeError
from turboquant.layout import BLOCK_TOKENS, BlockLayout, SideLayout, side_parts
from turboquant.ops.encode import encode
from turboquant.ops.unpack import unpack
from turboquant.rotation import Rotation, make_rotation


class RecordPool:
    """Records of blocks in slabs that never move once allocated, and who uses which.

    All records of a slab have one layout: that of new blocks, or one with fewer planes for aged ones.

    Args:
        layout: of new blocks. device: where the slabs lie.
    Attributes:
        slabs: uint8 [records, bytes], each of one layout. uses: for each id the rows that hold it; 0 = free.
    """

    def __init__(self, layout: BlockLayout, device: torch.device):
        self.layout, self.device = layout, device
        self.slabs: list[torch.Tensor] = []
        self.uses: list[int] = []
        self._layouts: list[BlockLayout] = []  # of each slab
        self._starts: list[int] = []  # id of each slab's first record
        self._free: dict[BlockLayout, list[int]] = {}
        self._records: Counter[BlockLayout] = Counter()  # of all slabs

    def __len__(self) -> int:
        return len(self.uses)

    @property
    def is_mixed(self) -> bool:
        """Whether records of another layout than that of new blocks are in use."""
        # asked in every step: no look at each slab
        return any(len(ids) < self._records[own] for own, ids in self._free.items() if own != self.layout)

    @property
    def free(self) -> list[int]:
        """Ids that no row uses."""
        return sorted(block for ids in self._free.values() for block in ids)

    def held(self) -> Iterator[tuple[BlockLayout, int]]:
        """Each slab's layout and number of records."""
        return zip(self._layouts, (slab.shape[0] for slab in self.slabs), strict=True)

    def grow(self, records: int, layout: BlockLayout | None = None) -> None:
        """Add a slab; its records get the next ids."""
        layout = layout or self.layout
        start = len(self.uses)
        self._starts.append(start)
        self._layouts.append(layout)
        self.slabs.append(torch.empty((records, layout.nbytes), dtype=torch.uint8, device=self.device))
        self.uses += [0] * records
        self._records[layout] += records
        self._free.setdefault(layout, []).extend(range(start, start + records))

    def take(self, count: int, layout: BlockLayout | None = None) -> list[int]:
        """Ids of free records, lowest first, each used once now; a new slab when they run out."""
        layout = layout or self.layout
        free = self._free.setdefault(layout, [])
        if count > len(free):
            # slabs of a sixteenth of what exists: at most 6 % idle, and few slabs however long the context
            have = sum(records for own, records in self.held() if own == layout)
            self.grow(max(count - len(free), have // 16), layout)
        ids, self._free[layout] = free[:count], free[count:]
        for block in ids:
            self.uses[block] = 1
        return ids

    def share(self, ids: Sequence[int]) -> None:
        """One more row uses these records."""
        for block in ids:
            self.uses[block] += 1

    def give_back(self, ids: Sequence[int]) -> None:
        """One row less uses these records; those that nobody uses are free."""
        touched = set()
        for block in ids:
            self.uses[block] -= 1
            if not self.uses[block]:
                layout = self._layouts[self._slab(block)]
                self._free[layout].append(block)
                touched.add(layout)
        for layout in touched:
            self._free[layout].sort()

    def layout_of(self, block: int) -> BlockLayout:
        """The layout of a record."""
        return self._layouts[self._slab(block)]

    def _slab(self, block: int) -> int:
        return bisect.bisect_right(self._starts, block) - 1

    def runs(self, ids: Sequence[int]) -> Iterator[tuple[int, torch.Tensor, BlockLayout]]:
        """Runs of consecutive ids within a slab: (index of the run's first id, view [n, bytes], layout)."""
        start = 0
        while start < len(ids):
            slab = self._slab(ids[start])
            end_of_slab = self._starts[slab] + self.slabs[slab].shape[0]
            stop = start + 1
            while stop < len(ids) and ids[stop] == ids[stop - 1] + 1 and ids[stop] < end_of_slab:
                stop += 1
            first = ids[start] - self._starts[slab]
            yield start, self.slabs[slab][first : first + stop - start], self._layouts[slab]
            start = stop

    def offsets(self, ids: Sequence[int], anchor: torch.Tensor) -> list[int]:
        """Entries of a block table: each record's distance from `anchor`, and its planes in the lowest bits."""
        return [
            view.data_ptr() - anchor.data_ptr() + i * layout.nbytes
            | layout.key.num_planes
            | layout.value.num_planes << 2
            for _, view, layout in self.runs(ids)
            for i in range(view.shape[0])
        ]


class Side:
    """Keys or values of one layer, rotated: a dense tail per row, and their side of the records.

    Args:
        layout: of the side. rotation: applied to every vector before it comes here.
        tail_slots: dense tokens that each row has room for (sinks and the ring of the recent window).
        like: [B, G, T, D], a tensor of the batch, heads, width, dtype and device to serve.
    """

    def __init__(self, layout: SideLayout, rotation: Rotation, tail_slots: int, like: torch.Tensor):
        batch, heads, _, dim = like.shape
        self.layout, self.rotation = layout, rotation
        self.tail = like.new_zeros(batch, heads, tail_slots, dim)  # [B, G, slots, D]

    def rotate(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., D], float32 or the model's dtype, rotated and rounded to the model's dtype: done once per token."""
        return self.rotation.apply(x).to(self.tail.dtype)


def side_layout(bits: int, like: torch.Tensor, has_mean: bool) -> SideLayout:
    """The layout of keys or values like [B, G, T, D].

    Raises:
        ShapeError: D is not a multiple of 8.
    """
    if like.shape[-1] % 8:
        raise ShapeError(f"bit planes need a head width that is a multiple of 8; got {like.shape[-1]}")
    return SideLayout(bits, like.shape[-1], like.dtype, has_mean)


def write_records(records: torch.Tensor, layout: BlockLayout, index: int, tokens: torch.Tensor) -> None:
    """Code the keys (0) or values (1) tokens [G, n * 64, D] into records [n, layout.nbytes]."""
    side, _ = layout.side(index)
    parts = side_parts(records, layout, index)
    x = tokens.unflatten(1, (-1, BLOCK_TOKENS)).transpose(0, 1)  # [n, G, 64, D]
    if parts.scales is None:
        parts.planes[0].copy_(x)
        return
    x = x.float()
    if parts.mean is not None:
        # rounded to fp16 before it is subtracted: what is added back is what was taken out
        mean = _block_mean(x).half()  # [n, G, D]
        parts.mean.copy_(mean)
        x = x - mean[..., None, :].float()
    encoded = encode(x, side.bits)
    for view, plane in zip(parts.planes, encoded.planes, strict=True):
        view.copy_(plane)
    parts.scales.copy_(encoded.scale)


def read_records(records: torch.Tensor, layout: BlockLayout, index: int) -> torch.Tensor:
    """The keys (0) or values (1) of records [n, layout.nbytes] as tokens [G, n * 64, D] float32, means added."""
    parts = side_parts(records, layout, index)
    if parts.scales is None:
        x = parts.planes[0].float()
    else:
        x = unpack(parts.planes, parts.scales)  # [n, G, 64, D]
        if parts.mean is not None:
            x = x + parts.mean[..., None, :].float()
    return x.transpose(0, 1).flatten(1, 2)


@cache
def rotation_bytes(kind: str, dim: int) -> int:
    """Bytes that a rotation in use keeps."""
    rotation = make_rotation(kind, dim, 0)
    rotation.apply(torch.zeros(1, dim))
    return sum(tensor.nbytes for tensor in rotation.tensors)


def _block_mean(x: torch.Tensor) -> torch.Tensor:
    """Mean over the 64 tokens of [n, G, 64, D]: halves added to halves, so that it does not depend on n.

    torch's own sum picks its order by the whole shape; then codes would depend on how tokens were split over calls.
    """
    while x.shape[-2] > 1:
        half = x.shape[-2] // 2
        x = x[..., :half, :] + x[..., half:, :]
    return x[..., 0, :] / BLOCK_TOKENS
