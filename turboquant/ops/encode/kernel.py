"""encode on the GPU: blocks of 64 rotated tokens -> planes, scales and mean, straight into their records."""

import math
from functools import cache

import torch
import triton
import triton.language as tl

from turboquant.codebook import embedded_codebook
from turboquant.layout import BlockLayout


@triton.jit
def _eighths(source, is_real, EIGHTH: tl.constexpr):
    """Coordinates i * D / 8 + e of vectors, i below 8: tensors [N, E]. source: [N, E], where coordinates e lie.

    Apart, so that a thread has the same of every eighth: what a byte of a plane is made of.
    """
    parts = ()
    for i in tl.static_range(0, 8):
        parts = parts + (tl.load(source + i * EIGHTH, mask=is_real, other=0),)
    return parts


@triton.jit
def _sum_of_8(a0, a1, a2, a3, a4, a5, a6, a7, b0, b1, b2, b3, b4, b5, b6, b7):
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3, a4 + b4, a5 + b5, a6 + b6, a7 + b7


@triton.constexpr_function
def _single_at(field, half):
    """Where a 1-bit plane keeps the bit of a field, see turboquant/planes.py."""
    return field % 2 + field // 2 * 4 + (1 - half) * 2


@triton.jit
def _magnitude(u, THRESHOLDS: tl.constexpr, CENTROIDS: tl.constexpr):
    """Bits of the magnitude of u, most significant first, and its centroid: the thresholds as a tree."""
    if len(CENTROIDS) == 2:
        high = u > THRESHOLDS[0]
        bits = (high,)
        centroid = tl.where(high, CENTROIDS[1], CENTROIDS[0])
    elif len(CENTROIDS) == 4:
        high = u > THRESHOLDS[1]
        low = u > tl.where(high, THRESHOLDS[2], THRESHOLDS[0])
        bits = (high, low)
        above = tl.where(low, CENTROIDS[3], CENTROIDS[2])
        centroid = tl.where(high, above, tl.where(low, CENTROIDS[1], CENTROIDS[0]))
    else:
        high = u > THRESHOLDS[3]
        middle = u > tl.where(high, THRESHOLDS[5], THRESHOLDS[1])
        above = tl.where(middle, THRESHOLDS[6], THRESHOLDS[4])
        low = u > tl.where(high, above, tl.where(middle, THRESHOLDS[2], THRESHOLDS[0]))
        bits = (high, middle, low)
        above = tl.where(
            middle,
            tl.where(low, CENTROIDS[7], CENTROIDS[6]),
            tl.where(low, CENTROIDS[5], CENTROIDS[4]),
        )
        below = tl.where(
            middle,
            tl.where(low, CENTROIDS[3], CENTROIDS[2]),
            tl.where(low, CENTROIDS[1], CENTROIDS[0]),
        )
        centroid = tl.where(high, above, below)
    return bits, centroid


