"""bfloat16 weights <-> coded bytes: the definition, in plain PyTorch; docs/format.md draws the layout.

A weight is 16 bits: sign, 8 bits of exponent, 7 of mantissa. Sign and mantissa are noise and stay as they are, a byte.
The exponents of trained weights are few and lie side by side: 97 % within 7 consecutive ones. So an exponent becomes
an index of 3 bits into the 7 that serve the block best, and what lies outside of these goes to a list of escapes.
"""

import torch
from torch import Tensor

from streamer.ops.lossless.layout import (
    BLOCK,
    ENTRY_BYTES,
    GROUPS,
    MAX_BASE,
    PLANE_BYTES,
    RECORD_BYTES,
    SIGNS_BYTES,
    WINDOW,
    coded_parts,
)

# Blocks that are coded at once: as many as int16 numbers in _best_windows. What a step takes whatever its size, mostly
# in Python, where one thread holds up the others, is 7 % of the time; 14 % with 64 blocks.
_STEP_BLOCKS = 127

# … by a GPU, for which a step is about 70 launches and 6 waits: a slice of a packed file, 32 MiB of weights, takes one.
# Its intermediate results take 160 MiB.
_GPU_STEP_BLOCKS = 4096

# Eight bytes of 0 or 1, as one integer, times this have in their highest byte bit i of byte i: 8 i + 56 - 7 j falls
# into it for i = j alone, and no two of these products meet, so nothing is carried.
_GATHER_BITS = 0x0102040810204080
_LOWEST_BITS = 0x0101010101010101


def encode(weights: Tensor) -> Tensor:
    """The coded bytes of a tensor, whether they are fewer or not.

    Args:
        weights: [N] int16, the bits of bfloat16 numbers, contiguous; any N >= 0, any device.
    Returns:
        [M] uint8 on the same device, a new tensor; M as `coded_parts` says, and a byte for each escape.
    Source: own; fixed-width indices into a window of exponents with escapes as ZipServ (arXiv 2603.17435) has them,
        in an order of our own.
    """
    parts = coded_parts(weights.numel())
    stored = torch.empty(parts.escapes, dtype=torch.uint8, device=weights.device)
    records = stored[: parts.entries].view(parts.blocks, RECORD_BYTES)
    bases = torch.empty(parts.blocks, dtype=torch.int64, device=weights.device)
    counts = torch.empty_like(bases)
    escapes = [stored[:0]]
    blocks = weights[: parts.blocks * BLOCK].view(parts.blocks, BLOCK)
    for step in _steps(parts.blocks, stored.device):
        found, bases[step], counts[step] = _encode_blocks(blocks[step], records[step])
        escapes.append(found)
    entries = (counts.cumsum(0) - counts) << 8 | bases
    stored[parts.entries : parts.tail] = entries.view(torch.uint8)
    stored[parts.tail : parts.escapes] = weights[parts.blocks * BLOCK :].view(torch.uint8)
    return torch.cat([stored, *escapes])


def decode(stored: Tensor, out: Tensor) -> None:
    """The weights of coded bytes.

    Args:
        stored: [M] uint8, of `encode`.
        out: [N] int16 on the same device, contiguous; N that of `encode`. Overwritten.
    Source: own.
    """
    parts = coded_parts(out.numel())
    records = stored[: parts.entries].view(parts.blocks, RECORD_BYTES)
    entries = _as_int64(stored[parts.entries : parts.tail])
    blocks = out[: parts.blocks * BLOCK].view(parts.blocks, BLOCK)
    last = stored.numel() - parts.escapes
    ends = torch.cat([entries[1:] >> 8, entries.new_full((min(1, parts.blocks),), last)])
    for step in _steps(parts.blocks, stored.device):
        begin, end = int(entries[step][0] >> 8), int(ends[step][-1])
        escapes = stored[parts.escapes + begin : parts.escapes + end]
        blocks[step] = _decode_blocks(records[step], (entries[step] & 0xFF).to(torch.uint8), escapes)
    out[parts.blocks * BLOCK :].view(torch.uint8).copy_(stored[parts.tail : parts.escapes])


def _steps(blocks: int, device: torch.device) -> list[slice]:
    """What is coded at once."""
    size = _STEP_BLOCKS if device.type == "cpu" else _GPU_STEP_BLOCKS
    return [slice(first, first + size) for first in range(0, blocks, size)]


