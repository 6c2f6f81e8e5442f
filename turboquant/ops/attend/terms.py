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
    piece,
    sum_of_row,
    two_floats,
)
from turboquant.ops.attend.parts import turned, turned_back

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
def _load_means(anchor, entry, t, DIM: tl.constexpr):
    """A block's mean, 4 of every 16 float16 a thread. anchor: of the head; entry: 0 gives zeros."""
    mean = anchor + (entry & -16) + 128 + 8 * t
    words = ()
    for k in tl.static_range(0, DIM // 16):
        both = tl.load((mean + 32 * k).to(tl.pointer_type(tl.int64)), mask=entry != 0, other=0)
        words = words + (both.to(tl.int32), (both >> 32).to(tl.int32))
    return words


@triton.jit
def _mean_products(queries, means, DIM: tl.constexpr):
    """Scores of the means of blocks 2 t and 2 t + 1 in row g; queries, means: from `_queries`, `_load_means`."""
    words = ()
    for k in tl.static_range(0, DIM // 16):
        words = words + queries[4 * k : 4 * k + 4] + means[2 * k : 2 * k + 2]
    ASSEMBLY: tl.constexpr = piece(_MEANS, 0, DIM)
    CONSTRAINTS: tl.constexpr = piece(_MEANS, 1, DIM)
    return tl.inline_asm_elementwise(
        ASSEMBLY, CONSTRAINTS, words, dtype=(tl.float32, tl.float32), is_pure=True, pack=1
    )


@triton.jit
def store_means(anchor, entries, first, last, q, is_row, row_scale, out, KEY_DIM: tl.constexpr):
    """What the means of blocks [first, last) add to the scores of their tokens.

    anchor: of the head. q, row_scale, out, is_row: [128], of thread (g, t)'s row g; out points to its block 0.
    """
    thread = tl.arange(0, 32 * 4)
    g = thread % 32 // 4
    t = thread % 4
    queries = _queries(q, is_row, t, KEY_DIM)
    # a warp multiplies 8 blocks at once
    for start in tl.range(first, last, 32, num_stages=1):
        column = start + thread // 32 * 8
        entry = tl.load(entries + column + g, mask=column + g < last, other=0)
        even, odd = _mean_products(queries, _load_means(anchor, entry, t, KEY_DIM), KEY_DIM)
        column += 2 * t
        tl.store(out + column, even * row_scale, mask=is_row & (column < last))
        tl.store(out + column + 1, odd * row_scale, mask=is_row & (column + 1 < last))


@triton.jit
def _prepared(
    cos,
    sin,
    next_cos,
    next_sin,
    steps,
    t,
    bias_scale,
    constant,
    PAIRS_PADDED: tl.constexpr,
    QUICK: tl.constexpr,
    FAST: tl.constexpr,
):
    """What `_bias_at` wants of two spans, from the coefficients at their first tokens."""
    # the table holds cos - 1 of all but quickly turning pairs, which keeps their digits
    still = _sum_of(cos, QUICK // 4, PAIRS_PADDED // 4) * bias_scale + constant
    next_still = _sum_of(next_cos, QUICK // 4, PAIRS_PADDED // 4) * bias_scale + constant
    operands = _operands(cos, sin, next_cos, next_sin, FAST // 4)
    slow = ()
    next_slow = ()
    if FAST < PAIRS_PADDED:
        turn = _pairs_at(steps + (2 * PAIRS_PADDED + FAST), t, PAIRS_PADDED - FAST)
        slow = _slow_scores(cos, sin, turn, FAST // 4, PAIRS_PADDED // 4)
        next_slow = _slow_scores(next_cos, next_sin, turn, FAST // 4, PAIRS_PADDED // 4)
    return still, next_still, operands, slow, next_slow


@triton.jit
def _bias_at(i, prepared, spans, thread, bias_scale, PAIRS_PADDED: tl.constexpr, FAST: tl.constexpr):
    """What the bias adds to tokens 8 i + 2 t and the next of a span in row g, and of the other span."""
    ASSEMBLY: tl.constexpr = piece(_BIAS, 0, FAST, PAIRS_PADDED)
    CONSTRAINTS: tl.constexpr = piece(_BIAS, 1, FAST, PAIRS_PADDED)
    b0, b1, b2, b3 = tl.inline_asm_elementwise(
        ASSEMBLY,
        CONSTRAINTS,
        ((spans + i * (16 * PAIRS_PADDED) + thread % 32 * 8).to(tl.int64),) + prepared[2],
        dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
        is_pure=True,
        pack=1,
    )
    if FAST < PAIRS_PADDED:
        x = (8 * i + 2 * (thread % 4)).to(tl.float32) * (1 / SPAN)
        y = x + 1 / SPAN
        b0 += _polynomial(prepared[3], x)
        b1 += _polynomial(prepared[3], y)
        b2 += _polynomial(prepared[4], x)
        b3 += _polynomial(prepared[4], y)
    return (
        b0 * bias_scale + prepared[0],
        b1 * bias_scale + prepared[0],
        b2 * bias_scale + prepared[1],
        b3 * bias_scale + prepared[1],
    )


@triton.jit
def store_bias(
    first,
    last,
    sinks,
    coefficients,
    frequencies,
    spans,
    steps,
    bias_scale,
    constant,
    out,
    is_row,
    PAIRS_PADDED: tl.constexpr,
    QUICK: tl.constexpr,
    FAST: tl.constexpr,
):
    """What the key bias adds to the scores of the tokens of blocks [first, last).

    coefficients, bias_scale, constant, out, is_row: [128], of thread (g, t)'s row g; out points to its first token
    behind the sinks. Four warps share two spans, or where there are more, each has its own.
    """
    thread = tl.arange(0, 32 * 4)
    t = thread % 4
    COUNT: tl.constexpr = PAIRS_PADDED // 4
    tokens = 64 * (last - first)
    shares = tokens <= 2 * SPAN
    rounds = (tokens + (8 * SPAN - 1)) // (8 * SPAN)
    now = 64 * first + tl.where(shares, 0, thread // 32 * (2 * SPAN * rounds))
    tile = tl.where(shares, thread // 32 * (SPAN // 32), 0)
    tiles = tl.where(shares, SPAN // 32, SPAN // 8)
    cos = _pairs_at(coefficients, t, PAIRS_PADDED)
    sin = _pairs_at(coefficients + PAIRS_PADDED, t, PAIRS_PADDED)
    first_cos, first_sin = _angles(now + sinks, frequencies, t, COUNT)
    cos, sin = _turn(cos, sin, first_cos, first_sin, COUNT)
    for _ in tl.range(0, rounds, num_stages=1):
        step_cos = _pairs_at(steps, t, PAIRS_PADDED)
        step_sin = _pairs_at(steps + PAIRS_PADDED, t, PAIRS_PADDED)
        next_cos, next_sin = _turn(cos, sin, step_cos, step_sin, COUNT)
        prepared = _prepared(
            cos, sin, next_cos, next_sin, steps, t, bias_scale, constant, PAIRS_PADDED, QUICK, FAST
        )
        cos, sin = _turn(next_cos, next_sin, step_cos, step_sin, COUNT)
        for j in tl.range(0, tiles, num_stages=1, loop_unroll_factor=2):
            s0, s1, s2, s3 = _bias_at(tile + j, prepared, spans, thread, bias_scale, PAIRS_PADDED, FAST)
            place = now + 8 * (tile + j) + 2 * t
            _store_two(s0, s1, out + place, is_row & (place < 64 * last))
            _store_two(s2, s3, out + place + SPAN, is_row & (place + SPAN < 64 * last))
        now += 2 * SPAN


@triton.jit
def store_bias_of_tail(
    first_slot,
    slots,
    sinks,
    length,
    coefficients,
    frequencies,
    spans,
    steps,
    bias_scale,
    constant,
    out,
    is_row,
    PAIRS_PADDED: tl.constexpr,
    QUICK: tl.constexpr,
    FAST: tl.constexpr,
):
    """The same of 64 slots of the tail; out points to row g's place of slot 0.

    In the ring, slots up to the newest token's hold one run of positions, those behind it an earlier one.
    """
    thread = tl.arange(0, 32 * 4)
    t = thread % 4
    COUNT: tl.constexpr = PAIRS_PADDED // 4
    newest = tl.maximum(length - sinks, 1) - 1
    turns = newest // (slots - sinks) * (slots - sinks)
    # sinks, which stand at their own positions, are another run
    for is_ring in tl.range(tl.where(first_slot < sinks, 0, 1), 2, num_stages=1):
        now = first_slot + turns * is_ring
        ends = tl.where(is_ring == 1, sinks + newest - turns, slots)
        cos = _pairs_at(coefficients, t, PAIRS_PADDED)
        sin = _pairs_at(coefficients + PAIRS_PADDED, t, PAIRS_PADDED)
        by_cos, by_sin = _angles(now - (slots - sinks) + 0 * t, frequencies, t, COUNT)
        next_cos, next_sin = _turn(cos, sin, by_cos, by_sin, COUNT)
        by_cos, by_sin = _angles(now + 0 * t, frequencies, t, COUNT)
        cos, sin = _turn(cos, sin, by_cos, by_sin, COUNT)
        prepared = _prepared(
            cos, sin, next_cos, next_sin, steps, t, bias_scale, constant, PAIRS_PADDED, QUICK, FAST
        )
        for j in tl.range(0, 2, num_stages=1):
            i = 2 * (thread // 32) + j
            s0, s1, s2, s3 = _bias_at(i, prepared, spans, thread, bias_scale, PAIRS_PADDED, FAST)
            slot = first_slot + 8 * i + 2 * t
            is_there = is_row & (slot < slots) & ((slot >= sinks) | (is_ring == 0))
            tl.store(out + slot, tl.where(slot <= ends, s0, s2), mask=is_there)
            is_there = is_row & (slot + 1 < slots) & ((slot + 1 >= sinks) | (is_ring == 0))
            tl.store(out + slot + 1, tl.where(slot + 1 <= ends, s1, s3), mask=is_there)


@triton.jit
def _store_two(x, y, to, mask):
    """Two float32 side by side, at an even place."""
    tl.store(to.to(tl.pointer_type(tl.int64)), eight_bytes(x, y), mask=mask)
