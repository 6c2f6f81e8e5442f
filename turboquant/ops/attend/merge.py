"""The last launch of decoding: parts of a query row joined and turned back, by threads that say what they exchange.

The same as `rows.merge_rows`, of which Triton makes sixteen exchanges through shared memory with a barrier each, one
after the other: 6 of 12 us of a call over 4,096 tokens (H100). Here there are two.
"""

import triton
import triton.language as tl

from turboquant.ops.attend.lanes import (
    floats_from_shared,
    floats_to_shared,
    from_thread,
    most_of_warp,
    shared_bytes,
    sum_of_warp,
)
from turboquant.ops.attend.parts import join_launches

# Widest head that it serves: a thread holds an eighth of a column of the rotation.
MERGED_DIM = 128

_TILE = tl.constexpr(64)  # parts that are asked for together, two for each thread of a warp


@triton.jit(do_not_specialize=["groups", "heads_per_group", "tokens", "parts"])
def merge_few_rows(
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
    HAS_SINK_LOGITS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """Half of the coordinates of a query row, by 4 DIM threads; DIM 64 or 128.

    Thread n joins coordinate n % DIM of every fourth part, then multiplies an eighth of all coordinates by the
    rotation's column n % (DIM / 2) of this half.
    """
    HALF: tl.constexpr = DIM // 2
    EACH: tl.constexpr = DIM // 8
    row = tl.program_id(0)
    bg = tl.program_id(1)
    rows = heads_per_group * tokens
    head = bg % groups * heads_per_group + row // tokens
    thread = tl.arange(0, 4 * DIM)
    lane = thread % 32
    fourth = thread // DIM
    c = thread % DIM
    eighth = thread // HALF
    d = tl.program_id(2) * HALF + thread % HALF
    turn = ()
    for j in tl.static_range(0, EACH):
        turn = turn + (tl.load(matrix + (eighth * EACH + j) * DIM + d),)
    shared = shared_bytes(thread, 32 * DIM)  # 4 times DIM numbers, then 8 times HALF
    join_launches(OVERLAPS)
    first = bg.to(tl.int64) * parts
    highest = tl.full((4 * DIM,), -1e30, tl.float32)
    mass = tl.zeros((4 * DIM,), tl.float32)
    if HAS_SINK_LOGITS:
        highest = 0 * mass + tl.load(sink_logits + head).to(tl.float32) * 1.4426950408889634
        mass += 1.0
    joined = tl.zeros((4 * DIM,), tl.float32)
    for start in tl.range(0, parts, _TILE, num_stages=1):
        own = ()
        some = start + fourth
        at = in_acc + ((first + some) * rows + row) * DIM + c
        for k in tl.static_range(0, _TILE // 4):
            own = own + (tl.load(at, mask=some + 4 * k < parts, other=0),)
            at += 4 * DIM * rows
        some = start + lane
        at = (first + some) * rows + row
        top0 = tl.load(in_top + at, mask=some < parts, other=-1e30)
        mass0 = tl.load(in_mass + at, mask=some < parts, other=0)
        at += 32 * rows
        top1 = tl.load(in_top + at, mask=some + 32 < parts, other=-1e30)
        mass1 = tl.load(in_mass + at, mask=some + 32 < parts, other=0)
        new = tl.maximum(highest, most_of_warp(tl.maximum(top0, top1)))
        shrink = tl.exp2(highest - new)
        share0 = tl.exp2(top0 - new)
        share1 = tl.exp2(top1 - new)
        mass = mass * shrink + sum_of_warp(mass0 * share0 + mass1 * share1)
        joined *= shrink
        for k in tl.static_range(0, _TILE // 4):
            share = from_thread(share0 if k < 8 else share1, 4 * (k % 8) + fourth)
            joined += own[k] * share
        highest = new
    floats_to_shared(shared + 4 * thread, (joined,), 1)
    tl.debug_barrier()  # others read what these have written
    total = tl.zeros((4 * DIM,), tl.float32)
    for j in tl.static_range(0, EACH, 4):
        at = shared + 4 * (eighth * EACH + j)
        a = floats_from_shared(at)
        b = floats_from_shared(at + 4 * DIM)
        e = floats_from_shared(at + 8 * DIM)
        f = floats_from_shared(at + 12 * DIM)
        for i in tl.static_range(0, 4):
            total += ((a[i] + b[i]) + (e[i] + f[i])) * turn[j + i]
    # eight numbers of a coordinate side by side
    sums = shared + 16 * DIM
    floats_to_shared(sums + 32 * (thread % HALF) + 4 * eighth, (total,), 1)
    tl.debug_barrier()
    a = floats_from_shared(sums + 32 * (thread % HALF))
    b = floats_from_shared(sums + 32 * (thread % HALF) + 16)
    total = ((a[0] + a[1]) + (a[2] + a[3])) + ((b[0] + b[1]) + (b[2] + b[3]))
    # a row that holds no token gives zeros
    total = total / tl.where(mass == 0, 1.0, mass)
    to = out + (bg // groups).to(tl.int64) * out_batch_stride + head.to(tl.int64) * out_head_stride
    to += (row % tokens).to(tl.int64) * out_token_stride
    tl.store(to + d, total.to(out.dtype.element_ty), mask=eighth == 0)
