"""The first and last launch of attend: queries rotated, the key bias folded in; parts merged and turned back.

The first one also asks the L2 for what the second one waits for first.
"""

import triton
import triton.language as tl

from turboquant.ops.attend.parts import ask_for_entries, join_launches


@triton.jit
def _share_of_bias(
    source,
    bias,
    bias_length,
    out_factor,
    out_coefficients,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    PAIRS: tl.constexpr,
    PAIRS_PADDED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """The length of a query row, and its products with the key bias [DIM] of its head."""
    d = tl.arange(0, DIM_PADDED)
    i = tl.arange(0, PAIRS_PADDED)
    first = 2 * i if INTERLEAVED else i
    second = 2 * i + 1 if INTERLEAVED else i + PAIRS
    still = (d >= 2 * PAIRS) & (d < DIM)  # coordinates that the rotary embedding leaves alone
    join_launches(OVERLAPS)
    # asked for together
    b1 = tl.load(bias + first, mask=i < PAIRS, other=0)
    b2 = tl.load(bias + second, mask=i < PAIRS, other=0)
    own_length = tl.load(bias_length)
    if 2 * PAIRS < DIM:
        unmoved = tl.load(bias + d, mask=still, other=0)
    x = tl.load(source + d, mask=d < DIM, other=0).to(tl.float32)
    q1 = tl.load(source + first, mask=i < PAIRS, other=0).to(tl.float32)
    q2 = tl.load(source + second, mask=i < PAIRS, other=0).to(tl.float32)
    length = tl.sqrt(tl.sum(x * x, 0))
    shrink = _inverse(length) * tl.where(own_length > 0, 1 / own_length, 0.0)
    tl.store(out_coefficients + i, (q1 * b1 + q2 * b2) * shrink)
    tl.store(out_coefficients + PAIRS_PADDED + i, (q2 * b1 - q1 * b2) * shrink)
    constant = 0.0
    if 2 * PAIRS < DIM:
        constant = tl.sum(x * unmoved, 0)
    tl.store(out_factor, length)
    tl.store(out_factor + 1, own_length * length)
    tl.store(out_factor + 2, constant)


@triton.jit
def _inverse(length):
    """1 / length; 0 of 0, and NaN stays."""
    inverse = tl.where(length > 0, 1 / length, 0.0)
    return tl.where(length != length, length, inverse)


@triton.jit(do_not_specialize=["table_stride", "most_blocks", "groups", "heads_per_group", "tokens"])
def prepare_rows(
    q,
    q_batch_stride,
    q_head_stride,
    q_token_stride,
    matrix,
    bias,
    bias_lengths,
    out_q,
    out_half,
    out_factor,
    out_coefficients,
    table,
    table_stride,
    most_blocks,
    groups,
    heads_per_group,
    tokens,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    QUARTER: tl.constexpr,
    QUARTER_PADDED: tl.constexpr,
    HAS_HALVES: tl.constexpr,
    PAIRS: tl.constexpr,
    PAIRS_PADDED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    CHUNK: tl.constexpr,
    OVERLAPS: tl.constexpr,
    ON_GPU: tl.constexpr,
):
    """One query row: CHUNK coordinates of it rotated to length 1, each quarter padded; HAS_HALVES: as float16, too.

    Its length comes from the first chunk's program, or, where there is a key bias (PAIRS at least 0), from one behind
    the last, with its share of that. What the next launch waits for first, the entries of `most_blocks` blocks, is
    asked for on the way.
    """
    row = tl.program_id(0)
    bg = tl.program_id(1)
    start = tl.program_id(2) * CHUNK
    b = bg // groups
    g = bg % groups
    rows = heads_per_group * tokens
    at = (bg * rows + row).to(tl.int64)
    head = g * heads_per_group + row // tokens
    source = q + b.to(tl.int64) * q_batch_stride + head.to(tl.int64) * q_head_stride
    source += (row % tokens).to(tl.int64) * q_token_stride
    if ON_GPU:
        if (start == 0) & (g == 0):
            ask_for_entries(table + b.to(tl.int64) * table_stride, row * (128 * 16), most_blocks, rows * (128 * 16))
    if start < 4 * QUARTER_PADDED:
        d = tl.arange(0, DIM_PADDED)
        p = start + tl.arange(0, CHUNK)
        c = p // QUARTER_PADDED * QUARTER + p % QUARTER_PADDED
        is_real = p % QUARTER_PADDED < QUARTER
        part = tl.load(matrix + c[:, None] * DIM + d[None, :], mask=is_real[:, None] & (d < DIM)[None, :], other=0)
        join_launches(OVERLAPS)
        x = tl.load(source + d, mask=d < DIM, other=0).to(tl.float32)
        length = tl.sqrt(tl.sum(x * x, 0))
        rotated = tl.sum(part * x[None, :], 1) * _inverse(length)
        tl.store(out_q + at * (4 * QUARTER_PADDED) + p, rotated)
        if HAS_HALVES:
            tl.store(out_half + at * (4 * QUARTER_PADDED) + p, rotated.to(tl.float16))
        if PAIRS < 0:
            if start == 0:
                tl.store(out_factor + at * 4, length)
    else:
        _share_of_bias(
            source,
            bias + g.to(tl.int64) * DIM,
            bias_lengths + g,
            out_factor + at * 4,
            out_coefficients + at * (2 * PAIRS_PADDED),
            DIM,
            DIM_PADDED,
            PAIRS,
            PAIRS_PADDED,
            INTERLEAVED,
            OVERLAPS,
        )


@triton.jit(do_not_specialize=["groups", "heads_per_group", "tokens", "parts"])
def merge_rows(
    in_top,
    in_mass,
    in_acc,
    matrix,
    sink_logits,
    out,
    out_batch_stride,
    out_head_stride,
    out_token_stride,
    groups,
    heads_per_group,
    tokens,
    parts,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    HAS_SINK_LOGITS: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """CHUNK coordinates of a query row: the parts joined by log-sum-exp, and turned back to the model's coordinates."""
    row = tl.program_id(0)
    bg = tl.program_id(1)
    rows = heads_per_group * tokens
    head = bg % groups * heads_per_group + row // tokens
    c = tl.arange(0, DIM_PADDED)
    d = tl.program_id(2) * CHUNK + tl.arange(0, CHUNK)
    turn = tl.load(matrix + c[:, None] * DIM + d[None, :], mask=(c < DIM)[:, None] & (d < DIM)[None, :], other=0)
    join_launches(OVERLAPS)
    first = bg.to(tl.int64) * parts
    highest = -1e30
    mass = 0.0
    if HAS_SINK_LOGITS:
        highest = tl.load(sink_logits + head).to(tl.float32) * 1.4426950408889634
        mass = 1.0
    joined = tl.zeros((DIM_PADDED,), tl.float32)
    for start in tl.range(0, parts, TILE, num_stages=1):
        # asked for together: most calls have no second tile, and take as long as their loads
        some = start + tl.arange(0, TILE)
        at = (first + some) * rows + row
        tops = tl.load(in_top + at, mask=some < parts, other=-1e30)
        masses = tl.load(in_mass + at, mask=some < parts, other=0)
        own = tl.load(
            in_acc + at[:, None] * DIM + c[None, :], mask=(some < parts)[:, None] & (c < DIM)[None, :], other=0
        )
        new = tl.maximum(highest, tl.max(tops, 0))
        shrink = tl.exp2(highest - new)
        share = tl.exp2(tops - new)
        mass = mass * shrink + tl.sum(masses * share, 0)
        joined = joined * shrink + tl.sum(own * share[:, None], 0)
        highest = new
    total = tl.sum(joined[:, None] * turn, 0)
    # a row that holds no token gives zeros
    total = total / tl.where(mass == 0, 1.0, mass)
    to = out + (bg // groups).to(tl.int64) * out_batch_stride + head.to(tl.int64) * out_head_stride
    to += (row % tokens).to(tl.int64) * out_token_stride
    tl.store(to + d, total.to(out.dtype.element_ty), mask=d < DIM)
