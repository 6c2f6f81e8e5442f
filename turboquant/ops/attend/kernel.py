"""attend over packed blocks on the GPU: queries rotated, splits of the tokens in parallel, their results merged.

Three launches. `_prepare` rotates the queries and folds the key bias into them; `_attend_split` reads the planes in
place, every program a share of the blocks of one KV head (one more program the sinks and the recent window);
`_merge` joins the shares by log-sum-exp and turns the result back. What changes from step to step (lengths, blocks,
their addresses) is read from device memory, so that a captured graph can be replayed.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from turboquant.layout import BLOCK_TOKENS, PackedTokens
from turboquant.ops.attend.bias import BiasTerms
from turboquant.ops.devices import capability, is_interpreted, multiprocessors
from turboquant.ops.unpack.kernel import coordinate, decode, is_coordinate, load_codes, tables


@dataclass(frozen=True)
class Launch:
    """How `_attend_split` is compiled and spread.

    Attributes:
        rows: query rows of a program. swap: tokens are the rows of the tensor cores' products.
        warps, stages: of a program. programs: wanted for each multiprocessor.
    """

    rows: int
    swap: bool
    warps: int
    stages: int
    programs: int


# By capability (0 = any other), query rows up to, and widest head up to; written by scripts/tune_kernels.py.
_LAUNCHES: dict[int, list[tuple[int, int, Launch]]] = {
    90: [
        (8, 128, Launch(rows=8, swap=True, warps=4, stages=3, programs=3)),
        (8, 256, Launch(rows=8, swap=True, warps=8, stages=2, programs=2)),
        (16, 128, Launch(rows=16, swap=True, warps=4, stages=2, programs=2)),
        (16, 256, Launch(rows=8, swap=True, warps=8, stages=2, programs=2)),
        (1 << 30, 128, Launch(rows=32, swap=True, warps=8, stages=2, programs=2)),
        (1 << 30, 256, Launch(rows=16, swap=True, warps=8, stages=2, programs=2)),
    ],
    0: [
        (1 << 30, 128, Launch(rows=16, swap=False, warps=8, stages=2, programs=2)),
        (1 << 30, 256, Launch(rows=16, swap=False, warps=8, stages=2, programs=2)),
    ],
}

# A share of fewer blocks costs more in merging than it gains in parallel.
_LEAST_BLOCKS = 2


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


@triton.jit(do_not_specialize=["groups", "heads_per_group", "tokens"])
def _prepare(
    q,
    q_batch_stride,
    q_head_stride,
    q_token_stride,
    matrix,
    bias,
    out_q,
    out_factor,
    out_coefficients,
    groups,
    heads_per_group,
    tokens,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    QUARTER: tl.constexpr,
    QUARTER_PADDED: tl.constexpr,
    PAIRS: tl.constexpr,
    PAIRS_PADDED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One query row: rotated to length 1, in the order of decoded tiles; its length; its share of the key bias."""
    row = tl.program_id(0)
    bg = tl.program_id(1)
    b = bg // groups
    g = bg % groups
    rows = heads_per_group * tokens
    at = (bg * rows + row).to(tl.int64)
    head = g * heads_per_group + row // tokens
    source = q + b.to(tl.int64) * q_batch_stride + head.to(tl.int64) * q_head_stride
    source += (row % tokens).to(tl.int64) * q_token_stride
    d = tl.arange(0, DIM_PADDED)
    x = tl.load(source + d, mask=d < DIM, other=0).to(tl.float32)
    length = tl.sqrt(tl.sum(x * x, 0))
    inverse = tl.where(length > 0, 1 / length, 0.0)
    inverse = tl.where(length != length, length, inverse)  # NaN stays
    width: tl.constexpr = 4 * QUARTER_PADDED
    for start in tl.static_range(0, width, CHUNK):
        p = start + tl.arange(0, CHUNK)
        c = coordinate(p, QUARTER)
        is_real = is_coordinate(p, QUARTER)
        part = tl.load(matrix + c[:, None] * DIM + d[None, :], mask=is_real[:, None] & (d < DIM)[None, :], other=0)
        tl.store(out_q + at * width + p, tl.sum(part * x[None, :], 1) * inverse)
    constant = 0.0
    bias_length = 0.0
    if PAIRS >= 0:
        own = bias + g.to(tl.int64) * DIM
        all_of_it = tl.load(own + d, mask=d < DIM, other=0)
        bias_length = tl.sqrt(tl.sum(all_of_it * all_of_it, 0))
        shrink = inverse * tl.where(bias_length > 0, 1 / bias_length, 0.0)
        i = tl.arange(0, PAIRS_PADDED)
        first = 2 * i if INTERLEAVED else i
        second = 2 * i + 1 if INTERLEAVED else i + PAIRS
        q1 = tl.load(source + first, mask=i < PAIRS, other=0).to(tl.float32)
        q2 = tl.load(source + second, mask=i < PAIRS, other=0).to(tl.float32)
        b1 = tl.load(own + first, mask=i < PAIRS, other=0)
        b2 = tl.load(own + second, mask=i < PAIRS, other=0)
        to = out_coefficients + at * (2 * PAIRS_PADDED) + i
        tl.store(to, (q1 * b1 + q2 * b2) * shrink)
        tl.store(to + PAIRS_PADDED, (q2 * b1 - q1 * b2) * shrink)
        still = d >= 2 * PAIRS  # coordinates that the rotary embedding leaves alone
        constant = tl.sum(tl.where(still, x * all_of_it, 0.0), 0)
    tl.store(out_factor + at * 4, length)
    tl.store(out_factor + at * 4 + 1, bias_length * length)
    tl.store(out_factor + at * 4 + 2, constant)


