"""Functions that the kernels of attend share: products, angles, and where things lie."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def join_launches(OVERLAPS: tl.constexpr):
    """Wait until the launch before this one has ended, where it may still run, and let the next one begin to start.

    In this order, so that when a program begins all that lies before the launch before has ended. Ahead of it only what
    was there long before may be read, rotations and tables, and nothing be written. The L2 may be asked for anything:
    all writes go there.
    """
    if OVERLAPS:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def turned(position, frequency):
    """cos and sin of position * frequency. frequency: int64, in 2^-64 turns, so that the product drops whole turns.

    Polynomials of a quarter turn, from Cephes (Moshier), sinf.c: absolute error below 1e-7. The library's functions
    would bring a reduction of large angles along, which needs local memory.
    """
    turns = (position.to(tl.int64) * frequency) >> 32
    quarter = (turns + (1 << 29)) >> 30
    x = (turns - (quarter << 30)).to(tl.float32) * 1.4629180792671596e-09  # 2 pi / 2^32
    quarter = quarter.to(tl.int32)
    z = x * x
    sin = ((-1.9515295891e-4 * z + 8.3321608736e-3) * z - 1.6666654611e-1) * z * x + x
    cos = ((2.443315711809948e-5 * z - 1.388731625493765e-3) * z + 4.166664568298827e-2) * z * z - 0.5 * z + 1
    is_odd = quarter % 2 != 0
    turned_cos = tl.where(is_odd, sin, cos) * tl.where((quarter + 1) & 2 != 0, -1.0, 1.0)
    turned_sin = tl.where(is_odd, cos, sin) * tl.where(quarter & 2 != 0, -1.0, 1.0)
    return turned_cos, turned_sin


@triton.jit
def turned_back(along_cos, along_sin, cos, sin):
    """Coefficients of cos and sin of angles that begin later, by an angle with that cos and sin."""
    return along_cos * cos + along_sin * sin, along_sin * cos - along_cos * sin


@triton.jit
def high_and_low(x, dtype: tl.constexpr):
    """x as a sum of two numbers of a shorter dtype: twice its digits."""
    high = x.to(dtype)
    return high, (x - high.to(tl.float32)).to(dtype)


@triton.jit
def dot(a, b, acc, ON_GPU: tl.constexpr):
    """acc + a @ b; Triton's interpreter would multiply the bits of bfloat16."""
    if not ON_GPU:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="tf32x3")


@triton.jit
def capped(s, softcap, HAS_SOFTCAP: tl.constexpr):
    """Scores in base 2: capped, and times log2 e, where there is a cap; else they have been multiplied already."""
    if HAS_SOFTCAP:
        s = softcap * (2 * tl.sigmoid(2 * s / softcap) - 1) * 1.4426950408889634
    return s


@triton.jit
def columns_of_piece(QUARTER: tl.constexpr, QUARTER_PADDED: tl.constexpr, piece: tl.constexpr, PIECES: tl.constexpr):
    """The coordinates of a piece of a head whose quarters are padded, and which of them are any; PIECES 1, 2 or 4."""
    WIDTH: tl.constexpr = 4 * QUARTER_PADDED // PIECES
    tl.static_assert(WIDTH % QUARTER_PADDED == 0, "a piece has whole quarters")
    p = tl.arange(0, WIDTH)
    if QUARTER == QUARTER_PADDED:
        column = piece * WIDTH + p
        is_real = p >= 0
    else:
        column = (piece * WIDTH + p) // QUARTER_PADDED * QUARTER + p % QUARTER_PADDED
        is_real = p % QUARTER_PADDED < QUARTER
    return column, is_real


@triton.jit
def rotated_piece(q, at, is_row, QUARTER_PADDED: tl.constexpr, piece: tl.constexpr, PIECES: tl.constexpr):
    """A piece of the rotated queries of rows `at`, [R, 4 QUARTER_PADDED / PIECES] float32."""
    WIDTH: tl.constexpr = 4 * QUARTER_PADDED // PIECES
    j = piece * WIDTH + tl.arange(0, WIDTH)
    return tl.load(q + at[:, None] * (4 * QUARTER_PADDED) + j[None, :], mask=is_row[:, None], other=0)


