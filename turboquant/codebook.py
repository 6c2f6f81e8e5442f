"""Scalar codebooks for unit-variance coordinates, in sign-magnitude form.

A rotated vector, scaled to variance 1, has coordinates close to N(0, 1), whatever the vector and the head size; so one
table serves every head size. A code of b bits is `sign << (b - 1) | m`: sign 1 means negative, and m in
0 .. 2^(b-1) - 1 is the index of the magnitude, 0 the smallest. Zero has sign 0. Dropping the lowest bit of a code
merges two neighbouring magnitudes, which is what `embedded_codebook` is built on.
"""

import itertools
import math
from dataclasses import dataclass
from functools import cache
from statistics import NormalDist

import torch
from torch import Tensor

from turboquant.errors import OptionError

# Positive thresholds of the 16-level Lloyd-Max quantizer of N(0, 1) (Max 1960, table I; Lloyd 1982), here to double
# precision: the fixed point that `lloyd_max(4)` finds. 0 is a threshold as well.
_THRESHOLDS_4_BITS = (
    0.25822166467071894,
    0.5224037090113769,
    0.7995497875097113,
    1.0992858269170673,
    1.4371387916845266,
    1.8435318062766297,
    2.4008033987632684,
)

# Newton's step doubles the correct digits; a move below this leaves only rounding (2e-13 at 8 bits).
_NEWTON_TOLERANCE = 1e-11


@dataclass(frozen=True)
class Codebook:
    """Thresholds and centroids of a symmetric scalar quantizer for unit-variance coordinates.

    Attributes:
        bits: width of a code; 2^bits levels, half of them negative.
        thresholds: the 2^(bits-1) - 1 positive decision thresholds, rising.
        centroids: the 2^(bits-1) positive reconstruction values, rising.
    """

    bits: int
    thresholds: tuple[float, ...]
    centroids: tuple[float, ...]

    def table(self, device: torch.device | str) -> Tensor:
        """The reconstruction value of each code.

        Args:
            device: where the table shall lie.
        Returns:
            [2^bits] float32, indexed by code; kept per device: read it, do not write to it.
        """
        return _tensors(self, torch.device(device))[1]

    def encode(self, u: Tensor) -> Tensor:
        """The code of each coordinate: its sign, and the number of positive thresholds below its magnitude.

        Args:
            u: any shape, floating, unit variance; compared in float32, so a value on a threshold takes the smaller
                magnitude. NaN has no meaningful code.
        Returns:
            uint8 codes below 2^bits, shape of u.
        """
        u = u.to(torch.float32)
        thresholds, _ = _tensors(self, u.device)
        # bucketize warns about (and copies) strided input, so the copy is made here.
        magnitude = torch.bucketize(u.abs().contiguous(), thresholds, out_int32=True).to(torch.uint8)
        return (u < 0).to(torch.uint8) << (self.bits - 1) | magnitude

    def decode(self, codes: Tensor) -> Tensor:
        """The reconstruction value of each code.

        Args:
            codes: any shape, uint8, below 2^bits.
        Returns:
            float32, shape of codes.
        """
        # index_select on the flat codes takes a quarter of the time of indexing on a CPU
        return self.table(codes.device).index_select(0, codes.flatten().to(torch.int32)).view(codes.shape)


@cache
def embedded_codebook(bits: int) -> Codebook:
    """The codebook whose codes are the top bits of the 4-bit Lloyd-Max codes, with centroids refitted to N(0, 1).

    So a stored code is made coarser by dropping its lowest bit, without touching the others. Mean squared errors, for
    N(0, 1): 0.00950 at 4 bits (the optimum), 0.03485 at 3 (optimum 0.03455), 0.1203 at 2 (0.1175), 0.3634 at 1 (the
    optimum); shown by tests/unit/test_turboquant_codebook.py.

    Args:
        bits: 1, 2, 3 or 4.
    Returns:
        The codebook; one object per width.
    Raises:
        OptionError: another width.
    Source: own; the 4-bit thresholds are Max 1960.
    """
    if bits not in (1, 2, 3, 4):
        raise OptionError(f"an embedded code has 1, 2, 3 or 4 bits, got {bits}; lloyd_max(bits) serves up to 8")
    step = 1 << (4 - bits)
    thresholds = _THRESHOLDS_4_BITS[step - 1 :: step]
    return Codebook(bits, thresholds, tuple(cell.centroid for cell in _cells(thresholds)))


