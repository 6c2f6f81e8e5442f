"""Sizes and places in a coded tensor; docs/format.md draws them."""

from dataclasses import dataclass

# Weights of a block, which share a base exponent. Of 1024 to 16384 the smallest coded size of the demo model within
# 0.03 % of bf16, and of random rows of 4096 weights whose scales differ (log-normal, 0.4) the smallest by 0.1 %.
BLOCK = 4096

# A block is 128 groups of 32: a group's bits of one plane are one word, and a warp reads 128 words as 16 bytes a lane.
GROUPS = 128

# Exponents that an index of 3 bits can name: its eighth value says that the exponent is among the escapes.
WINDOW = 7

# 255 = 248 + 7: no sum of base and index leaves its 8 bits, not even that of an escape, which is not used.
MAX_BASE = 248

SIGNS_BYTES = BLOCK
PLANE_BYTES = BLOCK // 8
RECORD_BYTES = SIGNS_BYTES + 3 * PLANE_BYTES
ENTRY_BYTES = 8

# What a lane of the kernel reads and writes at once: where it reads and writes, tensors begin at multiples.
ALIGNED_BYTES = 16


@dataclass(frozen=True)
class CodedParts:
    """Where the parts of a coded tensor begin, in bytes; records begin at 0.

    Attributes:
        blocks: whole blocks of the tensor; what is left over, fewer than BLOCK weights, is the tail.
        entries, tail, escapes: first bytes of these parts; entries are aligned to 8 bytes, the tail to 2.
    """

    blocks: int
    entries: int
    tail: int
    escapes: int


def coded_parts(numel: int) -> CodedParts:
    """Places in a coded tensor of that many weights.

    `escapes` is also the least length that it can have. The greatest is 2 * numel: what does not get shorter is raw.
    """
    blocks = numel // BLOCK
    entries = blocks * RECORD_BYTES
    tail = entries + blocks * ENTRY_BYTES
    return CodedParts(blocks, entries, tail, tail + 2 * (numel % BLOCK))