@triton.jit
def rotated_quarters(q, at, is_row, QUARTER_PADDED: tl.constexpr):
    """The rotated queries of rows `at` as four tensors [R, QUARTER_PADDED] float32."""
    return (
        rotated_piece(q, at, is_row, QUARTER_PADDED, 0, 4),
        rotated_piece(q, at, is_row, QUARTER_PADDED, 1, 4),
        rotated_piece(q, at, is_row, QUARTER_PADDED, 2, 4),
        rotated_piece(q, at, is_row, QUARTER_PADDED, 3, 4),
    )


@triton.jit
def row_factors(factor, at, is_row, scale, bias_scaling, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr):
    """What `prepare_rows` has left of rows `at`: factors of the scores and of the key bias's, and its constant part."""
    if not HAS_SOFTCAP:
        scale *= 1.4426950408889634  # log2 e: scores in base 2
    row_scale = tl.load(factor + at * 4, mask=is_row, other=0) * scale
    bias_scale = row_scale
    constant = row_scale
    if HAS_BIAS:
        bias_scale = tl.load(factor + at * 4 + 1, mask=is_row, other=0) * (scale * bias_scaling)
        constant = tl.load(factor + at * 4 + 2, mask=is_row, other=0) * scale
    return row_scale, bias_scale, constant


@triton.jit
def plain_piece(
    base,
    row_stride,
    n,
    is_held,
    QUARTER: tl.constexpr,
    QUARTER_PADDED: tl.constexpr,
    piece: tl.constexpr,
    PIECES: tl.constexpr,
):
    """A piece of 64 vectors of the model's dtype, [64, 4 QUARTER_PADDED / PIECES]."""
    column, is_real = columns_of_piece(QUARTER, QUARTER_PADDED, piece, PIECES)
    at = base + n[:, None] * row_stride + column[None, :]
    return tl.load(at, mask=is_held[:, None] & is_real[None, :], other=0)


@triton.jit
def plain_quarters(base, row_stride, n, is_held, QUARTER: tl.constexpr, QUARTER_PADDED: tl.constexpr):
    """64 vectors of the model's dtype as four tensors [64, QUARTER_PADDED]."""
    return (
        plain_piece(base, row_stride, n, is_held, QUARTER, QUARTER_PADDED, 0, 4),
        plain_piece(base, row_stride, n, is_held, QUARTER, QUARTER_PADDED, 1, 4),
        plain_piece(base, row_stride, n, is_held, QUARTER, QUARTER_PADDED, 2, 4),
        plain_piece(base, row_stride, n, is_held, QUARTER, QUARTER_PADDED, 3, 4),
    )


@triton.jit
def ask_for_tail(base, first_slot, end_slot, DIM: tl.constexpr):
    """Have the L2 read 64 slots of a head's tail, before `end_slot`, 128 bytes a thread."""
    BYTES: tl.constexpr = DIM * base.dtype.element_ty.primitive_bitwidth // 8
    own = tl.arange(0, 128) * 128
    for start in tl.static_range(0, 64 * BYTES, 128 * 128):
        at = first_slot * BYTES + start + own
        is_there = (at < end_slot * BYTES) & (start + own < 64 * BYTES)
        _ask_for(base.to(tl.pointer_type(tl.int8)) + at, is_there)


@triton.jit
def ask_for_entries(entries, start, count, step):
    """Have the L2 read entries of a block table, [start, count), 128 times 16 at once and `step` from one time to the
    next. The last of them may lie in a line of its own.
    """
    own = tl.arange(0, 128) * 16
    for at in tl.range(start, count, step, num_stages=1):
        _ask_for(entries + tl.minimum(at + own, count - 1), at + own < count + 15)