@triton.jit
def _high_and_low(x, dtype: tl.constexpr):
    """x as a sum of two numbers of a shorter dtype: twice its digits."""
    high = x.to(dtype)
    return high, (x - high.to(tl.float32)).to(dtype)


@triton.jit
def _dot(a, b, acc, ON_GPU: tl.constexpr):
    """acc + a @ b; Triton's interpreter would multiply the bits of bfloat16."""
    if not ON_GPU:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="tf32x3")


@triton.jit
def _scores(q, keys, SWAP: tl.constexpr, ON_GPU: tl.constexpr):
    """q [R, D] . keys [N, D] -> [R, N] float32; swapped, the tokens are the rows of the tensor cores' product."""
    if SWAP:
        s = tl.trans(_dot(keys, tl.trans(q), tl.zeros((keys.shape[0], q.shape[0]), tl.float32), ON_GPU))
    else:
        s = _dot(q, tl.trans(keys), tl.zeros((q.shape[0], keys.shape[0]), tl.float32), ON_GPU)
    return s


@triton.jit
def _scores_dense(q, keys, SWAP: tl.constexpr, ON_GPU: tl.constexpr):
    """Float32 q against keys of the model's dtype, with all digits of q."""
    if keys.dtype == tl.float32:
        s = _scores(q, keys, SWAP, ON_GPU)
    else:
        high, low = _high_and_low(q, keys.dtype)
        s = _scores(high, keys, SWAP, ON_GPU) + _scores(low, keys, SWAP, ON_GPU)
    return s


@triton.jit
def _in_base_2(s, softcap, HAS_SOFTCAP: tl.constexpr):
    """Scores capped, times log2 e."""
    if HAS_SOFTCAP:
        s = softcap * (2 * tl.sigmoid(2 * s / softcap) - 1)
    return s * 1.4426950408889634


@triton.jit
def _accumulate(acc, shrink, weights, values, SWAP: tl.constexpr, ON_GPU: tl.constexpr):
    """acc * shrink + weights @ values; acc [R, D], swapped [D, R]. weights [R, N] of the values' dtype, shrink [R]."""
    if SWAP:
        acc = _dot(tl.trans(values), tl.trans(weights), acc * shrink[None, :], ON_GPU)
    else:
        acc = _dot(weights, values, acc * shrink[:, None], ON_GPU)
    return acc