def _encode_blocks(weights: Tensor, records: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Blocks [n, BLOCK] int16 into records [n, RECORD_BYTES]; their escapes, bases [n] and escapes' counts [n]."""
    n = len(weights)
    # pair k of group g is weights 2 (128 k + g) and the next; byte 2 h + k % 2 of word k // 2: halves of two pairs
    signs = (weights & 0x7F | weights >> 8 & 0x80).view(n, 8, 2, 2 * GROUPS)
    halves = records[:, :SIGNS_BYTES].view(torch.int16).view(n, 8, 2 * GROUPS)
    torch.bitwise_or(signs[:, :, 0], signs[:, :, 1] << 8, out=halves)

    exponents = (weights >> 7).to(torch.uint8).view(n, 16, GROUPS * 2).mT.reshape(n, BLOCK)  # [n, g, h, k]
    bases, held = _best_windows(exponents)
    # modulo 256: what is below the base becomes large
    eights = (exponents - bases.to(torch.uint8)[:, None]).clamp_(max=WINDOW).view(torch.int64)  # [n, BLOCK / 8]
    for plane in range(3):
        at = SIGNS_BYTES + plane * PLANE_BYTES
        # the shift copies the sign into the upper bits, which the conversion drops
        bits = ((eights >> plane & _LOWEST_BITS) * _GATHER_BITS) >> 56
        records[:, at : at + PLANE_BYTES] = bits.to(torch.uint8)
    # first the eights that hold an escape, a fifth of them: looking at each weight takes longer than all else
    some = (eights & eights >> 1 & eights >> 2 & _LOWEST_BITS).view(-1).nonzero().squeeze(1)
    is_escape = eights.view(-1)[some].view(torch.uint8) == WINDOW
    return exponents.view(-1, 8)[some].view(-1)[is_escape], bases, BLOCK - held


def _best_windows(exponents: Tensor) -> tuple[Tensor, Tensor]:
    """Of each block [n, BLOCK] uint8 the least base whose window holds most exponents, and how many; [n] int64 each."""
    n = len(exponents)
    width = torch.int16 if 256 * n <= 2**15 else torch.int32
    first_keys = torch.arange(n, dtype=width, device=exponents.device) << 8
    keys = exponents.to(width).add_(first_keys[:, None])
    counts = torch.bincount(keys.view(-1), minlength=256 * n).view(n, 256)
    below = torch.nn.functional.pad(counts.cumsum(1), (1, 0))  # [n, 257]: exponents less than the index
    held = below[:, WINDOW : MAX_BASE + WINDOW + 1] - below[:, : MAX_BASE + 1]
    bases = held.argmax(1, keepdim=True)  # of several the first, on every device
    return bases.squeeze(1), held.gather(1, bases).squeeze(1)


def _decode_blocks(records: Tensor, bases: Tensor, escapes: Tensor) -> Tensor:
    """Blocks [n, BLOCK] int16 of records [n, RECORD_BYTES], bases [n] uint8 and their escapes in order."""
    n = len(records)
    index = torch.zeros(n, PLANE_BYTES, 8, dtype=torch.uint8, device=records.device)
    shifts = torch.arange(8, dtype=torch.uint8, device=records.device)
    for plane in range(3):
        at = SIGNS_BYTES + plane * PLANE_BYTES
        index |= (records[:, at : at + PLANE_BYTES, None] >> shifts & 1) << plane
    index = index.view(n, BLOCK)
    exponents = index + bases[:, None]
    exponents[index == WINDOW] = escapes
    pairs = exponents.view(n, GROUPS, 2, 16).permute(0, 3, 1, 2).to(torch.int16)  # [n, k, g, h]
    signs = records[:, :SIGNS_BYTES].view(n, 8, GROUPS, 2, 2).permute(0, 1, 4, 2, 3)
    signs = signs.reshape(n, 16, GROUPS, 2).to(torch.int16)
    return ((signs & 0x80) << 8 | pairs << 7 | signs & 0x7F).view(n, BLOCK)


def _as_int64(stored: Tensor) -> Tensor:
    """Entries of bytes that may begin anywhere; torch reads in place only what begins at a multiple of 8."""
    return stored.clone().view(torch.int64) if stored.storage_offset() % ENTRY_BYTES else stored.view(torch.int64)
