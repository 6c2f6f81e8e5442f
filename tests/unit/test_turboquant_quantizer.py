"""The paper's two quantizers, against exact errors and the paper's theorems."""

import math

import pytest
import torch
from scipy import integrate, special

from turboquant.codebook import lloyd_max
from turboquant.errors import OptionError, ShapeError
from turboquant.quantizer import TurboQuantIP, TurboQuantMSE

NUM_VECTORS = 20_000

# Relative squared error of the best code on the sphere; exact, by quadrature of its density.
SPHERE_ERROR = {
    64: (0.358387, 0.114526, 0.033391, 0.009132),
    80: (0.359389, 0.115115, 0.033620, 0.009204),
    96: (0.360056, 0.115508, 0.033773, 0.009253),
    128: (0.360889, 0.116000, 0.033966, 0.009315),
    256: (0.362136, 0.116740, 0.034256, 0.009408),
}


def sphere(count: int, dim: int, seed: int = 0) -> torch.Tensor:
    x = torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))
    return x / x.norm(dim=-1, keepdim=True)


def relative_error(x: torch.Tensor, decoded: torch.Tensor) -> float:
    return ((x - decoded).double().square().sum(-1) / x.double().square().sum(-1)).mean().item()


@pytest.fixture(scope="module")
def x128() -> torch.Tensor:
    return sphere(NUM_VECTORS, 128)


@pytest.fixture(scope="module")
def q128() -> torch.Tensor:
    return sphere(NUM_VECTORS, 128, seed=1)


def exact_error(dim: int, bits: int) -> float:
    """∫ (u - c(u))² over the density of a coordinate of a vector of length √dim that is uniform on its sphere."""
    codebook = lloyd_max(bits)
    factor = math.exp(special.gammaln(dim / 2) - special.gammaln((dim - 1) / 2)) / math.sqrt(math.pi * dim)
    borders = (0.0, *codebook.thresholds, math.sqrt(dim))
    return 2 * sum(
        integrate.quad(lambda u, c=c: (u - c) ** 2 * factor * (1 - u * u / dim) ** ((dim - 3) / 2), a, b)[0]
        for a, b, c in zip(borders, borders[1:], codebook.centroids, strict=False)
    )


