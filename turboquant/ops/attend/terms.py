"""Key terms of up to 8 query rows: what block means and the key bias add to scores.

The bias turns with the position. Within a span of 128 positions its quickly turning pairs meet a table of their angles,
in a product of matrices; what the slow ones add is a polynomial of the position, of degree 6 (BiasTerms.fast says
where they begin).

Every tensor has one element for each thread (see lanes.py). Rows g of a product are the high parts of the query rows,
turned back to the first token of a span, rows g + 8 their low parts.
"""

import triton
import triton.language as tl

from turboquant.ops.attend.bias import PAIRS_TOGETHER, SPAN_TOKENS
from turboquant.ops.attend.lanes import (
    high_and_low,
    multiply,
    names,
    piece,
    sum_of_row,
    two_floats,
)
from turboquant.ops.attend.parts import turned_back

SPAN = tl.constexpr(SPAN_TOKENS)
PAIRS = (16, 32, 64)  # padded, that are served: operands of more would not fit the registers


def _bias_scores(fast: int, pairs: int) -> tuple[str, str]:
    """Key bias, of the first `fast` of a table's pairs, of 8 tokens: assembly and its constraints.

    Outputs: of tokens 2 t and 2 t + 1 in row g. Inputs: address of what this thread reads of the table for these
    tokens; for each product the four words of its first operand, high and low part of one pair, then of the other.
    """
    products = fast // 8
    a = names(3, 4 * products)
    low_at = SPAN_TOKENS * 2 * pairs * 2  # bytes behind the high parts
    # two sums, for a product waits for the one before
    sums = [[f"c{4 * j + i}" for i in range(4)] for j in range(2)]
    lines = [".reg .b32 b<8>;", ".reg .f32 c<8>;", *(f"mov.f32 c{i}, 0f00000000;" for i in range(8))]
    for j in range(products // 2):
        for part in range(2):
            to = ", ".join(f"b{4 * part + i}" for i in range(4))
            lines.append(f"ld.global.nc.v4.b32 {{{to}}}, [$2 + {512 * j + low_at * part}];")
        for k in (2 * j, 2 * j + 1):
            for part in range(2):
                own = tuple(f"b{4 * part + 2 * (k % 2) + i}" for i in range(2))
                lines.append(multiply(sums[part], a[4 * k : 4 * k + 4], own))
    for i in range(2):
        lines += [f"add.f32 c{i + 2}, c{i + 2}, c{i + 4};", f"add.f32 c{i}, c{i}, c{i + 6};"]
        lines.append(f"add.f32 ${i}, c{i}, c{i + 2};")
    return "{\n" + "\n".join(lines) + "\n}", ",".join(["=f"] * 2 + ["l"] + ["r"] * (4 * products))


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
def _turned_quickly(position, frequency):
    """cos and sin of position * frequency, as `turned` gives them, by instructions of lower accuracy: 5e-7."""
    x = ((position.to(tl.int64) * frequency) >> 32).to(tl.int32).to(tl.float32) * 1.4629180792671596e-09  # 2 pi / 2^32
    return tl.inline_asm_elementwise(
        "cos.approx.ftz.f32 $0, $2; sin.approx.ftz.f32 $1, $2;",
        "=&f,=f,f",
        [x],
        dtype=(tl.float32, tl.float32),
        is_pure=True,
        pack=1,
    )


@triton.jit
def _turned_pairs(position, coefficients, frequencies, t, PAIRS_PADDED: tl.constexpr):
    """A thread's coefficients of cos and sin of angles that begin at a position."""
    cos = _pairs_at(coefficients, t, PAIRS_PADDED)
    sin = _pairs_at(coefficients + PAIRS_PADDED, t, PAIRS_PADDED)
    turned_cos = ()
    turned_sin = ()
    for k in tl.static_range(0, PAIRS_PADDED // 4):
        by_cos, by_sin = _turned_quickly(position, tl.load(frequencies + 4 * t + (k // 4 * 16 + k % 4)))
        one_cos, one_sin = turned_back(cos[k], sin[k], by_cos, by_sin)
        turned_cos = turned_cos + (one_cos,)
        turned_sin = turned_sin + (one_sin,)
    return turned_cos, turned_sin


@triton.jit
def _operands(cos, sin, COUNT: tl.constexpr):
    """First operands of the products of `_bias_scores`."""
    words = ()
    for k in tl.static_range(0, COUNT):
        words = words + high_and_low(cos[k], sin[k])
    return words


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
def span_of_bias(
    position,
    coefficients,
    frequencies,
    steps,
    bias_scale,
    constant,
    PAIRS_PADDED: tl.constexpr,
    QUICK: tl.constexpr,
    FAST: tl.constexpr,
):
    """What `bias_in_span` wants of the 128 positions from `position` on.

    coefficients, bias_scale, constant: [128], of thread (g, t)'s row g, see `prepare_rows` and `row_factors`.
    """
    t = tl.arange(0, 32 * 4) % 4
    COUNT: tl.constexpr = PAIRS_PADDED // 4
    cos, sin = _turned_pairs(position, coefficients, frequencies, t, PAIRS_PADDED)
    # the table holds cos - 1 of all but quickly turning pairs, which keeps their digits
    still = _sum_of(cos, QUICK // 4, COUNT) * bias_scale + constant
    operands = _operands(cos, sin, FAST // 4)
    slow = ()
    if FAST < PAIRS_PADDED:
        turn = _pairs_at(steps + (2 * PAIRS_PADDED + FAST), t, PAIRS_PADDED - FAST)
        slow = _slow_scores(cos, sin, turn, FAST // 4, COUNT)
    return still, operands, slow


@triton.jit
def bias_in_span(i, span, table, bias_scale, PAIRS_PADDED: tl.constexpr, FAST: tl.constexpr):
    """What the bias adds to tokens 8 i + 2 t and the next of a span, in row g. table: BiasTerms.spans."""
    thread = tl.arange(0, 32 * 4)
    ASSEMBLY: tl.constexpr = piece(_BIAS, 0, FAST, PAIRS_PADDED)
    CONSTRAINTS: tl.constexpr = piece(_BIAS, 1, FAST, PAIRS_PADDED)
    one, other = tl.inline_asm_elementwise(
        ASSEMBLY,
        CONSTRAINTS,
        ((table + i * (16 * PAIRS_PADDED) + thread % 32 * 8).to(tl.int64),) + span[1],
        dtype=(tl.float32, tl.float32),
        is_pure=True,
        pack=1,
    )
    if FAST < PAIRS_PADDED:
        x = (8 * i + 2 * (thread % 4)).to(tl.float32) * (1 / SPAN)
        one += _polynomial(span[2], x)
        other += _polynomial(span[2], x + 1 / SPAN)
    return one * bias_scale + span[0], other * bias_scale + span[0]


@triton.jit
def store_bias_of_tail(
    first_slot,
    slots,
    sinks,
    length,
    coefficients,
    frequencies,
    table,
    steps,
    bias_scale,
    constant,
    out,
    is_row,
    PAIRS_PADDED: tl.constexpr,
    QUICK: tl.constexpr,
    FAST: tl.constexpr,
):
    """What the key bias adds to the scores of 64 slots of the tail; out points to row g's place of slot 0."""
    thread = tl.arange(0, 32 * 4)
    newest = tl.maximum(length - sinks, 1) - 1
    turns = newest // (slots - sinks) * (slots - sinks)
    # three runs of positions: the sinks, the ring up to its newest token, and what is left of its turn before
    behind = sinks + newest - turns + 1
    for run in tl.range(0, 3, num_stages=1):
        begin = tl.maximum(tl.where(run == 0, 0, tl.where(run == 1, sinks, behind)), first_slot)
        end = tl.minimum(tl.where(run == 0, sinks, tl.where(run == 1, behind, slots)), first_slot + 64)
        if begin < end:
            position = first_slot + tl.where(run == 0, 0, turns - tl.where(run == 1, 0, slots - sinks)) + 0 * thread
            span = span_of_bias(
                position, coefficients, frequencies, steps, bias_scale, constant, PAIRS_PADDED, QUICK, FAST
            )
            for j in tl.range(0, 2, num_stages=1):
                i = 2 * (thread // 32) + j
                one, other = bias_in_span(i, span, table, bias_scale, PAIRS_PADDED, FAST)
                slot = first_slot + 8 * i + 2 * (thread % 4)
                tl.store(out + slot, one, mask=is_row & (slot >= begin) & (slot < end))
                tl.store(out + slot + 1, other, mask=is_row & (slot + 1 >= begin) & (slot + 1 < end))
