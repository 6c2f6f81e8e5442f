"""attend over packed blocks on the GPU: queries rotated, splits of the tokens in parallel, their results merged.

Three launches. `prepare_rows` rotates the queries and folds the key bias into them; `_attend_split` reads the planes in
place, every program a share of the blocks of one KV head (some of them, or some more, the sinks and the recent window);
`merge_few_rows` or `merge_rows` joins the shares by log-sum-exp and turns the result back. What changes from step to
step (lengths, blocks, their addresses) is read from device memory, so that a captured graph can be replayed.

Blocks are read in one of two ways. Up to 8 query rows of a KV head over coded tokens, which is decoding:
`attend_fragments`, decoded in registers. All others (`_fits_fragments` says which): `_attend_blocks`, by Triton's own
products through shared memory. There a head is multiplied quarter by quarter, as a byte of plane 0 holds one coordinate
of each quarter: what a thread decodes goes to shared memory in short rows, whose stores and loads meet no bank twice.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from turboquant.layout import BLOCK_TOKENS, PackedTokens
from turboquant.ops.attend.bias import BiasTerms
from turboquant.ops.attend.fragments import (
    QUARTERS,
    SHARED_BYTES,
    attend_fragments,
    begin_units,
    held_bytes,
    programs_and_units,
    triton_bytes,
    unit_bytes,
)
from turboquant.ops.attend.fragments import ROWS as FRAGMENT_ROWS
from turboquant.ops.attend.fragments import WARPS as FRAGMENT_WARPS
from turboquant.ops.attend.merge import MERGED_DIM, merge_few_rows
from turboquant.ops.attend.parts import (
    add_scores,
    add_scores_dense,
    ask_for_tail,
    bias_of_tokens,
    by_row,
    capped,
    columns_of_piece,
    dot,
    high_and_low,
    join_launches,
    mean_quarter,
    no_scores,
    place,
    plain_piece,
    plain_quarters,
    rotated_piece,
    rotated_quarters,
    row_factors,
    table_of_block,
    token_of,
    turned,
    turned_back,
)
from turboquant.ops.attend.rows import merge_rows, prepare_rows
from turboquant.ops.attend.terms import (
    PAIRS,
    keep_touched,
    load_means,
    store_bias_of_tail,
    touch_coefficients,
    touch_tables,
)
from turboquant.ops.devices import capability, is_interpreted, multiprocessors, shared_memory
from turboquant.ops.unpack.kernel import decode_fields, load_codes
from turboquant.ops.unpack.kernel import tables as decoder_tables


@dataclass(frozen=True)
class Launch:
    """How `_attend_split` is compiled and spread.

    Attributes:
        rows: query rows of a program, at least 16. swap: tokens are the rows of the products that give scores.
        warps, stages: of a program. programs: wanted for each multiprocessor. registers: most of a thread, 0 for what
            the compiler takes. Few query rows of coded tokens (see `fragments.py`) heed the last two; the others shape
            their tail alone.
    """

    rows: int
    swap: bool
    warps: int
    stages: int
    programs: int
    registers: int = 0


# Swapped tiles of 8 warps gave wrong answers with a key bias (Triton 3.6, H100).
# By capability (0 = any other), query rows up to, and widest head up to; written by scripts/tune_kernels.py.
_LAUNCHES: dict[int, list[tuple[int, int, Launch]]] = {
    90: [
        (8, 128, Launch(rows=16, swap=True, warps=4, stages=2, programs=3, registers=168)),
        (8, 256, Launch(rows=16, swap=True, warps=4, stages=2, programs=2, registers=0)),
        (1 << 30, 128, Launch(rows=16, swap=True, warps=4, stages=3, programs=3, registers=0)),
        (1 << 30, 256, Launch(rows=16, swap=True, warps=4, stages=2, programs=2, registers=0)),
    ],
    0: [
        (8, 128, Launch(rows=16, swap=True, warps=4, stages=2, programs=3, registers=168)),
        (8, 256, Launch(rows=16, swap=True, warps=4, stages=2, programs=2, registers=0)),
        (1 << 30, 256, Launch(rows=16, swap=True, warps=4, stages=2, programs=2, registers=0)),
    ],
}

# Triton's interpreter does not run assembly; a test that makes it do so sets this.
RUNS_ASSEMBLY = not is_interpreted()

# From this compute capability on a launch can begin while the one before it ends.
_OVERLAPS_FROM = 90

# Coordinates of a row that one program rotates, or turns back.
_CHUNK = 32

# A share of fewer blocks costs more in merging than it gains in parallel.
_LEAST_BLOCKS = 2

# As many blocks take about as long as 64 slots of the tail [H100: 3 to 8]. Where programs have more, those of the tail
# take blocks as well.
_TAIL_BLOCKS = 5


@triton.jit
def _share(split, splits, tails, blocks, fewer):
    """The first of `blocks` that a program takes, and the one behind its last; each of the last `tails` programs takes
    that many `fewer`.
    """
    alone = tl.maximum(splits - tails, 1)
    share = (blocks + alone - 1) // alone
    if share > fewer:
        share = tl.maximum((blocks + (splits - alone) * fewer + splits - 1) // splits, fewer)
    first = tl.minimum(split, alone) * share + tl.maximum(split - alone, 0) * (share - tl.minimum(fewer, share))
    own = tl.where(split < alone, share, share - tl.minimum(fewer, share))
    return first, tl.minimum(first + own, blocks)


@triton.jit
def _scale(base, IS_CODED: tl.constexpr, n):
    """The scales of 64 coded vectors, float32; nothing of others."""
    scale = n
    if IS_CODED:
        scale = tl.load(base.to(tl.pointer_type(tl.float16)) + n).to(tl.float32)
    return scale


@triton.jit
def _add_values(
    acc0,
    acc1,
    acc2,
    acc3,
    shrink,
    weights,
    values_at,
    value_planes,
    n,
    value_tail,
    centroids,
    registers,
    DIM: tl.constexpr,
    QUARTER: tl.constexpr,
    QUARTER_PADDED: tl.constexpr,
    PLANES: tl.constexpr,
    IS_MIXED: tl.constexpr,
    WARPS: tl.constexpr,
    ON_GPU: tl.constexpr,
):
    """acc * shrink + weights @ values of a block, quarter by quarter; weights [R, 64] float32 or the values' dtype."""
    if PLANES > 0:
        a, y1, y2 = load_codes(values_at + 128, value_planes, n, QUARTER, QUARTER_PADDED, PLANES, IS_MIXED)
        v0, v1, v2, v3 = decode_fields(
            a, y1, y2, value_planes, centroids, registers, QUARTER, QUARTER_PADDED, PLANES, WARPS, ON_GPU
        )
    else:
        plain = values_at.to(value_tail.dtype)
        v0, v1, v2, v3 = plain_quarters(plain, DIM, n, n >= 0, QUARTER, QUARTER_PADDED)
    weights = weights.to(v0.dtype)
    acc0 = dot(weights, v0, acc0 * shrink[:, None], ON_GPU)
    acc1 = dot(weights, v1, acc1 * shrink[:, None], ON_GPU)
    acc2 = dot(weights, v2, acc2 * shrink[:, None], ON_GPU)
    acc3 = dot(weights, v3, acc3 * shrink[:, None], ON_GPU)
    return acc0, acc1, acc2, acc3


