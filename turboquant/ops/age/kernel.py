"""age on the GPU: records copied without their last planes, scales fitted to the coarser codes."""

import torch
import triton
import triton.language as tl

from turboquant.layout import BlockLayout
from turboquant.ops.devices import is_interpreted
from turboquant.ops.unpack.kernel import decode, is_coordinate, load_codes, tables


@triton.jit
def _age_side(
    source,
    target,
    centroids,
    registers,
    DIM: tl.constexpr,
    QUARTER: tl.constexpr,
    QUARTER_PADDED: tl.constexpr,
    HELD: tl.constexpr,
    KEPT: tl.constexpr,
    HAS_MEAN: tl.constexpr,
    ITEM_BYTES: tl.constexpr,
    WARPS: tl.constexpr,
    ON_GPU: tl.constexpr,
):
    """One side of one head: 64 vectors with HELD planes (0 = numbers of ITEM_BYTES), KEPT of which stay."""
    n = tl.arange(0, 64)
    j = tl.arange(0, QUARTER_PADDED)
    is_byte = (j < QUARTER)[None, :] & (n >= 0)[:, None]
    if HELD == 0:
        row = n[:, None] * (DIM * ITEM_BYTES) + j[None, :]
        for k in tl.static_range(4 * ITEM_BYTES):
            at = row + k * QUARTER
            tl.store(target + at, tl.load(source + at, mask=is_byte, other=0), mask=is_byte)
    else:
        EIGHTH: tl.constexpr = QUARTER // 2
        MEAN_BYTES: tl.constexpr = 2 * DIM if HAS_MEAN else 0
        planes: tl.constexpr = 128 + MEAN_BYTES
        scale = tl.load(source.to(tl.pointer_type(tl.float16)) + n)
        a, y1, y2 = load_codes(source + planes, HELD, n, QUARTER, QUARTER_PADDED, HELD, False)
        if KEPT < HELD:
            fine = decode(a, y1, y2, HELD, centroids, registers, QUARTER, QUARTER_PADDED, HELD, WARPS, ON_GPU)
            coarse = decode(a, y1, y2, KEPT, centroids, registers, QUARTER, QUARTER_PADDED, HELD, WARPS, ON_GPU)
            is_real = is_coordinate(tl.arange(0, 4 * QUARTER_PADDED), QUARTER)[None, :]
            fine = tl.where(is_real, fine.to(tl.float32), 0.0)
            ratio = tl.sum(fine * fine, 1) / tl.sum(fine * coarse.to(tl.float32), 1)
            scale = (scale.to(tl.float32) * ratio).to(tl.float16)
        tl.store(target.to(tl.pointer_type(tl.float16)) + n, scale)
        if HAS_MEAN:
            for k in tl.static_range(8):
                at = 128 + k * QUARTER + j
                tl.store(target + at, tl.load(source + at, mask=j < QUARTER, other=0), mask=j < QUARTER)
        tl.store(target + planes + n[:, None] * QUARTER + j[None, :], a, mask=is_byte)
        # a 1-bit plane was spread over the bytes of plane 0: its first half is the whole plane
        is_first = is_byte & (j < EIGHTH)[None, :]
        at = n[:, None] * EIGHTH + j[None, :]
        if KEPT >= 2:
            tl.store(target + planes + 64 * QUARTER + at, y1, mask=is_first)
        if KEPT >= 3:
            tl.store(target + planes + 64 * (QUARTER + EIGHTH) + at, y2, mask=is_first)


@triton.jit
def _age_blocks(
    anchor,
    entries,
    aged,
    centroids,
    registers,
    KEY_DIM: tl.constexpr,
    KEY_QUARTER: tl.constexpr,
    KEY_QUARTER_PADDED: tl.constexpr,
    KEY_HELD: tl.constexpr,
    KEY_KEPT: tl.constexpr,
    HAS_MEANS: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_QUARTER: tl.constexpr,
    VALUE_QUARTER_PADDED: tl.constexpr,
    VALUE_HELD: tl.constexpr,
    VALUE_KEPT: tl.constexpr,
    ITEM_BYTES: tl.constexpr,
    HEAD_BYTES: tl.constexpr,
    AGED_HEAD_BYTES: tl.constexpr,
    VALUES_AT: tl.constexpr,
    AGED_VALUES_AT: tl.constexpr,
    WARPS: tl.constexpr,
    ON_GPU: tl.constexpr,
):
    i = tl.program_id(0)
    g = tl.program_id(1).to(tl.int64)
    source = anchor + tl.multiple_of(tl.load(entries + i) & -16, 16) + g * HEAD_BYTES
    target = anchor + tl.multiple_of(tl.load(aged + i) & -16, 16) + g * AGED_HEAD_BYTES
    if tl.program_id(2) == 0:
        _age_side(
            source,
            target,
            centroids,
            registers,
            KEY_DIM,
            KEY_QUARTER,
            KEY_QUARTER_PADDED,
            KEY_HELD,
            KEY_KEPT,
            HAS_MEANS,
            ITEM_BYTES,
            WARPS,
            ON_GPU,
        )
    else:
        _age_side(
            source + VALUES_AT,
            target + AGED_VALUES_AT,
            centroids,
            registers,
            VALUE_DIM,
            VALUE_QUARTER,
            VALUE_QUARTER_PADDED,
            VALUE_HELD,
            VALUE_KEPT,
            False,
            ITEM_BYTES,
            WARPS,
            ON_GPU,
        )


def age_blocks(
    layout: BlockLayout, aged_layout: BlockLayout, anchor: torch.Tensor, entries: torch.Tensor, aged: torch.Tensor
) -> None:
    """See `turboquant.ops.age.age_blocks`."""
    centroids, registers = tables(anchor.device)
    key, value = layout.key, layout.value
    _age_blocks[(entries.numel(), layout.heads, 2)](
        anchor,
        entries,
        aged,
        centroids,
        registers,
        KEY_DIM=key.dim,
        KEY_QUARTER=key.dim // 4,
        KEY_QUARTER_PADDED=triton.next_power_of_2(key.dim // 4),
        KEY_HELD=key.num_planes,
        KEY_KEPT=aged_layout.key.num_planes,
        HAS_MEANS=key.mean_bytes > 0,
        VALUE_DIM=value.dim,
        VALUE_QUARTER=value.dim // 4,
        VALUE_QUARTER_PADDED=triton.next_power_of_2(value.dim // 4),
        VALUE_HELD=value.num_planes,
        VALUE_KEPT=aged_layout.value.num_planes,
        ITEM_BYTES=key.dtype.itemsize,
        HEAD_BYTES=layout.head_bytes,
        AGED_HEAD_BYTES=aged_layout.head_bytes,
        VALUES_AT=key.nbytes,
        AGED_VALUES_AT=aged_layout.key.nbytes,
        WARPS=4,
        ON_GPU=not is_interpreted(),
        num_warps=4,
    )
