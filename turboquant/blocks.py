"""Side: the keys, or the values, of one layer: a dense tail per row, and coded blocks of 64 tokens from pools."""

from collections.abc import Iterator, Sequence
from functools import cache

import torch

from turboquant import planes
from turboquant.errors import ShapeError
from turboquant.ops.encode import encode
from turboquant.ops.unpack import unpack
from turboquant.rotation import Rotation, make_rotation

BLOCK_TOKENS = 64


class BlockPool:
    """Blocks of one kind (a plane, the scales, the means) in slabs that never move once allocated."""

    def __init__(self, block_shape: tuple[int, ...], dtype: torch.dtype, device: torch.device):
        self.block_shape, self.dtype, self.device = block_shape, dtype, device
        self.slabs: list[torch.Tensor] = []  # each [blocks, *block_shape]
        self._starts: list[int] = []  # id of each slab's first block

    @property
    def nbytes(self) -> int:
        """Bytes of all slabs."""
        return sum(slab.nbytes for slab in self.slabs)

    def grow(self, blocks: int) -> None:
        """Add a slab; its blocks get the next ids."""
        self._starts.append(self._starts[-1] + self.slabs[-1].shape[0] if self.slabs else 0)
        self.slabs.append(torch.empty((blocks, *self.block_shape), dtype=self.dtype, device=self.device))

    def _runs(self, ids: Sequence[int]) -> Iterator[tuple[int, torch.Tensor]]:
        """Runs of consecutive ids within a slab: (index of the run's first id, view [n, *block_shape])."""
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

    def read(self, ids: Sequence[int]) -> torch.Tensor:
        """Blocks [n, *block_shape]: a view where the ids are consecutive in one slab, else a copy."""
        runs = [view for _, view in self._runs(ids)]
        return runs[0] if len(runs) == 1 else torch.cat(runs)

    def write(self, ids: Sequence[int], blocks: torch.Tensor) -> None:
        """Store blocks [n, *block_shape] under `ids`."""
        for start, view in self._runs(ids):
            view.copy_(blocks[start : start + view.shape[0]])


class Side:
    """Keys or values of one layer, rotated.

    Args:
        bits: 2, 3, 4, or 16 to keep blocks in `dtype`.
        rotation: applied to every vector before it comes here.
        has_means: take the mean of each block out before coding it.
        tail_slots: dense tokens that each row has room for (sinks and the ring of the recent window).
        like: [B, G, T, D], a tensor of the batch, heads, width, dtype and device to serve.
    """

    def __init__(self, bits: int, rotation: Rotation, has_means: bool, tail_slots: int, like: torch.Tensor):
        batch, heads, _, dim = like.shape
        if dim % 8:
            raise ShapeError(f"bit planes need a head width that is a multiple of 8; got {dim}")
        self.bits, self.rotation = bits, rotation
        self.tail = like.new_zeros(batch, heads, tail_slots, dim)  # [B, G, slots, D]
        self.scales: BlockPool | None = None
        self.means: BlockPool | None = None
        if bits == 16:
            self.planes = [BlockPool((heads, BLOCK_TOKENS, dim), like.dtype, like.device)]
            return
        widths = planes.plane_bytes(dim, bits)
        self.planes = [BlockPool((heads, BLOCK_TOKENS, width), torch.uint8, like.device) for width in widths]
        self.scales = BlockPool((heads, BLOCK_TOKENS), torch.float16, like.device)
        if has_means:
            self.means = BlockPool((heads, dim), torch.float16, like.device)

    @property
    def pools(self) -> list[BlockPool]:
        """Every pool, planes first."""
        return [*self.planes, *(pool for pool in (self.scales, self.means) if pool is not None)]

    @property
    def tensors(self) -> list[torch.Tensor]:
        """Every tensor held."""
        return [self.tail, *(slab for pool in self.pools for slab in pool.slabs), *rotation_tensors(self.rotation)]

    def rotate(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., D], float32 or the model's dtype, rotated and rounded to the model's dtype: done once per token."""
        return self.rotation.apply(x).to(self.tail.dtype)

    def write_blocks(self, ids: Sequence[int], tokens: torch.Tensor) -> None:
        """Code tokens [G, n * 64, D] into the blocks `ids`."""
        x = tokens.unflatten(1, (-1, BLOCK_TOKENS)).transpose(0, 1)  # [n, G, 64, D]
        if self.scales is None:
            self.planes[0].write(ids, x)
            return
        x = x.float()
        if self.means is not None:
            # rounded to fp16 before it is subtracted: what is added back is what was taken out
            mean = _block_mean(x).half()  # [n, G, D]
            self.means.write(ids, mean)
            x = x - mean[..., None, :].float()
        encoded = encode(x, self.bits)
        for pool, plane in zip(self.planes, encoded.planes, strict=True):
            pool.write(ids, plane)
        self.scales.write(ids, encoded.scale)

    def read_blocks(self, ids: Sequence[int]) -> torch.Tensor:
        """Blocks `ids` as tokens [G, n * 64, D] float32, means added."""
        if self.scales is None:
            x = self.planes[0].read(ids).float()
        else:
            x = unpack(tuple(pool.read(ids) for pool in self.planes), self.scales.read(ids))  # [n, G, 64, D]
            if self.means is not None:
                x = x + self.means.read(ids)[..., None, :].float()
        return x.transpose(0, 1).flatten(1, 2)


def rotation_tensors(rotation: Rotation) -> list[torch.Tensor]:
    """The tensors that a rotation has drawn so far and keeps: signs and a small factor, or a dense matrix."""
    kept = [value for held in vars(rotation).values() if isinstance(held, dict) for value in held.values()]
    groups = [value if isinstance(value, tuple) else (value,) for value in kept]
    return [tensor for group in groups for tensor in group if isinstance(tensor, torch.Tensor)]


@cache
def rotation_bytes(kind: str, dim: int) -> int:
    """Bytes that a rotation in use keeps."""
    rotation = make_rotation(kind, dim, 0)
    rotation.apply(torch.zeros(1, dim))
    return sum(tensor.nbytes for tensor in rotation_tensors(rotation))


def _block_mean(x: torch.Tensor) -> torch.Tensor:
    """Mean over the 64 tokens of [n, G, 64, D]: halves added to halves, so that it does not depend on n.

    torch's own sum picks its order by the whole shape; then codes would depend on how tokens were split over calls.
    """
    while x.shape[-2] > 1:
        half = x.shape[-2] // 2
        x = x[..., :half, :] + x[..., half:, :]
    return x[..., 0, :] / BLOCK_TOKENS