@triton.jit(do_not_specialize=["first_slot", "first_token", "ring", "table_stride", "first_block", "sinks", "window"])
def _encode_blocks(
    tokens,
    batch_stride,
    head_stride,
    token_stride,
    first_slot,
    first_token,
    ring,
    anchor,
    table,
    table_stride,
    first_block,
    lengths,
    sinks,
    window,
    ROOT: tl.constexpr,
    DIM: tl.constexpr,
    EIGHTH: tl.constexpr,
    EIGHTH_PADDED: tl.constexpr,
    PLANES: tl.constexpr,
    THRESHOLDS: tl.constexpr,
    CENTROIDS: tl.constexpr,
    HAS_MEAN: tl.constexpr,
    HEAD_BYTES: tl.constexpr,
    SIDE_AT: tl.constexpr,
    AT_ONCE: tl.constexpr,
    WHEN_DUE: tl.constexpr,
):
    """One block of one head. When due: the block that the newest token has pushed out of the window, if it has."""
    i = tl.program_id(0)
    g = tl.program_id(1)
    b = tl.program_id(2)
    block = first_block + i
    token = first_token + 64 * i
    is_due = True
    if WHEN_DUE:
        beyond = tl.load(lengths + b) - sinks - window
        is_due = (beyond >= 64) & (beyond % 64 == 0)
        block = tl.maximum(beyond // 64 - 1, 0)
        token = 64 * block
    if is_due:
        entry = tl.load(table + b.to(tl.int64) * table_stride + block)
        record = anchor + tl.multiple_of(entry & -16, 16) + g.to(tl.int64) * HEAD_BYTES + SIDE_AT
        e = tl.arange(0, EIGHTH_PADDED)[None, :]
        is_real = e < EIGHTH
        source = tokens + b.to(tl.int64) * batch_stride + g.to(tl.int64) * head_stride + e
        planes = record + 128
        if HAS_MEAN:
            sums = (tl.zeros((AT_ONCE, EIGHTH_PADDED), tl.float32),) * 8
            for start in tl.range(0, 64, AT_ONCE):
                slot = (first_slot + (token + start + tl.arange(0, AT_ONCE)) % ring)[:, None]
                parts = _eighths(source + slot.to(tl.int64) * token_stride, is_real, EIGHTH)
                more = ()
                for f in tl.static_range(0, 8):
                    more = more + (sums[f] + parts[f].to(tl.float32),)
                sums = more
            means = tl.reduce(sums, 0, _sum_of_8)
            taken = ()
            for f in tl.static_range(0, 8):
                # rounded before it is taken out: what is added back is what was taken out
                rounded = (means[f] / 64).to(tl.float16)[None, :]
                tl.store((record + 128).to(tl.pointer_type(tl.float16)) + (f * EIGHTH + e), rounded, mask=is_real)
                taken = taken + (rounded.to(tl.float32),)
            planes = record + (128 + 2 * DIM)
        for start in tl.range(0, 64, AT_ONCE):
            row = start + tl.arange(0, AT_ONCE)
            n = row[:, None]
            slot = (first_slot + (token + row) % ring)[:, None]
            parts = _eighths(source + slot.to(tl.int64) * token_stride, is_real, EIGHTH)
            if PLANES == 0:
                for f in tl.static_range(0, 8):
                    tl.store(record.to(tokens.dtype) + n * DIM + (f * EIGHTH + e), parts[f], mask=is_real)
            else:
                x = ()
                squares = tl.zeros((AT_ONCE, EIGHTH_PADDED), tl.float32)
                # 0, or NaN where a coordinate is infinite or NaN
                zeros = squares
                for f in tl.static_range(0, 8):
                    own = parts[f].to(tl.float32)
                    if HAS_MEAN:
                        own -= taken[f]
                    squares += own * own
                    zeros += own * 0.0
                    x = x + (own,)
                length = tl.sqrt(tl.sum(squares, 1))  # [AT_ONCE]
                is_codable = (length > 0) & (length < float("inf"))
                factor = tl.where(is_codable, ROOT / length, 0.0)[:, None]
                # of what is not codable all bits are 0: nothing is above a threshold, and no sign is taken
                may_be_negative = is_codable[:, None]
                products = tl.zeros((AT_ONCE, EIGHTH_PADDED), tl.float32)
                first = tl.zeros((AT_ONCE, EIGHTH_PADDED), tl.int32)
                pairs = (first, first)
                singles = (first, first)
                for f in tl.static_range(0, 8):
                    # field f // 2 of byte e, or, of its other half, of byte e + D / 8
                    u = tl.abs(x[f]) * factor
                    bits, centroid = _magnitude(u, THRESHOLDS, CENTROIDS)
                    products += u * centroid
                    own = tl.where((x[f] < 0) & may_be_negative, 2 << (2 * (f // 2)), 0)
                    own |= tl.where(bits[0], 1 << (2 * (f // 2)), 0)
                    pairs = (pairs[0] | own, pairs[1]) if f % 2 == 0 else (pairs[0], pairs[1] | own)
                    if PLANES > 1:
                        one = singles[0] | tl.where(bits[1], 1 << _single_at(f // 2, f % 2), 0)
                        other = singles[1]
                        if PLANES > 2:
                            other |= tl.where(bits[2], 1 << _single_at(f // 2, f % 2), 0)
                        singles = (one, other)
                scale = tl.where(length == 0, 0.0, length * (ROOT / tl.sum(products, 1)))
                # a finite vector whose squares overflow must not look like a broken one, nor the reverse
                beyond_all = tl.where(tl.sum(zeros, 1) == 0, float("inf"), float("nan"))
                scale = tl.where(length < float("inf"), scale, beyond_all)
                tl.store(record.to(tl.pointer_type(tl.float16)) + row, scale.to(tl.float16))
                mask = is_real & (n >= 0)
                for half in tl.static_range(0, 2):
                    at = planes + n * (2 * EIGHTH) + (half * EIGHTH + e)
                    tl.store(at, pairs[half].to(tl.uint8), mask=mask)
                for k in tl.static_range(0, PLANES - 1):
                    at = planes + (128 * EIGHTH + k * (64 * EIGHTH)) + n * EIGHTH + e
                    tl.store(at, singles[k].to(tl.uint8), mask=mask)


@cache
def _levels(bits: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Thresholds between magnitudes, and their centroids."""
    codebook = embedded_codebook(bits)
    return tuple(map(float, codebook.thresholds)), tuple(map(float, codebook.centroids))


def encode_records(
    tokens: torch.Tensor,
    layout: BlockLayout,
    index: int,
    anchor: torch.Tensor,
    table: torch.Tensor,
    *,
    first_block: int = 0,
    blocks: int = 1,
    first_slot: int = 0,
    first_token: int = 0,
    ring: int = 1 << 30,
    when_due: tuple[torch.Tensor, int, int] | None = None,
) -> None:
    """Code blocks of rotated tokens into records, by the rule "unbiased".

    Args:
        tokens: [B, G, slots, D], last axis contiguous; token t of a row lies in slot first_slot + t % ring.
        layout, index: of the records, and keys (0) or values (1).
        anchor, table: see PackedTokens; entry `first_block` + i of row b gives the record of its tokens
            `first_token` + 64 i and on.
        blocks: how many.
        when_due: (lengths, sinks, window): instead, of each row the block that its newest token has pushed out of
            the window, if it has pushed one out; for captured graphs.
    """
    side, side_at = layout.side(index)
    dim = side.dim
    eighth = triton.next_power_of_2(dim // 8)
    lengths, sinks, window = when_due if when_due is not None else (table, 0, 0)
    thresholds, centroids = _levels(side.bits) if side.num_planes else ((), ())
    _encode_blocks[(blocks, layout.heads, tokens.shape[0])](
        tokens,
        tokens.stride(0),
        tokens.stride(1),
        tokens.stride(2),
        first_slot,
        first_token,
        ring,
        anchor,
        table,
        table.stride(0),
        first_block,
        lengths,
        sinks,
        window,
        ROOT=math.sqrt(dim),
        DIM=dim,
        EIGHTH=dim // 8,
        EIGHTH_PADDED=eighth,
        PLANES=side.num_planes,
        THRESHOLDS=thresholds,
        CENTROIDS=centroids,
        HAS_MEAN=side.mean_bytes > 0,
        HEAD_BYTES=layout.head_bytes,
        SIDE_AT=side_at,
        AT_ONCE=min(64, 256 // eighth),
        WHEN_DUE=when_due is not None,
        num_warps=4,
    )
