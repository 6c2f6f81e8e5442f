"""encode on the GPU: blocks of 64 rotated tokens -> planes, scales and mean, straight into their records."""

import math
from functools import cache

import torch
import triton
import triton.language as tl

from turboquant.codebook import embedded_codebook
from turboquant.layout import BlockLayout


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
    levels,
    root,
    DIM: tl.constexpr,
    EIGHTH: tl.constexpr,
    EIGHTH_PADDED: tl.constexpr,
    PLANES: tl.constexpr,
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
        # axis 1 counts field and half, f * 2 + h: coordinates f * D / 4 + h * D / 8 + e
        fh = tl.arange(0, 8)
        e = tl.arange(0, EIGHTH_PADDED)
        is_real = (e < EIGHTH)[None, None, :]
        column = (fh * EIGHTH)[None, :, None] + e[None, None, :]
        source = tokens + b.to(tl.int64) * batch_stride + g.to(tl.int64) * head_stride + column
        planes = record + 128
        mean = tl.zeros((8, EIGHTH_PADDED), tl.float32)
        if HAS_MEAN:
            for start in tl.static_range(0, 64, AT_ONCE):
                slot = first_slot + (token + start + tl.arange(0, AT_ONCE)) % ring
                x = tl.load(source + slot[:, None, None].to(tl.int64) * token_stride, mask=is_real, other=0)
                mean += tl.sum(x.to(tl.float32), 0)
            # rounded before it is taken out: what is added back is what was taken out
            rounded = (mean / 64).to(tl.float16)
            at = (fh * EIGHTH)[:, None] + e[None, :]
            tl.store((record + 128).to(tl.pointer_type(tl.float16)) + at, rounded, mask=(e < EIGHTH)[None, :])
            mean = rounded.to(tl.float32)
            planes = record + (128 + 2 * DIM)
        # tiles that the registers hold
        for start in tl.static_range(0, 64, AT_ONCE):
            n = start + tl.arange(0, AT_ONCE)
            slot = first_slot + (token + n) % ring
            x = tl.load(source + slot[:, None, None].to(tl.int64) * token_stride, mask=is_real, other=0)
            if PLANES == 0:
                tl.store(record.to(tokens.dtype) + n[:, None, None] * DIM + column, x, mask=is_real)
            else:
                x = tl.where(is_real, x.to(tl.float32) - mean[None, :, :], 0.0)
                length = tl.sqrt(tl.sum(tl.sum(x * x, 2), 1))  # [AT_ONCE]
                is_codable = (length > 0) & (length < float("inf"))
                factor = tl.where(is_codable, root / length, 0.0)[:, None, None]
                u = tl.where(is_codable[:, None, None], tl.abs(x) * factor, 0.0)
                # levels: the least centroid, then each threshold and how far the centroid jumps there
                magnitude = tl.zeros((AT_ONCE, 8, EIGHTH_PADDED), tl.int32)
                centroid = tl.zeros((AT_ONCE, 8, EIGHTH_PADDED), tl.float32) + tl.load(levels)
                for k in tl.static_range((1 << PLANES) - 1):
                    is_above = u > tl.load(levels + 1 + 2 * k)
                    magnitude += is_above.to(tl.int32)
                    centroid += tl.where(is_above, tl.load(levels + 2 + 2 * k), 0.0)
                product = tl.sum(tl.sum(tl.where(is_real, u * centroid, 0.0), 2), 1)
                scale = length * (root / product)
                scale = tl.where(length == 0, 0.0, scale)
                # a finite vector whose squares overflow must not look like a broken one, nor the reverse
                broken = tl.sum(tl.sum((~(tl.abs(x) < float("inf"))).to(tl.int32), 2), 1) > 0
                beyond_all = tl.where(broken, float("nan"), float("inf"))
                scale = tl.where(length < float("inf"), scale, beyond_all)
                tl.store(record.to(tl.pointer_type(tl.float16)) + n, scale.to(tl.float16))

                # what is not codable has codes 0, without a sign
                is_negative = ((x < 0) & is_codable[:, None, None]).to(tl.int32)
                field = (fh // 2)[None, :, None]
                half = (fh % 2)[None, :, None]
                two = (is_negative << 1 | (magnitude >> (PLANES - 1))) << (2 * field)
                two = tl.where(is_real, two, 0)
                mask = (e < EIGHTH)[None, :] & (n >= 0)[:, None]
                row = n[:, None] * (2 * EIGHTH) + e[None, :]
                first_half = tl.sum(tl.where(half == 0, two, 0), 1)
                second_half = tl.sum(tl.where(half == 1, two, 0), 1)
                tl.store(planes + row, first_half.to(tl.uint8), mask=mask)
                tl.store(planes + row + EIGHTH, second_half.to(tl.uint8), mask=mask)
                position = field % 2 + field // 2 * 4 + (1 - half) * 2
                row = n[:, None] * EIGHTH + e[None, :]
                for k in tl.static_range(PLANES - 1):
                    one = ((magnitude >> (PLANES - 2 - k)) & 1) << position
                    at = planes + 64 * 2 * EIGHTH + k * (64 * EIGHTH) + row
                    tl.store(at, tl.sum(one, 1).to(tl.uint8), mask=mask)


@cache
def _levels(bits: int, device: torch.device) -> torch.Tensor:
    """Float32 on `device`: the least centroid, then for each threshold itself and the jump of the centroid there."""
    codebook = embedded_codebook(bits)
    centroids = codebook.centroids
    listed = [centroids[0]]
    for k, threshold in enumerate(codebook.thresholds):
        listed += [threshold, centroids[k + 1] - centroids[k]]
    with torch.inference_mode(False):
        return torch.tensor(listed, dtype=torch.float32).to(device)


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
    lengths, sinks, window = when_due if when_due is not None else (table, 0, 0)
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
        _levels(side.bits, tokens.device) if side.num_planes else anchor,
        math.sqrt(dim),
        DIM=dim,
        EIGHTH=dim // 8,
        EIGHTH_PADDED=triton.next_power_of_2(dim // 8),
        PLANES=side.num_planes,
        HAS_MEAN=side.mean_bytes > 0,
        HEAD_BYTES=layout.head_bytes,
        SIDE_AT=side_at,
        AT_ONCE=64 if dim <= 128 else 32,
        WHEN_DUE=when_due is not None,
        num_warps=8,
    )
