"""decode on the GPU: four warps for each block of 4096 weights, 32 of them a lane; one tensor, or all parts of a unit.

Every tensor here has an element for each group of a block, so no data moves between lanes but for one sum: how many
escapes stand before a group's own. An index is never taken apart: a shift and a mask put the bits of both weights of a
pair where they belong in its word. Compiled for capability 9.0 that is 9.1 instructions a weight, and 1.7 for each
round of escapes, of which normal weights need about 4 (scripts/check_kernels.py shows the rest: 25 registers, none
spilled).
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from streamer.errors import OptionError
from streamer.ops.lossless.layout import (
    ALIGNED_BYTES,
    BLOCK,
    ENTRY_BYTES,
    GROUPS,
    RECORD_BYTES,
    SIGNS_BYTES,
    coded_parts,
)
from turboquant.ops.devices import is_interpreted

# Words of 32 bits.
_RECORD = tl.constexpr(RECORD_BYTES // 4)
_SIGNS = tl.constexpr(SIGNS_BYTES // 4)
_GROUPS = tl.constexpr(GROUPS)
_BLOCK = tl.constexpr(BLOCK)

# Both halves of a word of the result; the sign of its upper half makes 0x80008000 a negative number.
_MANTISSAS = tl.constexpr(0x007F007F)
_SIGN_BITS = tl.constexpr(0x8000_8000 - (1 << 32))

# Places in a table of parts count these: so the compiler sees that they are aligned.
_ALIGNED = tl.constexpr(ALIGNED_BYTES)

# Of a block: decoded; and coded, with its entry. An odd number of blocks leaves the tail at a multiple of 8.
_DECODED_BYTES = tl.constexpr(2 * BLOCK)
_RECORDS_BYTES = tl.constexpr(RECORD_BYTES)
_CODED_BYTES = tl.constexpr(RECORD_BYTES + ENTRY_BYTES)

# Bytes that a program copies: 32 registers a lane.
_CHUNK_BYTES = 4096
_CHUNK = tl.constexpr(_CHUNK_BYTES)

# Of a block. One warp has fewer instructions to do, 16 bytes a lane at a time, and waits more: two or three rounds of
# escapes one after the other want many warps beside each other. 1.43 TB/s of bf16 come out, 1.01 with one [H100].
_WARPS = 4

# Parts that a unit's table has room for, at least: a kernel is compiled for each power of two.
_LEAST_PARTS = 64


@triton.jit
def _ones(word):
    """How many bits of each word are 1."""
    word = word.to(tl.uint32, bitcast=True)
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    return ((word * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def _pair_bits(word, k: tl.constexpr, at: tl.constexpr):
    """Bits k and 16 + k of each word, moved to bits `at` and 16 + `at`; at > 0."""
    if k <= at:
        moved = word << (at - k)
    else:
        moved = word >> (k - at)
    return moved & (0x0001_0001 << at)


@triton.jit
def _decode_block(record, entry, escapes, out):
    """One block: first as if it had no escapes, then these.

    record, out: words (int32) of the block, 16-byte aligned. entry: its own. escapes: bytes, from the tensor's first.
    """
    g = tl.arange(0, _GROUPS)
    base = (entry & 0xFF).to(tl.int32) * 0x0080_0080  # in the exponents of both halves
    plane0 = tl.load(record + _SIGNS + g)
    plane1 = tl.load(record + _SIGNS + _GROUPS + g)
    plane2 = tl.load(record + _SIGNS + 2 * _GROUPS + g)
    for i in tl.static_range(8):
        signs = tl.load(record + i * _GROUPS + g)
        for j in tl.static_range(2):
            k = 2 * i + j
            # the three fields have no bit in common, and base + index at most 255: nothing is carried
            index = _pair_bits(plane0, k, 7) | _pair_bits(plane1, k, 8) | _pair_bits(plane2, k, 9)
            if j == 0:
                word = (signs & _MANTISSAS) | ((signs << 8) & _SIGN_BITS)
            else:
                word = ((signs >> 8) & _MANTISSAS) | (signs & _SIGN_BITS)
            tl.store(out + k * _GROUPS + g, word | (base + index))

    # a few of a group's 32 weights at most: patched one after another, by as many rounds as the worst group has
    left = plane0 & plane1 & plane2
    count = _ones(left)
    escapes += entry >> 8
    number = tl.cumsum(count, 0) - count
    sign_bytes = record.to(tl.pointer_type(tl.uint8))
    halves = out.to(tl.pointer_type(tl.int16))
    tl.debug_barrier()  # a patch may come from another lane than the word that it changes
    for _ in range(tl.max(count, 0)):
        is_left = left != 0
        bit = _ones((left & -left) - 1)  # of the lowest 1; anything where there is none
        pair = bit & 15
        h = (bit >> 4) & 1
        exponent = tl.load(escapes + number, mask=is_left, other=0).to(tl.int32)
        at = ((pair >> 1) * _GROUPS + g) * 4 + 2 * h + (pair & 1)
        sign = tl.load(sign_bytes + at, mask=is_left, other=0).to(tl.int32)
        weight = ((sign & 0x80) << 8) | (exponent << 7) | (sign & 0x7F)
        tl.store(halves + (pair * _GROUPS + g) * 2 + h, weight.to(tl.int16), mask=is_left)
        left &= left - 1
        number += 1


@triton.jit(do_not_specialize_on_alignment=["escapes"])
def _decode_blocks(records, entries, escapes, out):
    """A block of one tensor. records, out: words (int32). entries: int64. escapes: bytes."""
    block = tl.program_id(0).to(tl.int64)
    _decode_block(records + block * _RECORD, tl.load(entries + block), escapes, out + block * (_BLOCK // 2))


@triton.jit
def _copy(source, target, nbytes):
    """The first _CHUNK of some bytes, as many at once as the compiler knows to be aligned; the last few one by one.

    Every program of a part copies these last: less than 16.
    """
    words = nbytes // _ALIGNED * (_ALIGNED // 4)
    w = tl.arange(0, _CHUNK // 4)
    read = tl.load(source.to(tl.pointer_type(tl.int32)) + w, mask=w < words)
    tl.store(target.to(tl.pointer_type(tl.int32)) + w, read, mask=w < words)
    b = words * 4 + tl.arange(0, _ALIGNED)
    tl.store(target + b, tl.load(source + b, mask=b < nbytes), mask=b < nbytes)


@triton.jit
def _decode_parts(table, stored, out, PARTS: tl.constexpr):
    """A block of one of the parts, or a chunk of its bytes that are not coded. table: see `parts_table`."""
    program = tl.program_id(0)
    part = tl.sum((tl.load(table + tl.arange(0, PARTS)) <= program).to(tl.int32), 0) - 1
    fields = table + PARTS + 4 * part
    source = stored + tl.load(fields) * _ALIGNED
    target = out + tl.load(fields + 1) * _ALIGNED
    blocks = tl.load(fields + 2)
    rest = tl.load(fields + 3)
    block = program - tl.load(table + part)
    if block < blocks:
        entries = (source + blocks * _RECORDS_BYTES).to(tl.pointer_type(tl.int64))
        _decode_block(
            (source + block * _RECORDS_BYTES).to(tl.pointer_type(tl.int32)),
            tl.load(entries + block),
            source + blocks * _CODED_BYTES + rest,
            (target + block * _DECODED_BYTES).to(tl.pointer_type(tl.int32)),
        )
    else:
        at = (block - blocks) * _CHUNK
        if blocks == 0:
            _copy(source + at, target + at, rest - at)
        else:  # at a multiple of 8
            _copy(source + blocks * _CODED_BYTES + at, target + blocks * _DECODED_BYTES + at, rest - at)


def decode(stored: torch.Tensor, out: torch.Tensor, *, warps: int = _WARPS) -> None:
    """The weights of coded bytes: one launch, and a copy of the tail where there is one; nothing waits for the device.

    Args:
        stored: [M] uint8 of `encode`, on the device, beginning at a multiple of 16 bytes. Its entries and planes are
            believed: bytes from a file are checked when they are read.
        out: [N] int16, contiguous, on the same device, beginning at a multiple of 16 bytes. Overwritten.
        warps: of a block.
    Raises:
        OptionError: one of them begins elsewhere.
    Source: own; equal to streamer/ops/lossless/reference.py (tests/kernels/test_streamer_lossless_kernel.py).
    """
    begins = stored.data_ptr(), out.data_ptr()
    if any(begin % ALIGNED_BYTES for begin in begins):
        raise OptionError(
            f"the kernel reads and writes what begins at multiples of {ALIGNED_BYTES} bytes; these coded bytes begin "
            f"at {begins[0]:#x}, the tensor for the weights at {begins[1]:#x}: allocate them, or copy them there"
        )
    parts = coded_parts(out.numel())
    if parts.blocks:
        _decode_blocks[(parts.blocks,)](
            stored[: parts.entries].view(torch.int32),
            stored[parts.entries : parts.tail].view(torch.int64),
            stored[parts.escapes :],
            out[: parts.blocks * BLOCK].view(torch.int32),
            num_warps=warps,
        )
    if parts.escapes > parts.tail:
        out[parts.blocks * BLOCK :].view(torch.uint8).copy_(stored[parts.tail : parts.escapes])


def parts_table(parts: Sequence[tuple[int, int, int, int]]) -> tuple[torch.Tensor, int]:
    """What `_decode_parts` looks up, and how many programs it takes.

    Args:
        parts: of each (stored_at, at, blocks, rest): where it begins among the stored and the decoded bytes, at
            multiples of ALIGNED_BYTES; whole blocks that are coded; bytes behind them that are not.
    Returns:
        [5 P] int64 on the CPU, P a power of two: the first program of each part, then its four fields, of which places
        count ALIGNED_BYTES; and the number of programs.
    """
    size = max(_LEAST_PARTS, triton.next_power_of_2(len(parts)))
    first, fields, programs = [], [], 0
    for stored_at, at, blocks, rest in parts:
        first.append(programs)
        fields += [stored_at // ALIGNED_BYTES, at // ALIGNED_BYTES, blocks, rest]
        programs += blocks - (-rest // _CHUNK_BYTES)
    first += [programs] * (size - len(parts))  # no program has this number
    return torch.tensor(first + fields + [0] * (5 * size - len(first) - len(fields))), programs


def compile_parts(table: torch.Tensor) -> Any:
    """The kernel that decodes parts, compiled for the current device. table: of `parts_table`, on it."""
    any_bytes = table.view(torch.uint8)
    return _decode_parts.warmup(table, any_bytes, any_bytes, PARTS=table.numel() // 5, grid=(1,), num_warps=_WARPS)


def parts_launch(table: torch.Tensor, programs: int) -> Callable[[torch.Tensor, torch.Tensor], Any]:
    """A function of the stored and the decoded bytes that decodes all parts by one launch on the current device.

    What Triton asks at every launch of arguments, options and globals is settled here, 21 of 24 µs of Python. So both
    arguments must be uint8 on the device and begin at multiples of ALIGNED_BYTES: nobody looks.

    Args:
        table, programs: of `parts_table`, the table on the device.
    """
    kernel = _decode_parts if is_interpreted() else compile_parts(table)
    launch, size = kernel[(programs, 1, 1)], table.numel() // 5
    return lambda stored, out: launch(table, stored, out, size)
