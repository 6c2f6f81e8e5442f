"""Blocks of coded tokens for up to 8 query rows: what a thread decodes are operands of mma, in registers.

Every tensor here has one element for each thread, as in CUDA: thread 4 g + t of a warp, g below 8, t below 4, holds
what mma.m16n8k16 wants of it (PTX ISA, "Matrix Fragments for mma.m16n8k16"). Which coordinate stands where along a
product's inner axis is free, and so is which of a warp's 16 tokens; they are chosen such that a thread decodes only
what it multiplies:

    scores   [tokens, rows] = keys [tokens, D] @ q^T: thread (g, t) has of rows g and g + 8 (token_of_row says which
             tokens these are) a quarter of the bytes of plane 0, the t-th, and the same of query row g
    values   out^T [D, rows] += values^T [D, tokens] @ weights^T: thread (g, t) has of tokens t, t + 4, t + 8 and t + 12
             an eighth of the bytes, the g-th, and their weights in row g: the scores' matrix transposed, which is one
             instruction

A warp takes 16 tokens, a unit, at once. Their planes and scales come to shared memory by asynchronous copies, one to
three units ahead: registers that wait for memory would be copied, and waited for, at the end of each round. What a warp
reads there it has copied itself, so no warp waits for another. Each of 4 takes 16 tokens of every block, or a quarter
of all in a row where there is a key bias, and keeps a softmax of its own; they meet behind the loop. Triton's
interpreter runs it where a test lends it the PTX.
"""

import struct

import triton
import triton.language as tl

from turboquant.layout import BlockLayout
from turboquant.ops.attend.bias import SPAN_TOKENS
from turboquant.ops.attend.lanes import (
    await_copies,
    copy_to_shared,
    floats_from_shared,
    floats_to_shared,
    halves_swapped,
    lower_half,
    multiply,
    names,
    packed,
    piece,
    shared_bytes,
    shared_words,
    store_floats,
    sum_of_column,
    token_of_row,
    transposed,
    words_at,
)
from turboquant.ops.attend.parts import capped, place
from turboquant.ops.attend.terms import bias_beside, span_of_bias, store_means, zero_again
from turboquant.ops.unpack.kernel import SIGNS, DecoderRegisters, decoder, in_vector_register

