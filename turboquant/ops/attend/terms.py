"""Key terms of up to 8 query rows, found before the planes are read: block means and the key bias.

Within a span, quickly turning pairs of the bias meet a table of their angles, in a product of matrices; what the slow
ones add is a polynomial of the position, of degree 6 (BiasTerms.fast says where they begin).

Every tensor has one element for each thread (see lanes.py). A warp takes two spans of 128 tokens at a time: rows g of a
product are the query rows turned back to the first token of one span, rows g + 8 those of the next.
"""

import triton
import triton.language as tl

from turboquant.ops.attend.bias import PAIRS_TOGETHER, SPAN_TOKENS
from turboquant.ops.attend.lanes import (
    eight_bytes,
    high_and_low,
    multiply,
    names,
    of_first_two,
    piece,
    sum_of_row,
    two_floats,
)
from turboquant.ops.attend.parts import row_factors, turned, turned_back

SPAN = tl.constexpr(SPAN_TOKENS)
PAIRS = (16, 32, 64)  # padded, that are served: operands of more would not fit the registers


def _bias_scores(fast: int, pairs: int) -> tuple[str, str]:
    """Key bias, of the first `fast` of a table's pairs, of 8 tokens each of two spans: assembly and its constraints.

    Outputs: of tokens 2 t and 2 t + 1 in row g, of the first span, then of the second. Inputs: address of what this
    thread reads of the table for these tokens; for each product the four words of its first operand, high parts, then
    low parts. Products of low parts alone are left out: they are below float32's digits of the others.
    """
    products = fast // 8
    a = names(5, 8 * products)
    low_at = SPAN_TOKENS * 2 * pairs * 2  # bytes behind the high parts
    # three sums, for a product waits for the one before
    sums = [[f"c{4 * j + i}" for i in range(4)] for j in range(3)]
    lines = [".reg .b32 b<8>;", ".reg .f32 c<12>;", *(f"mov.f32 c{i}, 0f00000000;" for i in range(12))]
    for j in range(products // 2):
        for part in range(2):
            to = ", ".join(f"b{4 * part + i}" for i in range(4))
            lines.append(f"ld.global.nc.v4.b32 {{{to}}}, [$4 + {512 * j + low_at * part}];")
        for k in (2 * j, 2 * j + 1):
            high, low = a[8 * k : 8 * k + 4], a[8 * k + 4 : 8 * k + 8]
            own, own_low = (tuple(f"b{4 * part + 2 * (k % 2) + i}" for i in range(2)) for part in range(2))
            lines += [multiply(sums[0], high, own), multiply(sums[1], low, own), multiply(sums[2], high, own_low)]
    for i in range(4):
        lines += [f"add.f32 c{i + 4}, c{i + 4}, c{i + 8};", f"add.f32 ${i}, c{i}, c{i + 4};"]
    return "{\n" + "\n".join(lines) + "\n}", ",".join(["=f"] * 4 + ["l"] + ["r"] * (8 * products))


def _mean_scores(dim: int) -> tuple[str, str]:
    """Products of a query row with the means of 8 blocks: assembly and its constraints.

    Outputs: of blocks 2 t and 2 t + 1 in row g. Inputs: for each product four words of q, high and low part of one
    pair, then of the other, and two of the means.
    """
    products = dim // 16
    words = names(2, 6 * products)
    lines = [".reg .f32 c<8>;", *(f"mov.f32 c{i}, 0f00000000;" for i in range(8))]
    for k in range(products):
        own = words[6 * k : 6 * k + 6]
        # rows g + 8 of the operand are the low parts
        lines.append(multiply([f"c{4 * (k % 2) + i}" for i in range(4)], own[:4], (own[4], own[5])))
    for i in range(2):
        lines += [f"add.f32 c{i}, c{i}, c{i + 4};", f"add.f32 c{i + 2}, c{i + 2}, c{i + 6};"]
        lines.append(f"add.f32 ${i}, c{i}, c{i + 2};")
    return "{\n" + "\n".join(lines) + "\n}", ",".join(["=f"] * 2 + ["r"] * (6 * products))


_BIAS = tl.constexpr({
    (fast, pairs): _bias_scores(fast, pairs)
    for pairs in PAIRS
    for fast in range(PAIRS_TOGETHER, pairs + 1, PAIRS_TOGETHER)
})
_MEANS = tl.constexpr({(dim,): _mean_scores(dim) for dim in (64, 128, 256)})


@triton.jit
def _pairs_at(base, t, PAIRS_PADDED: tl.constexpr):
    """A thread's pairs of numbers: 4 of every 16, [.., P] float32 as a tuple."""
    own = (base + 4 * t).to(tl.pointer_type(tl.int64))
    found = ()
    for j in tl.static_range(0, PAIRS_PADDED // 16):
        a, b = two_floats(tl.load(own + 8 * j))
        c, d = two_floats(tl.load(own + 8 * j + 1))
        found = found + (a, b, c, d)
    return found


@triton.jit
def _angles(position, frequencies, t, COUNT: tl.constexpr):
    """cos and sin of a position times the frequency of each of a thread's pairs."""
    cos = ()
    sin = ()
    for k in tl.static_range(0, COUNT):
        angle = turned(position, tl.load(frequencies + 4 * t + (k // 4 * 16 + k % 4)))
        cos = cos + (angle[0],)
        sin = sin + (angle[1],)
    return cos, sin


@triton.jit
def _operands(cos, sin, next_cos, next_sin, COUNT: tl.constexpr):
    """First operands of the products: pairs of float16, of one span in rows g and of the next in rows g + 8."""
    words = ()
    for k in tl.static_range(0, COUNT, 2):
        a = high_and_low(cos[k], sin[k])
        b = high_and_low(next_cos[k], next_sin[k])
        c = high_and_low(cos[k + 1], sin[k + 1])
        d = high_and_low(next_cos[k + 1], next_sin[k + 1])
        words = words + (a[0], b[0], c[0], d[0], a[1], b[1], c[1], d[1])
    return words


@triton.jit
def _turn(cos, sin, by_cos, by_sin, COUNT: tl.constexpr):
    """Coefficients of angles that begin later."""
    turned_cos = ()
    turned_sin = ()
    for i in tl.static_range(0, COUNT):
        one_cos, one_sin = turned_back(cos[i], sin[i], by_cos[i], by_sin[i])
        turned_cos = turned_cos + (one_cos,)
        turned_sin = turned_sin + (one_sin,)
    return turned_cos, turned_sin


@triton.jit
def _slow_scores(cos, sin, turn, START: tl.constexpr, COUNT: tl.constexpr):
    """Factors of x to x^6, x the part of a span behind a token, in what a thread's pairs from START add to its score.

    turn: their angle over a span; cos * (cos(turn x) - 1) + sin * sin(turn x), both by their series.
    """
    x1 = 0.0 * cos[START]
    x2 = x1
    x3 = x1
    x4 = x1
    x5 = x1
    x6 = x1
    for k in tl.static_range(START, COUNT):
        square = turn[k - START] * turn[k - START]
        odd = sin[k] * turn[k - START]
        even = cos[k] * square
        x1 += odd
        x2 += even
        odd *= square
        even *= square
        x3 += odd
        x4 += even
        x5 += odd * square
        x6 += even * square
    return (
        sum_of_row(x1),
        sum_of_row(x2) * (-1 / 2),
        sum_of_row(x3) * (-1 / 6),
        sum_of_row(x4) * (1 / 24),
        sum_of_row(x5) * (1 / 120),
        sum_of_row(x6) * (-1 / 720),
    )


@triton.jit
def _polynomial(factors, x):
    value = factors[5] * x
    for k in tl.static_range(0, 5):
        value = (value + factors[4 - k]) * x
    return value


@triton.jit
def _sum_of(parts, START: tl.constexpr, COUNT: tl.constexpr):
    total = parts[START]
    for i in tl.static_range(START + 1, COUNT):
        total += parts[i]
    return sum_of_row(total)


@triton.jit
def _queries(q, is_row, t, DIM: tl.constexpr):
    """A rotated query row, 4 of every 16 numbers a thread: for each product of `_mean_scores` its first four words."""
    own = (q + 4 * t).to(tl.pointer_type(tl.int64))
    words = ()
    for k in tl.static_range(0, DIM // 8):
        x = two_floats(tl.load(own + (k // 2 * 8 + k % 2), mask=is_row, other=0))
        words = words + high_and_low(x[0], x[1])
    return words


@triton.jit
def _entries_of(entries, first, blocks, g):
    """Entries of blocks first to first + 3, for threads (g, t) with g below 4; of blocks that are not there 0."""
    return tl.load(entries + first + g, mask=(g < 4) & (first + g < blocks), other=0)


@triton.jit
def _load_means(anchor, entry, t, DIM: tl.constexpr):
    """A block's mean, 4 of every 16 float16 a thread. anchor: of the head; entry: 0 gives zeros."""
    mean = anchor + (entry & -16) + 128 + 8 * t
    words = ()
    for k in tl.static_range(0, DIM // 16):
        both = tl.load((mean + 32 * k).to(tl.pointer_type(tl.int64)), mask=entry != 0, other=0)
        words = words + (both.to(tl.int32), (both >> 32).to(tl.int32))
    return words


@triton.jit
def _mean_products(queries, means, g, DIM: tl.constexpr):
    """Scores of the means of four blocks in row g; queries, means: what `_queries` and `_load_means` give."""
    words = ()
    for k in tl.static_range(0, DIM // 16):
        words = words + queries[4 * k : 4 * k + 4] + means[2 * k : 2 * k + 2]
    ASSEMBLY: tl.constexpr = piece(_MEANS, 0, DIM)
    CONSTRAINTS: tl.constexpr = piece(_MEANS, 1, DIM)
    even, odd = tl.inline_asm_elementwise(
        ASSEMBLY, CONSTRAINTS, words, dtype=(tl.float32, tl.float32), is_pure=True, pack=1
    )
    m0, m2 = of_first_two(even, g)
    m1, m3 = of_first_two(odd, g)
    return m0, m1, m2, m3


@triton.jit
def _store_by_position(s0, s1, to, place, end, is_row):
    """Scores of two tokens by position, before `end`, which is even."""
    tl.store((to + place).to(tl.pointer_type(tl.int64)), eight_bytes(s0, s1), mask=is_row & (place < end))


@triton.jit
def _store_in_ring(s0, s1, to, place, ring, start, end, is_row):
    """Scores of two tokens by their slot, from `start`, which is even, to `end`."""
    tl.store(to + place % ring, s0, mask=is_row & (place >= start) & (place < end))
    tl.store(to + (place + 1) % ring, s1, mask=is_row & (place >= start) & (place + 1 < end))


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
        "out_stride",
        "rounds",
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
    spans,
    steps,
    out,
    out_stride,
    groups,
    heads_per_group,
    tokens,
    sinks,
    window,
    slots,
    scale,
    bias_scaling,
    rounds,
    KEY_DIM: tl.constexpr,
    HEAD_BYTES: tl.constexpr,
    HAS_MEANS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PAIRS_PADDED: tl.constexpr,
    QUICK: tl.constexpr,
    FAST: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    """out [B * G * rows, out_stride] float32: what is added to a token's score, blocks first, the tail's slots behind.

    The last program of a head takes the sinks, at most two spans. Each of the others takes tokens behind them, which
    are stored by position while they lie in blocks, then by their slot in the ring of recent ones: two spans, of which
    each of the 4 warps takes a quarter, or where rounds > 0 two spans for each warp, `rounds` times.
    """
    tile = tl.program_id(0)
    bg = tl.program_id(1)
    b = bg // groups
    rows = heads_per_group * tokens
    thread = tl.arange(0, 32 * 4)
    warp = thread // 32
    g = thread % 32 // 4
    t = thread % 4
    is_row = g < rows
    at = bg.to(tl.int64) * rows + g
    length = tl.load(lengths + b)
    blocks = tl.maximum(tl.load(coded + b), (length - sinks - window) // 64)
    row_scale, bias_scale, constant = row_factors(factor, at, is_row, scale, bias_scaling, HAS_BIAS, HAS_SOFTCAP)
    own = out + at * out_stride
    tail = own + (out_stride - (slots + 63) // 64 * 64)
    is_sinks = tile == tl.num_programs(0) - 1
    # tokens counted from the first behind the sinks, or from the first of all
    ring = tl.where(is_sinks, tl.maximum(sinks, 1), slots - sinks)
    to_ring = tl.where(is_sinks, tail, tail + sinks)
    count = tl.where(is_sinks, tl.minimum(sinks, length), length - sinks)
    in_blocks = tl.where(is_sinks, 0, 64 * blocks)
    shares = rounds > 0
    each = 2 * SPAN * tl.maximum(rounds, 1)
    here = tl.where(shares, 4 * each, each)
    start = tl.where(is_sinks, 0, tile * here)
    in_blocks_only = start + here <= in_blocks
    now = start + tl.where(shares, warp * each, 0)
    # of the 16 times 8 tokens of a span
    first = tl.where(shares, 0, 4 * warp)
    COUNT: tl.constexpr = PAIRS_PADDED // 4

    if start < count:
        cos = ()
        sin = ()
        if HAS_MEANS:
            entries = table + b.to(tl.int64) * table_stride
            held = tl.where(is_sinks, 0, blocks)
            entry = _entries_of(entries, now // 64, held, g)
        if HAS_BIAS:
            row = coefficients + tl.where(is_row, at, bg.to(tl.int64) * rows) * (2 * PAIRS_PADDED)
            cos = _pairs_at(row, t, PAIRS_PADDED)
            sin = _pairs_at(row + PAIRS_PADDED, t, PAIRS_PADDED)
            first_cos, first_sin = _angles(now + tl.where(is_sinks, 0, sinks), frequencies, t, COUNT)
            cos, sin = _turn(cos, sin, first_cos, first_sin, COUNT)
        for _ in tl.range(0, tl.maximum(rounds, 1), num_stages=1):
            m0 = row_scale * 0
            m1 = m0
            m2 = m0
            m3 = m0
            operands = ()
            if HAS_MEANS:
                # on their way while the coefficients are turned, as the next entries are while all else is done
                means = _load_means(anchor + bg % groups * HEAD_BYTES, entry, t, KEY_DIM)
                entry = _entries_of(entries, now // 64 + 4, held, g)
            if HAS_BIAS:
                step_cos = _pairs_at(steps, t, PAIRS_PADDED)
                step_sin = _pairs_at(steps + PAIRS_PADDED, t, PAIRS_PADDED)
                next_cos, next_sin = _turn(cos, sin, step_cos, step_sin, COUNT)
                # the table holds cos - 1 of all but quickly turning pairs, which keeps their digits
                m0 = _sum_of(cos, QUICK // 4, COUNT) * bias_scale + constant
                m1 = m0
                m2 = _sum_of(next_cos, QUICK // 4, COUNT) * bias_scale + constant
                m3 = m2
                operands = _operands(cos, sin, next_cos, next_sin, FAST // 4)
                if FAST < PAIRS_PADDED:
                    turn = _pairs_at(steps + (2 * PAIRS_PADDED + FAST), t, PAIRS_PADDED - FAST)
                    slow = _slow_scores(cos, sin, turn, FAST // 4, COUNT)
                    next_slow = _slow_scores(next_cos, next_sin, turn, FAST // 4, COUNT)
                cos, sin = _turn(next_cos, next_sin, step_cos, step_sin, COUNT)
            if HAS_MEANS:
                # read again in every round: registers are short
                queries = _queries(q + at * KEY_DIM, is_row, t, KEY_DIM)
                by_mean = _mean_products(queries, means, g, KEY_DIM)
                m0 += row_scale * by_mean[0]
                m1 += row_scale * by_mean[1]
                m2 += row_scale * by_mean[2]
                m3 += row_scale * by_mean[3]
            for j in tl.range(0, tl.where(shares, SPAN // 8, SPAN // 32), num_stages=1, loop_unroll_factor=4):
                i = first + j
                s0 = tl.where(i < SPAN // 16, m0, m1)
                s2 = tl.where(i < SPAN // 16, m2, m3)
                s1 = s0
                s3 = s2
                if HAS_BIAS:
                    ASSEMBLY: tl.constexpr = piece(_BIAS, 0, FAST, PAIRS_PADDED)
                    CONSTRAINTS: tl.constexpr = piece(_BIAS, 1, FAST, PAIRS_PADDED)
                    b0, b1, b2, b3 = tl.inline_asm_elementwise(
                        ASSEMBLY,
                        CONSTRAINTS,
                        ((spans + i * (16 * PAIRS_PADDED) + thread % 32 * 8).to(tl.int64),) + operands,
                        dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
                        is_pure=True,
                        pack=1,
                    )
                    if FAST < PAIRS_PADDED:
                        x = (8 * i + 2 * t).to(tl.float32) * (1 / SPAN)
                        y = x + 1 / SPAN
                        b0 += _polynomial(slow, x)
                        b1 += _polynomial(slow, y)
                        b2 += _polynomial(next_slow, x)
                        b3 += _polynomial(next_slow, y)
                    s0 += b0 * bias_scale
                    s1 += b1 * bias_scale
                    s2 += b2 * bias_scale
                    s3 += b3 * bias_scale
                place = now + 8 * i + 2 * t
                _store_by_position(s0, s1, own, place, in_blocks, is_row)
                _store_by_position(s2, s3, own, place + SPAN, in_blocks, is_row)
                if not in_blocks_only:
                    _store_in_ring(s0, s1, to_ring, place, ring, in_blocks, count, is_row)
                    _store_in_ring(s2, s3, to_ring, place + SPAN, ring, in_blocks, count, is_row)
            now += 2 * SPAN