@cache
def lloyd_max(bits: int) -> Codebook:
    """The quantizer of N(0, 1) with the least mean squared error among those with 2^bits levels.

    The fixed point "centroids are the means of their cells, thresholds are midpoints of centroids", which is unique
    for a log-concave density; found by Newton's method in float64 from the companding quantizer.

    Args:
        bits: 1 to 8.
    Returns:
        The codebook; one object per width.
    Raises:
        OptionError: another width.
    Source: Lloyd 1982, Max 1960; optimality is shown by tests/unit/test_turboquant_codebook.py.
    """
    if bits not in range(1, 9):
        raise OptionError(f"a Lloyd-Max code has 1 to 8 bits, got {bits}")
    count = 1 << (bits - 1)
    # At high rate the best density of levels is the cube root of N(0, 1)'s, which is N(0, 3)'s (Panter and Dite 1951).
    companding = NormalDist(0.0, math.sqrt(3.0))
    centroids = [companding.inv_cdf(0.5 + (i + 0.5) / (2 * count)) for i in range(count)]
    for _ in range(50):
        move = _newton_step(centroids)
        centroids = [c + d for c, d in zip(centroids, move, strict=True)]
        if max(abs(d) for d in move) < _NEWTON_TOLERANCE:
            return Codebook(bits, _midpoints(centroids), tuple(centroids))
    raise AssertionError(f"Newton's method did not settle for {bits} bits")


@dataclass(frozen=True)
class _Cell:
    """One positive cell (lower, upper] of N(0, 1): its mean, and how the mean moves with either border."""

    centroid: float
    slope_lower: float
    slope_upper: float


def _cells(thresholds: tuple[float, ...]) -> list[_Cell]:
    """The cells between 0, the thresholds and infinity.

    With density f and tail mass T: mass p = T(a) - T(b), mean g = (f(a) - f(b)) / p (as f' = -x f), and
    dg/da = f(a)(g - a)/p, dg/db = f(b)(b - g)/p.
    """
    borders = (0.0, *thresholds)
    density = [math.exp(-0.5 * x * x) / math.sqrt(2.0 * math.pi) for x in borders] + [0.0]
    # erfc keeps the digits of small tails that 1 - erf loses.
    tail = [0.5 * math.erfc(x / math.sqrt(2.0)) for x in borders] + [0.0]
    cells = []
    for i, lower in enumerate(borders):
        mass = tail[i] - tail[i + 1]
        mean = (density[i] - density[i + 1]) / mass
        slope_upper = density[i + 1] * (borders[i + 1] - mean) / mass if i + 1 < len(borders) else 0.0
        cells.append(_Cell(mean, density[i] * (mean - lower) / mass, slope_upper))
    return cells


def _midpoints(centroids: list[float]) -> tuple[float, ...]:
    return tuple((a + b) / 2 for a, b in itertools.pairwise(centroids))


def _newton_step(centroids: list[float]) -> list[float]:
    """The change of the centroids c that solves the linearized c = mean of the cell between midpoints.

    The Jacobian is tridiagonal (each border is the midpoint of two centroids), so one elimination sweep solves it.
    """
    cells = _cells(_midpoints(centroids))
    last = len(cells) - 1
    # The border at 0 does not move, and the one at infinity has slope 0.
    left = [0.0 if i == 0 else 0.5 * cell.slope_lower for i, cell in enumerate(cells)]
    right = [0.5 * cell.slope_upper for cell in cells]
    diagonal = [1.0 - a - b for a, b in zip(left, right, strict=True)]
    move = [cell.centroid - c for cell, c in zip(cells, centroids, strict=True)]
    for i in range(1, last + 1):
        ratio = left[i] / diagonal[i - 1]
        diagonal[i] -= ratio * right[i - 1]
        move[i] += ratio * move[i - 1]
    move[last] /= diagonal[last]
    for i in range(last - 1, -1, -1):
        move[i] = (move[i] + right[i] * move[i + 1]) / diagonal[i]
    return move


@cache
def _tensors(codebook: Codebook, device: torch.device) -> tuple[Tensor, Tensor]:
    """(thresholds [2^(b-1) - 1], table [2^b]), float32."""
    # Kept tensors must stay usable in autograd, so they are not made as inference tensors.
    with torch.inference_mode(False):
        thresholds = torch.tensor(codebook.thresholds, dtype=torch.float32, device=device)
        positive = torch.tensor(codebook.centroids, dtype=torch.float32, device=device)
        return thresholds, torch.cat((positive, -positive))
