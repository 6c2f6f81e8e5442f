"""What kernels of one element a thread share: pieces of PTX, loads as words, and what threads of a warp exchange.

Thread 4 g + t of a warp, g below 8, t below 4, holds what mma.m16n8k16 wants of it: of the first operand rows g and
g + 8, of the second column g, of the result rows g and g + 8 and columns 2 t and 2 t + 1 (PTX ISA, "Matrix Fragments
for mma.m16n8k16").
"""

from collections.abc import Sequence

import triton
import triton.language as tl


def names(first: int, count: int) -> list[str]:
    return [f"${i}" for i in range(first, first + count)]


def multiply(to: Sequence[str], a: Sequence[str], b: Sequence[str]) -> str:
    """Adds a product whose inner axis is 8 for each word of `b`, of which there are one or two."""
    c = "{" + ", ".join(to) + "}"
    shape = f"m16n8k{8 * len(b)}.row.col.f32.f16.f16.f32"
    return f"mma.sync.aligned.{shape} {c}, {{{', '.join(a)}}}, {{{', '.join(b)}}}, {c};"


@triton.constexpr_function
def piece(table, part, *key):
    """The assembly (part 0) or its constraints (part 1) for a key of a table of both.

    A table is a constant of its module, so that Triton's cache of compiled kernels knows when it changes.
    """
    return table[key][part]


@triton.jit
def token_of_row(thread):
    """Which of 16 tokens thread (g, t) has in row g of a product; row g + 8 is the eighth token behind it.

    Rows 2 t and 2 t + 1 are tokens t and t + 4: the four that a thread takes of the values then lie apart by as many
    tokens, and threads that read shared memory at once meet no bank twice. Where tokens are taken in mirrored order
    it is that one XOR 7 (`terms.bias_beside`).
    """
    g = thread % 32 // 4
    return g // 2 + g % 2 * 4


@triton.constexpr_function
def _declaration(count):
    return f"{{ .shared .align 1024 .b8 held[{count}]; mov.u32 $0, held; }}"


@triton.jit
def shared_bytes(thread, BYTES: tl.constexpr):
    """Address of shared memory of the program's own, besides what Triton takes: int32, the same for all threads."""
    ASSEMBLY: tl.constexpr = _declaration(BYTES)
    return tl.inline_asm_elementwise(ASSEMBLY, "=r,r", [thread], dtype=tl.int32, is_pure=False, pack=1)


def _copies(count: int) -> tuple[str, str]:
    lines = [".reg .pred all, last;", "setp.ne.s32 all, $2, 0;", "setp.ne.s32 last, $3, 0;"]
    for i in range(count):
        guard = "last" if i == count - 1 else "all"
        lines.append(f"@{guard} cp.async.cg.shared.global [$1 + {512 * i}], [${4 + i}], 16;")
    lines += ["cp.async.commit_group;", "mov.b32 $0, 0;"]
    return "{\n" + "\n".join(lines) + "\n}", ",".join(["=r"] + ["r"] * 3 + ["l"] * count)


