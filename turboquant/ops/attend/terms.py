"""Key terms of up to 8 query rows: what block means and the key bias add to scores.

The bias turns with the position. Within a span of 128 positions its quickly turning pairs meet a table of their angles,
in a product of matrices; what the slow ones add is a polynomial of the position, of degree 6 (BiasTerms.fast says
where they begin).

Every tensor has one element for each thread (see lanes.py). Products that give the bias have tokens in their rows, as
the scores', and in column g the coefficients of query row g, turned back to the first token of a span: high and low
parts apart. Those that give means' scores have query rows in their rows, and blocks in their columns.
"""

import triton
import triton.language as tl

from turboquant.ops.attend.bias import PAIRS_TOGETHER, SPAN_TOKENS
from turboquant.ops.attend.lanes import (
    high_and_low,
    multiply,
    names,
    piece,
    two_floats,
)
from turboquant.ops.attend.parts import place, turned_back

SPAN = tl.constexpr(SPAN_TOKENS)
PAIRS = (16, 32, 64)  # padded, that are served: operands of more would not fit the registers


def _bias_scores(fast: int, pairs: int) -> tuple[str, str]:
    """Key bias of 16 tokens: the first `fast` of a table's pairs, and the polynomial. Assembly and its constraints.

    Outputs: of token g in rows 2 t and 2 t + 1, then of token g + 8. Inputs: address of what this thread reads of the
    table for these tokens; for each product high and low part of row g's one pair, then of the other. Products of low
    parts alone are left out: they are below float32's digits of the others.
    """
    products = [*range(fast // 8), pairs // 8, pairs // 8 + 1]
    b = names(5, 4 * len(products))
    low_at = SPAN_TOKENS * 2 * (pairs + 16) * 2  # bytes behind the high parts
    # two sums, for a product waits for the one before
    sums = [[f"c{4 * j + i}" for i in range(4)] for j in range(2)]
    lines = [".reg .b32 a<8>;", ".reg .f32 c<8>;", *(f"mov.f32 c{i}, 0f00000000;" for i in range(8))]
    for j, product in enumerate(products):
        for part in range(2):
            to = ", ".join(f"a{4 * part + i}" for i in range(4))
            lines.append(f"ld.global.nc.v4.b32 {{{to}}}, [$4 + {512 * product + low_at * part}];")
        high, low = b[4 * j : 4 * j + 4 : 2], b[4 * j + 1 : 4 * j + 4 : 2]
        table = tuple(tuple(f"a{4 * part + i}" for i in range(4)) for part in range(2))
        lines += [
            multiply(sums[0], table[0], high),
            multiply(sums[1], table[0], low),
            multiply(sums[1], table[1], high),
        ]
    lines += [f"add.f32 ${i}, c{i}, c{i + 4};" for i in range(4)]
    return "{\n" + "\n".join(lines) + "\n}", ",".join(["=f"] * 4 + ["l"] + ["r"] * len(b))


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
def zero_again(x):
    """0, of which the compiler does not know that it is the same in every round of a loop."""
    return tl.inline_asm_elementwise("mov.b32 $0, 0;", "=r,r", [x], dtype=tl.int32, is_pure=False, pack=1)


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
def _four_at(pointer):
    """Four float32 of a thread."""
    words = pointer.to(tl.pointer_type(tl.int64))
    return two_floats(tl.load(words)) + two_floats(tl.load(words + 1))


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
def _load_means(record, is_there, t, DIM: tl.constexpr):
    """A block's mean, 4 of every 16 float16 a thread. record: where the head's share of it begins."""
    mean = record + (128 + 8 * t)
    words = ()
    for k in tl.static_range(0, DIM // 16):
        both = tl.load((mean + 32 * k).to(tl.pointer_type(tl.int64)), mask=is_there, other=0)
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
    return tl.inline_asm_elementwise(ASSEMBLY, CONSTRAINTS, words, dtype=(tl.float32, tl.float32), is_pure=True, pack=1)


@triton.jit
def store_means(
    anchor,
    entries,
    first,
    last,
    head,
    q,
    is_row,
    row_scale,
    out,
    KEY_DIM: tl.constexpr,
    VALUE_QUARTER: tl.constexpr,
    KEY_PLANES: tl.constexpr,
    VALUE_PLANES: tl.constexpr,
    KEY_BYTES: tl.constexpr,
    VALUE_BYTES: tl.constexpr,
    IS_MIXED: tl.constexpr,
):
    """What the means of blocks [first, last) add to the scores of their tokens.

    q, row_scale, out, is_row: [128], of thread (g, t)'s row g; out points to its block 0.
    """
    thread = tl.arange(0, 32 * 4)
    g = thread % 32 // 4
    t = thread % 4
    queries = _queries(q, is_row, t, KEY_DIM)
    # a warp multiplies 8 blocks at once
    for start in tl.range(first, last, 32, num_stages=1):
        column = start + thread // 32 * 8
        is_there = column + g < last
        record, _, _, _ = place(
            anchor,
            tl.load(entries + column + g, mask=is_there, other=0),
            head,
            KEY_BYTES,
            VALUE_BYTES,
            KEY_DIM // 4,
            VALUE_QUARTER,
            KEY_PLANES,
            VALUE_PLANES,
            IS_MIXED,
        )
        even, odd = _mean_products(queries, _load_means(record, is_there, t, KEY_DIM), KEY_DIM)
        column += 2 * t
        tl.store(out + column, even * row_scale, mask=is_row & (column < last))
        tl.store(out + column + 1, odd * row_scale, mask=is_row & (column + 1 < last))


@triton.jit
def span_of_bias(
    position,
    coefficients,
    frequencies,
    steps,
    constant,
    PAIRS_PADDED: tl.constexpr,
    QUICK: tl.constexpr,
    FAST: tl.constexpr,
):
    """What `bias_in_span` wants of the 128 positions from `position` on.

    coefficients: [128], of thread (g, t)'s row g, see `prepare_rows`; constant: what its row adds at any position.
    """
    # what is loaded here would else be kept in registers throughout a loop over spans
    t = tl.arange(0, 32 * 4) % 4 + zero_again(position)
    operands = ()
    # factors of x^0 to x^6, x the part of a span behind a token: a slow pair adds
    # cos * (cos(turn x) - 1) + sin * sin(turn x), both by their series
    x0 = tl.where(t == 0, constant, 0.0)
    x1 = 0.0 * x0
    x2 = x1
    x3 = x1
    x4 = x1
    x5 = x1
    x6 = x1
    # 4 pairs at a time, for registers are short
    for j in tl.static_range(0, PAIRS_PADDED // 16):
        along_cos = _four_at(coefficients + 4 * t + 16 * j)
        along_sin = _four_at(coefficients + 4 * t + (16 * j + PAIRS_PADDED))
        if 16 * j >= FAST:
            turns = _four_at(steps + 4 * t + 16 * j)
        for k in tl.static_range(0, 4):
            by_cos, by_sin = _turned_quickly(position, tl.load(frequencies + 4 * t + (16 * j + k)))
            cos, sin = turned_back(along_cos[k], along_sin[k], by_cos, by_sin)
            if 16 * j >= QUICK:
                x0 += cos  # the table holds cos - 1 of all but quickly turning pairs, which keeps their digits
            if 16 * j < FAST:
                operands = operands + high_and_low(cos, sin)
            else:
                turn = turns[k]
                square = turn * turn
                sin *= turn
                cos *= square
                x1 += sin
                x2 += cos
                sin *= square
                cos *= square
                x3 += sin
                x4 += cos
                x5 += sin * square
                x6 += cos * square
    return (
        operands
        + high_and_low(x0, x1)
        + high_and_low(x2 * (-1 / 2), x3 * (-1 / 6))
        + high_and_low(x4 * (1 / 24), x5 * (1 / 120))
        + high_and_low(x6 * (-1 / 720), 0.0 * x0)
    )


@triton.jit
def bias_in_span(i, span, table, PAIRS_PADDED: tl.constexpr, FAST: tl.constexpr):
    """What the bias adds to token 16 i + g of a span in rows 2 t and 2 t + 1, and to the eighth behind it, but for
    `bias_scale`. table: BiasTerms.spans.
    """
    thread = tl.arange(0, 32 * 4)
    ASSEMBLY: tl.constexpr = piece(_BIAS, 0, FAST, PAIRS_PADDED)
    CONSTRAINTS: tl.constexpr = piece(_BIAS, 1, FAST, PAIRS_PADDED)
    return tl.inline_asm_elementwise(
        ASSEMBLY,
        CONSTRAINTS,
        ((table + i * (32 * PAIRS_PADDED + 512) + thread % 32 * 8).to(tl.int64),) + span,
        dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
        is_pure=True,
        pack=1,
    )


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
    constant,
    bias_scale,
    out,
    rows,
    PAIRS_PADDED: tl.constexpr,
    QUICK: tl.constexpr,
    FAST: tl.constexpr,
):
    """What the key bias adds to the scores of 64 slots of the tail.

    bias_scale, out: pairs of [128], of thread (g, t)'s rows 2 t and 2 t + 1; out point to their places of slot 0.
    """
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
            span = span_of_bias(position, coefficients, frequencies, steps, constant, PAIRS_PADDED, QUICK, FAST)
            s0, s1, s2, s3 = bias_in_span(thread // 32, span, table, PAIRS_PADDED, FAST)
            slot = first_slot + thread // 32 * 16 + thread % 32 // 4
            row = thread % 4 * 2
            is_there = (slot >= begin) & (slot < end)
            tl.store(out[0] + slot, s0 * bias_scale[0], mask=is_there & (row < rows))
            tl.store(out[1] + slot, s1 * bias_scale[1], mask=is_there & (row + 1 < rows))
            is_there = (slot + 8 >= begin) & (slot + 8 < end)
            tl.store(out[0] + slot + 8, s2 * bias_scale[0], mask=is_there & (row < rows))
            tl.store(out[1] + slot + 8, s3 * bias_scale[1], mask=is_there & (row + 1 < rows))
