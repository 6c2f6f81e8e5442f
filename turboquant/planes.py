"""Integer codes <-> bit planes: the only file that knows the bit order (drawn in docs/format.md).

Codes of b bits are kept as b - 1 planes, most significant first: plane 0 has the two top bits (sign, top magnitude
bit) of every coordinate, each further plane one more bit. Giving up the last plane makes every code `code >> 1`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from turboquant.errors import OptionError, ShapeError

# Where a 1-bit plane keeps its bits: _BIT_POSITIONS[half][field]. Plane-0 byte j has four 2-bit fields; the halves are
# the plane-0 bytes j and j + D/8 that byte j of a 1-bit plane serves. With these positions one shift and one mask join
# a nibble's low two bits (plane 0) and its third (here) for four codes at once, which a byte-permute decoder needs.
_BIT_POSITIONS = ((2, 3, 6, 7), (0, 1, 4, 5))

_SCALE_BYTES = 2  # float16


def plane_bytes(head_dim: int, bits: int) -> tuple[int, ...]:
    """Bytes per vector of each plane, most significant first.

    Args:
        head_dim: coordinates per vector, a multiple of 8.
        bits: 2, 3 or 4.
    Returns:
        bits - 1 numbers: head_dim / 4, then head_dim / 8 for each further plane.
    Raises:
        OptionError: another width, or a head_dim that is not a positive multiple of 8.
    """
    _check(head_dim, bits)
    return (head_dim // 4,) + (head_dim // 8,) * (bits - 2)


def vector_bytes(head_dim: int, bits: int) -> int:
    """Bytes that one compressed vector takes: its planes and its float16 scale (50 for head_dim 128 at 3 bits).

    Args:
        head_dim: coordinates per vector, a multiple of 8.
        bits: 2, 3 or 4.
    Returns:
        The number of bytes.
    Raises:
        OptionError: another width, or a head_dim that is not a positive multiple of 8.
    """
    return sum(plane_bytes(head_dim, bits)) + _SCALE_BYTES


def pack(codes: Tensor, bits: int) -> tuple[Tensor, ...]:
    """The bit planes of codes.

    Args:
        codes: [..., D] uint8, D a multiple of 8, values below 2^bits (higher bits are ignored).
        bits: 2, 3 or 4.
    Returns:
        bits - 1 new uint8 tensors: [..., D/4], then [..., D/8] for each further bit.
    Raises:
        OptionError: another width, or D is not a positive multiple of 8.
        ShapeError: codes is not uint8, or has no axis.
    """
    if codes.dtype != torch.uint8 or codes.dim() == 0:
        raise ShapeError(f"pack takes uint8 codes [..., D], got {codes.dtype} {list(codes.shape)}")
    _check(codes.shape[-1], bits)
    fields = codes.chunk(4, -1)  # field f: [..., D/4], the coordinates f*D/4 + j
    planes = [_join([(field >> (bits - 2) & 3) << 2 * f for f, field in enumerate(fields)])]
    halves = [field.chunk(2, -1) for field in fields]  # [f][half]: [..., D/8]
    for shift in range(bits - 3, -1, -1):
        planes.append(
            _join([
                (halves[f][half] >> shift & 1) << position
                for half, positions in enumerate(_BIT_POSITIONS)
                for f, position in enumerate(positions)
            ])
        )
    return tuple(planes)


def unpack(planes: Sequence[Tensor], head_dim: int) -> Tensor:
    """The codes that `pack` packed; n planes hold codes of n + 1 bits.

    Args:
        planes: 1 to 3 uint8 tensors, most significant first: [..., D/4], then [..., D/8] each.
        head_dim: D.
    Returns:
        [..., D] uint8 codes below 2^(n+1), a new tensor.
    Raises:
        OptionError: no plane or more than three, or D is not a positive multiple of 8.
        ShapeError: a plane's dtype or shape does not fit D and the first plane.
    """
    bits = len(planes) + 1
    sizes = plane_bytes(head_dim, bits)
    for index, (plane, size) in enumerate(zip(planes, sizes, strict=True)):
        wanted = (*planes[0].shape[:-1], size)
        if plane.dtype != torch.uint8 or plane.shape != wanted:
            raise ShapeError(
                f"plane {index} of {len(planes)} must be uint8 {list(wanted)} for head_dim {head_dim}, "
                f"got {plane.dtype} {list(plane.shape)}"
            )
    codes = torch.stack([planes[0] >> 2 * f & 3 for f in range(4)], -2)  # [..., 4, D/4]
    for plane in planes[1:]:
        bit = torch.stack(
            [torch.cat([plane >> positions[f] & 1 for positions in _BIT_POSITIONS], -1) for f in range(4)], -2
        )  # [..., 4, D/4]
        codes = codes << 1 | bit
    return codes.flatten(-2)


def _join(parts: list[Tensor]) -> Tensor:
    joined = parts[0]
    for part in parts[1:]:
        joined = joined | part
    return joined


def _check(head_dim: int, bits: int) -> None:
    if bits not in (2, 3, 4):
        raise OptionError(f"bit planes hold codes of 2, 3 or 4 bits, got {bits}")
    if head_dim < 8 or head_dim % 8:
        raise OptionError(f"bit planes need a head_dim that is a multiple of 8, got {head_dim}")
