"""Vectors -> codes and scales: the definition, in plain PyTorch.

Symbols, for one rotated vector x of length D: n = |x|; u = x·√D/n, its unit-variance coordinates; c, the centroid of
each u; A = Σ u·c; C = Σ c². The decoder gives a·c, and the scale a follows one of these rules:

    plain      n/√D        the paper's; <x, x̂> falls short of n² by the relative error
    corrected  n/√C        x̂ has x's length
    unbiased   n·√D/A      <x, x̂> = n² for every vector
    optimal    n·A/(C·√D)  the least |x - x̂| for these codes
"""

import math

import torch
from torch import Tensor

from turboquant.codebook import Codebook
from turboquant.errors import OptionError

SCALE_RULES = ("plain", "corrected", "unbiased", "optimal")


def encode_codes(x: Tensor, codebook: Codebook, rule: str) -> tuple[Tensor, Tensor]:
    """Codes and scale of each vector. All arithmetic in float32, and in an order that only D decides.

    Args:
        x: [..., D], floating.
        codebook: gives the codes.
        rule: "plain", "corrected", "unbiased" or "optimal".
    Returns:
        (codes [..., D] uint8, scale [...] float16), new tensors. A zero vector has scale 0, a vector with NaN or
        infinity has scale NaN, and one whose norm or scale is too large has scale infinity; in all of these where the
        norm itself is zero or not finite the codes are 0. Scales below float16's smallest number round to 0.
    Raises:
        OptionError: unknown rule.
    Source: plain: TurboQuant (arXiv 2504.19874), algorithm 1; unbiased: DRIVE (arXiv 2105.08339) and EDEN
        (arXiv 2108.08842); the others: least squares.
    """
    if rule not in SCALE_RULES:
        raise OptionError(f"unknown scale rule {rule!r}; use one of {', '.join(SCALE_RULES)}")
    x = x.to(torch.float32)
    root = math.sqrt(x.shape[-1])
    n = fixed_order_sum(x * x).sqrt()  # [...]
    is_codable = torch.isfinite(n) & (n > 0)
    factor = torch.where(is_codable, root / n, 0.0)
    u = torch.where(is_codable.unsqueeze(-1), x * factor.unsqueeze(-1), 0.0)  # [..., D]
    codes = codebook.encode(u)
    c = codebook.decode(codes)
    if rule == "plain":
        scale = n / root
    elif rule == "corrected":
        scale = n / fixed_order_sum(c * c).sqrt()
    elif rule == "unbiased":
        scale = n * (root / fixed_order_sum(u * c))
    else:
        scale = n / root * (fixed_order_sum(u * c) / fixed_order_sum(c * c))
    scale = torch.where(n == 0, 0.0, scale)
    # A finite vector whose squares overflow must not look like a broken one, nor the reverse.
    beyond = torch.where(torch.isfinite(x).all(-1), math.inf, math.nan)
    return codes, torch.where(torch.isfinite(n), scale, beyond).to(torch.float16)


def fixed_order_sum(x: Tensor) -> Tensor:
    """Sum over the last axis, by halves, in float additions whose order depends on its length alone.

    `Tensor.sum` orders its additions by the whole shape and by the device; a vector's code would then depend on the
    batch that it came in.

    Args:
        x: [..., D], D at least 1.
    Returns:
        [...], dtype of x.
    Source: own (pairwise summation).
    """
    while x.shape[-1] > 1:
        half = x.shape[-1] // 2
        folded = x[..., :half] + x[..., half : 2 * half]
        x = torch.cat((folded, x[..., 2 * half :]), -1) if x.shape[-1] % 2 else folded
    return x[..., 0]
