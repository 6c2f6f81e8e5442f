"""age: give up the lowest bit plane of vectors and rescale them."""

from collections.abc import Sequence

from torch import Tensor

from turboquant.errors import OptionError
from turboquant.ops.age import reference
from turboquant.ops.unpack import check_planes_and_scale


def age(planes: Sequence[Tensor], scale: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
    """The same vectors with one bit less per coordinate. Nothing is encoded again.

    Args:
        planes: 2 or 3 uint8 tensors, most significant first: [..., D/4], then [..., D/8] each.
        scale: [...] float16, on the planes' device.
    Returns:
        (planes without the last, the very tensors that came in; new float16 scale [...]).
    Raises:
        OptionError: one plane only (codes of one bit are not stored), or none, or more than three.
        ShapeError: the planes do not fit each other, or the scale does not fit the planes.
    Source: own.
    """
    check_planes_and_scale(planes, scale)
    if len(planes) < 2:
        raise OptionError("vectors with one bit plane (2 bits) cannot age: codes of one bit are not stored")
    return tuple(planes[:-1]), reference.rescale(planes, scale)