def _shared_loads(count: int, distance: int, width: int) -> tuple[str, str]:
    each = max(width // 4, 1)
    kind = {2: "u16", 4: "b32", 8: "v2.b32", 16: "v4.b32"}[width]
    lines = []
    for i in range(count):
        to = ", ".join(names(i * each, each))
        to = f"{{{to}}}" if each > 1 else to
        lines.append(f"ld.shared.{kind} {to}, [${count * each} + {distance * i}];")
    return "\n".join(lines), ",".join(["=&r"] * (count * each) + ["r"])


def _shared_store(count: int) -> tuple[str, str]:
    values = ", ".join(names(2, count))
    kind, values = ("b32", values) if count == 1 else (f"v{count}.b32", f"{{{values}}}")
    return f"st.shared.{kind} [$1], {values}; mov.b32 $0, 0;", ",".join(["=r", "r"] + ["f"] * count)


_SHARED_STORES = tl.constexpr({(count,): _shared_store(count) for count in (1, 2, 4)})
_COPIES = tl.constexpr({(count,): _copies(count) for count in range(1, 11)})
_SHARED_LOADS = tl.constexpr({
    (count, distance, width): _shared_loads(count, distance, width)
    for count in (2, 4)
    for distance in (16, 32, 64, 128, 256, 512)
    for width in (2, 4, 8, 16)
})


@triton.jit
def copy_to_shared(to, sources, is_left, is_last_left, COUNT: tl.constexpr):
    """Begin to copy 16 bytes from each of COUNT addresses, a tuple, to shared memory: 512 bytes apart.

    is_left, is_last_left: whether this thread copies, and whether it does from the last address. What is copied from
    here on until the next call is one group, see `await_copies`.
    """
    ASSEMBLY: tl.constexpr = piece(_COPIES, 0, COUNT)
    CONSTRAINTS: tl.constexpr = piece(_COPIES, 1, COUNT)
    flags = (is_left.to(tl.int32), is_last_left.to(tl.int32))
    tl.inline_asm_elementwise(ASSEMBLY, CONSTRAINTS, (to,) + flags + sources, dtype=tl.int32, is_pure=False, pack=1)


@triton.constexpr_function
def _wait(pending):
    return f"cp.async.wait_group {pending}; bar.warp.sync 0xffffffff; mov.b32 $0, 0;"


@triton.jit
def await_copies(thread, PENDING: tl.constexpr):
    """Wait until of this warp's groups of copies only the newest PENDING may be under way; all its threads see them."""
    ASSEMBLY: tl.constexpr = _wait(PENDING)
    tl.inline_asm_elementwise(ASSEMBLY, "=r,r", [thread], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def shared_words(at, COUNT: tl.constexpr, DISTANCE: tl.constexpr, BYTES: tl.constexpr):
    """BYTES (2 to 16) of shared memory from each of COUNT addresses, DISTANCE apart, as a tuple of int32."""
    ASSEMBLY: tl.constexpr = piece(_SHARED_LOADS, 0, COUNT, DISTANCE, BYTES)
    CONSTRAINTS: tl.constexpr = piece(_SHARED_LOADS, 1, COUNT, DISTANCE, BYTES)
    WORDS: tl.constexpr = COUNT * max(BYTES // 4, 1)
    # not pure: it stays behind the wait
    return tl.inline_asm_elementwise(ASSEMBLY, CONSTRAINTS, [at], dtype=(tl.int32,) * WORDS, is_pure=False, pack=1)


@triton.jit
def floats_to_shared(at, values, COUNT: tl.constexpr):
    """A tuple of float32 to shared memory, side by side; COUNT 1, 2, 4 or 8, and `at` a multiple of their bytes, up to
    16.
    """
    if COUNT == 8:
        floats_to_shared(at, values[:4], 4)
        floats_to_shared(at + 16, values[4:], 4)
    else:
        ASSEMBLY: tl.constexpr = piece(_SHARED_STORES, 0, COUNT)
        CONSTRAINTS: tl.constexpr = piece(_SHARED_STORES, 1, COUNT)
        tl.inline_asm_elementwise(ASSEMBLY, CONSTRAINTS, (at,) + values, dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def floats_from_shared(at):
    """Four float32 of shared memory, side by side."""
    return tl.inline_asm_elementwise(
        "ld.shared.v4.b32 {$0, $1, $2, $3}, [$4];",
        "=f,=f,=f,=f,r",
        [at],
        dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
        is_pure=False,
        pack=1,
    )


@triton.jit
def store_floats(pointer, values, mask):
    """Four float32 side by side, in one access: four would touch every sector each."""
    tl.inline_asm_elementwise(
        "{.reg .pred p; setp.ne.s32 p, $2, 0; @p st.global.v4.b32 [$1], {$3, $4, $5, $6}; mov.b32 $0, 0;}",
        "=r,l,r,f,f,f,f",
        (pointer.to(tl.int64), mask.to(tl.int32)) + values,
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def words_at(pointer, mask, BYTES: tl.constexpr):
    """8 bytes, or 16 or 32, as a tuple of int32."""
    if BYTES == 8:
        both = tl.load(pointer.to(tl.pointer_type(tl.int64)), mask=mask)
        words = (both.to(tl.int32), (both >> 32).to(tl.int32))
    else:
        words = words_at(pointer, mask, BYTES // 2) + words_at(pointer + BYTES // 2, mask, BYTES // 2)
    return words


@triton.jit
def lower_half(word):
    """The lower float16 of a word as float32."""
    return tl.inline_asm_elementwise(
        "{.reg .b16 l, h; mov.b32 {l, h}, $1; cvt.f32.f16 $0, l;}",
        "=f,r",
        [word],
        dtype=tl.float32,
        is_pure=True,
        pack=1,
    )


@triton.jit
def packed(low, high):
    """Two float32 as float16 in one word."""
    return tl.inline_asm_elementwise(
        "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", [low, high], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def _from_neighbour(x, by):
    """What the thread has whose number in the warp differs in the bits `by`, float32."""
    return tl.inline_asm_elementwise(
        "shfl.sync.bfly.b32 $0, $1, $2, 0x1f, 0xffffffff;", "=f,f,r", [x, by], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def sum_of_column(x):
    """The sum of the eight threads (0, t) to (7, t)."""
    x += _from_neighbour(x, 4)
    x += _from_neighbour(x, 8)
    return x + _from_neighbour(x, 16)


@triton.jit
def sum_of_warp(x):
    """The sum of all 32 threads."""
    x += _from_neighbour(x, 1)
    x += _from_neighbour(x, 2)
    return sum_of_column(x)


@triton.jit
def most_of_warp(x):
    """The largest of all 32 threads."""
    for i in tl.static_range(0, 5):
        x = tl.maximum(x, _from_neighbour(x, 1 << i))
    return x


@triton.jit
def from_thread(x, lane):
    """What a thread of the warp has, float32, by its number."""
    return tl.inline_asm_elementwise(
        "shfl.sync.idx.b32 $0, $1, $2, 0x1f, 0xffffffff;", "=f,f,r", [x, lane], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def halves_swapped(word, is_wanted):
    """A word whose halves have changed places, where that is wanted."""
    selector = tl.where(is_wanted, 0x1032, 0x3210)
    return tl.inline_asm_elementwise(
        "prmt.b32 $0, $1, $1, $2;", "=r,r,r", [word, selector], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def transposed(word):
    """Of a matrix of float16 with rows g, of which thread (g, t) has columns 2 t and 2 t + 1: the transposed one's."""
    return tl.inline_asm_elementwise(
        "movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;", "=r,r", [word], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def high_and_low(x, y):
    """Two float32 as two float16 in one word, and what that leaves out, in another."""
    return tl.inline_asm_elementwise(
        """{.reg .f32 a, b; .reg .b16 l, h; .reg .b32 p;
        cvt.rn.f16x2.f32 p, $3, $2; mov.b32 {l, h}, p;
        cvt.f32.f16 a, l; cvt.f32.f16 b, h; sub.f32 a, $2, a; sub.f32 b, $3, b;
        cvt.rn.f16x2.f32 $1, b, a; mov.b32 $0, p;}""",
        "=r,=r,f,f",
        [x, y],
        dtype=(tl.int32, tl.int32),
        is_pure=True,
        pack=1,
    )


@triton.jit
def two_floats(words):
    """Two float32 of 8 bytes."""
    return tl.inline_asm_elementwise(
        "mov.b64 {$0, $1}, $2;", "=f,=f,l", [words], dtype=(tl.float32, tl.float32), is_pure=True, pack=1
    )