@triton.jit
def _start(ROWS: tl.constexpr, VALUE_WIDTH: tl.constexpr, SWAP: tl.constexpr):
    """Top score, mass and weighted sum of no token."""
    if SWAP:
        acc = tl.zeros((VALUE_WIDTH, ROWS), tl.float32)
    else:
        acc = tl.zeros((ROWS, VALUE_WIDTH), tl.float32)
    return tl.full((ROWS,), -1e30, tl.float32), tl.zeros((ROWS,), tl.float32), acc


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
    q,
    row_scale,
    bias_scale,
    constant,
    coefficients,
    is_row,
    frequencies,
    bias_table,
    position,
    softcap,
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
    IS_MIXED: tl.constexpr,
    HAS_MEANS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PAIRS_PADDED: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    ROWS: tl.constexpr,
    SWAP: tl.constexpr,
    WARPS: tl.constexpr,
    ON_GPU: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The blocks [first, last) of `entries`; q [ROWS, 4 * KEY_QUARTER_PADDED] float32."""
    # bytes of the sides of a record, but for the 1-bit planes of coded ones
    ITEM_BYTES: tl.constexpr = key_tail.dtype.element_ty.primitive_bitwidth // 8
    MEAN_BYTES: tl.constexpr = 2 * KEY_DIM if HAS_MEANS else 0
    KEY_BYTES: tl.constexpr = 128 + MEAN_BYTES + 64 * KEY_QUARTER if KEY_PLANES > 0 else 64 * KEY_DIM * ITEM_BYTES
    VALUE_BYTES: tl.constexpr = 128 + 64 * VALUE_QUARTER if VALUE_PLANES > 0 else 64 * VALUE_DIM * ITEM_BYTES
    n = tl.arange(0, 64)
    p = tl.arange(0, 4 * KEY_QUARTER_PADDED)
    key_coordinate = coordinate(p, KEY_QUARTER)
    is_key = is_coordinate(p, KEY_QUARTER)
    p = tl.arange(0, 4 * VALUE_QUARTER_PADDED)
    value_coordinate = coordinate(p, VALUE_QUARTER)
    is_value = is_coordinate(p, VALUE_QUARTER)
    top, mass, acc = _start(ROWS, 4 * VALUE_QUARTER_PADDED, SWAP)
    q16 = q.to(tl.float16)
    if HAS_BIAS:
        # the query turned back to the first token of the block, block after block, meets one table of 64 angles
        i = tl.arange(0, PAIRS_PADDED)
        frequency = tl.load(frequencies + i)
        along_cos = tl.load(coefficients[:, None] + i[None, :], mask=is_row[:, None], other=0)
        along_sin = tl.load(coefficients[:, None] + PAIRS_PADDED + i[None, :], mask=is_row[:, None], other=0)
        cos, sin = turned((sinks + 64 * first).to(tl.int64), frequency)
        cos_step, sin_step = turned(tl.full((1,), 64, tl.int64), frequency)
        along_cos, along_sin = (
            along_cos * cos[None, :] + along_sin * sin[None, :],
            along_sin * cos[None, :] - along_cos * sin[None, :],
        )
        two = tl.arange(0, 2 * PAIRS_PADDED)
        turns = tl.load(bias_table + n[:, None] * (2 * PAIRS_PADDED) + two[None, :])
    upcoming = tl.load(entries + first, mask=first < last, other=0)
    for block in tl.range(first, last, num_stages=STAGES):
        entry = upcoming
        # the address of the next block is asked for a block ahead of its bytes
        upcoming = tl.load(entries + block + 1, mask=block + 1 < last, other=0)
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
        record = anchor + tl.multiple_of(entry & -16, 16) + tl.multiple_of(head * (key_bytes + value_bytes), 16)

        if KEY_PLANES > 0:
            key_scale = tl.load(record.to(tl.pointer_type(tl.float16)) + n).to(tl.float32)
            a, y1, y2 = load_codes(
                record + (128 + MEAN_BYTES),
                key_planes,
                n,
                KEY_QUARTER,
                KEY_QUARTER_PADDED,
                KEY_PLANES,
                IS_MIXED,
            )
            keys = decode(
                a, y1, y2, key_planes, centroids, registers, KEY_QUARTER, KEY_QUARTER_PADDED, KEY_PLANES, WARPS, ON_GPU
            )
            s = _scores(q16, keys, SWAP, ON_GPU) * key_scale[None, :]
            if HAS_MEANS:
                mean = record.to(tl.pointer_type(tl.float16)) + 64 + key_coordinate
                mean = tl.load(mean, mask=is_key, other=0).to(tl.float32)
                s += tl.sum(q * mean[None, :], 1)[:, None]
        else:
            plain = record.to(key_tail.dtype) + n[:, None] * KEY_DIM + key_coordinate[None, :]
            s = _scores_dense(q, tl.load(plain, mask=is_key[None, :], other=0), SWAP, ON_GPU)
        s = s * row_scale[:, None]
        if HAS_BIAS:
            both = tl.reshape(tl.join(along_cos, along_sin), (ROWS, 2 * PAIRS_PADDED))
            # the table holds cos - 1, which keeps the digits of slowly turning pairs
            bias = _scores_dense(both, turns, SWAP, ON_GPU) + tl.sum(along_cos, 1)[:, None]
            s += bias * bias_scale[:, None] + constant[:, None]
            along_cos, along_sin = (
                along_cos * cos_step[None, :] + along_sin * sin_step[None, :],
                along_sin * cos_step[None, :] - along_cos * sin_step[None, :],
            )
        s = _in_base_2(s, softcap, HAS_SOFTCAP)
        if IS_CAUSAL:
            s = tl.where((sinks + 64 * block + n)[None, :] <= position[:, None], s, float("-inf"))

        if VALUE_PLANES > 0:
            # a value's scale joins the exponent: weights are at most 1 and keep their digits in float16
            value_scale = tl.load((record + key_bytes).to(tl.pointer_type(tl.float16)) + n).to(tl.float32)
            smallest = tl.maximum(tl.abs(value_scale), 5.9604645e-08, propagate_nan=tl.PropagateNan.ALL)
            exponent = tl.log2(smallest)
            inverse = tl.exp2(-exponent)
            s += exponent[None, :]
        new_top = tl.maximum(top, tl.max(s, 1))
        shrink = tl.exp2(top - new_top)
        top = new_top
        weights = tl.exp2(s - new_top[:, None])
        if VALUE_PLANES > 0:
            mass = mass * shrink + tl.sum(weights * inverse[None, :], 1)
            weights = (weights * (value_scale * inverse)[None, :]).to(tl.float16)
            a, y1, y2 = load_codes(
                record + key_bytes + 128,
                value_planes,
                n,
                VALUE_QUARTER,
                VALUE_QUARTER_PADDED,
                VALUE_PLANES,
                IS_MIXED,
            )
            values = decode(
                a,
                y1,
                y2,
                value_planes,
                centroids,
                registers,
                VALUE_QUARTER,
                VALUE_QUARTER_PADDED,
                VALUE_PLANES,
                WARPS,
                ON_GPU,
            )
        else:
            mass = mass * shrink + tl.sum(weights, 1)
            plain = (record + key_bytes).to(value_tail.dtype) + n[:, None] * VALUE_DIM
            values = tl.load(plain + value_coordinate[None, :], mask=is_value[None, :], other=0)
            weights = weights.to(values.dtype)
        acc = _accumulate(acc, shrink, weights, values, SWAP, ON_GPU)
    return top, mass, acc


@triton.jit
def _attend_tail(
    key_tail,
    value_tail,
    first_slot,
    slots,
    sinks,
    length,
    blocks,
    q,
    row_scale,
    bias_scale,
    constant,
    coefficients,
    is_row,
    frequencies,
    position,
    softcap,
    KEY_DIM: tl.constexpr,
    KEY_QUARTER: tl.constexpr,
    KEY_QUARTER_PADDED: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_QUARTER: tl.constexpr,
    VALUE_QUARTER_PADDED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PAIRS_PADDED: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    ROWS: tl.constexpr,
    SWAP: tl.constexpr,
    ON_GPU: tl.constexpr,
):
    """64 slots of one head's tail: sinks, then the ring of recent tokens. key_tail, value_tail: of that head."""
    p = tl.arange(0, 4 * KEY_QUARTER_PADDED)
    key_coordinate = coordinate(p, KEY_QUARTER)
    is_key = is_coordinate(p, KEY_QUARTER)
    p = tl.arange(0, 4 * VALUE_QUARTER_PADDED)
    value_coordinate = coordinate(p, VALUE_QUARTER)
    is_value = is_coordinate(p, VALUE_QUARTER)
    top, mass, acc = _start(ROWS, 4 * VALUE_QUARTER_PADDED, SWAP)
    slot = first_slot + tl.arange(0, 64)
    ring = slots - sinks
    end = length - sinks
    # the newest token that lies in each slot of the ring
    newest = tl.maximum(end, 1) - 1
    in_ring = newest - (newest - (slot - sinks) + ring) % ring
    is_sink = slot < sinks
    token = tl.where(is_sink, slot, sinks + in_ring)
    is_recent = (slot >= sinks) & (slot < tl.where(end > 0, slots, 0)) & (in_ring >= 64 * blocks)
    is_held = (is_sink & (slot < length)) | is_recent
    keys = tl.load(
        key_tail + slot[:, None] * KEY_DIM + key_coordinate[None, :],
        mask=is_held[:, None] & is_key[None, :],
        other=0,
    )
    s = _scores_dense(q, keys, SWAP, ON_GPU) * row_scale[:, None]
    if HAS_BIAS:
        # few pairs at a time: all angles of 64 tokens at once would not fit the registers
        bias = tl.zeros((ROWS, 64), tl.float32)
        for start in tl.static_range(0, PAIRS_PADDED, 16):
            i = start + tl.arange(0, 16)
            cos, sin = turned(token[:, None], tl.load(frequencies + i)[None, :])
            along_cos = tl.load(coefficients[:, None] + i[None, :], mask=is_row[:, None], other=0)
            along_sin = tl.load(coefficients[:, None] + PAIRS_PADDED + i[None, :], mask=is_row[:, None], other=0)
            bias += _scores(along_cos, cos, SWAP, ON_GPU) + _scores(along_sin, sin, SWAP, ON_GPU)
        s += bias * bias_scale[:, None] + constant[:, None]
    s = _in_base_2(s, softcap, HAS_SOFTCAP)
    s = tl.where(is_held[None, :] & (token[None, :] <= position[:, None]), s, float("-inf"))
    top = tl.maximum(top, tl.max(s, 1))
    weights = tl.exp2(s - top[:, None])
    values = tl.load(
        value_tail + slot[:, None] * VALUE_DIM + value_coordinate[None, :],
        mask=is_held[:, None] & is_value[None, :],
        other=0,
    )
    acc = _accumulate(acc, mass, weights.to(values.dtype), values, SWAP, ON_GPU)
    return top, tl.sum(weights, 1), acc


