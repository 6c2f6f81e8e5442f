"""Key terms of few query rows over many blocks, found before the planes are read: block means and the key bias.

In the loop over the planes they take registers that other programs need. Here eight blocks share one product.
"""

import triton
import triton.language as tl

from turboquant.ops.attend.parts import (
    add_scores_dense,
    bias_of_tokens,
    mean_quarter,
    no_scores,
    place,
    rotated_quarter,
    row_factors,
    token_of,
    turned,
)


@triton.jit
def _rows_of(x, BLOCKS: tl.constexpr, ROWS: tl.constexpr):
    """x [ROWS] for each of BLOCKS: [BLOCKS * ROWS]."""
    return tl.reshape(tl.broadcast_to(x[None, :], (BLOCKS, ROWS)), (BLOCKS * ROWS,))


@triton.jit(
    do_not_specialize=[
        "table_stride",
        "groups",
        "heads_per_group",
        "tokens",
        "sinks",
        "window",
        "slots",
        "block_tiles",
        "out_stride",
    ]
)
def key_terms(
    anchor,
    table,
    table_stride,
    lengths,
    coded,
    q,
    factor,
    coefficients,
    frequencies,
    bias_table,
    out,
    out_stride,
    groups,
    heads_per_group,
    tokens,
    sinks,
    window,
    slots,
    block_tiles,
    scale,
    bias_scaling,
    KEY_DIM: tl.constexpr,
    KEY_QUARTER: tl.constexpr,
    KEY_QUARTER_PADDED: tl.constexpr,
    VALUE_QUARTER: tl.constexpr,
    KEY_PLANES: tl.constexpr,
    VALUE_PLANES: tl.constexpr,
    KEY_BYTES: tl.constexpr,
    VALUE_BYTES: tl.constexpr,
    IS_MIXED: tl.constexpr,
    HAS_MEANS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PAIRS_PADDED: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCKS: tl.constexpr,
    ROWS: tl.constexpr,
    ON_GPU: tl.constexpr,
):
    """out [B * G * rows, out_stride] float32: what is added to a token's score, blocks first, the tail's slots behind.

    The first `block_tiles` programs take BLOCKS blocks each, the others 64 slots of the tail.
    """
    tile = tl.program_id(0)
    bg = tl.program_id(1)
    b = bg // groups
    rows = heads_per_group * tokens
    r = tl.arange(0, ROWS)
    is_row = r < rows
    at = bg.to(tl.int64) * rows + r
    n = tl.arange(0, 64)
    length = tl.load(lengths + b)
    blocks = tl.maximum(tl.load(coded + b), (length - sinks - window) // 64)
    row_scale, bias_scale, constant = row_factors(factor, at, is_row, scale, bias_scaling, HAS_BIAS, HAS_SOFTCAP)
    own = coefficients + at * (2 * PAIRS_PADDED)

    if tile >= block_tiles:
        if HAS_BIAS:
            slot = (tile - block_tiles) * 64 + n
            token, _ = token_of(slot, slots, sinks, length)
            s = bias_of_tokens(token, own, is_row, frequencies, no_scores(ROWS, False), PAIRS_PADDED, False, ON_GPU)
            s = s * bias_scale[:, None] + constant[:, None]
            # behind the room for blocks, which the number of tiles does not tell
            to = out + at * out_stride + (out_stride - (slots + 63) // 64 * 64)
            tl.store(to[:, None] + slot[None, :], s, mask=is_row[:, None])
    elif tile * BLOCKS < blocks:
        block = tile * BLOCKS + tl.arange(0, BLOCKS)
        is_block = block < blocks
        s = tl.zeros((BLOCKS * ROWS, 64), tl.float32)
        if HAS_BIAS:
            # the query turned back to the first token of each block meets one table of 64 angles
            i = tl.arange(0, PAIRS_PADDED)
            along_cos = tl.load(own[:, None] + i[None, :], mask=is_row[:, None], other=0)
            along_sin = tl.load(own[:, None] + PAIRS_PADDED + i[None, :], mask=is_row[:, None], other=0)
            cos, sin = turned((sinks + 64 * block)[:, None], tl.load(frequencies + i)[None, :])
            block_cos = along_cos[None, :, :] * cos[:, None, :] + along_sin[None, :, :] * sin[:, None, :]
            block_sin = along_sin[None, :, :] * cos[:, None, :] - along_cos[None, :, :] * sin[:, None, :]
            both = tl.reshape(tl.join(block_cos, block_sin), (BLOCKS * ROWS, 2 * PAIRS_PADDED))
            two = tl.arange(0, 2 * PAIRS_PADDED)
            turns = tl.load(bias_table + n[:, None] * (2 * PAIRS_PADDED) + two[None, :])
            # the table holds cos - 1, which keeps the digits of slowly turning pairs
            s = add_scores_dense(s, both, turns, False, ON_GPU)
            s += tl.reshape(tl.sum(block_cos, 2), (BLOCKS * ROWS,))[:, None]
            s = s * _rows_of(bias_scale, BLOCKS, ROWS)[:, None] + _rows_of(constant, BLOCKS, ROWS)[:, None]
        if HAS_MEANS:
            entry = tl.load(table + b.to(tl.int64) * table_stride + block, mask=is_block, other=0)
            keys_at, _, _, _ = place(
                anchor,
                entry,
                bg % groups,
                KEY_BYTES,
                VALUE_BYTES,
                KEY_QUARTER,
                VALUE_QUARTER,
                KEY_PLANES,
                VALUE_PLANES,
                IS_MIXED,
            )
            by_mean = tl.zeros((BLOCKS, ROWS), tl.float32)
            for f in tl.static_range(4):
                mean = mean_quarter(keys_at[:, None], is_block[:, None], KEY_QUARTER, KEY_QUARTER_PADDED, f)
                turned_q = rotated_quarter(q, at, is_row, KEY_QUARTER_PADDED, f)
                by_mean += tl.sum(turned_q[None, :, :] * mean[:, None, :], 2)
            s += tl.reshape(by_mean * row_scale[None, :], (BLOCKS * ROWS,))[:, None]
        to = tl.broadcast_to((at * out_stride)[None, :], (BLOCKS, ROWS)) + 64 * block[:, None]
        is_real = is_row[None, :] & is_block[:, None]
        to = tl.reshape(to, (BLOCKS * ROWS,))
        tl.store(out + to[:, None] + n[None, :], s, mask=tl.reshape(is_real, (BLOCKS * ROWS,))[:, None])
