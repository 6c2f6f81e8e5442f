"""Key terms of up to 8 query rows: what block means and the key bias add to scores.

The bias turns with the position. What it adds within a span of at most 256 positions is one product of matrices: the
cosines and sines of its quickly turning pairs, and 16 Chebyshev polynomials of the position, which stand for all others
(BiasTables.fast says which), times the query's coefficients, turned to the middle of the span. Those of the polynomials
are a product of the others' with a matrix that never changes.

Functions of the position are even or odd. Products with either are found apart: their sum is the bias at a position
behind the middle, their difference at the mirrored one. So 32 tokens take what 16 would else, half of it loads.

Every tensor has one element for each thread (see lanes.py). Products that give the bias have tokens in their rows, as
the scores', and in column g the coefficients of query row g: high and low parts apart. Those that give means' scores
have query rows in their rows, and blocks in their columns.
"""

import triton
import triton.language as tl

from turboquant.ops.attend.bias import PAIRS_TOGETHER, SPAN_TOKENS
from turboquant.ops.attend.lanes import (
    from_thread,
    high_and_low,
    multiply,
    names,
    piece,
    token_of_row,
    transposed,
    two_floats,
)
from turboquant.ops.attend.parts import place, turned_back

HALF_SPAN = tl.constexpr(SPAN_TOKENS // 2)
PAIRS = (16, 32, 64, 128)  # padded, that are served


def _series_times(operands: int) -> tuple[str, str]:
    """The series' factors times the coefficients of the query rows: assembly and its constraints.

    Outputs: row g in query rows 2 t and 2 t + 1, then row g + 8. Inputs: address of what this thread reads of the first
    operand; for each operand of row g's coefficients the high and low part of one word, then of the other. Products of
    low parts alone are left out: they are below float32's digits of the others.
    """
    b = names(5, 4 * operands)
    low_at = 512 * operands  # bytes behind the high parts
    # a sum for each kind of product, for a product waits for the one before
    sums = [[f"c{4 * j + i}" for i in range(4)] for j in range(3)]
    lines = [".reg .b32 a<8>;", ".reg .f32 c<12>;", *(f"mov.f32 c{i}, 0f00000000;" for i in range(12))]
    for j in range(operands):
        high, low = b[4 * j : 4 * j + 4 : 2], b[4 * j + 1 : 4 * j + 4 : 2]
        table = [_loaded(f"a{4 * part}", 512 * j + low_at * part, 4, lines) for part in range(2)]
        lines += [
            multiply(sums[0], table[0], high),
            multiply(sums[1], table[0], low),
            multiply(sums[2], table[1], high),
        ]
    lines += [f"add.f32 c{i + 4}, c{i + 4}, c{i + 8};" for i in range(4)]
    lines += [f"add.f32 ${i}, c{i}, c{i + 4};" for i in range(4)]
    return "{\n" + "\n".join(lines) + "\n}", ",".join(["=f"] * 4 + ["l"] + ["r"] * len(b))


def _loaded(first: str, offset: int, address: int, lines: list[str]) -> list[str]:
    """Four registers, from `first` on, that hold 16 bytes behind the address in that operand."""
    letter, number = first[0], int(first[1:])
    registers = [f"{letter}{number + i}" for i in range(4)]
    lines.append(f"ld.global.nc.v4.b32 {{{', '.join(registers)}}}, [${address} + {offset}];")
    return registers


def _span_times(operands: int) -> tuple[str, str]:
    """16 rows of BiasTables.spans times the coefficients of the query rows: assembly and its constraints.

    Outputs: of row g what even and odd functions add up to in query rows 2 t and 2 t + 1, then of row g + 8; then the
    same of their difference. Inputs: address of what this thread reads of the first of so many operands; words of row
    g's coefficients, of even functions, then of odd ones, high and low part of each.
    """
    words = [names(9 + 2 * operands * i, 2 * operands) for i in range(2)]
    low_at = 8 * 512 * operands  # bytes behind the high parts
    whole = operands // 2
    lines = [f".reg .b32 a<{8 * operands}>;", ".reg .f32 c<16>;", *(f"mov.f32 c{i}, 0f00000000;" for i in range(16))]
    # asked for together
    table = [
        [_loaded(f"a{8 * j + 4 * part}", 512 * j + low_at * part, 8, lines) for part in range(2)]
        for j in range(operands)
    ]
    for i in range(operands - whole):
        for odd in range(2):
            if i < whole:
                own = table[whole * odd + i]
                high, low = (words[odd][4 * i + part : 4 * i + part + 4 : 2] for part in range(2))
            else:
                own = [operand[2 * odd : 2 * odd + 2] for operand in table[-1]]
                high, low = ([words[odd][4 * i + part]] for part in range(2))
            # two sums of either, for a product waits for the one before
            most, rest = ([f"c{8 * odd + 4 * j + k}" for k in range(4)] for j in range(2))
            lines += [multiply(most, own[0], high), multiply(rest, own[0], low), multiply(rest, own[1], high)]
    lines += [f"add.f32 c{8 * odd + k}, c{8 * odd + k}, c{8 * odd + 4 + k};" for odd in range(2) for k in range(4)]
    lines += [f"add.f32 ${k}, c{k}, c{8 + k};" for k in range(4)]
    lines += [f"sub.f32 ${4 + k}, c{k}, c{8 + k};" for k in range(4)]
    return "{\n" + "\n".join(lines) + "\n}", ",".join(["=&f"] * 8 + ["l"] + ["r"] * (4 * operands))


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


# By operands.
_MOST = PAIRS[-1] // PAIRS_TOGETHER
_BIAS = tl.constexpr({(n,): _span_times(n) for n in range(1, _MOST + 2)})
_SERIES = tl.constexpr({(n,): _series_times(n) for n in range(1, _MOST + 1)})
_MEANS = tl.constexpr({(dim,): _mean_scores(dim) for dim in (64, 128, 256)})


@triton.jit
def zero_again(x):
    """0, of which the compiler does not know that it is the same in every round of a loop."""
    return tl.inline_asm_elementwise("mov.b32 $0, 0;", "=r,r", [x], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def _turned_quickly(position, frequency):
    """cos and sin of (position - 1/2) * frequency, as `turned` gives them, by instructions of lower accuracy: 5e-7."""
    turns = (position.to(tl.int64) * frequency - (frequency >> 1)) >> 32
    x = turns.to(tl.int32).to(tl.float32) * 1.4629180792671596e-09  # 2 pi / 2^32
    return tl.inline_asm_elementwise(
        "cos.approx.ftz.f32 $0, $2; sin.approx.ftz.f32 $1, $2;",
        "=&f,=f,f",
        [x],
        dtype=(tl.float32, tl.float32),
        is_pure=True,
        pack=1,
    )


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
def load_means(
    anchor,
    entries,
    start,
    last,
    head,
    KEY_DIM: tl.constexpr,
    VALUE_QUARTER: tl.constexpr,
    KEY_PLANES: tl.constexpr,
    VALUE_PLANES: tl.constexpr,
    KEY_BYTES: tl.constexpr,
    VALUE_BYTES: tl.constexpr,
    IS_MIXED: tl.constexpr,
):
    """Means of the 32 blocks from `start` on, before `last`: a warp has 8 of them, thread (g, t) of the g-th 4 of every
    16 float16.
    """
    thread = tl.arange(0, 32 * 4)
    column = start + thread // 32 * 8 + thread % 32 // 4
    is_there = column < last
    record, _, _, _ = place(
        anchor,
        tl.load(entries + column, mask=is_there, other=0),
        head,
        KEY_BYTES,
        VALUE_BYTES,
        KEY_DIM // 4,
        VALUE_QUARTER,
        KEY_PLANES,
        VALUE_PLANES,
        IS_MIXED,
    )
    mean = record + (128 + 8 * (thread % 4))
    words = ()
    for k in tl.static_range(0, KEY_DIM // 16):
        own = (mean + 32 * k).to(tl.pointer_type(tl.int64))
        both = tl.load(own, mask=is_there, other=0)
        words = words + (both.to(tl.int32), (both >> 32).to(tl.int32))
    return words


@triton.jit
def _mean_products(queries, means, DIM: tl.constexpr):
    """Scores of the means of blocks 2 t and 2 t + 1 in row g; queries, means: from `_queries`, `load_means`."""
    words = ()
    for k in tl.static_range(0, DIM // 16):
        words = words + queries[4 * k : 4 * k + 4] + means[2 * k : 2 * k + 2]
    ASSEMBLY: tl.constexpr = piece(_MEANS, 0, DIM)
    CONSTRAINTS: tl.constexpr = piece(_MEANS, 1, DIM)
    return tl.inline_asm_elementwise(ASSEMBLY, CONSTRAINTS, words, dtype=(tl.float32, tl.float32), is_pure=True, pack=1)


@triton.jit
def store_means(
    means,
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

    means: from `load_means`, of the first blocks. q, row_scale, out, is_row: [128], of thread (g, t)'s row g; out
    points to its block 0.
    """
    thread = tl.arange(0, 32 * 4)
    t = thread % 4
    queries = _queries(q, is_row, t, KEY_DIM)
    # a warp multiplies 8 blocks at once
    for start in tl.range(first, last, 32, num_stages=1):
        even, odd = _mean_products(queries, means, KEY_DIM)
        column = start + thread // 32 * 8 + 2 * t
        tl.store(out + column, even * row_scale, mask=is_row & (column < last))
        tl.store(out + column + 1, odd * row_scale, mask=is_row & (column + 1 < last))
        means = load_means(
            anchor,
            entries,
            start + 32,
            last,
            head,
            KEY_DIM,
            VALUE_QUARTER,
            KEY_PLANES,
            VALUE_PLANES,
            KEY_BYTES,
            VALUE_BYTES,
            IS_MIXED,
        )


@triton.jit
def _touch(pointer, is_wanted):
    """Have the L1 read a line; a word of it, for `keep_touched`."""
    return tl.load(pointer.to(tl.pointer_type(tl.int32)), mask=is_wanted, other=0)


@triton.jit
def touch_tables(frequencies, spans, series, PAIRS_PADDED: tl.constexpr, FAST: tl.constexpr):
    """Have the L1 read the tables that the bias of the first tokens is made of, in lines of 128 bytes; of `spans` what
    64 tokens take, of `series` as many.
    """
    thread = tl.arange(0, 32 * 4)
    line = thread % 64
    OPERANDS: tl.constexpr = FAST // 8 + 1
    part = tl.where(thread < 64, 0, 8 * 256 * OPERANDS)  # the low parts lie behind the high ones
    found = _touch(spans + part + line * 64, line < min(8 * OPERANDS, 64))
    # both parts of the series, and frequencies, at most 8 lines
    found ^= _touch(series + line * 64, (thread < 64) & (line < (PAIRS_PADDED - FAST) // 8 * 8))
    return found ^ _touch(frequencies + (line - 32) * 16, (thread >= 96) & (line - 32 < PAIRS_PADDED // 16))


@triton.jit
def touch_coefficients(coefficients, rows, PAIRS_PADDED: tl.constexpr):
    """The same for the coefficients of `rows` query rows, at most 64 lines."""
    line = tl.arange(0, 32 * 4)
    return _touch(coefficients + line * 32, line < rows * (PAIRS_PADDED // 16))


@triton.jit
def keep_touched(found, pointer):
    """Makes the compiler believe that what was touched is needed: it would drop the loads."""
    tl.inline_asm_elementwise(
        "{.reg .pred p; setp.eq.u32 p, $1, 0x7fc1a5a5; @p prefetch.global.L2 [$2]; mov.b32 $0, 0;}",
        "=r,r,l",
        [found, pointer.to(tl.int64)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _own_words(table):
    """Where a thread's 16 bytes of an operand lie."""
    lane = tl.arange(0, 32 * 4) % 32
    return (table + lane * 8).to(tl.int64)


@triton.jit
def span_of_bias(
    middle,
    coefficients,
    frequencies,
    series,
    constant,
    PAIRS_PADDED: tl.constexpr,
    FAST: tl.constexpr,
):
    """What `bias_beside` wants of the 128 positions from `middle` on and the 128 before.

    coefficients: [128], of thread (g, t)'s row g, see `prepare_rows`; constant: what its rows 2 t and 2 t + 1 add at
    any position, a pair of [128].
    """
    lane = tl.arange(0, 32 * 4) % 32
    # what is loaded here would else be kept in registers throughout a loop over spans
    hidden = zero_again(middle)
    t = lane % 4 + hidden
    # an angle is the same in all rows: each thread finds those of every 32nd pair
    EVERY: tl.constexpr = min(PAIRS_PADDED, 32)
    angles = ()
    for i in tl.static_range(0, PAIRS_PADDED, EVERY):
        frequency = tl.load(frequencies + lane % EVERY + i + hidden)
        angles = angles + (_turned_quickly(middle, frequency),)
    even = ()
    odd = ()
    slow = ()
    for j in tl.static_range(0, PAIRS_PADDED, 8):
        along_cos = two_floats(tl.load((coefficients + 2 * t + j).to(tl.pointer_type(tl.int64))))
        along_sin = two_floats(tl.load((coefficients + 2 * t + (j + PAIRS_PADDED)).to(tl.pointer_type(tl.int64))))
        from_lane = lane % 4 * 2 + j % EVERY
        cos, sin = from_thread(angles[j // EVERY][0], from_lane), from_thread(angles[j // EVERY][1], from_lane)
        cos0, sin0 = turned_back(along_cos[0], along_sin[0], cos, sin)
        from_lane += 1
        cos, sin = from_thread(angles[j // EVERY][0], from_lane), from_thread(angles[j // EVERY][1], from_lane)
        cos1, sin1 = turned_back(along_cos[1], along_sin[1], cos, sin)
        by_cos = high_and_low(cos0, cos1)
        by_sin = high_and_low(sin0, sin1)
        if j < FAST:
            even = even + by_cos
            odd = odd + by_sin
        else:
            slow = slow + by_cos + by_sin
    s0 = tl.where(lane < 4, constant[0], 0.0)
    s1 = tl.where(lane < 4, constant[1], 0.0)
    s2 = 0.0 * s0
    s3 = s2
    if FAST < PAIRS_PADDED:
        ASSEMBLY: tl.constexpr = piece(_SERIES, 0, (PAIRS_PADDED - FAST) // 8)
        CONSTRAINTS: tl.constexpr = piece(_SERIES, 1, (PAIRS_PADDED - FAST) // 8)
        c0, c1, s2, s3 = tl.inline_asm_elementwise(
            ASSEMBLY,
            CONSTRAINTS,
            (_own_words(series + hidden),) + slow,
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
            is_pure=True,
            pack=1,
        )
        s0 += c0
        s1 += c1
    # degrees were rows, even ones first, and are to be the inner axis
    by_even = high_and_low(s0, s1)
    by_odd = high_and_low(s2, s3)
    even = even + (transposed(by_even[0]), transposed(by_even[1]))
    return even + odd + (transposed(by_odd[0]), transposed(by_odd[1]))


@triton.jit
def bias_beside(i, span, table, FAST: tl.constexpr):
    """What the bias adds, but for `bias_scale`, on either side of the middle of a span. table: BiasTables.spans.

    With r = token_of_row: in rows 2 t and 2 t + 1 at position middle + 16 i + r, and at the eighth behind that. Then at
    middle - 16 (i + 1) + (r XOR 7) and the eighth behind that: units of 16 tokens on both sides are mirrored.
    """
    ASSEMBLY: tl.constexpr = piece(_BIAS, 0, FAST // 8 + 1)
    CONSTRAINTS: tl.constexpr = piece(_BIAS, 1, FAST // 8 + 1)
    found = tl.inline_asm_elementwise(
        ASSEMBLY,
        CONSTRAINTS,
        (_own_words(table + i * (256 * (FAST // 8 + 1))),) + span,
        dtype=(tl.float32,) * 8,
        is_pure=True,
        pack=1,
    )
    return found[:4], (found[6], found[7], found[4], found[5])


@triton.jit
def bias_in_span(i, span, table, FAST: tl.constexpr):
    """Which of tokens 16 i to 16 i + 15 of a span of 256 a thread has, with the eighth behind it, and what the bias
    adds there, see `bias_beside`. The span's middle is that of the 256.
    """
    is_below = i < 8
    above, below = bias_beside(tl.where(is_below, 7 - i, i - 8), span, table, FAST)
    token = token_of_row(tl.arange(0, 32 * 4)) ^ tl.where(is_below, 7, 0)
    found = ()
    for j in tl.static_range(0, 4):
        found = found + (tl.where(is_below, below[j], above[j]),)
    return token, found


@triton.jit
def store_bias_of_tail(
    first_slot,
    end_slot,
    slots,
    sinks,
    length,
    coefficients,
    frequencies,
    table,
    series,
    constant,
    bias_scale,
    out,
    rows,
    PAIRS_PADDED: tl.constexpr,
    FAST: tl.constexpr,
):
    """What the key bias adds to the scores of 64 slots of the tail, either all sinks or all of the ring.

    constant, bias_scale, out: pairs of [128], of thread (g, t)'s rows 2 t and 2 t + 1; out point to their places of
    slot 0.
    """
    thread = tl.arange(0, 32 * 4)
    warp = thread // 32
    in_ring = first_slot >= sinks
    ring = slots - sinks
    newest = tl.maximum(length - sinks, 1) - 1
    turns = newest // ring * ring
    # slots of the ring from here on hold what is left of its turn before
    behind = newest - turns + 1
    # its tokens fit one span that begins such that 16 slots are 16 of its rows
    at_once = in_ring & (ring % 16 == 0) & (ring <= 2 * HALF_SPAN - 16)
    turned_by = behind // 16
    tile = (first_slot - sinks) // 16 + warp
    runs = tl.where(at_once | (first_slot < sinks), 1, 2)
    for run in tl.range(0, runs, num_stages=1):
        if at_once:
            start = sinks + turns - ring + 16 * turned_by
            newer = tile + ring // 16 - turned_by
            older = tile - turned_by
        else:
            start = first_slot + tl.where(in_ring, turns - run * ring, 0)
            newer = warp
            older = warp
        middle = start + HALF_SPAN + 0 * thread
        span = span_of_bias(middle, coefficients, frequencies, series, constant, PAIRS_PADDED, FAST)
        for age in tl.static_range(0, 2):
            unit = tl.minimum(newer, 15) if age == 0 else tl.maximum(older, 0)
            token, found = bias_in_span(unit, span, table, FAST)
            for j in tl.static_range(0, 4):
                slot = first_slot + warp * 16 + token + 8 * (j // 2)
                is_newer = slot - sinks < behind
                is_there = (slot < end_slot) & ((is_newer.to(tl.int32) + run == 1) | (runs + 0 * slot == 1))
                is_there &= (is_newer == (age == 0)) & (thread % 4 * 2 + j % 2 < rows)
                tl.store(out[j % 2] + slot, found[j] * bias_scale[j % 2], mask=is_there)
