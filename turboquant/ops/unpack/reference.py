"""Planes and scales -> vectors: the definition, in plain PyTorch."""

from collections.abc import Sequence

import torch
from torch import Tensor

from turboquant import planes as bit_planes
from turboquant.codebook import embedded_codebook


def unpack(planes: Sequence[Tensor], scale: Tensor) -> Tensor:
    """scale · centroid(code), in float32.

    Args:
        planes: 1 to 3 uint8 tensors, most significant first: [..., D/4], then [..., D/8] each.
        scale: [...] floating.
    Returns:
        [..., D] float32, still rotated; a new tensor.
    """
    codes = bit_planes.unpack(planes, 4 * planes[0].shape[-1])
    return scale.to(torch.float32).unsqueeze(-1) * embedded_codebook(len(planes) + 1).decode(codes)