# A kernel for every value of these would be compiled in the middle of a generation.
@triton.jit(
    do_not_specialize=["table_stride", "groups", "heads_per_group", "tokens", "sinks", "window", "slots", "splits"]
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
    factor,
    coefficients,
    frequencies,
    bias_table,
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
    scale,
    bias_scaling,
    softcap,
    KEY_DIM: tl.constexpr,
    KEY_QUARTER: tl.constexpr,
    KEY_QUARTER_PADDED: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_QUARTER: tl.constexpr,
    VALUE_QUARTER_PADDED: tl.constexpr,
    KEY_PLANES: tl.constexpr,
    VALUE_PLANES: tl.constexpr,
    IS_MIXED: tl.constexpr,
    HAS_MEANS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PAIRS_PADDED: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    ROWS: tl.constexpr,
    SWAP: tl.constexpr,
    WARPS: tl.constexpr,
    ON_GPU: tl.constexpr,
    STAGES: tl.constexpr,
):
    """A share of the tokens of one row of the batch, one KV head, ROWS query rows: top score, mass, weighted sum.

    The first `splits` programs take blocks, each of the others 64 slots of the sinks and the recent window. The
    weight of a token is its value's scale times exp(score); the top is that of the weights.
    """
    KEY_WIDTH: tl.constexpr = 4 * KEY_QUARTER_PADDED
    split = tl.program_id(0)
    bg = tl.program_id(1)
    b = bg // groups
    rows = heads_per_group * tokens
    r = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    is_row = r < rows
    at = bg.to(tl.int64) * rows + r
    length = tl.load(lengths + b)
    blocks = tl.maximum(tl.load(coded + b), (length - sinks - window) // 64)
    # a query that was padding sees the first token
    position = tl.maximum(length - tokens + r % tokens, 0)
    own_q = tl.load(q + at[:, None] * KEY_WIDTH + tl.arange(0, KEY_WIDTH)[None, :], mask=is_row[:, None], other=0)
    row_scale = tl.load(factor + at * 4, mask=is_row, other=0) * scale
    bias_scale = row_scale
    constant = row_scale
    if HAS_BIAS:
        bias_scale = tl.load(factor + at * 4 + 1, mask=is_row, other=0) * (scale * bias_scaling)
        constant = tl.load(factor + at * 4 + 2, mask=is_row, other=0) * scale

    if split < splits:
        share = (blocks + splits - 1) // splits
        first = split * share
        top, mass, acc = _attend_blocks(
            anchor,
            table + b.to(tl.int64) * table_stride,
            first,
            tl.minimum(first + share, blocks),
            bg % groups,
            sinks,
            key_tail,
            value_tail,
            own_q,
            row_scale,
            bias_scale,
            constant,
            coefficients + at * (2 * PAIRS_PADDED),
            is_row,
            frequencies,
            bias_table,
            position,
            softcap,
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
            IS_MIXED,
            HAS_MEANS,
            HAS_BIAS,
            PAIRS_PADDED,
            HAS_SOFTCAP,
            IS_CAUSAL,
            ROWS,
            SWAP,
            WARPS,
            ON_GPU,
            STAGES,
        )
    else:
        top, mass, acc = _attend_tail(
            key_tail + bg.to(tl.int64) * slots * KEY_DIM,
            value_tail + bg.to(tl.int64) * slots * VALUE_DIM,
            (split - splits) * 64,
            slots,
            sinks,
            length,
            blocks,
            own_q,
            row_scale,
            bias_scale,
            constant,
            coefficients + at * (2 * PAIRS_PADDED),
            is_row,
            frequencies,
            position,
            softcap,
            KEY_DIM,
            KEY_QUARTER,
            KEY_QUARTER_PADDED,
            VALUE_DIM,
            VALUE_QUARTER,
            VALUE_QUARTER_PADDED,
            HAS_BIAS,
            PAIRS_PADDED,
            HAS_SOFTCAP,
            ROWS,
            SWAP,
            ON_GPU,
        )

    to = (bg.to(tl.int64) * tl.num_programs(0) + split) * rows + r
    tl.store(out_top + to, top, mask=is_row)
    tl.store(out_mass + to, mass, mask=is_row)
    p = tl.arange(0, 4 * VALUE_QUARTER_PADDED)
    d = coordinate(p, VALUE_QUARTER)
    is_value = is_coordinate(p, VALUE_QUARTER)
    if SWAP:
        tl.store(out_acc + to[None, :] * VALUE_DIM + d[:, None], acc, mask=is_row[None, :] & is_value[:, None])
    else:
        tl.store(out_acc + to[:, None] * VALUE_DIM + d[None, :], acc, mask=is_row[:, None] & is_value[None, :])


@triton.jit(do_not_specialize=["groups", "heads_per_group", "tokens", "parts"])
def _merge(
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
    PARTS_PADDED: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One query row: the parts joined by log-sum-exp, and turned back to the model's coordinates."""
    row = tl.program_id(0)
    bg = tl.program_id(1)
    rows = heads_per_group * tokens
    head = bg % groups * heads_per_group + row // tokens
    part = tl.arange(0, PARTS_PADDED)
    at = (bg.to(tl.int64) * parts + part) * rows + row
    tops = tl.load(in_top + at, mask=part < parts, other=-1e30)
    highest = tl.max(tops, 0)
    if HAS_SINK_LOGITS:
        logit = tl.load(sink_logits + head).to(tl.float32) * 1.4426950408889634
        highest = tl.maximum(highest, logit)
    share = tl.exp2(tops - highest)
    mass = tl.sum(tl.load(in_mass + at, mask=part < parts, other=0) * share, 0)
    if HAS_SINK_LOGITS:
        mass += tl.exp2(logit - highest)
    d = tl.arange(0, DIM_PADDED)
    total = tl.zeros((DIM_PADDED,), tl.float32)
    for start in tl.static_range(0, DIM, CHUNK):
        c = start + tl.arange(0, CHUNK)
        own = tl.load(
            in_acc + at[:, None] * DIM + c[None, :], mask=(part < parts)[:, None] & (c < DIM)[None, :], other=0
        )
        joined = tl.sum(own * share[:, None], 0)
        turn = tl.load(matrix + c[:, None] * DIM + d[None, :], mask=(c < DIM)[:, None] & (d < DIM)[None, :], other=0)
        total += tl.sum(joined[:, None] * turn, 0)
    # a row that holds no token gives zeros
    total = total / tl.where(mass == 0, 1.0, mass)
    to = out + (bg // groups).to(tl.int64) * out_batch_stride + head.to(tl.int64) * out_head_stride
    to += (row % tokens).to(tl.int64) * out_token_stride
    tl.store(to + d, total.to(out.dtype.element_ty), mask=d < DIM)


def launch_for(device: torch.device, rows: int, width: int) -> Launch:
    """The entry of the table for a number of query rows of one KV head and a head width."""
    entries = _LAUNCHES.get(capability(device), _LAUNCHES[0])
    return next((launch for most, widest, launch in entries if rows <= most and width <= widest), entries[-1][2])


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
    launch: Launch | None = None,
) -> torch.Tensor:
    """See `turboquant.ops.attend.attend_packed`."""
    layout = packed.layout
    batch, heads, tokens, key_dim = q.shape
    groups, value_dim, slots = layout.heads, layout.value.dim, packed.key_tail.shape[2]
    heads_per_group = heads // groups
    rows = heads_per_group * tokens
    device = q.device
    launch = launch or launch_for(device, rows, max(key_dim, value_dim))
    key_quarter = triton.next_power_of_2(key_dim // 4)
    value_quarter = triton.next_power_of_2(value_dim // 4)
    # [rows, width] float32: enough for every launch, smaller than one layer's queries times four
    rotated = torch.empty(batch * groups * rows, 4 * key_quarter, dtype=torch.float32, device=device)
    factor = torch.empty(batch * groups * rows, 4, dtype=torch.float32, device=device)
    pairs_padded = bias.frequencies.shape[0] if bias is not None else 16
    coefficients = (
        torch.empty(batch * groups * rows, 2, pairs_padded, dtype=torch.float32, device=device)
        if bias is not None
        else factor
    )
    _prepare[(rows, batch * groups)](
        q,
        q.stride(0),
        q.stride(1),
        q.stride(2),
        key_matrix,
        bias.bias if bias is not None else factor,
        rotated,
        factor,
        coefficients,
        groups,
        heads_per_group,
        tokens,
        DIM=key_dim,
        DIM_PADDED=triton.next_power_of_2(key_dim),
        QUARTER=key_dim // 4,
        QUARTER_PADDED=key_quarter,
        PAIRS=bias.pairs if bias is not None else -1,
        PAIRS_PADDED=pairs_padded,
        INTERLEAVED=bias is not None and bias.interleaved,
        CHUNK=32,
    )
    tiles = -(-rows // launch.rows)
    wanted = launch.programs * multiprocessors(device)
    # all programs run at once: one too many would wait for the others and double the time
    tails = -(-slots // BLOCK_TOKENS)
    splits = min(max(wanted // (batch * groups * tiles) - tails, 1), -(-most_blocks // _LEAST_BLOCKS))
    parts = splits + tails
    top = torch.empty(batch * groups, parts, rows, dtype=torch.float32, device=device)
    mass = torch.empty_like(top)
    acc = torch.empty(batch * groups, parts, rows, value_dim, dtype=torch.float32, device=device)
    centroids, registers = tables(device)
    _attend_split[(parts, batch * groups, tiles)](
        packed.anchor,
        packed.table,
        packed.table.stride(0),
        packed.lengths,
        packed.coded,
        packed.key_tail,
        packed.value_tail,
        rotated,
        factor,
        coefficients,
        bias.frequencies if bias is not None else packed.table,
        bias.table if bias is not None else centroids,
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
        scale,
        bias.scaling if bias is not None else 1.0,
        softcap or 1.0,
        KEY_DIM=key_dim,
        KEY_QUARTER=key_dim // 4,
        KEY_QUARTER_PADDED=key_quarter,
        VALUE_DIM=value_dim,
        VALUE_QUARTER=value_dim // 4,
        VALUE_QUARTER_PADDED=value_quarter,
        KEY_PLANES=layout.key.num_planes,
        VALUE_PLANES=layout.value.num_planes,
        IS_MIXED=is_mixed,
        HAS_MEANS=layout.key.mean_bytes > 0,
        HAS_BIAS=bias is not None,
        PAIRS_PADDED=pairs_padded,
        HAS_SOFTCAP=softcap is not None,
        IS_CAUSAL=tokens > 1,
        ROWS=launch.rows,
        SWAP=launch.swap,
        WARPS=launch.warps,
        ON_GPU=not is_interpreted(),
        STAGES=launch.stages,
        num_warps=launch.warps,
        num_stages=launch.stages,
    )
    out = torch.empty(batch, tokens, heads, value_dim, dtype=q.dtype, device=device)
    _merge[(rows, batch * groups)](
        top,
        mass,
        acc,
        value_matrix,
        sink_logits if sink_logits is not None else factor,
        out,
        out.stride(0),
        out.stride(2),
        out.stride(1),
        groups,
        heads_per_group,
        tokens,
        parts,
        DIM=value_dim,
        DIM_PADDED=triton.next_power_of_2(value_dim),
        HAS_SINK_LOGITS=sink_logits is not None,
        PARTS_PADDED=triton.next_power_of_2(parts),
        CHUNK=32,
    )
    return out.transpose(1, 2)