@triton.jit
def _attend_blocks(
    anchor,
    entries,
    first,
    last,
    head,
    sinks,
    key_tail,
    value_tail,
    q0,
    q1,
    q2,
    q3,
    row_scale,
    bias_scale,
    constant,
    coefficients,
    is_row,
    frequencies,
    bias_table,
    position,
    softcap,
    skip_below,
    centroids,
    registers,
    KEY_DIM: tl.constexpr,
    KEY_QUARTER: tl.constexpr,
    KEY_QUARTER_PADDED: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_QUARTER: tl.constexpr,
    VALUE_QUARTER_PADDED: tl.constexpr,
    KEY_PLANES: tl.constexpr,
    VALUE_PLANES: tl.constexpr,
    KEY_BYTES: tl.constexpr,
    VALUE_BYTES: tl.constexpr,
    IS_MIXED: tl.constexpr,
    HAS_MEANS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PAIRS_PADDED: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    SKIPS: tl.constexpr,
    ROWS: tl.constexpr,
    SWAP: tl.constexpr,
    WARPS: tl.constexpr,
    ON_GPU: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The blocks [first, last) of `entries`; q0 to q3 [ROWS, KEY_QUARTER_PADDED] float32."""
    n = tl.arange(0, 64)
    all_held = n >= 0
    top = tl.full((ROWS,), -1e30, tl.float32)
    # by token of a block: summed over them once, behind the loop
    masses = tl.zeros((ROWS, 64), tl.float32)
    acc0 = tl.zeros((ROWS, VALUE_QUARTER_PADDED), tl.float32)
    acc1 = acc0
    acc2 = acc0
    acc3 = acc0
    h0 = q0.to(tl.float16)
    h1 = q1.to(tl.float16)
    h2 = q2.to(tl.float16)
    h3 = q3.to(tl.float16)
    if HAS_BIAS:
        # the query turned back to the first token of the block, block after block, meets one table of 64 angles
        i = tl.arange(0, PAIRS_PADDED)
        frequency = tl.load(frequencies + i)
        along_cos = tl.load(coefficients[:, None] + i[None, :], mask=is_row[:, None], other=0)
        along_sin = tl.load(coefficients[:, None] + PAIRS_PADDED + i[None, :], mask=is_row[:, None], other=0)
        cos, sin = turned((sinks + 64 * first).to(tl.int64), frequency)
        cos_step, sin_step = turned(tl.full((1,), 64, tl.int64), frequency)
        along_cos, along_sin = turned_back(along_cos, along_sin, cos[None, :], sin[None, :])
    for block in tl.range(first, last, num_stages=STAGES):
        entry = tl.load(entries + block)
        keys_at, values_at, key_planes, value_planes = place(
            anchor, entry, head, KEY_BYTES, VALUE_BYTES, KEY_QUARTER, VALUE_QUARTER, KEY_PLANES, VALUE_PLANES, IS_MIXED
        )
        key_scale = _scale(keys_at, KEY_PLANES > 0, n)
        value_scale = _scale(values_at, VALUE_PLANES > 0, n)
        s = no_scores(ROWS, SWAP)
        if KEY_PLANES > 0:
            a, y1, y2 = load_codes(
                keys_at + (128 + (2 * KEY_DIM if HAS_MEANS else 0)),
                key_planes,
                n,
                KEY_QUARTER,
                KEY_QUARTER_PADDED,
                KEY_PLANES,
                IS_MIXED,
            )
            k0, k1, k2, k3 = decode_fields(
                a, y1, y2, key_planes, centroids, registers, KEY_QUARTER, KEY_QUARTER_PADDED, KEY_PLANES, WARPS, ON_GPU
            )
            s = add_scores(s, h0, k0, SWAP, ON_GPU)
            s = add_scores(s, h1, k1, SWAP, ON_GPU)
            s = add_scores(s, h2, k2, SWAP, ON_GPU)
            s = add_scores(s, h3, k3, SWAP, ON_GPU)
            s = by_row(s, SWAP) * key_scale[None, :]
            if HAS_MEANS:
                by_mean = q0 * mean_quarter(keys_at, True, KEY_QUARTER, KEY_QUARTER_PADDED, 0)
                by_mean += q1 * mean_quarter(keys_at, True, KEY_QUARTER, KEY_QUARTER_PADDED, 1)
                by_mean += q2 * mean_quarter(keys_at, True, KEY_QUARTER, KEY_QUARTER_PADDED, 2)
                by_mean += q3 * mean_quarter(keys_at, True, KEY_QUARTER, KEY_QUARTER_PADDED, 3)
                s += tl.sum(by_mean, 1)[:, None]
        else:
            plain = keys_at.to(key_tail.dtype)
            k0, k1, k2, k3 = plain_quarters(plain, KEY_DIM, n, all_held, KEY_QUARTER, KEY_QUARTER_PADDED)
            s = add_scores_dense(s, q0, k0, SWAP, ON_GPU)
            s = add_scores_dense(s, q1, k1, SWAP, ON_GPU)
            s = add_scores_dense(s, q2, k2, SWAP, ON_GPU)
            s = add_scores_dense(s, q3, k3, SWAP, ON_GPU)
            s = by_row(s, SWAP)
        s = s * row_scale[:, None]
        if HAS_BIAS:
            both = tl.reshape(tl.join(along_cos, along_sin), (ROWS, 2 * PAIRS_PADDED))
            high, low = high_and_low(both, tl.float16)
            terms = add_scores(no_scores(ROWS, SWAP), high, table_of_block(bias_table, 1, PAIRS_PADDED), SWAP, ON_GPU)
            tl.debug_barrier()  # so that both parts of the table take the same shared memory
            turns = table_of_block(bias_table, 0, PAIRS_PADDED)
            terms = add_scores(terms, low, turns, SWAP, ON_GPU)
            terms = add_scores(terms, high, turns, SWAP, ON_GPU)
            s += by_row(terms, SWAP) * bias_scale[:, None] + constant[:, None]
            along_cos, along_sin = turned_back(along_cos, along_sin, cos_step[None, :], sin_step[None, :])
        s = capped(s, softcap, HAS_SOFTCAP)
        if IS_CAUSAL:
            s = tl.where((sinks + 64 * block + n)[None, :] <= position[:, None], s, float("-inf"))

        if VALUE_PLANES > 0:
            # a value's scale joins the exponent: weights are at most 1 and keep their digits in float16
            # in powers of two, which are exact to divide by; NaN and infinity make NaN of the weights
            power = (value_scale.to(tl.int32, bitcast=True) >> 23) & 255
            power = tl.minimum(tl.maximum(power, 127 - 24), 254)
            inverse = ((254 - power) << 23).to(tl.float32, bitcast=True)
            exponent = (power - 127).to(tl.float32)
            s += exponent[None, :]
        new_top = tl.maximum(top, tl.max(s, 1))
        shrink = tl.exp2(top - new_top)
        top = new_top
        weights = tl.exp2(s - new_top[:, None])
        if VALUE_PLANES > 0:
            masses = masses * shrink[:, None] + weights * inverse[None, :]
            weights = weights * (value_scale * inverse)[None, :]
        else:
            masses = masses * shrink[:, None] + weights
        # no more than the threshold of the largest weight so far, in every real row
        if SKIPS and tl.max(tl.max(tl.where(is_row[:, None], weights, 0.0), 1), 0) <= skip_below:
            acc0 *= shrink[:, None]
            acc1 *= shrink[:, None]
            acc2 *= shrink[:, None]
            acc3 *= shrink[:, None]
        else:
            acc0, acc1, acc2, acc3 = _add_values(
                acc0,
                acc1,
                acc2,
                acc3,
                shrink,
                weights,
                values_at,
                value_planes,
                n,
                value_tail,
                centroids,
                registers,
                VALUE_DIM,
                VALUE_QUARTER,
                VALUE_QUARTER_PADDED,
                VALUE_PLANES,
                IS_MIXED,
                WARPS,
                ON_GPU,
            )
    return top, tl.sum(masses, 1), acc0, acc1, acc2, acc3


@triton.jit
def _attend_tail(
    key_tail,
    value_tail,
    first_slot,
    end_slot,
    slots,
    sinks,
    length,
    blocks,
    q,
    at,
    row_scale,
    bias_scale,
    constant,
    coefficients,
    is_row,
    frequencies,
    position,
    softcap,
    terms,
    KEY_DIM: tl.constexpr,
    KEY_QUARTER: tl.constexpr,
    KEY_QUARTER_PADDED: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_QUARTER: tl.constexpr,
    VALUE_QUARTER_PADDED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    READS_TERMS: tl.constexpr,
    PAIRS_PADDED: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    ROWS: tl.constexpr,
    SWAP: tl.constexpr,
    ON_GPU: tl.constexpr,
    PIECES: tl.constexpr,
):
    """64 slots of one head's tail, before `end_slot`: sinks, or of the ring of recent tokens behind them. key_tail,
    value_tail: of that head.

    q: rotated queries, of which rows `at`. terms: [ROWS] pointers to what `store_bias_of_tail` has found for slot 0,
    where READS_TERMS. PIECES: see `_tail_pieces`. Returns tops, masses, and sums by piece.
    """
    slot = first_slot + tl.arange(0, 64)
    token, in_ring = token_of(slot, slots, sinks, length)
    is_recent = (slot >= sinks) & (slot < tl.where(length > sinks, slots, 0)) & (in_ring >= 64 * blocks)
    is_held = (((slot < sinks) & (slot < length)) | is_recent) & (slot < end_slot)
    s = no_scores(ROWS, SWAP)
    for piece in tl.static_range(0, PIECES):
        queries = rotated_piece(q, at, is_row, KEY_QUARTER_PADDED, piece, PIECES)
        keys = plain_piece(key_tail, KEY_DIM, slot, is_held, KEY_QUARTER, KEY_QUARTER_PADDED, piece, PIECES)
        s = add_scores_dense(s, queries, keys, SWAP, ON_GPU)
        if PIECES > 1:
            tl.debug_barrier()
    s = by_row(s, SWAP) * row_scale[:, None]
    if HAS_BIAS:
        if READS_TERMS:
            s += tl.load(terms[:, None] + slot[None, :], mask=is_row[:, None] & is_held[None, :], other=0)
        else:
            bias = bias_of_tokens(
                token, coefficients, is_row, frequencies, no_scores(ROWS, SWAP), PAIRS_PADDED, SWAP, ON_GPU
            )
            s += by_row(bias, SWAP) * bias_scale[:, None] + constant[:, None]
    s = capped(s, softcap, HAS_SOFTCAP)
    s = tl.where(is_held[None, :] & (token[None, :] <= position[:, None]), s, float("-inf"))
    top = tl.maximum(tl.max(s, 1), -1e30)
    weights = tl.exp2(s - top[:, None])
    mass = tl.sum(weights, 1)
    weights = weights.to(value_tail.dtype.element_ty)
    none = tl.zeros((ROWS, 4 * VALUE_QUARTER_PADDED // PIECES), tl.float32)
    sums = ()
    for piece in tl.static_range(0, PIECES):
        values = plain_piece(value_tail, VALUE_DIM, slot, is_held, VALUE_QUARTER, VALUE_QUARTER_PADDED, piece, PIECES)
        sums = sums + (dot(weights, values, none, ON_GPU),)
        if PIECES > 1:
            tl.debug_barrier()
    return (top, mass) + sums


@triton.jit
def _store_parts(
    out_top,
    out_mass,
    out_acc,
    to,
    is_row,
    found,
    VALUE_DIM: tl.constexpr,
    VALUE_QUARTER: tl.constexpr,
    VALUE_QUARTER_PADDED: tl.constexpr,
    PIECES: tl.constexpr,
):
    """What `_attend_blocks` or `_attend_tail` has found, its sums in so many pieces, at the rows `to`."""
    tl.store(out_top + to, found[0], mask=is_row)
    tl.store(out_mass + to, found[1], mask=is_row)
    parts = out_acc + to * VALUE_DIM
    for piece in tl.static_range(0, PIECES):
        column, is_real = columns_of_piece(VALUE_QUARTER, VALUE_QUARTER_PADDED, piece, PIECES)
        tl.store(parts[:, None] + column[None, :], found[2 + piece], mask=is_row[:, None] & is_real[None, :])


# A kernel for every value of these would be compiled in the middle of a generation.
@triton.jit(
    do_not_specialize=[
        "table_stride",
        "groups",
        "heads_per_group",
        "tokens",
        "sinks",
        "window",
        "slots",
        "splits",
        "tail_blocks",
        "terms_stride",
        "terms_means",
    ]
)
def _attend_split(
    anchor,
    table,
    table_stride,
    lengths,
    coded,
    key_tail,
    value_tail,
    q,
    halves,
    factor,
    coefficients,
    frequencies,
    bias_table,
    bias_series,
    centroids,
    registers,
    out_top,
    out_mass,
    out_acc,
    groups,
    heads_per_group,
    tokens,
    sinks,
    window,
    slots,
    splits,
    tail_blocks,
    scale,
    bias_scaling,
    softcap,
    skip_below,
    terms,
    terms_stride,
    terms_means,
    KEY_DIM: tl.constexpr,
    KEY_QUARTER: tl.constexpr,
    KEY_QUARTER_PADDED: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_QUARTER: tl.constexpr,
    VALUE_QUARTER_PADDED: tl.constexpr,
    KEY_PLANES: tl.constexpr,
    VALUE_PLANES: tl.constexpr,
    KEY_BYTES: tl.constexpr,
    VALUE_BYTES: tl.constexpr,
    IS_MIXED: tl.constexpr,
    HAS_MEANS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PAIRS_PADDED: tl.constexpr,
    FAST: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    SKIPS: tl.constexpr,
    ROWS: tl.constexpr,
    SWAP: tl.constexpr,
    WARPS: tl.constexpr,
    ON_GPU: tl.constexpr,
    STAGES: tl.constexpr,
    IN_FRAGMENTS: tl.constexpr,
    TAIL_PIECES: tl.constexpr,
    UNIT_BYTES: tl.constexpr,
    UNITS: tl.constexpr,
    HELD_BYTES: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """A share of the tokens of one row of the batch, one KV head, ROWS query rows: top score, mass, weighted sum.

    The first `splits` programs take blocks, each of the last ones 64 slots of the sinks and the recent window: of some
    more programs, or, where all programs take blocks, of those that get fewer. The weight of a token is its value's
    scale times exp(score); the top is that of the weights.
    """
    split = tl.program_id(0)
    bg = tl.program_id(1)
    b = bg // groups
    rows = heads_per_group * tokens
    if IN_FRAGMENTS and HAS_BIAS:
        # which no launch writes
        touched = touch_tables(frequencies, bias_table, bias_series, PAIRS_PADDED, FAST)
    # all else waits for memory, which is asked for at once: the launch before is short
    join_launches(OVERLAPS)
    if IN_FRAGMENTS and HAS_BIAS:
        own_rows = coefficients + bg.to(tl.int64) * rows * (2 * PAIRS_PADDED)
        touched ^= touch_coefficients(own_rows, rows, PAIRS_PADDED)
    r = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    is_row = r < rows
    at = bg.to(tl.int64) * rows + r
    length = tl.load(lengths + b)
    blocks = tl.maximum(tl.load(coded + b), (length - sinks - window) // 64)
    ring_tails = (slots - sinks + 63) // 64
    tails = ring_tails + (sinks + 63) // 64
    tail = split - (tl.num_programs(0) - tails)
    # slots of the ring, then sinks: positions in a row, but for where the ring's turn ends
    first_slot = tl.where(tail < ring_tails, sinks + tail * 64, (tail - ring_tails) * 64)
    end_slot = tl.where(tail < ring_tails, slots, sinks)
    to = bg.to(tl.int64) * (splits + tails) * rows
    # a query that was padding sees the first token
    position = tl.maximum(length - tokens + r % tokens, 0)
    has_both = tl.num_programs(0) == splits
    first, last = _share(split, splits, tl.where(has_both, tails, 0), blocks, tl.where(has_both, tail_blocks, 0))
    entries = table + b.to(tl.int64) * table_stride
    KEYS_AT: tl.constexpr = 128 + (2 * KEY_DIM if HAS_MEANS else 0)
    if IN_FRAGMENTS:
        # of thread (g, t) row g, then rows 2 t and 2 t + 1, see `attend_fragments`
        thread = tl.arange(0, 32 * 4)
        first_row = bg.to(tl.int64) * rows
        is_own = thread % 32 // 4 < rows
        own = first_row + tl.where(is_own, thread % 32 // 4, 0)
        even = tl.minimum(thread % 4 * 2, rows - 1)
        odd = tl.minimum(thread % 4 * 2 + 1, rows - 1)
        own_coefficients = coefficients + own * (2 * PAIRS_PADDED)
        own_scale, _, _ = row_factors(factor, own, is_own, scale, bias_scaling, HAS_BIAS, HAS_SOFTCAP)
        even_scale, even_bias_scale, even_constant = row_factors(
            factor, first_row + even, True, scale, bias_scaling, HAS_BIAS, HAS_SOFTCAP
        )
        odd_scale, odd_bias_scale, odd_constant = row_factors(
            factor, first_row + odd, True, scale, bias_scaling, HAS_BIAS, HAS_SOFTCAP
        )
        begun = begin_units(
            anchor,
            entries,
            first,
            last,
            bg % groups,
            KEYS_AT,
            KEY_BYTES,
            VALUE_BYTES,
            KEY_QUARTER,
            VALUE_QUARTER,
            KEY_PLANES,
            VALUE_PLANES,
            IS_MIXED,
            HAS_BIAS,
            UNIT_BYTES,
            UNITS,
            HELD_BYTES,
        )
        means = ()
        if HAS_MEANS:
            means = load_means(
                anchor,
                entries,
                first,
                last,
                bg % groups,
                KEY_DIM,
                VALUE_QUARTER,
                KEY_PLANES,
                VALUE_PLANES,
                KEY_BYTES,
                VALUE_BYTES,
                IS_MIXED,
            )
        if tail >= 0:
            ask_for_tail(key_tail + bg.to(tl.int64) * slots * KEY_DIM, first_slot, end_slot, KEY_DIM)
            ask_for_tail(value_tail + bg.to(tl.int64) * slots * VALUE_DIM, first_slot, end_slot, VALUE_DIM)
        if HAS_BIAS:
            keep_touched(touched, frequencies)
        # both are multiplied together
        constants = (
            even_constant / tl.where(even_bias_scale != 0, even_bias_scale, 1.0),
            odd_constant / tl.where(odd_bias_scale != 0, odd_bias_scale, 1.0),
        )
        even_terms = terms + (first_row + even) * terms_stride
        odd_terms = terms + (first_row + odd) * terms_stride

    if split < splits:
        to_part = to + split * rows
        if IN_FRAGMENTS:
            attend_fragments(
                begun,
                anchor,
                entries,
                first,
                last,
                bg % groups,
                sinks,
                halves + own * (4 * KEY_QUARTER_PADDED),
                rows,
                (even_scale, odd_scale),
                (
                    tl.maximum(length - tokens + even % tokens, 0),
                    tl.maximum(length - tokens + odd % tokens, 0),
                ),
                softcap,
                (even_terms + terms_means, odd_terms + terms_means),
                (q + own * (4 * KEY_QUARTER_PADDED), own_scale, terms + own * terms_stride + terms_means, means),
                (own_coefficients, frequencies, bias_series, constants),
                bias_table,
                (even_bias_scale, odd_bias_scale),
                registers,
                out_top + to_part,
                out_mass + to_part,
                out_acc + to_part * VALUE_DIM,
                KEY_DIM,
                KEY_QUARTER,
                VALUE_DIM,
                VALUE_QUARTER,
                KEY_PLANES,
                VALUE_PLANES,
                KEY_BYTES,
                VALUE_BYTES,
                IS_MIXED,
                HAS_MEANS,
                HAS_BIAS,
                HAS_SOFTCAP,
                IS_CAUSAL,
                PAIRS_PADDED,
                FAST,
                KEYS_AT,
                UNIT_BYTES,
                UNITS,
            )
        else:
            row_scale, bias_scale, constant = row_factors(
                factor, at, is_row, scale, bias_scaling, HAS_BIAS, HAS_SOFTCAP
            )
            q0, q1, q2, q3 = rotated_quarters(q, at, is_row, KEY_QUARTER_PADDED)
            found = _attend_blocks(
                anchor,
                entries,
                first,
                last,
                bg % groups,
                sinks,
                key_tail,
                value_tail,
                q0,
                q1,
                q2,
                q3,
                row_scale,
                bias_scale,
                constant,
                coefficients + at * (2 * PAIRS_PADDED),
                is_row,
                frequencies,
                bias_table,
                position,
                softcap,
                skip_below,
                centroids,
                registers,
                KEY_DIM,
                KEY_QUARTER,
                KEY_QUARTER_PADDED,
                VALUE_DIM,
                VALUE_QUARTER,
                VALUE_QUARTER_PADDED,
                KEY_PLANES,
                VALUE_PLANES,
                KEY_BYTES,
                VALUE_BYTES,
                IS_MIXED,
                HAS_MEANS,
                HAS_BIAS,
                PAIRS_PADDED,
                HAS_SOFTCAP,
                IS_CAUSAL,
                SKIPS,
                ROWS,
                SWAP,
                WARPS,
                ON_GPU,
                STAGES,
            )
            _store_parts(
                out_top,
                out_mass,
                out_acc,
                to_part + r,
                is_row,
                found,
                VALUE_DIM,
                VALUE_QUARTER,
                VALUE_QUARTER_PADDED,
                4,
            )
    if tail >= 0:
        if IN_FRAGMENTS and HAS_BIAS:
            store_bias_of_tail(
                first_slot,
                end_slot,
                slots,
                sinks,
                length,
                own_coefficients,
                frequencies,
                bias_table,
                bias_series,
                constants,
                (even_bias_scale, odd_bias_scale),
                (even_terms, odd_terms),
                rows,
                PAIRS_PADDED,
                FAST,
            )
            tl.debug_barrier()  # other threads read what these have stored
        row_scale, bias_scale, constant = row_factors(factor, at, is_row, scale, bias_scaling, HAS_BIAS, HAS_SOFTCAP)
        found = _attend_tail(
            key_tail + bg.to(tl.int64) * slots * KEY_DIM,
            value_tail + bg.to(tl.int64) * slots * VALUE_DIM,
            first_slot,
            end_slot,
            slots,
            sinks,
            length,
            blocks,
            q,
            at,
            row_scale,
            bias_scale,
            constant,
            coefficients + at * (2 * PAIRS_PADDED),
            is_row,
            frequencies,
            position,
            softcap,
            terms + at * terms_stride,
            KEY_DIM,
            KEY_QUARTER,
            KEY_QUARTER_PADDED,
            VALUE_DIM,
            VALUE_QUARTER,
            VALUE_QUARTER_PADDED,
            HAS_BIAS,
            IN_FRAGMENTS and HAS_BIAS,
            PAIRS_PADDED,
            HAS_SOFTCAP,
            ROWS,
            SWAP,
            ON_GPU,
            TAIL_PIECES,
        )
        _store_parts(
            out_top,
            out_mass,
            out_acc,
            to + (splits + tail) * rows + r,
            is_row,
            found,
            VALUE_DIM,
            VALUE_QUARTER,
            VALUE_QUARTER_PADDED,
            TAIL_PIECES,
        )


def launch_for(device: torch.device, rows: int, width: int, *, in_fragments: bool) -> Launch:
    """The entry of the table for a number of query rows of one KV head and a head width."""
    entries = _LAUNCHES.get(capability(device), _LAUNCHES[0])
    if not in_fragments:
        rows = max(rows, FRAGMENT_ROWS + 1)  # whose entries are for `attend_fragments`
    return next((launch for most, widest, launch in entries if rows <= most and width <= widest), entries[-1][2])


def _fits_fragments(packed: PackedTokens, rows: int, pairs: int, *, skips: bool) -> bool:
    """Whether `attend_fragments` serves this call."""
    sides = (packed.layout.key, packed.layout.value)
    return (
        RUNS_ASSEMBLY
        and rows <= FRAGMENT_ROWS
        and pairs in PAIRS
        and not skips
        and all(side.num_planes > 0 and side.dim // 4 in QUARTERS and side.dim % 4 == 0 for side in sides)
        and held_bytes(2, packed.layout) + triton_bytes(packed.key_tail.dtype.itemsize) <= SHARED_BYTES
    )


def _tail_pieces(quarter: int) -> int:
    """In how many the tail is multiplied, of 64 coordinates each: more at once take more shared memory than the blocks
    leave, and each waits for the one before.
    """
    return max(1, 4 * quarter // 64)


def _padded_quarter(dim: int) -> int:
    """A quarter of a head as the tensor cores take it: a power of two, and at least 16."""
    return max(16, int(triton.next_power_of_2(dim // 4)))


def attend_packed(
    q: torch.Tensor,
    packed: PackedTokens,
    key_matrix: torch.Tensor,
    value_matrix: torch.Tensor,
    bias: BiasTerms | None,
    *,
    scale: float,
    softcap: float | None,
    sink_logits: torch.Tensor | None,
    most_blocks: int,
    is_mixed: bool,
    skip_below: float = 0.0,
    launch: Launch | None = None,
) -> torch.Tensor:
    """See `turboquant.ops.attend.attend_packed`."""
    layout = packed.layout
    batch, heads, tokens, key_dim = q.shape
    groups, value_dim, slots = layout.heads, layout.value.dim, packed.key_tail.shape[2]
    heads_per_group = heads // groups
    rows = heads_per_group * tokens
    device = q.device
    key_quarter = _padded_quarter(key_dim)
    value_quarter = _padded_quarter(value_dim)
    rotated = torch.empty(batch * groups * rows, 4 * key_quarter, dtype=torch.float32, device=device)
    factor = torch.empty(batch * groups * rows, 4, dtype=torch.float32, device=device)
    tables = bias.tables if bias is not None else None
    pairs_padded = tables.frequencies.shape[0] if tables is not None else 16
    in_fragments = _fits_fragments(packed, rows, pairs_padded, skips=skip_below > 0)
    halves = torch.empty_like(rotated, dtype=torch.float16) if in_fragments else rotated
    overlaps = capability(device) >= _OVERLAPS_FROM
    launch = launch or launch_for(device, rows, max(key_dim, value_dim), in_fragments=in_fragments)
    coefficients = (
        torch.empty(batch * groups * rows, 2, pairs_padded, dtype=torch.float32, device=device)
        if bias is not None
        else factor
    )
    overlapping = {"OVERLAPS": overlaps, "launch_pdl": overlaps}
    # a program more where there is a bias
    prepare_rows[(rows, batch * groups, -(-4 * key_quarter // _CHUNK) + (bias is not None))](
        q,
        q.stride(0),
        q.stride(1),
        q.stride(2),
        key_matrix,
        bias.bias if bias is not None else factor,
        bias.lengths if bias is not None else factor,
        rotated,
        halves,
        factor,
        coefficients,
        packed.table,
        packed.table.stride(0),
        min(most_blocks, packed.table.shape[1]),
        groups,
        heads_per_group,
        tokens,
        DIM=key_dim,
        DIM_PADDED=triton.next_power_of_2(key_dim),
        QUARTER=key_dim // 4,
        QUARTER_PADDED=key_quarter,
        HAS_HALVES=in_fragments,
        PAIRS=tables.pairs if tables is not None else -1,
        PAIRS_PADDED=pairs_padded,
        INTERLEAVED=bias is not None and bias.interleaved,
        CHUNK=_CHUNK,
        ON_GPU=not is_interpreted(),
        **overlapping,
    )
    tails = -(-(slots - packed.sinks) // BLOCK_TOKENS) - (-packed.sinks // BLOCK_TOKENS)
    sides: dict[str, Any] = {
        "KEY_DIM": key_dim,
        "KEY_QUARTER": key_dim // 4,
        "KEY_QUARTER_PADDED": key_quarter,
        "VALUE_QUARTER": value_dim // 4,
        "KEY_PLANES": layout.key.num_planes,
        "VALUE_PLANES": layout.value.num_planes,
        # of the sides of a record, but for the 1-bit planes of coded ones
        "KEY_BYTES": layout.key.nbytes - sum(layout.key.plane_bytes[1:]),
        "VALUE_BYTES": layout.value.nbytes - sum(layout.value.plane_bytes[1:]),
        "IS_MIXED": is_mixed,
        "HAS_MEANS": layout.key.mean_bytes > 0,
        "HAS_BIAS": bias is not None,
        "PAIRS_PADDED": pairs_padded,
        "HAS_SOFTCAP": softcap is not None,
        "ON_GPU": not is_interpreted(),
    }
    frequencies, bias_table, bias_series = packed.table, factor, factor
    if tables is not None:
        frequencies, bias_series = tables.frequencies, tables.series
        bias_table = tables.spans if in_fragments else tables.turns
    bias_scaling = bias.scaling if bias is not None else 1.0
    # of a query row: what is added to the scores of the tail's slots, and of whole blocks
    terms_means = slots if bias is not None else 0
    terms_stride = terms_means + (most_blocks if layout.key.mean_bytes else 0)
    terms = factor
    if in_fragments and terms_stride:
        terms = torch.empty(batch * groups * rows, terms_stride, dtype=torch.float32, device=device)
    tiles = -(-rows // launch.rows)
    # all programs run at once: one too many would wait for the others and double the time
    units, programs = 0, launch.programs
    if in_fragments:
        programs, units = programs_and_units(
            programs, layout, triton_bytes(packed.key_tail.dtype.itemsize), shared_memory(device)
        )
    programs = programs * multiprocessors(device) // (batch * groups * tiles)
    splits = min(max(programs - tails, 1), -(-most_blocks // _LEAST_BLOCKS))
    if programs > tails and most_blocks > splits * _TAIL_BLOCKS:
        splits = programs
    else:
        programs = splits + tails
    parts = splits + tails
    top = torch.empty(batch * groups, parts, rows, dtype=torch.float32, device=device)
    mass = torch.empty_like(top)
    acc = torch.empty(batch * groups, parts, rows, value_dim, dtype=torch.float32, device=device)
    centroids, registers = decoder_tables(device)
    _attend_split[(programs, batch * groups, tiles)](
        packed.anchor,
        packed.table,
        packed.table.stride(0),
        packed.lengths,
        packed.coded,
        packed.key_tail,
        packed.value_tail,
        rotated,
        halves,
        factor,
        coefficients,
        frequencies,
        bias_table,
        bias_series,
        centroids,
        registers,
        top,
        mass,
        acc,
        groups,
        heads_per_group,
        tokens,
        packed.sinks,
        packed.window,
        slots,
        splits,
        _TAIL_BLOCKS,
        scale,
        bias_scaling,
        softcap or 1.0,
        skip_below,
        terms,
        terms_stride,
        terms_means,
        VALUE_DIM=value_dim,
        VALUE_QUARTER_PADDED=value_quarter,
        FAST=tables.fast if tables is not None else pairs_padded,
        IS_CAUSAL=tokens > 1,
        SKIPS=skip_below > 0,
        ROWS=launch.rows,
        SWAP=launch.swap,
        WARPS=FRAGMENT_WARPS if in_fragments else launch.warps,
        **sides,
        STAGES=launch.stages,
        IN_FRAGMENTS=in_fragments,
        TAIL_PIECES=_tail_pieces(max(key_quarter, value_quarter)),
        UNIT_BYTES=unit_bytes(layout),
        UNITS=units,
        HELD_BYTES=held_bytes(units, layout),
        num_warps=FRAGMENT_WARPS if in_fragments else launch.warps,
        num_stages=launch.stages,
        **overlapping,
        **({"maxnreg": launch.registers} if launch.registers else {}),
    )
    out = torch.empty(batch, tokens, heads, value_dim, dtype=q.dtype, device=device)
    merge_parts(top, mass, acc, value_matrix, sink_logits, out, by_hand=in_fragments, overlaps=overlaps)
    return out.transpose(1, 2)


def merge_parts(
    top: torch.Tensor,
    mass: torch.Tensor,
    acc: torch.Tensor,
    matrix: torch.Tensor,
    sink_logits: torch.Tensor | None,
    out: torch.Tensor,
    *,
    by_hand: bool,
    overlaps: bool,
) -> None:
    """The last launch: parts joined by log-sum-exp and turned back.

    Args:
        top, mass: [B G, parts, rows] float32, of each part the top score in base 2 and the sum of the weights below it;
            acc: [.., Dv], their weighted values, rotated. rows: H / G T.
        matrix: [Dv, Dv] float32. sink_logits: [H], or None.
        out: [B, T, H, Dv], written.
        by_hand: by `merge_few_rows` where it serves the width. overlaps: see `join_launches`.
    """
    programs, parts, rows = top.shape
    batch, tokens, _, dim = out.shape
    operands = (
        top,
        mass,
        acc,
        matrix,
        sink_logits if sink_logits is not None else top,
        out,
        out.stride(0),
        out.stride(2),
        out.stride(1),
        programs // batch,
        rows // tokens,
        tokens,
        parts,
    )
    options: dict[str, Any] = {"DIM": dim, "HAS_SINK_LOGITS": sink_logits is not None}
    options |= {"OVERLAPS": overlaps, "launch_pdl": overlaps}
    if by_hand and dim <= MERGED_DIM:
        # registers: beside programs of the launch before
        merge_few_rows[(rows, programs, 2)](*operands, **options, num_warps=dim // 8, maxnreg=64)
    else:
        merge_rows[(rows, programs, -(-dim // _CHUNK))](
            *operands,
            **options,
            DIM_PADDED=triton.next_power_of_2(dim),
            CHUNK=_CHUNK,
            TILE=64 if dim <= 128 else 32,
            num_warps=8,
        )
