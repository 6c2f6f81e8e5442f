"""unpack: bit planes and scales -> vectors, still rotated."""

from collections.abc import Sequence

from torch import Tensor

from turboquant.errors import OptionError, ShapeError
from turboquant.layout import BlockLayout
from turboquant.ops.devices import launching_on
from turboquant.ops.unpack import reference
from turboquant.planes import plane_bytes


def unpack(planes: Sequence[Tensor], scale: Tensor) -> Tensor:
    """The vectors that planes and scales stand for.

    Args:
        planes: 1 to 3 uint8 tensors, most significant first: [..., D/4], then [..., D/8] each; as `encode` gives
            them, or a leading part of that.
        scale: [...] floating, on the planes' device.
    Returns:
        [..., D] float32, still rotated; a new tensor that the caller owns.
    Raises:
        OptionError: no plane or more than three, or D is not a positive multiple of 8.
        ShapeError: the planes do not fit each other, or the scale does not fit the planes.
    Source: own.
    """
    check_planes_and_scale(planes, scale)
    return reference.unpack(planes, scale)


def unpack_records(layout: BlockLayout, index: int, anchor: Tensor, entries: Tensor, out: Tensor) -> None:
    """Coded keys (0) or values (1) of whole blocks as rows, means added, still rotated, by a kernel.

    Args:
        layout, index: of the records, and which side; 2 to 4 bits.
        anchor: see PackedTokens. entries: [n] int64, offsets of the records.
        out: [G, n * 64, D] float32, float16 or bfloat16, last axis contiguous; written.
    """
    from turboquant.ops.unpack import kernel

    with launching_on(anchor.device):
        kernel.unpack_records(layout, index, anchor, entries, out)


def check_planes_and_scale(planes: Sequence[Tensor], scale: Tensor) -> None:
    """Refuses a scale that does not belong to the planes, and a number of planes that no code has.

    Args:
        planes: as in `unpack`.
        scale: as in `unpack`.
    Raises:
        OptionError: no plane or more than three, or D is not a positive multiple of 8.
        ShapeError: the scale's shape, dtype or device does not fit the first plane.
    """
    if not 1 <= len(planes) <= 3:
        raise OptionError(f"vectors have 1, 2 or 3 bit planes (2, 3 or 4 bits), got {len(planes)}")
    first = planes[0]
    if first.dim() == 0:
        raise ShapeError("plane 0 must be [..., D/4], got a tensor without axes")
    plane_bytes(4 * first.shape[-1], len(planes) + 1)
    if not scale.is_floating_point() or scale.shape != first.shape[:-1] or scale.device != first.device:
        raise ShapeError(
            f"the scale must be floating {list(first.shape[:-1])} on {first.device}, as plane 0 is "
            f"{list(first.shape)}; got {scale.dtype} {list(scale.shape)} on {scale.device}"
        )