# Query rows that a program can hold.
ROWS = 8
EACH = tl.constexpr(SPAN_TOKENS // 16)  # units of a warp in a span
WARPS = 4
QUARTERS = (16, 32, 64)  # bytes of plane 0, of heads that are served

# Shared memory that a launch has without asking for more. Triton asks for its own part alone.
SHARED_BYTES = 48 << 10

# Of the shared memory of a multiprocessor, for more units than two. With 117 instead of 135 of its 228 KiB in use
# 131,072 tokens with a key bias took 76 instead of 83 us (H100, 3 bits).
_MOST_OF_SHARED = 0.55

# What every program takes besides.
_SYSTEM_BYTES = 1 << 10

# Weights may pass 1 by as many powers of two before the top of their row moves: with a value's scale, which is below 2,
# they stay far from float16's largest number.
_LEEWAY = 8.0

# Columns of what warps have found that go through shared memory at once.
_JOINED_AT_ONCE = tl.constexpr(64)

_TABLES = 6  # operands that every piece of assembly begins with: table, signs, factor


def unit_bytes(layout: BlockLayout) -> int:
    """Shared memory for 16 tokens of a head: planes, and scales in float16."""
    return sum(8 * (side.num_planes + 1) * (side.dim // 4) + 32 for side in (layout.key, layout.value))


def triton_bytes(itemsize: int) -> int:
    """Shared memory that Triton takes at most, for the tail, beside the units: as compiled by Triton 3.6 and 3.9.

    scripts/check_kernels.py holds the sum of both to SHARED_BYTES, not this.
    """
    return 13 << 10 if itemsize == 2 else 17 << 10


def held_bytes(units: int, layout: BlockLayout) -> int:
    """Shared memory for that many units of each warp, and behind the loop for what they have found.

    A multiple of 1 KiB: Triton's own begins behind it, and tensor cores that read shared memory count on this alignment
    (PTX ISA, "Matrix Descriptor Format", base offset).
    """
    width = min(layout.value.dim, _JOINED_AT_ONCE.value)
    joined = WARPS * ROWS * (4 * width + 16) + ROWS * 2 * WARPS * 4
    most: int = max(WARPS * units * unit_bytes(layout), joined)
    return -(-most // 1024) * 1024


def programs_and_units(programs: int, layout: BlockLayout, own: int, shared: int) -> tuple[int, int]:
    """How many programs a multiprocessor with that much shared memory runs at once, of those wanted, and how many units
    each of their warps has there or on their way: 2 to 4, or 0 if two do not fit.

    own: what Triton takes.
    """
    programs = max(1, min(programs, shared // (held_bytes(2, layout) + own + _SYSTEM_BYTES)))
    room = min(SHARED_BYTES, shared // programs - _SYSTEM_BYTES) - own
    if held_bytes(2, layout) > room:
        return programs, 0
    # what is left of the memory is the L1, which holds the tables of a key bias
    room = min(room, int(_MOST_OF_SHARED * shared) // programs - _SYSTEM_BYTES - own)
    return programs, max((units for units in (3, 4) if held_bytes(units, layout) <= room), default=2)


def _decoder_registers(first: int, a: str, y1: str, y2: str) -> DecoderRegisters:
    high0, high1, low0, low1, signs, factor = names(first, _TABLES)
    return DecoderRegisters(a, y1, y2, factor, high0, high1, low0, low1, signs)


def _scores(planes: int, quarter: int) -> tuple[str, str]:
    """Products of 16 tokens with the query rows: assembly and its constraints.

    Outputs: scores of the token in row g for query rows 2 t and 2 t + 1, then of the one in row g + 8, float32. Inputs:
    table, signs, factor; q as pairs of float16, for each word of 4 bytes and field a pair for bytes 0 and 1 and one for
    2 and 3; the words of each plane of the first token, then of the other.
    """
    words = quarter // 16
    at = 4 + _TABLES
    q = names(at, 8 * words)
    at += len(q)
    inputs = _TABLES + (8 + 2 * planes) * words
    lines = [".reg .b32 k<8>, l<8>;", ".reg .f32 c<8>;", *(f"mov.f32 c{i}, 0f00000000;" for i in range(8))]
    for w in range(words):
        for token, out in ((0, "k"), (1, "l")):
            own = [f"${at + (token * planes + p) * words + w}" if p < planes else "0" for p in range(3)]
            lines.append(decoder(planes, _decoder_registers(4, *own), [f"{out}{i}" for i in range(8)]))
        for f in range(4):
            # two sums: a product waits for the one before
            to = [f"c{4 * (f % 2) + i}" for i in range(4)]
            keys = (f"k{2 * f}", f"l{2 * f}", f"k{2 * f + 1}", f"l{2 * f + 1}")
            lines.append(multiply(to, keys, q[8 * w + 2 * f : 8 * w + 2 * f + 2]))
    lines += [f"add.f32 ${i}, c{i}, c{i + 4};" for i in range(4)]
    return "{\n" + "\n".join(lines) + "\n}", ",".join(["=f"] * 4 + ["r"] * inputs)


def _values(planes: int, quarter: int) -> tuple[str, str]:
    """Weighted values of 16 tokens added to the sums: assembly and its constraints.

    Outputs: the sums [D / 16 products, 4] float32; product 4 (2 w + p) + f has field f of bytes 2 p and 2 p + 1 of
    word w, of which rows 2 t and 2 t + 1, then the same of the second byte. Inputs: table, signs, factor; weights of
    the tokens as two pairs of float16; for each plane its words of the tokens in rows 2 t, 2 t + 1, 2 t + 8 and
    2 t + 9 of the scores; the sums.
    """
    sums = quarter
    words = max(quarter // 32, 1)
    halves = 2 if quarter >= 32 else 1  # of a word that hold anything
    weights = names(sums + _TABLES, 2)
    at = sums + _TABLES + 2
    planes_at = [names(at + p * 4 * words, 4 * words) for p in range(planes)]
    before = names(at + planes * 4 * words, sums)
    lines = [
        ".reg .b32 v<8>, x<8>, m<6>;",
        f".reg .f32 c<{sums}>;",
        *(f"mov.f32 c{i}, {name};" for i, name in enumerate(before)),
    ]
    for w in range(words):
        for half in range(halves):
            for pair, out in ((0, "v"), (1, "x")):
                mixed = []
                for p in range(planes):
                    # bytes of two tokens alternate, so that a decoded pair is one coordinate of both
                    one, other = (planes_at[p][4 * w + 2 * pair + i] for i in range(2))
                    mixed.append(f"m{3 * pair + p}")
                    lines.append(f"prmt.b32 {mixed[-1]}, {one}, {other}, {0x7362 if half else 0x5140:#x};")
                a, y1, y2 = (mixed + ["0", "0"])[:3]
                lines.append(decoder(planes, _decoder_registers(sums, a, y1, y2), [f"{out}{i}" for i in range(8)]))
            for f in range(4):
                product = 4 * (2 * w + half) + f
                to = [f"c{4 * product + i}" for i in range(4)]
                operand = (f"v{2 * f}", f"v{2 * f + 1}", f"x{2 * f}", f"x{2 * f + 1}")
                lines.append(multiply(to, operand, (weights[0], weights[1])))
    lines += [f"mov.f32 ${i}, c{i};" for i in range(sums)]
    inputs = ["r"] * (_TABLES + 2 + planes * 4 * words) + ["f"] * sums
    return "{\n" + "\n".join(lines) + "\n}", ",".join(["=f"] * sums + inputs)


def _raised(sums: int) -> tuple[str, str]:
    """Tops that no weight of 16 tokens passes by more than 2^_LEEWAY: assembly and its constraints.

    Outputs: of rows 2 t and 2 t + 1 the tops, the masses, then the sums, which go by the tops. Inputs: the highest
    exponents of this thread in these rows, then all that the outputs take the place of. Mostly nothing changes, which
    costs no exchange between threads.
    """
    lines = [
        ".reg .f32 most<2>, new<2>, by<2>, other, bound;",
        ".reg .pred changed;",
        f"add.f32 bound, ${sums + 6}, {_float_name(_LEEWAY)};",
        f"setp.gt.f32 changed, ${sums + 4}, bound;",
        f"add.f32 bound, ${sums + 7}, {_float_name(_LEEWAY)};",
        f"setp.gt.or.f32 changed, ${sums + 5}, bound, changed;",
        "vote.sync.any.pred changed, changed, 0xffffffff;",
        *(f"mov.f32 ${i}, ${sums + 6 + i};" for i in range(sums + 4)),
        "@!changed bra.uni kept;",
    ]
    for row in range(2):
        lines.append(f"mov.f32 most{row}, ${sums + 4 + row};")
        # of the eight threads of a column
        for lane in (4, 8, 16):
            lines.append(f"shfl.sync.bfly.b32 other, most{row}, {lane}, 0x1f, 0xffffffff;")
            lines.append(f"max.f32 most{row}, most{row}, other;")
        lines += [
            f"max.f32 new{row}, most{row}, ${row};",
            f"sub.f32 by{row}, ${row}, new{row};",
            f"ex2.approx.ftz.f32 by{row}, by{row};",
            f"mov.f32 ${row}, new{row};",
            f"mul.f32 ${2 + row}, ${2 + row}, by{row};",
        ]
    lines += [f"mul.f32 ${4 + i}, ${4 + i}, by{i % 2};" for i in range(sums)]
    lines.append("kept:")
    return "{\n" + "\n".join(lines) + "\n}", ",".join(["=&f"] * (sums + 4) + ["f"] * (sums + 6))


def _float_name(x: float) -> str:
    return "0f" + struct.pack(">f", x).hex().upper()


# By planes and bytes of plane 0.
_SCORES = tl.constexpr({(p, quarter): _scores(p, quarter) for p in (1, 2, 3) for quarter in QUARTERS})
_RAISED = tl.constexpr({(quarter,): _raised(quarter) for quarter in QUARTERS})
_VALUES = tl.constexpr({(p, quarter): _values(p, quarter) for p in (1, 2, 3) for quarter in QUARTERS})


@triton.jit
def _load_queries(q, t, is_row, QUARTER: tl.constexpr):
    """A thread's quarter of each quarter of a query row, as `_scores` takes them."""
    OWN: tl.constexpr = QUARTER // 2  # bytes of a quarter's quarter
    own = q.to(tl.pointer_type(tl.int8)) + t * OWN
    parts = ()
    for f in tl.static_range(0, 4):
        parts = parts + (words_at(own + 2 * f * QUARTER, is_row, OWN),)
    words = ()
    for w in tl.static_range(0, QUARTER // 16):
        for f in tl.static_range(0, 4):
            words = words + (parts[f][2 * w], parts[f][2 * w + 1])
    return words


@triton.jit
def _bits_at(held, QUARTER: tl.constexpr, IS_MIXED: tl.constexpr):
    """Where the two 1-bit planes begin behind plane 0; of one that is missing anything may be read."""
    first = 64 * QUARTER
    second = 64 * (QUARTER + QUARTER // 2)
    if IS_MIXED:
        first = tl.where(held >= 2, first, 0)
        second = tl.where(held >= 3, second, 0)
    return first, second


@triton.jit
def _source(
    chunk,
    token,
    values_behind,
    key_bits,
    value_bits,
    KEYS_AT: tl.constexpr,
    KEY_QUARTER: tl.constexpr,
    VALUE_QUARTER: tl.constexpr,
    KEY_PLANES: tl.constexpr,
    VALUE_PLANES: tl.constexpr,
):
    """Where 16 bytes of what belongs to 16 tokens lie, from where a head's share of a record begins.

    In this order: plane 0 of the keys, of the values; the other planes of the keys, of the values; both scales.
    """
    at = KEYS_AT + token * KEY_QUARTER + 16 * chunk
    START: tl.constexpr = KEY_QUARTER
    at = tl.where(chunk >= START, values_behind + 128 + token * VALUE_QUARTER + 16 * (chunk - START), at)
    KEY_BITS: tl.constexpr = START + VALUE_QUARTER
    for p in tl.static_range(0, KEY_PLANES - 1):
        behind = chunk - (KEY_BITS + p * (KEY_QUARTER // 2))
        at = tl.where(behind >= 0, KEYS_AT + key_bits[p] + token * (KEY_QUARTER // 2) + 16 * behind, at)
    VALUE_BITS: tl.constexpr = KEY_BITS + (KEY_PLANES - 1) * (KEY_QUARTER // 2)
    for p in tl.static_range(0, VALUE_PLANES - 1):
        behind = chunk - (VALUE_BITS + p * (VALUE_QUARTER // 2))
        bits = values_behind + 128 + value_bits[p] + token * (VALUE_QUARTER // 2)
        at = tl.where(behind >= 0, bits + 16 * behind, at)
    behind = chunk - (VALUE_BITS + (VALUE_PLANES - 1) * (VALUE_QUARTER // 2))
    at = tl.where(behind >= 0, token * 2 + 16 * behind, at)
    return tl.where(behind >= 2, values_behind + token * 2 + 16 * (behind - 2), at)


@triton.jit
def _begin_unit(
    unit,
    anchor,
    entry,
    head,
    token,
    is_left,
    KEYS_AT: tl.constexpr,
    KEY_BYTES: tl.constexpr,
    VALUE_BYTES: tl.constexpr,
    KEY_QUARTER: tl.constexpr,
    VALUE_QUARTER: tl.constexpr,
    KEY_PLANES: tl.constexpr,
    VALUE_PLANES: tl.constexpr,
    IS_MIXED: tl.constexpr,
    UNIT_BYTES: tl.constexpr,
):
    """Begin to copy what belongs to 16 tokens of a block, from `token` on, to shared memory at `unit`."""
    keys_at, values_at, held_keys, held_values = place(
        anchor, entry, head, KEY_BYTES, VALUE_BYTES, KEY_QUARTER, VALUE_QUARTER, KEY_PLANES, VALUE_PLANES, IS_MIXED
    )
    values_behind = (values_at.to(tl.int64) - keys_at.to(tl.int64)).to(tl.int32)
    key_bits = _bits_at(held_keys, KEY_QUARTER, IS_MIXED)
    value_bits = _bits_at(held_values, VALUE_QUARTER, IS_MIXED)
    lane = tl.arange(0, 32 * 4) % 32
    CHUNKS: tl.constexpr = UNIT_BYTES // 16
    COUNT: tl.constexpr = (CHUNKS + 31) // 32
    sources = ()
    for i in tl.static_range(0, COUNT):
        at = _source(
            32 * i + lane,
            token,
            values_behind,
            key_bits,
            value_bits,
            KEYS_AT,
            KEY_QUARTER,
            VALUE_QUARTER,
            KEY_PLANES,
            VALUE_PLANES,
        )
        sources = sources + ((keys_at + at).to(tl.int64),)
    is_last = is_left & (lane < CHUNKS - 32 * (COUNT - 1))
    copy_to_shared(unit + 16 * lane, sources, is_left, is_last, COUNT)


@triton.jit
def _held_keys(
    unit, thread, token, SCALES_AT: tl.constexpr, BITS_AT: tl.constexpr, QUARTER: tl.constexpr, PLANES: tl.constexpr
):
    """A thread's part of the keys of its two tokens, of which the first is given, and their scales: words as `_scores`
    takes them, of each token plane by plane.
    """
    t = thread % 4
    OWN: tl.constexpr = QUARTER // 4
    WORDS: tl.constexpr = OWN // 4
    own = shared_words(unit + token * QUARTER + t * OWN, 2, 8 * QUARTER, OWN)
    first = own[:WORDS]
    second = own[WORDS:]
    for p in tl.static_range(0, PLANES - 1):
        bits = unit + (token * (QUARTER // 2) + t % 2 * OWN + (BITS_AT + p * 8 * QUARTER))
        own = shared_words(bits, 2, 4 * QUARTER, OWN)
        first = first + own[:WORDS]
        second = second + own[WORDS:]
    return first + second + shared_words(unit + (SCALES_AT + 2 * token), 2, 16, 2)


@triton.jit
def _held_values(
    unit, thread, token, AT: tl.constexpr, BITS_AT: tl.constexpr, QUARTER: tl.constexpr, PLANES: tl.constexpr
):
    """A thread's part of the values of four tokens, each the fourth behind the one before: words as `_values` takes
    them.
    """
    g = thread % 32 // 4
    EIGHTH: tl.constexpr = QUARTER // 8
    words = _by_word(shared_words(unit + (AT + token * QUARTER + g * EIGHTH), 4, 4 * QUARTER, EIGHTH), EIGHTH)
    for p in tl.static_range(0, PLANES - 1):
        bits = unit + (token * (QUARTER // 2) + g % 4 * EIGHTH + (BITS_AT + p * 8 * QUARTER))
        words = words + _by_word(shared_words(bits, 4, 2 * QUARTER, EIGHTH), EIGHTH)
    return words


@triton.jit
def _by_word(words, BYTES: tl.constexpr):
    """Of four tokens' words first words of all, second words of all."""
    if BYTES == 8:
        words = (words[0], words[2], words[4], words[6], words[1], words[3], words[5], words[7])
    return words


@triton.jit
def _taken(u, below, IN_RUNS: tl.constexpr):
    """Which of the units of 16 tokens that a warp has it takes as the u-th.

    IN_RUNS: a span's units in the order of their distance from its middle, of two the one below first; `below` are how
    many the one that it is in has there.
    """
    unit = u
    if IN_RUNS:
        beside = (u & (EACH - 1)) >> 1
        # -1, 0, -2, 1, -3 and so on from the middle
        unit = (u & -EACH) + below + (beside ^ ((u & 1) - 1))
    return unit


@triton.jit
def _share_of_warp(unit, first, count, warp, IN_RUNS: tl.constexpr):
    """Block and first token in it of a unit of a warp, of `count` blocks from `first` on."""
    if IN_RUNS:
        unit += warp * count
        block = first + (unit >> 2)
        token = (unit & 3) * 16
    else:
        block = first + unit
        token = warp * 16
    return block, token


@triton.jit
def _below_middle(start, count):
    """How many units of the span that begins with that one of `count` lie below its middle."""
    return (tl.minimum(count - start, EACH) + 1) >> 1


@triton.jit
def _table(registers, held, PLANES: tl.constexpr):
    """The permute table of codes of PLANES planes, of which `held` are there, and the signs, as the assembly takes
    them.
    """
    own = registers + (12 * (PLANES - 1) + 4 * (held - 1))
    return (
        in_vector_register(tl.load(own)),
        in_vector_register(tl.load(own + 1)),
        in_vector_register(tl.load(own + 2)),
        in_vector_register(tl.load(own + 3)),
        in_vector_register(SIGNS),
    )


@triton.jit
def _power_of_two(scale):
    """The exponent of a scale, a float16 in float32, and 2 to the minus that: exact to multiply by.

    NaN and infinity make NaN of the weights; zero counts as the smallest number.
    """
    power = tl.maximum(scale.to(tl.int32, bitcast=True) >> 23, 127 - 24)
    # the integer in the last digits of 2^23, which needs no conversion
    exponent = (power + 0x4B000000).to(tl.float32, bitcast=True) - (8388608.0 + 127.0)
    return exponent, ((254 - power) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _store_joined(
    shared,
    tops,
    masses,
    sums,
    rows,
    out_top,
    out_mass,
    out_acc,
    VALUE_DIM: tl.constexpr,
    VALUE_QUARTER: tl.constexpr,
):
    """What the four warps have found, joined: through `shared`, the program's memory (`held_bytes`).

    tops, masses: pairs of [128], of thread (g, t)'s rows 2 t and 2 t + 1; masses of its tokens alone. Results are
    stored 256 bytes a row at once: where each thread stored its own numbers, this took 3 of 15 us (H100).
    """
    thread = tl.arange(0, 32 * 4)
    warp = thread // 32
    g = thread % 32 // 4
    t = thread % 4
    WIDTH: tl.constexpr = min(VALUE_DIM, _JOINED_AT_ONCE)
    # of a row, with 16 bytes more: threads that write at once meet no bank twice
    STRIDE: tl.constexpr = 4 * WIDTH + 16
    FIELDS: tl.constexpr = 4 * WIDTH // VALUE_DIM
    EACH: tl.constexpr = VALUE_QUARTER // 8
    tops_at = shared + 32 * STRIDE
    for half in tl.static_range(0, VALUE_DIM // WIDTH):
        tl.debug_barrier()  # all have read what lay here
        for parity in tl.static_range(0, 2):
            row = 2 * t + parity
            if half == 0:
                floats_to_shared(tops_at + 32 * row + 4 * warp, (tops[parity],), 1)
                floats_to_shared(tops_at + 32 * row + 4 * warp + 16, (sum_of_column(masses[parity]),), 1)
            for f in tl.static_range(0, FIELDS):
                own = ()
                for j in tl.static_range(0, EACH):
                    own = own + (sums[16 * (j // 2) + 4 * (half * FIELDS + f) + 2 * (j % 2) + parity],)
                at = shared + (warp * 8 + row) * STRIDE + (4 * f * VALUE_QUARTER) + 4 * EACH * g
                floats_to_shared(at, own, EACH)
        tl.debug_barrier()  # others read what these have written
        for start in tl.static_range(0, 2 * WIDTH, 32 * 4):
            index = start + thread
            row = index // (WIDTH // 4)
            column = index % (WIDTH // 4) * 4
            top = floats_from_shared(tops_at + 32 * row)
            mass = floats_from_shared(tops_at + 32 * row + 16)
            best = tl.maximum(tl.maximum(top[0], top[1]), tl.maximum(top[2], top[3]))
            joined = (tl.zeros((32 * 4,), tl.float32),) * 4
            all_mass = joined[0]
            for w in tl.static_range(0, 4):
                share = tl.exp2(top[w] - best)
                own = floats_from_shared(shared + (w * 8 + row) * STRIDE + 4 * column)
                all_mass += mass[w] * share
                joined = (
                    joined[0] + own[0] * share,
                    joined[1] + own[1] * share,
                    joined[2] + own[2] * share,
                    joined[3] + own[3] * share,
                )
            store_floats(out_acc + row * VALUE_DIM + (half * WIDTH + column), joined, row < rows)
            if half == 0:
                tl.store(out_top + row, best, mask=(row < rows) & (column == 0))
                tl.store(out_mass + row, all_mass, mask=(row < rows) & (column == 0))


@triton.jit
def begin_units(
    anchor,
    entries,
    first,
    last,
    head,
    KEYS_AT: tl.constexpr,
    KEY_BYTES: tl.constexpr,
    VALUE_BYTES: tl.constexpr,
    KEY_QUARTER: tl.constexpr,
    VALUE_QUARTER: tl.constexpr,
    KEY_PLANES: tl.constexpr,
    VALUE_PLANES: tl.constexpr,
    IS_MIXED: tl.constexpr,
    IN_RUNS: tl.constexpr,
    UNIT_BYTES: tl.constexpr,
    UNITS: tl.constexpr,
    HELD_BYTES: tl.constexpr,
):
    """Begin to copy the first units of each warp; its shared memory, and the entry of the first unit behind them."""
    thread = tl.arange(0, 32 * 4)
    warp = thread // 32
    count = tl.maximum(last - first, 0)
    below = _below_middle(0, count)
    held = shared_bytes(thread, HELD_BYTES) + warp * (UNITS * UNIT_BYTES)
    for j in tl.static_range(0, UNITS - 1):
        block, token = _share_of_warp(_taken(0 * count + j, below, IN_RUNS), first, count, warp, IN_RUNS)
        entry = tl.load(entries + block, mask=0 * block + j < count, other=0)
        _begin_unit(
            held + j * UNIT_BYTES,
            anchor,
            entry,
            head,
            token,
            0 * thread + j < count,
            KEYS_AT,
            KEY_BYTES,
            VALUE_BYTES,
            KEY_QUARTER,
            VALUE_QUARTER,
            KEY_PLANES,
            VALUE_PLANES,
            IS_MIXED,
            UNIT_BYTES,
        )
    block, _ = _share_of_warp(_taken(0 * count + (UNITS - 1), below, IN_RUNS), first, count, warp, IN_RUNS)
    return held, tl.load(entries + block, mask=0 * block + (UNITS - 1) < count, other=0)


@triton.jit
def attend_fragments(
    begun,
    anchor,
    entries,
    first,
    last,
    head,
    sinks,
    q,
    rows,
    row_scale,
    position,
    softcap,
    means,
    for_means,
    bias,
    bias_table,
    bias_scale,
    registers,
    out_top,
    out_mass,
    out_acc,
    KEY_DIM: tl.constexpr,
    KEY_QUARTER: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_QUARTER: tl.constexpr,
    KEY_PLANES: tl.constexpr,
    VALUE_PLANES: tl.constexpr,
    KEY_BYTES: tl.constexpr,
    VALUE_BYTES: tl.constexpr,
    IS_MIXED: tl.constexpr,
    HAS_MEANS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    PAIRS_PADDED: tl.constexpr,
    FAST: tl.constexpr,
    KEYS_AT: tl.constexpr,
    UNIT_BYTES: tl.constexpr,
    UNITS: tl.constexpr,
):
    """The blocks [first, last) of `entries` for `rows` query rows, at most 8; stores top, mass and weighted sums.

    begun: from `begin_units`. q: [128], where thread (g, t)'s row g begins in what `prepare_rows` left in float16.
    row_scale, position, means, bias_scale: pairs of [128], of its rows 2 t and 2 t + 1; means point to what is added
    to the scores of block 0.
    for_means: of row g, what `store_means` takes: its query in float32, the factor of its scores, where block 0's goes;
    then the first means.
    bias: what `span_of_bias` takes behind the position. out_top, out_mass, out_acc: of the first row.
    """
    thread = tl.arange(0, 32 * 4)
    g = thread % 32 // 4
    t = thread % 4
    is_row = g < rows
    KEY_WORDS: tl.constexpr = KEY_QUARTER // 16
    KEYS: tl.constexpr = KEY_WORDS * KEY_PLANES
    SUMS: tl.constexpr = VALUE_QUARTER

    queries = _load_queries(q, t, is_row, KEY_QUARTER)
    key_table = _table(registers, KEY_PLANES, KEY_PLANES) + (t // 2 * 3 + 1,)
    value_table = _table(registers, VALUE_PLANES, VALUE_PLANES) + (g // 4 * 3 + 1,)
    top0 = tl.full((32 * 4,), -1e30, tl.float32)
    top1 = top0
    mass0 = tl.zeros((32 * 4,), tl.float32)
    mass1 = mass0
    sums = (tl.zeros((32 * 4,), tl.float32),) * SUMS
    is_row0 = 2 * t < rows
    is_row1 = 2 * t + 1 < rows

    # within a unit, see `_source`
    VALUES_AT: tl.constexpr = 16 * KEY_QUARTER
    KEY_BITS_AT: tl.constexpr = VALUES_AT + 16 * VALUE_QUARTER
    VALUE_BITS_AT: tl.constexpr = KEY_BITS_AT + (KEY_PLANES - 1) * 8 * KEY_QUARTER
    SCALES_AT: tl.constexpr = UNIT_BYTES - 64
    warp = thread // 32
    count = tl.maximum(last - first, 0)
    held, entry = begun
    if HAS_MEANS:
        store_means(
            for_means[3],
            anchor,
            entries,
            first,
            last,
            head,
            for_means[0],
            is_row,
            for_means[1],
            for_means[2],
            KEY_DIM,
            VALUE_QUARTER,
            KEY_PLANES,
            VALUE_PLANES,
            KEY_BYTES,
            VALUE_BYTES,
            IS_MIXED,
        )
        tl.debug_barrier()  # other threads read what these have stored
    # where the unit lies that is read next, and that which was read last
    unit = 0 * count
    before = unit + (UNITS - 1) * UNIT_BYTES
    # the first of a warp's two tokens in rows g and g + 8, of four among the values
    first_token = token_of_row(thread)
    value_token = t
    if HAS_BIAS:
        above = (0.0 * top0,) * 4
        # units from the one in turn to the one that is copied next
        ahead = (0 * count,) * UNITS
        for j in tl.static_range(0, UNITS):
            ahead = ahead[1:] + (_taken(0 * count + j, _below_middle(0, count), True),)
    # a warp's tokens are one run where there is a bias
    STEP: tl.constexpr = EACH if HAS_BIAS else 1 << 30
    for start in tl.range(0, count, STEP, num_stages=1):
        if HAS_BIAS:
            below_middle = _below_middle(start, count)
            below_next = _below_middle(start + EACH, count)
            span = span_of_bias(
                sinks + 64 * first + 16 * (warp * count + start + below_middle),
                bias[0],
                bias[1],
                bias[2],
                bias[3],
                PAIRS_PADDED,
                FAST,
            )
            # read again behind it, where registers are short
            queries = _load_queries(q, t + zero_again(start + 0 * t), is_row, KEY_QUARTER)
        for u in tl.range(start, tl.minimum(start + STEP, count), num_stages=1):
            if HAS_BIAS:
                # units on both sides of the middle are mirrored, and have their bias together
                is_below = u & 1 == 0
                b0, b1, b2, b3 = above
                if is_below:
                    above, below = bias_beside((u - start) >> 1, span, bias_table, FAST)
                    b0, b1, b2, b3 = below
                first_token = token_of_row(thread) ^ tl.where(is_below, 7, 0)
                value_token = t ^ tl.where(is_below, 3, 0)
                in_turn = ahead[0]
                copied = ahead[UNITS - 1]
                following = u + UNITS + 0 * count
                is_next = following >= start + EACH
                ahead = ahead[1:] + (_taken(following, tl.where(is_next, below_next, below_middle), True),)
                asked = ahead[UNITS - 1]
            else:
                in_turn = u
                copied = u + (UNITS - 1)
                asked = u + UNITS
            await_copies(thread, UNITS - 2)
            # all threads of the warp are done with what was read last
            _, token = _share_of_warp(copied, first, count, warp, HAS_BIAS)
            _begin_unit(
                held + before,
                anchor,
                entry,
                head,
                token,
                0 * thread + (u + (UNITS - 1)) < count,
                KEYS_AT,
                KEY_BYTES,
                VALUE_BYTES,
                KEY_QUARTER,
                VALUE_QUARTER,
                KEY_PLANES,
                VALUE_PLANES,
                IS_MIXED,
                UNIT_BYTES,
            )
            block, _ = _share_of_warp(asked, first, count, warp, HAS_BIAS)
            entry = tl.load(entries + block, mask=0 * block + (u + UNITS) < count, other=0)
            block, token = _share_of_warp(in_turn, first, count, warp, HAS_BIAS)
            keys = _held_keys(held + unit, thread, first_token, SCALES_AT, KEY_BITS_AT, KEY_QUARTER, KEY_PLANES)
            own_key_table = key_table
            own_value_table = value_table
            if IS_MIXED:
                own_entry = tl.load(entries + block)
                held_keys = (own_entry & 3).to(tl.int32)
                held_values = ((own_entry >> 2) & 3).to(tl.int32)
                own_key_table = _table(registers, held_keys, KEY_PLANES) + (t // 2 * 3 + 1,)
                own_value_table = _table(registers, held_values, VALUE_PLANES) + (g // 4 * 3 + 1,)
            if HAS_MEANS:
                mean0 = tl.load(means[0] + block, mask=is_row0, other=0)
                mean1 = tl.load(means[1] + block, mask=is_row1, other=0)
            KEY_ASSEMBLY: tl.constexpr = piece(_SCORES, 0, KEY_PLANES, KEY_QUARTER)
            KEY_CONSTRAINTS: tl.constexpr = piece(_SCORES, 1, KEY_PLANES, KEY_QUARTER)
            # of the first token in an even and an odd row, and of the second one
            s0, s1, s2, s3 = tl.inline_asm_elementwise(
                KEY_ASSEMBLY,
                KEY_CONSTRAINTS,
                own_key_table + queries + keys[: 2 * KEYS],
                dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
                is_pure=True,
                pack=1,
            )
            scales = shared_words(held + (unit + (SCALES_AT + 32)) + 2 * first_token, 2, 16, 2)
            values = _held_values(
                held + unit, thread, value_token, VALUES_AT, VALUE_BITS_AT, VALUE_QUARTER, VALUE_PLANES
            )
            k0 = lower_half(keys[2 * KEYS])
            k1 = lower_half(keys[2 * KEYS + 1])
            v0 = lower_half(scales[0])
            v1 = lower_half(scales[1])
            s0 *= k0 * row_scale[0]
            s1 *= k0 * row_scale[1]
            s2 *= k1 * row_scale[0]
            s3 *= k1 * row_scale[1]
            if HAS_MEANS:
                s0 += mean0
                s1 += mean1
                s2 += mean0
                s3 += mean1
            if HAS_BIAS:
                s0 += b0 * bias_scale[0]
                s1 += b1 * bias_scale[1]
                s2 += b2 * bias_scale[0]
                s3 += b3 * bias_scale[1]
            s0 = capped(s0, softcap, HAS_SOFTCAP)
            s1 = capped(s1, softcap, HAS_SOFTCAP)
            s2 = capped(s2, softcap, HAS_SOFTCAP)
            s3 = capped(s3, softcap, HAS_SOFTCAP)
            if IS_CAUSAL:
                at = sinks + 64 * block + token + first_token
                s0 = tl.where(at <= position[0], s0, float("-inf"))
                s1 = tl.where(at <= position[1], s1, float("-inf"))
                s2 = tl.where(at + 8 <= position[0], s2, float("-inf"))
                s3 = tl.where(at + 8 <= position[1], s3, float("-inf"))

            # a value's scale joins the exponent: weights are at most 1 and keep their digits in float16
            e0, i0 = _power_of_two(v0)
            e1, i1 = _power_of_two(v1)
            s0 += e0
            s1 += e0
            s2 += e1
            s3 += e1
            RAISED_ASSEMBLY: tl.constexpr = piece(_RAISED, 0, VALUE_QUARTER)
            RAISED_CONSTRAINTS: tl.constexpr = piece(_RAISED, 1, VALUE_QUARTER)
            found = tl.inline_asm_elementwise(
                RAISED_ASSEMBLY,
                RAISED_CONSTRAINTS,
                (tl.maximum(s0, s2), tl.maximum(s1, s3), top0, top1, mass0, mass1) + sums,
                dtype=(tl.float32,) * (SUMS + 4),
                is_pure=True,
                pack=1,
            )
            top0, top1, mass0, mass1 = found[0], found[1], found[2], found[3]
            w0 = tl.exp2(s0 - top0)
            w1 = tl.exp2(s1 - top1)
            w2 = tl.exp2(s2 - top0)
            w3 = tl.exp2(s3 - top1)
            mass0 += w0 * i0 + w2 * i1
            mass1 += w1 * i0 + w3 * i1
            v0 *= i0
            v1 *= i1
            weights = (transposed(packed(w0 * v0, w1 * v0)), transposed(packed(w2 * v1, w3 * v1)))
            if HAS_BIAS:
                # rows 2 t and 2 t + 1 of mirrored tokens are 7 - t and 3 - t
                weights = (halves_swapped(weights[0], is_below), halves_swapped(weights[1], is_below))
            VALUE_ASSEMBLY: tl.constexpr = piece(_VALUES, 0, VALUE_PLANES, VALUE_QUARTER)
            VALUE_CONSTRAINTS: tl.constexpr = piece(_VALUES, 1, VALUE_PLANES, VALUE_QUARTER)
            sums = tl.inline_asm_elementwise(
                VALUE_ASSEMBLY,
                VALUE_CONSTRAINTS,
                own_value_table + weights + values + found[4:],
                dtype=(tl.float32,) * SUMS,
                is_pure=True,
                pack=1,
            )
            before = unit
            unit = tl.where(unit == (UNITS - 1) * UNIT_BYTES, 0, unit + UNIT_BYTES)

    _store_joined(
        held - warp * (UNITS * UNIT_BYTES),
        (top0, top1),
        (mass0, mass1),
        sums,
        rows,
        out_top,
        out_mass,
        out_acc,
        VALUE_DIM,
        VALUE_QUARTER,
    )
