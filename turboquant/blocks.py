"""Blocks: records of 64 tokens in slabs, and the keys or values of one layer as PyTorch writes and reads them."""

from collections.abc import Iterator, Sequence
from functools import cache

import torch

from turboquant.errors import ShapeError
from turboquant.layout import BLOCK_TOKENS, BlockLayout, SideLayout, side_parts
from turboquant.ops.encode import encode
from turboquant.ops.unpack import unpack
from turboquant.rotation import Rotation, make_rotation


class RecordPool:
    """Records of one layout in slabs that never move once allocated.

    Args:
        layout: of a record. device: where they lie.
    """

    def __init__(self, layout: BlockLayout, device: torch.device):
        self.layout, self.device = layout, device
        self.slabs: list[torch.Tensor] = []  # each [records, layout.nbytes] uint8
        self._starts: list[int] = []  # id of each slab's first record

    def __len__(self) -> int:
        return self._starts[-1] + self.slabs[-1].shape[0] if self.slabs else 0

    def grow(self, records: int) -> None:
        """Add a slab; its records get the next ids."""
        self._starts.append(len(self))
        self.slabs.append(torch.empty((records, self.layout.nbytes), dtype=torch.uint8, device=self.device))

    def runs(self, ids: Sequence[int]) -> Iterator[tuple[int, torch.Tensor]]:
        """Runs of consecutive ids within a slab: (index of the run's first id, view [n, layout.nbytes])."""
        start = 0
        while start < len(ids):
            slab = next(i for i in range(len(self._starts) - 1, -1, -1) if self._starts[i] <= ids[start])
            end_of_slab = self._starts[slab] + self.slabs[slab].shape[0]
            stop = start + 1
            while stop < len(ids) and ids[stop] == ids[stop - 1] + 1 and ids[stop] < end_of_slab:
                stop += 1
            first = ids[start] - self._starts[slab]
            yield start, self.slabs[slab][first : first + stop - start]
            start = stop

    def offsets(self, ids: Sequence[int]) -> list[int]:
        """Entries of a block table: each record's distance from the first slab, and its planes in the lowest bits."""
        planes = self.layout.key.num_planes | self.layout.value.num_planes << 2
        start = self.slabs[0].data_ptr()
        return [
            view.data_ptr() - start + i * self.layout.nbytes | planes
            for _, view in self.runs(ids)
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
