"""age: give up the lowest bit planes of vectors and rescale them. Nothing is encoded again."""

from collections.abc import Sequence

from torch import Tensor

from turboquant.errors import OptionError
from turboquant.layout import BlockLayout, side_parts
from turboquant.ops.age import reference
from turboquant.ops.devices import launching_on
from turboquant.ops.unpack import check_planes_and_scale


def age(planes: Sequence[Tensor], scale: Tensor, kept: int | None = None) -> tuple[tuple[Tensor, ...], Tensor]:
    """The same vectors with fewer bits per coordinate.

    Args:
        planes: 2 or 3 uint8 tensors, most significant first: [..., D/4], then [..., D/8] each.
        scale: [...] float16, on the planes' device. kept: planes to keep, None = all but the last.
    Returns:
        (the first `kept` of the very tensors that came in; new float16 scale [...]).
    Raises:
        OptionError: one plane only (codes of one bit are not stored), or none, or more than three; `kept` is not at
            least 1 and less than there are.
        ShapeError: the planes do not fit each other, or the scale does not fit the planes.
    Source: own.
    """
    check_planes_and_scale(planes, scale)
    if len(planes) < 2:
        raise OptionError("vectors with one bit plane (2 bits) cannot age: codes of one bit are not stored")
    kept = len(planes) - 1 if kept is None else kept
    if not 1 <= kept < len(planes):
        raise OptionError(f"of {len(planes)} bit planes 1 to {len(planes) - 1} can be kept, got {kept}")
    return tuple(planes[:kept]), reference.rescale(planes, scale, kept)


def age_records(records: Tensor, layout: BlockLayout, aged: Tensor, aged_layout: BlockLayout) -> None:
    """Blocks with fewer planes, in plain PyTorch.

    Args:
        records: [n, layout.nbytes] uint8, read. aged: [n, aged_layout.nbytes] uint8, written; the same heads and
            widths, and as many planes or fewer on either side.
    """
    for index in (0, 1):
        old, new = side_parts(records, layout, index), side_parts(aged, aged_layout, index)
        if old.scales is not None and new.scales is not None:
            kept = len(new.planes)
            scales = old.scales if kept == len(old.planes) else age(old.planes, old.scales, kept)[1]
            new.scales.copy_(scales)
        if old.mean is not None and new.mean is not None:
            new.mean.copy_(old.mean)
        for to, plane in zip(new.planes, old.planes, strict=False):
            to.copy_(plane)


def age_blocks(layout: BlockLayout, aged_layout: BlockLayout, anchor: Tensor, entries: Tensor, aged: Tensor) -> None:
    """Blocks with fewer planes, by a kernel: one launch for all of them.

    Args:
        layout, aged_layout: of the records that are read and written; see `age_records`.
        anchor: see PackedTokens. entries, aged: [n] int64, offsets of the records that are read and written.
    """
    from turboquant.ops.age import kernel

    with launching_on(anchor.device):
        kernel.age_blocks(layout, aged_layout, anchor, entries, aged)
