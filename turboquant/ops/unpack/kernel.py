"""Planes -> centroids in registers: the decoder that the kernels of attend, unpack and age share, and unpack's own.

On CUDA a byte-permute table looks up four codes in one instruction; elsewhere (Triton's interpreter) a gather does.
A byte of plane 0 holds one coordinate of each quarter of a vector, so a tile is decoded as four tiles of a quarter
(`decode_fields`, for whoever multiplies by it), or as one in the order in which the bytes lie (`decode`): position p
then holds the coordinate `coordinate(p)`. No data moves between threads for either.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch
import triton
import triton.language as tl

from turboquant.codebook import embedded_codebook
from turboquant.layout import BlockLayout
from turboquant.ops.devices import is_interpreted

# A byte-permute table of signs: 0x80 where bit 1 of a selector below 4 is set. 0x80800000, as int32.
SIGNS = tl.constexpr(-0x7F800000)


@dataclass(frozen=True)
class DecoderRegisters:
    """Names of what the decoder reads.

    Attributes:
        a, y1, y2: 4 bytes each of plane 0, 1 and 2. factor: of the 1-bit planes, 1 in the first half of them, 4 in
            the second.
        high0, high1, low0, low1: the table's high and low bytes, 8 entries in 2 registers each. signs: `SIGNS`.
    """

    a: str
    y1: str
    y2: str
    factor: str
    high0: str
    high1: str
    low0: str
    low1: str
    signs: str


def _look_up(
    inputs: DecoderRegisters, selectors: str, outputs: tuple[str, str, str, str], signs: str | None
) -> list[str]:
    """8 look-ups: nibble i of `selectors` is field f (i even) or f + 2 (i odd) of byte i // 2.

    With `signs`, a register whose bits 4i + 1 are the signs and whose bits 4i + 2 and 4i + 3 are 0, entries are
    magnitudes.
    """
    lines = [f"shr.u32 n, {selectors}, 16;"]
    if signs is not None:
        lines.append(f"shr.u32 g, {signs}, 16;")
    for nibbles, own_signs, low, high in (
        (selectors, signs, outputs[0], outputs[2]),
        ("n", "g", outputs[1], outputs[3]),
    ):
        lines += [
            f"prmt.b32 u, {inputs.high0}, {inputs.high1}, {nibbles};",
            f"prmt.b32 v, {inputs.low0}, {inputs.low1}, {nibbles};",
        ]
        if signs is not None:
            lines += [f"prmt.b32 w, {inputs.signs}, {inputs.signs}, {own_signs};", "add.u32 u, u, w;"]
        lines += [f"prmt.b32 {low}, v, u, 0x6240;", f"prmt.b32 {high}, v, u, 0x7351;"]
    return lines


def decoder(planes: int, inputs: DecoderRegisters, outputs: Sequence[str]) -> str:
    """PTX that decodes 4 bytes of each of 1 to 3 planes; docs/format.md draws where the bits lie.

    outputs: 8 registers of 2 float16 each: field f of bytes 0 and 1 goes to 2 f, of bytes 2 and 3 to 2 f + 1.
    """
    lines = []
    if planes >= 2:
        # multiplied, not shifted: look-ups and masks keep the units that shift busy, and leave those idle that multiply
        lines.append(f"mul.lo.u32 y, {inputs.y1}, {inputs.factor};")
    if planes == 3:
        lines.append(f"mul.lo.u32 z, {inputs.y2}, {inputs.factor};")
    for first in (0, 1):  # fields 0 and 2, then 1 and 3
        code = inputs.a
        if first:
            lines.append(f"shr.u32 a, {inputs.a}, 2;")
            code = "a"
        # the sign is a bit of the selector, or of one of its own
        lines.append(f"and.b32 {'s' if planes < 3 else 't'}, {code}, 0x33333333;")
        if planes >= 2:
            bit = "y"
            if first:
                lines.append("shr.u32 b, y, 1;")
                bit = "b"
        # lop3: 0xF8 is p | (q & r), 0xCA takes q where p is 1 and r elsewhere
        if planes == 2:
            lines.append(f"lop3.b32 s, s, {bit}, 0x44444444, 0xF8;")
        elif planes == 3:
            lines += [
                f"shr.u32 c, z, {1 + first};",
                f"lop3.b32 s, 0x44444444, {bit}, c, 0xCA;",
                "lop3.b32 s, 0x66666666, s, t, 0xCA;",
            ]
        at = 2 * first
        of_fields = (outputs[at], outputs[at + 1], outputs[at + 4], outputs[at + 5])
        lines += _look_up(inputs, "s", of_fields, "t" if planes == 3 else None)
    return "{\n.reg .b32 a, b, c, g, n, s, t, u, v, w, y, z;\n" + "\n".join(lines) + "\n}"


# Operands of the decoder as an elementwise operation: every input but those of the tables comes once for 4 elements.
_OPERANDS = DecoderRegisters("$8", "$9", "$10", "$11", "$12", "$16", "$20", "$24", "$28")
_CONSTRAINTS = ",".join(["=&r"] * 8 + ["r"] * 24)


def _assembly(planes: int, is_shifted: bool = False) -> str:
    """is_shifted: each byte of the 1-bit planes has been multiplied before."""
    operands = replace(_OPERANDS, factor="1") if is_shifted else _OPERANDS
    return decoder(planes, operands, [f"${i}" for i in range(8)])


_ASSEMBLY_1 = tl.constexpr(_assembly(1))
_ASSEMBLY_2 = tl.constexpr(_assembly(2))
_ASSEMBLY_3 = tl.constexpr(_assembly(3))
_SHIFTED_2 = tl.constexpr(_assembly(2, is_shifted=True))
_SHIFTED_3 = tl.constexpr(_assembly(3, is_shifted=True))
_ASSEMBLY_CONSTRAINTS = tl.constexpr(_CONSTRAINTS)


def _half(value: float) -> int:
    """The bits of a number as float16."""
    return int(struct.unpack("<H", struct.pack("<e", value))[0])


def permute_table(held: int, read: int) -> tuple[int, int, int, int]:
    """Registers H0, H1, L0, L1 for codes of `held` planes, read as codes of `read` planes whose last bits are noise."""
    positive = embedded_codebook(held + 1).centroids
    entries = []
    for selector in range(8):
        if read < 3:  # selector = bit of plane 1, sign, top magnitude bit
            extra, negative, top = selector >> 2 & 1, selector >> 1 & 1, selector & 1
            magnitude = top << 1 | extra if held >= 2 else top
            entries.append(_half(positive[magnitude]) | negative << 15)
        else:  # selector = bit of plane 1, bit of plane 2, top magnitude bit
            first, second, top = selector >> 2 & 1, selector >> 1 & 1, selector & 1
            magnitude = (top << 2 | first << 1 | second) >> (3 - held)
            entries.append(_half(positive[magnitude]))
    high, low = [entry >> 8 for entry in entries], [entry & 0xFF for entry in entries]

    def word(values: list[int]) -> int:
        joined = values[0] | values[1] << 8 | values[2] << 16 | values[3] << 24
        return joined - (1 << 32) if joined >> 31 else joined  # as int32

    return word(high[:4]), word(high[4:]), word(low[:4]), word(low[4:])


@cache
def tables(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """What `decode` reads: centroids by planes held and full 4-bit code, and permute tables by planes read and held.

    Returns:
        ([3, 16] float16, [3, 3, 4] int32): rows are planes - 1; kept per device.
    """
    with torch.inference_mode(False):
        centroids = torch.zeros(3, 16)
        registers = torch.zeros(3, 3, 4, dtype=torch.int32)
        for held in (1, 2, 3):
            table = embedded_codebook(held + 1).table("cpu")
            centroids[held - 1] = table[torch.arange(16) >> (3 - held)]
            for read in range(held, 4):
                registers[read - 1, held - 1] = torch.tensor(permute_table(held, read), dtype=torch.int32)
        return centroids.half().to(device), registers.to(device)


@triton.jit
def coordinate(p, QUARTER: tl.constexpr):
    """The coordinate at position p of a decoded vector of 4 * QUARTER; see `is_coordinate` for padding."""
    return (p // 2) % 4 * QUARTER + p // 8 * 2 + p % 2


@triton.jit
def is_coordinate(p, QUARTER: tl.constexpr):
    """Whether position p holds a coordinate: a quarter is padded to a power of two."""
    return p // 8 * 2 + p % 2 < QUARTER


@triton.jit
def _fields_by_gather(centroids, a, y1, y2, half, PLANES: tl.constexpr, f: tl.constexpr):
    """Values of field f: the code is put together bit by bit and looked up."""
    code = ((a >> (2 * f)) & 3).to(tl.int32) << 2
    first: tl.constexpr = (2, 3, 6, 7)[f]
    second: tl.constexpr = (0, 1, 4, 5)[f]
    if PLANES >= 2:
        code |= tl.where(half == 0, y1 >> first, y1 >> second).to(tl.int32) % 2 << 1
    if PLANES >= 3:
        code |= tl.where(half == 0, y2 >> first, y2 >> second).to(tl.int32) % 2
    return tl.load(centroids + code)


@triton.jit
def _load_bits(base, row, QUARTER: tl.constexpr, QUARTER_PADDED: tl.constexpr):
    """A 1-bit plane [N, QUARTER / 2], spread: byte e stands beside bytes e and QUARTER / 2 + e of plane 0."""
    EIGHTH: tl.constexpr = QUARTER // 2
    N: tl.constexpr = row.shape[0]
    if QUARTER == QUARTER_PADDED:
        # read once, and doubled on the way from shared memory
        y = tl.load(base + row[:, None] * EIGHTH + tl.arange(0, EIGHTH)[None, :])
        y = tl.reshape(tl.broadcast_to(y[:, None, :], (N, 2, EIGHTH)), (N, QUARTER))
    else:
        j = tl.arange(0, QUARTER_PADDED)
        y = tl.load(base + row[:, None] * EIGHTH + (j % EIGHTH)[None, :], mask=(j < QUARTER)[None, :], other=0)
    return y


@triton.jit
def load_codes(
    base,
    planes_held,
    row,
    QUARTER: tl.constexpr,
    QUARTER_PADDED: tl.constexpr,
    PLANES: tl.constexpr,
    IS_MIXED: tl.constexpr,
):
    """Bytes of vectors: plane 0 [N, QUARTER_PADDED] uint8, and the 1-bit planes spread to the same shape.

    base: where plane 0 of the first vector of 64 begins, uint8 pointer ([N, 1] or scalar); planes follow each other.
    planes_held: how many there are, PLANES unless IS_MIXED; of one that is missing anything is read.
    row: [N] which of the 64.
    """
    EIGHTH: tl.constexpr = QUARTER // 2
    j = tl.arange(0, QUARTER_PADDED)
    mask = (j < QUARTER)[None, :]
    if QUARTER == QUARTER_PADDED:
        a = tl.load(base + row[:, None] * QUARTER + j[None, :])
    else:
        a = tl.load(base + row[:, None] * QUARTER + j[None, :], mask=mask, other=0)
    y1 = a
    y2 = a
    if PLANES >= 2:
        first = 64 * QUARTER
        if IS_MIXED:
            first = tl.where(planes_held >= 2, first, 0)
        y1 = _load_bits(base + first, row, QUARTER, QUARTER_PADDED)
    if PLANES >= 3:
        second = 64 * (QUARTER + EIGHTH)
        if IS_MIXED:
            second = tl.where(planes_held >= 3, second, 0)
        y2 = _load_bits(base + second, row, QUARTER, QUARTER_PADDED)
    return a, y1, y2


@triton.jit
def in_vector_register(x):
    """x, so that the assembler does not know it for uniform: it would copy it from a uniform register at every use."""
    return tl.inline_asm_elementwise(
        "{.reg .b32 t; mov.u32 t, %laneid; shr.u32 t, t, 5; add.u32 $0, $1, t;}",
        "=r,r",
        [x],
        dtype=tl.int32,
        is_pure=True,
        pack=1,
    )


@triton.jit
def decode_fields(
    a,
    y1,
    y2,
    planes_held,
    centroids,
    registers,
    QUARTER: tl.constexpr,
    QUARTER_PADDED: tl.constexpr,
    PLANES: tl.constexpr,
    WARPS: tl.constexpr,
    ON_GPU: tl.constexpr,
):
    """Centroids as four float16 tensors [N, QUARTER_PADDED]: field f holds the coordinates f * QUARTER + j.

    a, y1, y2: as `load_codes` gives them. planes_held: of the codes, PLANES or fewer. centroids, registers: `tables`.
    WARPS: of the program.
    """
    N: tl.constexpr = a.shape[0]
    centroids += 16 * (planes_held - 1)
    registers += 12 * (PLANES - 1) + 4 * (planes_held - 1)
    j = tl.arange(0, QUARTER_PADDED)
    EIGHTH: tl.constexpr = QUARTER // 2
    if ON_GPU and QUARTER_PADDED >= 4:
        # 4 neighbouring bytes of a vector share a register; its lowest byte alone says by how much to multiply
        factor = tl.where(j % 4 == 0, tl.where(j >= EIGHTH, 4, 1), 0).to(tl.uint8)
        # a register may have bytes of both halves, or of two vectors, where a thread has less than 4 neighbours or
        # halves are odd: no byte of it can then speak for the others
        SHIFTED: tl.constexpr = EIGHTH % 4 != 0 or N * QUARTER_PADDED < 4 * 32 * WARPS
        if SHIFTED:
            y1 = tl.where((j >= EIGHTH)[None, :], y1 << 2, y1)
            y2 = tl.where((j >= EIGHTH)[None, :], y2 << 2, y2)
        TWO: tl.constexpr = _SHIFTED_2 if SHIFTED else _ASSEMBLY_2
        THREE: tl.constexpr = _SHIFTED_3 if SHIFTED else _ASSEMBLY_3
        ASSEMBLY: tl.constexpr = _ASSEMBLY_1 if PLANES == 1 else (TWO if PLANES == 2 else THREE)
        f0, f1, f2, f3 = tl.inline_asm_elementwise(
            ASSEMBLY,
            _ASSEMBLY_CONSTRAINTS,
            [
                a,
                y1,
                y2,
                factor[None, :],
                in_vector_register(tl.load(registers)),
                in_vector_register(tl.load(registers + 1)),
                in_vector_register(tl.load(registers + 2)),
                in_vector_register(tl.load(registers + 3)),
                in_vector_register(SIGNS),
            ],
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
            is_pure=True,
            pack=4,
        )
    else:
        half = (j >= EIGHTH)[None, :].to(tl.int32)
        f0 = _fields_by_gather(centroids, a, y1, y2, half, PLANES, 0)
        f1 = _fields_by_gather(centroids, a, y1, y2, half, PLANES, 1)
        f2 = _fields_by_gather(centroids, a, y1, y2, half, PLANES, 2)
        f3 = _fields_by_gather(centroids, a, y1, y2, half, PLANES, 3)
    return f0, f1, f2, f3


@triton.jit
def decode(
    a,
    y1,
    y2,
    planes_held,
    centroids,
    registers,
    QUARTER: tl.constexpr,
    QUARTER_PADDED: tl.constexpr,
    PLANES: tl.constexpr,
    WARPS: tl.constexpr,
    ON_GPU: tl.constexpr,
):
    """The same in one tensor [N, 4 * QUARTER_PADDED], positions as `coordinate` says: no data moves for it."""
    N: tl.constexpr = a.shape[0]
    f0, f1, f2, f3 = decode_fields(
        a, y1, y2, planes_held, centroids, registers, QUARTER, QUARTER_PADDED, PLANES, WARPS, ON_GPU
    )
    fields = tl.join(tl.join(f0, f1), tl.join(f2, f3))  # [N, j, low bit of f, high bit of f]
    pairs = tl.reshape(fields, (N, QUARTER_PADDED // 2, 2, 2, 2))
    return tl.reshape(tl.permute(pairs, (0, 1, 4, 3, 2)), (N, 4 * QUARTER_PADDED))


@triton.jit
def _unpack_blocks(
    anchor,
    entries,
    centroids,
    registers,
    out,
    out_head_stride,
    out_token_stride,
    DIM: tl.constexpr,
    QUARTER: tl.constexpr,
    QUARTER_PADDED: tl.constexpr,
    PLANES: tl.constexpr,
    HAS_MEAN: tl.constexpr,
    HEAD_BYTES: tl.constexpr,
    SIDE_AT: tl.constexpr,
    WARPS: tl.constexpr,
    ON_GPU: tl.constexpr,
):
    """One block of one head as 64 rows, still rotated."""
    i = tl.program_id(0)
    g = tl.program_id(1)
    entry = tl.load(entries + i)
    record = anchor + tl.multiple_of(entry & -16, 16) + g.to(tl.int64) * HEAD_BYTES + SIDE_AT
    n = tl.arange(0, 64)
    p = tl.arange(0, 4 * QUARTER_PADDED)
    d = coordinate(p, QUARTER)
    is_real = is_coordinate(p, QUARTER)
    scale = tl.load(record.to(tl.pointer_type(tl.float16)) + n).to(tl.float32)
    planes = record + 128
    if HAS_MEAN:
        planes = record + (128 + 2 * DIM)
    a, y1, y2 = load_codes(planes, PLANES, n, QUARTER, QUARTER_PADDED, PLANES, False)
    x = decode(a, y1, y2, PLANES, centroids, registers, QUARTER, QUARTER_PADDED, PLANES, WARPS, ON_GPU).to(tl.float32)
    x = x * scale[:, None]
    if HAS_MEAN:
        mean = tl.load((record + 128).to(tl.pointer_type(tl.float16)) + d, mask=is_real, other=0)
        x += mean.to(tl.float32)[None, :]
    to = out + g.to(tl.int64) * out_head_stride + (64 * i + n[:, None]).to(tl.int64) * out_token_stride + d[None, :]
    tl.store(to, x.to(out.dtype.element_ty), mask=is_real[None, :] & (n >= 0)[:, None])


def unpack_records(
    layout: BlockLayout, index: int, anchor: torch.Tensor, entries: torch.Tensor, out: torch.Tensor
) -> None:
    """Coded keys (0) or values (1) of whole blocks as rows, means added, still rotated.

    Args:
        layout, index: of the records, and which side; 2 to 4 bits.
        anchor: see PackedTokens. entries: [n] int64, offsets of the records.
        out: [G, n * 64, D] float32, float16 or bfloat16, last axis contiguous; written.
    """
    side, side_at = layout.side(index)
    centroids, registers = tables(anchor.device)
    _unpack_blocks[(entries.numel(), layout.heads)](
        anchor,
        entries,
        centroids,
        registers,
        out,
        out.stride(0),
        out.stride(1),
        DIM=side.dim,
        QUARTER=side.dim // 4,
        QUARTER_PADDED=triton.next_power_of_2(side.dim // 4),
        PLANES=side.num_planes,
        HAS_MEAN=side.mean_bytes > 0,
        HEAD_BYTES=layout.head_bytes,
        SIDE_AT=side_at,
        WARPS=8,
        ON_GPU=not is_interpreted(),
        num_warps=8,
    )
