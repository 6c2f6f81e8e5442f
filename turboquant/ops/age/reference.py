"""Coarser codes from the planes that stay, with rescaled vectors: the definition, in plain PyTorch."""

from collections.abc import Sequence

import torch
from torch import Tensor

from turboquant import planes as bit_planes
from turboquant.codebook import embedded_codebook
from turboquant.ops.encode.reference import fixed_order_sum


def rescale(planes: Sequence[Tensor], scale: Tensor, kept: int) -> Tensor:
    """The scale that fits the vectors once only the first `kept` planes are left.

    With c the old and c' the new centroids of the codes, a' = a·<c, c>/<c, c'>: the new reconstruction a'·c' has the
    same product with the old one, a·c, as that has with itself. So what `encode` made unbiased stays so to first
    order, and nothing but codes is read.

    Args:
        planes: 2 or 3 uint8 tensors, most significant first: [..., D/4], then [..., D/8] each.
        scale: [...] float16, of these planes. kept: at least 1, fewer than there are.
    Returns:
        [...] float16, a new tensor, the same for a row whatever batch it lies in.
    """
    codes = bit_planes.unpack(planes, 4 * planes[0].shape[-1])
    c = embedded_codebook(len(planes) + 1).decode(codes)  # [..., D]
    coarse = embedded_codebook(kept + 1).decode(codes >> (len(planes) - kept))  # [..., D]
    return (scale.to(torch.float32) * (fixed_order_sum(c * c) / fixed_order_sum(c * coarse))).to(torch.float16)
