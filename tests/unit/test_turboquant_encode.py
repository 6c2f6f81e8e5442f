"""The ops encode, unpack and age, against exact distortions on the sphere and against each other."""

import math

import pytest
import torch

from turboquant.codebook import embedded_codebook
from turboquant.errors import OptionError, ShapeError
from turboquant.ops.age import age
from turboquant.ops.encode import encode
from turboquant.ops.encode.reference import fixed_order_sum
from turboquant.ops.unpack import unpack
from turboquant.planes import pack, vector_bytes
from turboquant.planes import unpack as unpack_codes
from turboquant.rotation import make_rotation

NUM_VECTORS = 20_000
RULES = ("plain", "corrected", "unbiased", "optimal")

# Relative squared error of the best code on the sphere in D dimensions; exact, by quadrature of its density.
SPHERE_ERROR = {
    64: {2: 0.114526, 3: 0.033391, 4: 0.009132},
    80: {2: 0.115115, 3: 0.033620, 4: 0.009204},
    96: {2: 0.115508, 3: 0.033773, 4: 0.009253},
    128: {2: 0.116000, 3: 0.033966, 4: 0.009315},
    256: {2: 0.116740, 3: 0.034256, 4: 0.009408},
}
# What the embedded code adds to that (tests/unit/test_turboquant_codebook.py), N(0, 1).
EMBEDDED_EXCESS = {2: 1.024, 3: 1.009, 4: 1.0}


def sphere(count: int, dim: int, seed: int = 0) -> torch.Tensor:
    x = torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))
    return x / x.norm(dim=-1, keepdim=True)


@pytest.fixture(scope="module")
def x128() -> torch.Tensor:
    return sphere(NUM_VECTORS, 128)


def relative_error(x: torch.Tensor, decoded: torch.Tensor) -> float:
    return ((x - decoded).double().square().sum(-1) / x.double().square().sum(-1)).mean().item()


def decode(x: torch.Tensor, bits: int, rule: str) -> torch.Tensor:
    encoded = encode(x, bits, rule=rule)
    return unpack(encoded.planes, encoded.scale)


