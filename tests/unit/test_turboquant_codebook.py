"""Codebooks, against integrals and optima found by scipy, and published tables."""

import itertools
import math

import pytest
import torch
from scipy import integrate, optimize, stats

from turboquant.codebook import Codebook, embedded_codebook, lloyd_max
from turboquant.errors import OptionError

# Least mean squared error of 2^bits levels for N(0, 1); Max 1960, table I, for 1 to 5 bits.
LLOYD_MAX_ERROR = {
    1: 0.36338023,
    2: 0.11748185,
    3: 0.03454776,
    4: 0.00950101,
    5: 0.00250467,
    6: 0.00064424,
    7: 0.00016348,
    8: 0.0000412,
}
EMBEDDED_ERROR = {1: 0.363380, 2: 0.120294, 3: 0.034852, 4: 0.00950101}


def normal_integral(function, lower, upper):
    """∫ function(x) φ(x) dx; φ is below 1e-31 past 12."""
    value, _ = integrate.quad(lambda x: function(x) * stats.norm.pdf(x), lower, min(upper, 12.0), epsabs=1e-14)
    return value


def cells_of(codebook: Codebook):
    borders = (0.0, *codebook.thresholds, math.inf)
    return list(zip(borders, borders[1:], codebook.centroids, strict=False))


def error_of(codebook: Codebook) -> float:
    return 2 * sum(normal_integral(lambda x, c=c: (x - c) ** 2, a, b) for a, b, c in cells_of(codebook))


@pytest.mark.parametrize("bits", range(1, 9))
def test_lloyd_max_error_is_the_published_one(bits):
    assert error_of(lloyd_max(bits)) == pytest.approx(LLOYD_MAX_ERROR[bits], rel=1e-3 if bits == 8 else 5e-5)


@pytest.mark.parametrize("bits", range(1, 9))
def test_lloyd_max_is_the_fixed_point(bits):
    """Centroids are the means of their cells and thresholds the midpoints; for N(0, 1) only the optimum is so."""
    codebook = lloyd_max(bits)
    assert len(codebook.centroids) == 1 << (bits - 1)
    for lower, upper, centroid in cells_of(codebook)[:: 1 + (bits > 5) * 7]:
        mean = normal_integral(lambda x: x, lower, upper) / normal_integral(lambda x: 1.0, lower, upper)
        assert centroid == pytest.approx(mean, abs=1e-9)
    for threshold, below, above in zip(codebook.thresholds, codebook.centroids, codebook.centroids[1:], strict=False):
        assert threshold == pytest.approx((below + above) / 2, abs=1e-12)
    assert list(codebook.centroids) == sorted(set(codebook.centroids))


@pytest.mark.parametrize("bits", [2, 3])
def test_a_general_optimizer_finds_the_same_centroids(bits):
    def error(centroids):
        centroids = sorted(abs(c) for c in centroids)
        thresholds = [(a + b) / 2 for a, b in itertools.pairwise(centroids)]
        return error_of(Codebook(bits, tuple(thresholds), tuple(centroids)))

    start = [0.7 * (i + 0.5) for i in range(1 << (bits - 1))]
    found = optimize.minimize(error, start, method="Nelder-Mead", options={"xatol": 1e-6, "fatol": 1e-12})
    assert sorted(found.x) == pytest.approx(lloyd_max(bits).centroids, abs=1e-4)


def test_four_embedded_bits_are_lloyd_max():
    assert embedded_codebook(4).thresholds == pytest.approx(lloyd_max(4).thresholds, abs=1e-12)
    assert embedded_codebook(4).centroids == pytest.approx(lloyd_max(4).centroids, abs=1e-12)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_embedded_errors(bits):
    """The price of being embedded: 0.9 % at 3 bits, 2.4 % at 2, none at 4 and 1."""
    assert error_of(embedded_codebook(bits)) == pytest.approx(EMBEDDED_ERROR[bits], rel=2e-5)


@pytest.mark.parametrize(
    ("bits", "centroids"),
    [(1, (0.79788,)), (2, (0.49679, 1.60522)), (3, (0.25532, 0.78869, 1.40599, 2.23538))],
)
def test_embedded_centroids_are_refitted(bits, centroids):
    assert embedded_codebook(bits).centroids == pytest.approx(centroids, abs=6e-6)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_dropping_the_lowest_bit_is_the_coarser_embedded_code(bits):
    u = 2 * torch.randn(10_000, generator=torch.Generator().manual_seed(1))
    assert torch.equal(embedded_codebook(bits).encode(u) >> 1, embedded_codebook(bits - 1).encode(u))


@pytest.mark.parametrize(
    ("make", "bits"),
    [(embedded_codebook, bits) for bits in range(1, 5)] + [(lloyd_max, bits) for bits in range(1, 9)],
)
def test_encode_takes_the_cell_and_decode_its_centroid(make, bits):
    codebook = make(bits)
    u = 2 * torch.randn(4, 500, generator=torch.Generator().manual_seed(2))
    codes = codebook.encode(u)
    assert codes.dtype == torch.uint8
    assert codes.shape == u.shape
    for value, code in zip(u.flatten()[:300].tolist(), codes.flatten().tolist(), strict=False):
        assert code >> (bits - 1) == (value < 0)
        lower, upper, centroid = cells_of(codebook)[code & ((1 << (bits - 1)) - 1)]
        assert lower - 1e-6 <= abs(value) <= upper + 1e-6
        decoded = codebook.decode(torch.tensor([code], dtype=torch.uint8))
        assert decoded.dtype == torch.float32
        assert decoded.item() == pytest.approx(math.copysign(centroid, value))
    assert torch.equal(codebook.encode(codebook.table("cpu")), torch.arange(1 << bits, dtype=torch.uint8))


def test_ties_zeros_and_large_values():
    codebook = embedded_codebook(4)
    threshold = torch.tensor(codebook.thresholds[3], dtype=torch.float32).item()
    above = torch.nextafter(torch.tensor(threshold), torch.tensor(9.0)).item()
    u = torch.tensor([threshold, above, -threshold, -above, 0.0, -0.0, 100.0, -100.0])
    assert codebook.encode(u).tolist() == [3, 4, 8 + 3, 8 + 4, 0, 0, 7, 15]
    assert codebook.encode(u.double()).tolist() == [3, 4, 8 + 3, 8 + 4, 0, 0, 7, 15]


def test_encode_takes_strided_input():
    u = torch.randn(16, 8, generator=torch.Generator().manual_seed(3))
    assert torch.equal(lloyd_max(3).encode(u.T), lloyd_max(3).encode(u).T)


def test_a_table_made_in_inference_mode_serves_autograd():
    """Kept tensors outlive the mode they were made in; an inference tensor could not be saved for backward."""
    codebook = Codebook(2, (0.9,), (0.5, 1.25))
    with torch.inference_mode():
        table = codebook.table("cpu")
    weight = torch.ones(4, requires_grad=True)
    (weight * table).sum().backward()
    assert weight.grad.tolist() == [0.5, 1.25, -0.5, -1.25]


@pytest.mark.parametrize("bits", [0, 5, 16])
def test_embedded_widths(bits):
    with pytest.raises(OptionError, match=f"1, 2, 3 or 4 bits, got {bits}"):
        embedded_codebook(bits)


@pytest.mark.parametrize("bits", [0, 9])
def test_lloyd_max_widths(bits):
    with pytest.raises(OptionError, match=f"1 to 8 bits, got {bits}"):
        lloyd_max(bits)