@pytest.mark.parametrize("dim", SPHERE_ERROR)
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_error_on_the_sphere(dim, bits):
    """Within 1.5 % of the best code for that dim, and within sampling error of this code's exact value."""
    quantizer = TurboQuantMSE(dim, bits)
    x = sphere(NUM_VECTORS // 2, dim)
    error = relative_error(x, quantizer.dequantize(quantizer.quantize(x)))
    assert error == pytest.approx(SPHERE_ERROR[dim][bits - 1], rel=0.015)
    assert error == pytest.approx(exact_error(dim, bits), rel=0.005)


@pytest.mark.parametrize("bits", [5, 6, 7, 8])
def test_error_of_wide_codes(bits):
    quantizer = TurboQuantMSE(128, bits, rule="optimal")
    x = sphere(4000, 128)
    assert relative_error(x, quantizer.dequantize(quantizer.quantize(x))) == pytest.approx(
        exact_error(128, bits), rel=0.04
    )


@pytest.mark.parametrize("kind", ["hadamard", "qr"])
def test_the_paper_bound_holds_for_structured_vectors(kind):
    """Theorem 1: at most √3·π/2·4^-b for any vector; here one-hot and constant ones, averaged over rotations."""
    for x in (torch.eye(64), torch.ones(1, 64)):
        errors = []
        for seed in range(16):
            quantizer = TurboQuantMSE(64, 2, seed=seed, rotation=kind)
            errors.append(relative_error(x, quantizer.dequantize(quantizer.quantize(x))))
        if kind == "qr":
            assert sum(errors) / 16 == pytest.approx(SPHERE_ERROR[64][1], rel=0.1)
        else:
            # One Hadamard round sends a one-hot vector to ±1 everywhere: (1 - c)² with c = 1.5104.
            assert sum(errors) / 16 < 0.262


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_unbiased_rule(x128, bits):
    quantizer = TurboQuantMSE(128, bits, rule="unbiased", rotation="qr")
    gain = (x128 * quantizer.dequantize(quantizer.quantize(x128))).sum(-1)
    assert (gain - 1).abs().max() < 1e-3


@pytest.mark.parametrize("bits", range(1, 9))
def test_bytes_are_those_of_the_tensors(bits):
    quantized = TurboQuantMSE(64, bits).quantize(sphere(10, 64).reshape(2, 5, 64))
    per_vector = {2: 16, 3: 24, 4: 32}.get(bits, 64) + 2
    assert quantized.nbytes == 10 * per_vector
    assert quantized.scale.shape == (2, 5)
    assert all(part.dtype == torch.uint8 for part in quantized.codes)
    unaligned = TurboQuantMSE(20, bits).quantize(sphere(3, 20))
    assert unaligned.nbytes == 3 * (20 + 2)


@pytest.mark.parametrize("dim", [1, 3, 20, 64, 100])
@pytest.mark.parametrize("kind", ["hadamard", "qr"])
def test_any_dim_any_shape(dim, kind):
    x = sphere(12, dim).reshape(3, 4, dim)
    mse = TurboQuantMSE(dim, 8, rotation=kind, rule="optimal")
    decoded = mse.dequantize(mse.quantize(x.double()))
    assert decoded.dtype == torch.float32
    torch.testing.assert_close(decoded, x, rtol=0, atol=0.2 / math.sqrt(dim))
    ip = TurboQuantIP(dim, 8, rotation=kind)
    assert ip.dequantize(ip.quantize(x)).shape == x.shape
    torch.testing.assert_close(ip.dequantize(ip.quantize(x))[1], ip.dequantize(ip.quantize(x[1])), rtol=0, atol=1e-3)


def test_equal_seeds_give_equal_bytes():
    x = sphere(20, 64)
    for make in (TurboQuantMSE, TurboQuantIP):
        first, second = make(64, 3, seed=4), make(64, 3, seed=4)
        assert torch.equal(first.dequantize(first.quantize(x)), second.dequantize(second.quantize(x)))
        other = make(64, 3, seed=5)
        assert not torch.equal(first.dequantize(first.quantize(x)), other.dequantize(other.quantize(x)))


@pytest.mark.parametrize("kind", ["hadamard", "qr"])
@pytest.mark.parametrize(("bits", "coarse_error"), [(1, 1.0), (2, 0.360889), (3, 0.116), (4, 0.033966)])
def test_variance_of_sketched_inner_products(x128, q128, kind, bits, coarse_error):
    """Theorem 2: unbiased, and for unit vectors dim times the variance is (π/2 - 1/dim)·D(bits - 1).

    That is the variance over sketches: one sketch strays from it by 3 %, so several are averaged.
    """
    x, q = x128[:3000], q128[:3000]
    errors = []
    for seed in range(12):
        quantizer = TurboQuantIP(128, bits, seed=seed, rotation=kind)
        errors.append((quantizer.inner_product(q, quantizer.quantize(x)) - (q * x).sum(-1)).double())
    error = torch.stack(errors)
    expected = (math.pi / 2 - 1 / 128) * coarse_error
    assert 128 * error.square().mean().item() == pytest.approx(expected, rel=0.04)
    assert abs(error.mean().item()) < 4 * error.std().item() / math.sqrt(3000)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_sketched_products_do_not_shrink(x128, bits):
    """A vector's product with its own reconstruction: the plain code loses D(bits) of it, the sketch nothing."""
    gain = torch.stack([
        quantizer.inner_product(x128[:4000], quantizer.quantize(x128[:4000])).mean()
        for quantizer in (TurboQuantIP(128, bits, seed=seed) for seed in range(8))
    ])
    assert gain.mean().item() == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_unbiased_scale_beats_the_sketch(x128, q128, bits):
    """The warning of TurboQuantIP: four to six times the variance, and several times the squared error."""
    truth = (q128 * x128).sum(-1)
    sketched, scaled = TurboQuantIP(128, bits), TurboQuantMSE(128, bits, rule="unbiased")
    sketches = sketched.quantize(x128)
    decoded = scaled.dequantize(scaled.quantize(x128))
    ratio = (sketched.inner_product(q128, sketches) - truth).var() / ((q128 * decoded).sum(-1) - truth).var()
    assert 3.7 < ratio.item() < 6.3
    assert relative_error(x128, sketched.dequantize(sketches)) > 3.7 * relative_error(x128, decoded)


@pytest.mark.parametrize("bits", [1, 3])
@pytest.mark.parametrize("dim", [20, 64])
def test_inner_product_is_that_with_the_reconstruction(bits, dim):
    quantizer = TurboQuantIP(dim, bits, seed=3)
    x, q = 4 * sphere(30, dim), sphere(5, dim, seed=2)
    quantized = quantizer.quantize(x)
    torch.testing.assert_close(
        quantizer.inner_product(q[:, None], quantized), q @ quantizer.dequantize(quantized).T, rtol=0, atol=1e-4
    )


def test_the_sketch_by_its_formula():
    """One bit, no coarse codes: √(π/2)/dim · |x| · Sᵀ sign(S x), sign bits lowest first, S from the seed."""
    quantizer = TurboQuantIP(12, 1, seed=9)
    sketch = torch.randn(12, 12, generator=torch.Generator().manual_seed(9))
    x = 3 * sphere(4, 12)
    quantized = quantizer.quantize(x)
    assert quantized.coarse is None
    signs = torch.where(x @ sketch.T < 0, -1.0, 1.0)
    assert quantized.signs.tolist() == [
        [sum((row[8 * j + i] > 0).item() << i for i in range(8) if 8 * j + i < 12) for j in range(2)] for row in signs
    ]
    norm = x.norm(dim=-1, keepdim=True).half().float()
    expected = math.sqrt(math.pi / 2) / 12 * norm * (signs @ sketch)
    torch.testing.assert_close(quantizer.dequantize(quantized), expected)
    assert quantized.nbytes == 4 * (2 + 2)


def test_sketch_bytes():
    """bits·dim bits and two float16 numbers a vector."""
    for bits, per_vector in ((1, 8 + 2), (3, 16 + 8 + 4), (4, 24 + 8 + 4)):
        assert TurboQuantIP(64, bits).quantize(sphere(10, 64)).nbytes == 10 * per_vector


def test_zero_and_broken_vectors():
    x = torch.zeros(3, 64)
    x[1, 0] = math.nan
    x[2, 0] = math.inf
    for quantizer in (TurboQuantMSE(64, 3), TurboQuantIP(64, 3), TurboQuantIP(64, 1)):
        decoded = quantizer.dequantize(quantizer.quantize(x))
        assert (decoded[0] == 0).all()
        assert not decoded[1:].isfinite().any()


def test_first_use_in_inference_mode_leaves_autograd_usable():
    quantizer = TurboQuantIP(16, 2)
    with torch.inference_mode():
        quantized = quantizer.quantize(sphere(1, 16)[0])
        reconstruction = quantizer.dequantize(quantized).clone()
    q = torch.ones(16, requires_grad=True)
    copy = quantizer.quantize(sphere(1, 16)[0])
    quantizer.inner_product(q, copy).backward()
    torch.testing.assert_close(q.grad, torch.tensor(reconstruction.tolist()), rtol=0, atol=1e-5)


def test_bad_arguments():
    with pytest.raises(OptionError, match="1 to 8 bits, got 9"):
        TurboQuantMSE(64, 9)
    with pytest.raises(OptionError, match="1 to 8 bits, got 0"):
        TurboQuantIP(64, 0)
    with pytest.raises(OptionError, match="unknown rotation"):
        TurboQuantMSE(64, 3, rotation="none")
    with pytest.raises(OptionError, match="unknown scale rule 'best'"):
        TurboQuantMSE(64, 3, rule="best")
    with pytest.raises(ShapeError, match=r"\[\.\.\., 64\], got torch.float32 \[2, 32\]"):
        TurboQuantMSE(64, 3).quantize(torch.zeros(2, 32))
    ip = TurboQuantIP(64, 3)
    with pytest.raises(ShapeError, match=r"\[\.\.\., 64\], got torch.float32 \[2, 32\]"):
        ip.quantize(torch.zeros(2, 32))
    with pytest.raises(ShapeError, match=r"got torch.int64 \[64\]"):
        ip.inner_product(torch.zeros(64, dtype=torch.int64), ip.quantize(torch.zeros(2, 64)))


def test_codes_of_another_quantizer():
    x = torch.zeros(2, 64)
    with pytest.raises(ShapeError, match=r"dim 64 at 4 bits has \[16, 8, 8\] code bytes per vector, got \[16, 8\]"):
        TurboQuantMSE(64, 4).dequantize(TurboQuantMSE(64, 3).quantize(x))
    with pytest.raises(ShapeError, match="8 sign bytes and no coarse codes, which is not dim 64 at 3 bits"):
        TurboQuantIP(64, 3).dequantize(TurboQuantIP(64, 1).quantize(x))
    with pytest.raises(ShapeError, match="use the quantizer that made them"):
        TurboQuantIP(128, 1).inner_product(torch.zeros(128), TurboQuantIP(64, 1).quantize(x))