@triton.jit
def _ask_for(pointer, is_there):
    """Have the L2 read the 128 bytes that a pointer lies in."""
    tl.inline_asm_elementwise(
        "{.reg .pred p; setp.ne.s32 p, $2, 0; @p prefetch.global.L2 [$1]; mov.b32 $0, 0;}",
        "=r,l,r",
        [pointer.to(tl.int64), is_there.to(tl.int32)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def add_scores(s, q, keys, SWAP: tl.constexpr, ON_GPU: tl.constexpr):
    """s + q [R, D] . keys [N, D] -> [R, N] float32; swapped, s is [N, R]: tokens are the product's rows."""
    if SWAP:
        s = dot(keys, tl.trans(q), s, ON_GPU)
    else:
        s = dot(q, tl.trans(keys), s, ON_GPU)
    return s


@triton.jit
def add_scores_dense(s, q, keys, SWAP: tl.constexpr, ON_GPU: tl.constexpr):
    """The same of float32 q and keys of the model's dtype, with all digits of q."""
    if keys.dtype == tl.float32:
        s = add_scores(s, q, keys, SWAP, ON_GPU)
    else:
        high, low = high_and_low(q, keys.dtype)
        s = add_scores(s, high, keys, SWAP, ON_GPU)
        s = add_scores(s, low, keys, SWAP, ON_GPU)
    return s


@triton.jit
def no_scores(ROWS: tl.constexpr, SWAP: tl.constexpr):
    """Scores of 64 tokens to add to."""
    if SWAP:
        s = tl.zeros((64, ROWS), tl.float32)
    else:
        s = tl.zeros((ROWS, 64), tl.float32)
    return s


@triton.jit
def by_row(s, SWAP: tl.constexpr):
    """Scores as [R, N]."""
    if SWAP:
        s = tl.trans(s)
    return s


@triton.jit
def place(
    anchor,
    entry,
    head,
    KEY_BYTES: tl.constexpr,
    VALUE_BYTES: tl.constexpr,
    KEY_QUARTER: tl.constexpr,
    VALUE_QUARTER: tl.constexpr,
    KEY_PLANES: tl.constexpr,
    VALUE_PLANES: tl.constexpr,
    IS_MIXED: tl.constexpr,
):
    """Where a head's share of a record begins, and its values; how many planes they have."""
    if IS_MIXED:
        key_planes = (entry & 3).to(tl.int32)
        value_planes = ((entry >> 2) & 3).to(tl.int32)
    else:
        key_planes = KEY_PLANES
        value_planes = VALUE_PLANES
    key_bytes = KEY_BYTES
    value_bytes = VALUE_BYTES
    if KEY_PLANES > 0:
        key_bytes += (key_planes - 1) * (32 * KEY_QUARTER)
    if VALUE_PLANES > 0:
        value_bytes += (value_planes - 1) * (32 * VALUE_QUARTER)
    keys = anchor + tl.multiple_of(entry & -16, 16) + tl.multiple_of(head * (key_bytes + value_bytes), 16)
    return keys, keys + tl.multiple_of(key_bytes, 16), key_planes, value_planes


@triton.jit
def mean_quarter(keys_at, is_block, QUARTER: tl.constexpr, QUARTER_PADDED: tl.constexpr, f: tl.constexpr):
    """Quarter f of the means of blocks' keys, float32 [.., QUARTER_PADDED]; keys_at, is_block: [.., 1]."""
    j = tl.arange(0, QUARTER_PADDED)[None, :]
    at = keys_at.to(tl.pointer_type(tl.float16)) + 64 + f * QUARTER + j
    return tl.load(at, mask=is_block & (j < QUARTER), other=0).to(tl.float32)


@triton.jit
def token_of(slot, slots, sinks, length):
    """The newest token that lies in each slot of a tail, and its place behind the sinks."""
    ring = slots - sinks
    newest = tl.maximum(length - sinks, 1) - 1
    in_ring = newest - (newest - (slot - sinks) + ring) % ring
    return tl.where(slot < sinks, slot, sinks + in_ring), in_ring


@triton.jit
def table_of_block(turns, part, PAIRS_PADDED: tl.constexpr):
    """cos and sin of each pair at positions 0 to 63, of BiasTables.turns: rounded (part 0), or what that leaves out."""
    at = tl.arange(0, 64)[:, None] * (2 * PAIRS_PADDED) + tl.arange(0, 2 * PAIRS_PADDED)[None, :]
    return tl.load(turns + part * (128 * PAIRS_PADDED) + at)


@triton.jit
def bias_of_tokens(
    token,
    coefficients,
    is_row,
    frequencies,
    bias,
    PAIRS_PADDED: tl.constexpr,
    SWAP: tl.constexpr,
    ON_GPU: tl.constexpr,
):
    """bias + scores [R, N] of the rotated key bias at tokens [N]; few pairs at a time: angles take many registers."""
    for start in tl.static_range(0, PAIRS_PADDED, 16):
        i = start + tl.arange(0, 16)
        cos, sin = turned(token[:, None], tl.load(frequencies + i)[None, :])
        along_cos = tl.load(coefficients[:, None] + i[None, :], mask=is_row[:, None], other=0)
        along_sin = tl.load(coefficients[:, None] + PAIRS_PADDED + i[None, :], mask=is_row[:, None], other=0)
        bias = add_scores(bias, along_cos, cos, SWAP, ON_GPU)
        bias = add_scores(bias, along_sin, sin, SWAP, ON_GPU)
    return bias