@pytest.mark.parametrize("dim", SPHERE_ERROR)
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_plain_error_is_that_of_the_sphere_and_the_embedded_code(dim, bits):
    x = sphere(NUM_VECTORS // 2, dim)
    expected = SPHERE_ERROR[dim][bits] * EMBEDDED_EXCESS[bits]
    assert relative_error(x, decode(x, bits, "plain")) == pytest.approx(expected, rel=0.015)


@pytest.mark.parametrize(("bits", "expected"), [(2, 0.1307), (3, 0.03474), (4, 0.00924)])
def test_unbiased_error(x128, bits, expected):
    """D / (1 - D) for a relative error D, which grows with the embedded code's."""
    error = relative_error(x128, decode(x128, bits, "unbiased"))
    assert error == pytest.approx(expected * EMBEDDED_EXCESS[bits], rel=0.015)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_unbiased_products_are_exact_for_every_vector(x128, bits):
    gain = (x128 * decode(x128, bits, "unbiased")).sum(-1)
    assert (gain - 1).abs().max() < 1e-3  # float16 scales: 2^-11
    assert abs(gain.mean().item() - 1) < 1e-5


@pytest.mark.parametrize(("bits", "gain"), [(2, 0.885), (3, 0.9675), (4, 0.9913)])
def test_plain_products_fall_short(x128, bits, gain):
    assert (x128 * decode(x128, bits, "plain")).sum(-1).mean().item() == pytest.approx(gain, abs=0.003)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_corrected_length_is_exact(x128, bits):
    assert (decode(x128, bits, "corrected").norm(dim=-1) - 1).abs().max() < 1e-3


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_optimal_scale_has_the_least_error(x128, bits):
    x = x128[:2000]
    encoded = encode(x, bits, rule="optimal")
    best = (x - unpack(encoded.planes, encoded.scale)).square().sum(-1)
    for factor in (0.99, 1.01):
        assert ((x - factor * unpack(encoded.planes, encoded.scale)).square().sum(-1) > best).all()
    for rule in ("plain", "corrected", "unbiased"):
        other = encode(x, bits, rule=rule)
        for plane, same in zip(other.planes, encoded.planes, strict=True):
            assert torch.equal(plane, same)
        # Two float16 scales that mean the same may differ by rounding.
        assert ((x - unpack(other.planes, other.scale)).square().sum(-1) >= best - 1e-6).all()


@pytest.mark.parametrize(("bits", "expected"), [(2, 0.1295), (3, 0.0347), (4, 0.0092)])
def test_variance_of_unbiased_inner_products(x128, bits, expected):
    q = sphere(NUM_VECTORS, 128, seed=1)
    error = (q * (decode(x128, bits, "unbiased") - x128)).sum(-1).double()
    assert 128 * error.var().item() == pytest.approx(expected * EMBEDDED_EXCESS[bits], rel=0.05)
    assert abs(error.mean().item()) < 4 * error.std().item() / math.sqrt(NUM_VECTORS)


@pytest.mark.parametrize("bits", [3, 4])
def test_a_rotated_structured_vector_is_coded_as_well_as_a_random_one(bits):
    x = 1 + 0.05 * torch.randn(4000, 128, generator=torch.Generator().manual_seed(2))
    rotation = make_rotation("hadamard", 128, 0)
    decoded = rotation.invert(decode(rotation.apply(x), bits, "plain"))
    assert relative_error(x, decoded) < 1.3 * SPHERE_ERROR[128][bits]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("dim", [64, 80, 128])
def test_a_row_has_the_same_bytes_in_any_batch(rule, bits, dim):
    x = 3 * torch.randn(2, 700, 3, dim, generator=torch.Generator().manual_seed(4))
    whole = encode(x, bits, rule=rule)
    aged = age(whole.planes, whole.scale)[1] if bits > 2 else whole.scale
    strided = encode(x.transpose(-1, 1).contiguous().transpose(-1, 1), bits, rule=rule)
    for part, same in zip((*whole.planes, whole.scale), (*strided.planes, strided.scale), strict=True):
        assert torch.equal(part, same)
    for index in ((0, 0, 0), (1, 311, 2), (slice(None), 5), (1, slice(3, 600, 7), 1)):
        alone = encode(x[index], bits, rule=rule)
        for part, same in zip((*alone.planes, alone.scale), (*whole.planes, whole.scale), strict=True):
            assert torch.equal(part, same[index])
        if bits > 2:
            assert torch.equal(age(alone.planes, alone.scale)[1], aged[index])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_are_read_as_float32(dtype):
    x = sphere(50, 64).to(dtype)
    encoded, same = encode(x, 3), encode(x.float(), 3)
    assert torch.equal(encoded.scale, same.scale)
    assert all(torch.equal(a, b) for a, b in zip(encoded.planes, same.planes, strict=True))


def test_codes_are_those_of_the_embedded_codebook():
    x = 5 * sphere(300, 96, seed=3)
    u = x.double() * math.sqrt(96) / x.double().norm(dim=-1, keepdim=True)
    codebook = embedded_codebook(4)
    thresholds = torch.tensor((0.0, *codebook.thresholds), dtype=torch.float64)
    is_clear = ((u.abs().unsqueeze(-1) - thresholds).abs() > 1e-5).all(-1)
    assert is_clear.double().mean() > 0.999
    codes = unpack_codes(encode(x, 4).planes, 96)
    assert torch.equal(codes[is_clear], codebook.encode(u)[is_clear])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_zero_broken_and_large_vectors(rule, bits):
    x = sphere(8, 64)
    x[1] = 0
    x[2, 5] = math.nan
    x[3, 0] = math.inf
    x[4, 63] = -math.inf
    x[5] *= 1e30  # finite, but its square is not
    x[6] *= 1e8  # scale beyond float16's 65504
    x[7] *= 1e-12  # scale below float16's 6e-8
    encoded = encode(x, bits, rule=rule)
    finite = encode(x[:1], bits, rule=rule)
    assert torch.equal(encoded.scale[:1], finite.scale)
    assert encoded.scale[1:].tolist() == pytest.approx(
        [0, math.nan, math.nan, math.nan, math.inf, math.inf, 0], nan_ok=True
    )
    decoded = unpack(encoded.planes, encoded.scale)
    assert (decoded[[1, 7]] == 0).all()
    assert decoded[2:5].isnan().all()
    assert decoded[5:7].isinf().all()
    assert all((plane[1:6] == 0).all() for plane in encoded.planes)
    if bits > 2:
        _, aged_scale = age(encoded.planes, encoded.scale)
        assert aged_scale[1:].tolist() == pytest.approx(
            [0, math.nan, math.nan, math.nan, math.inf, math.inf, 0], nan_ok=True
        )


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_held_bytes(bits):
    encoded = encode(sphere(30, 80).reshape(2, 15, 80), bits)
    assert encoded.nbytes == 30 * vector_bytes(80, bits)
    assert encoded.nbytes == sum(part.untyped_storage().nbytes() for part in (*encoded.planes, encoded.scale))


def test_unpack_is_scale_times_centroid():
    codes = torch.arange(16, dtype=torch.uint8)
    scale = torch.tensor([2.0, -0.5], dtype=torch.float16)
    centroids = torch.tensor(embedded_codebook(4).centroids)
    table = torch.cat((centroids, -centroids))
    decoded = unpack(pack(codes.expand(2, 16), 4), scale)
    assert decoded.dtype == torch.float32
    torch.testing.assert_close(decoded, torch.stack((2 * table, -0.5 * table)))
    coarse = torch.tensor([0.49679, 0.49679, 1.60522, 1.60522])
    fewer = unpack(pack(torch.arange(8, dtype=torch.uint8), 3)[:1], torch.tensor(1.0))
    torch.testing.assert_close(fewer, torch.cat((coarse, -coarse)), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("steps", "expected", "spread"), [(1, 0.0352, 0.003), (2, 0.1342, 0.008)])
def test_ageing_keeps_products_and_costs_little(x128, steps, expected, spread):
    """Expected errors: simulated apart from this code, at 128 dimensions, from 4 bits to 3 and to 2.

    The gain of a vector strays by 0.002 after one step and 0.0064 after two (0.004, were both planes dropped at once).
    """
    encoded = encode(x128, 4)
    planes, scale = encoded.planes, encoded.scale
    for _ in range(steps):
        planes, scale = age(planes, scale)
    assert scale.dtype == torch.float16
    assert len(planes) == 3 - steps
    assert all(kept is plane for kept, plane in zip(planes, encoded.planes, strict=False))
    decoded = unpack(planes, scale)
    assert relative_error(x128, decoded) == pytest.approx(expected, rel=0.02)
    gain = (x128 * decoded).sum(-1)
    assert gain.mean().item() == pytest.approx(1.0, abs=1e-3)
    assert gain.std().item() < spread


def test_dropping_two_planes_at_once_strays_less(x128):
    encoded = encode(x128, 4)
    planes, scale = age(encoded.planes, encoded.scale, kept=1)
    assert len(planes) == 1
    gain = (x128 * unpack(planes, scale)).sum(-1)
    assert gain.mean().item() == pytest.approx(1.0, abs=1e-3)
    assert 0.003 < gain.std().item() < 0.005
    for kept in (0, 3):
        with pytest.raises(OptionError, match="1 to 2 can be kept"):
            age(encoded.planes, encoded.scale, kept=kept)


def test_ageing_keeps_the_product_with_the_last_reconstruction():
    x = sphere(200, 96)
    encoded = encode(x, 4)
    last = unpack(encoded.planes, encoded.scale)
    aged = unpack(*age(encoded.planes, encoded.scale))
    torch.testing.assert_close((last * aged).sum(-1), last.square().sum(-1), rtol=1e-3, atol=0)


def test_mean_removal_gains_bits():
    """Keys with a large common part: at mean 10 standard deviations the error falls by more than three bits' worth."""
    noise = torch.randn(64, 128, generator=torch.Generator().manual_seed(5))
    x = 10 * torch.randn(128, generator=torch.Generator().manual_seed(6)) + noise
    mean = x.mean(0).half().float()
    treated = decode(x - mean, 3, "unbiased") + mean
    untreated = decode(x, 3, "unbiased")
    ratio = ((untreated - x).square().sum() / (treated - x).square().sum()).item()
    assert math.log2(ratio) / 2 > 3


def test_fixed_order_sum_is_a_sum():
    for dim in (1, 2, 3, 7, 8, 80, 251):
        x = torch.randn(5, dim, generator=torch.Generator().manual_seed(dim))
        torch.testing.assert_close(fixed_order_sum(x).double(), x.double().sum(-1), rtol=0, atol=1e-5)
    assert fixed_order_sum(torch.arange(7, dtype=torch.int64)).item() == 21


@pytest.mark.parametrize("bits", [1, 5, 16])
def test_encode_widths(bits):
    with pytest.raises(OptionError, match=f"2, 3 or 4 bits, got {bits}"):
        encode(torch.zeros(2, 64), bits)


def test_encode_refuses_what_it_cannot_take():
    with pytest.raises(OptionError, match="unknown scale rule 'best'; use one of plain, corrected, unbiased, optimal"):
        encode(torch.zeros(2, 64), 3, rule="best")
    with pytest.raises(OptionError, match="multiple of 8, got 20"):
        encode(torch.zeros(2, 20), 3)
    with pytest.raises(ShapeError, match=r"floating tensor \[\.\.\., D\], got torch.int32 \[64\]"):
        encode(torch.zeros(64, dtype=torch.int32), 3)
    with pytest.raises(ShapeError, match=r"got torch.float32 \[\]"):
        encode(torch.zeros(()), 3)


def test_unpack_and_age_refuse_what_does_not_fit():
    encoded = encode(sphere(3, 64), 4)
    for op in (unpack, age):
        with pytest.raises(ShapeError, match=r"scale must be floating \[3\] on cpu, as plane 0 is \[3, 16\]"):
            op(encoded.planes, encoded.scale[:2])
        with pytest.raises(ShapeError, match=r"got torch.int32 \[3\]"):
            op(encoded.planes, encoded.scale.int())
        with pytest.raises(ShapeError, match=r"got torch.float16 .* on meta"):
            op(encoded.planes, encoded.scale.to("meta"))
        with pytest.raises(OptionError, match="got 0"):
            op((), encoded.scale)
        with pytest.raises(OptionError, match="got 4"):
            op((*encoded.planes, encoded.planes[2]), encoded.scale)
        with pytest.raises(ShapeError, match="plane 1 of 2"):
            op((encoded.planes[0], encoded.planes[0]), encoded.scale)
        with pytest.raises(ShapeError, match="without axes"):
            op((torch.zeros((), dtype=torch.uint8),), encoded.scale)
    with pytest.raises(OptionError, match=r"one bit plane .* cannot age"):
        age(encoded.planes[:1], encoded.scale)
