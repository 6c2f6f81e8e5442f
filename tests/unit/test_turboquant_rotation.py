"""Rotations: orthogonal, repeatable, mixing, and the same for a row in any batch."""

import pytest
import torch

from turboquant.errors import OptionError, ShapeError
from turboquant.rotation import make_rotation

# The first row of √16·Π for dim 16 and seed 0, which is the signs; written down once.
GOLDEN_SIGNS = [-1.0, -1.0, 1.0, -1.0, -1.0, -1.0, 1.0, -1.0, 1.0, -1.0, 1.0, -1.0, -1.0, 1.0, 1.0, -1.0]

DIMS = [1, 2, 7, 16, 40, 64, 80, 96, 112, 128, 192, 256, 576]


def vectors(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", ["hadamard", "qr"])
@pytest.mark.parametrize("dim", DIMS)
def test_orthogonal(kind, dim):
    matrix = make_rotation(kind, dim, 3).matrix().double()
    assert (matrix @ matrix.T - torch.eye(dim, dtype=torch.float64)).abs().max() < 1e-5


@pytest.mark.parametrize("kind", ["hadamard", "qr"])
@pytest.mark.parametrize("dim", DIMS)
def test_apply_is_the_matrix_and_invert_undoes_it(kind, dim):
    rotation = make_rotation(kind, dim, 5)
    x = vectors(3, 4, dim)
    y = rotation.apply(x)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y.double(), x.double() @ rotation.matrix().double().T, rtol=0, atol=1e-5)
    torch.testing.assert_close(rotation.invert(y), x, rtol=0, atol=1e-5)
    assert (rotation.kind, rotation.dim, rotation.seed) == (kind, dim, 5)


def test_the_hadamard_matrix_by_its_definition():
    """√m·Π·diag(s) for a power of two is the Sylvester matrix: entry (i, j) is (-1)^popcount(i & j)."""
    matrix = make_rotation("hadamard", 16, 11).matrix() * 4
    signs = matrix[0]
    expected = torch.tensor([[(-1.0) ** (i & j).bit_count() for j in range(16)] for i in range(16)])
    assert torch.equal(matrix * signs, expected)
    assert set(signs.tolist()) == {-1.0, 1.0}


def test_the_seed_gives_the_same_signs_everywhere():
    """Stored codes are read by another process: the drawing of signs from a seed must not drift."""
    assert torch.equal(make_rotation("hadamard", 16, 0).matrix()[0] * 4, torch.tensor(GOLDEN_SIGNS))


@pytest.mark.parametrize("dim", [40, 80, 96])
def test_the_small_factor_is_a_kronecker_factor(dim):
    m = dim & -dim
    k = dim // m
    matrix = make_rotation("hadamard", dim, 1).matrix().double()
    # Column signs are unknown here, but they square away: |Π| = |H|/√m ⊗ |Q|.
    blocks = matrix.abs().reshape(m, k, m, k)
    torch.testing.assert_close(blocks, blocks[:1, :, :1].expand(m, k, m, k), rtol=0, atol=1e-6)
    small = blocks[0, :, 0] * m**0.5
    torch.testing.assert_close(small.square().sum(0), torch.ones(k, dtype=torch.float64), rtol=0, atol=1e-5)
    assert small.min() > 1e-4


@pytest.mark.parametrize("kind", ["hadamard", "qr"])
def test_equal_arguments_give_equal_rotations_and_others_do_not(kind):
    matrix = make_rotation(kind, 96, 7).matrix()
    assert torch.equal(matrix, make_rotation(kind, 96, 7).matrix())
    for seed in (8, -7, 7 + 2**40):
        assert (matrix - make_rotation(kind, 96, seed).matrix()).abs().max() > 0.05
    other = make_rotation("qr" if kind == "hadamard" else "hadamard", 96, 7).matrix()
    assert (matrix - other).abs().max() > 0.05


def test_drawing_does_not_touch_the_global_generator():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    make_rotation("hadamard", 80, 0).matrix()
    make_rotation("qr", 80, 0).matrix()
    assert torch.equal(before, torch.get_rng_state())


def test_qr_is_haar():
    """Without the sign fix the diagonal of Q leans to one side (LAPACK's R has a negative diagonal mostly)."""
    diagonals = torch.stack([make_rotation("qr", 8, seed).matrix().diagonal() for seed in range(400)])
    # 3200 numbers of standard deviation 1/√8: the mean has 0.00625.
    assert abs(diagonals.mean().item()) < 0.025
    assert diagonals.square().mean().item() == pytest.approx(1 / 8, rel=0.15)


@pytest.mark.parametrize("kind", ["hadamard", "qr"])
@pytest.mark.parametrize("dim", [64, 96, 128])
def test_a_constant_vector_is_spread(kind, dim):
    """A plain Hadamard matrix sends it to a single coordinate; the signs prevent that."""
    y = torch.stack([make_rotation(kind, dim, seed).apply(torch.ones(dim)) for seed in range(8)])
    assert y.abs().max() < 4.6  # of √dim = 8 to 11; the coordinates are close to N(0, 1)
    assert y.std().item() == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("dim", [64, 80, 96, 112, 128])
def test_a_row_has_the_same_bits_in_any_batch(dim):
    rotation = make_rotation("hadamard", dim, 2)
    x = vectors(2, 1500, 3, dim)
    whole_y, whole_x = rotation.apply(x), rotation.invert(x)
    assert torch.equal(rotation.apply(x.reshape(-1, dim)), whole_y.reshape(-1, dim))
    assert torch.equal(rotation.apply(x.transpose(0, 1)), whole_y.transpose(0, 1))
    strided = x.transpose(-1, 1).contiguous().transpose(-1, 1)
    assert torch.equal(rotation.apply(strided), whole_y)
    assert torch.equal(rotation.invert(strided), whole_x)
    for row in (0, 1, 777, 1499):
        assert torch.equal(rotation.apply(x[1, row, 2]), whole_y[1, row, 2])
        assert torch.equal(rotation.apply(x[:, row]), whole_y[:, row])
        assert torch.equal(rotation.invert(x[1, row, 2]), whole_x[1, row, 2])


@pytest.mark.parametrize("kind", ["hadamard", "qr"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_come_out_as_float32(kind, dtype):
    rotation = make_rotation(kind, 80, 0)
    x = vectors(3, 80).to(dtype)
    assert rotation.apply(x).dtype == rotation.invert(x).dtype == torch.float32
    assert torch.equal(rotation.apply(x), rotation.apply(x.float()))
    assert torch.equal(rotation.invert(x), rotation.invert(x.float()))


@pytest.mark.parametrize("kind", ["hadamard", "qr"])
@pytest.mark.parametrize("shape", [(0, 96), (2, 0, 96)], ids=str)
def test_empty_batches(kind, shape):
    rotation = make_rotation(kind, 96, 0)
    assert rotation.apply(torch.zeros(shape)).shape == rotation.invert(torch.zeros(shape)).shape == shape


@pytest.mark.parametrize("kind", ["hadamard", "qr"])
def test_first_use_in_inference_mode_leaves_autograd_usable(kind):
    rotation = make_rotation(kind, 12, 0)
    with torch.inference_mode():
        rotation.apply(torch.ones(12))
    x = torch.ones(12, requires_grad=True)
    rotation.apply(x)[0].backward()
    torch.testing.assert_close(x.grad, rotation.matrix()[0])


@pytest.mark.parametrize("kind", ["hadamard", "qr"])
def test_a_default_device_does_not_catch_the_drawing(kind):
    """Models are built under `torch.device("meta")`, where a bare torch.randn has no numbers."""
    with torch.device("meta"):
        matrix = make_rotation(kind, 12, 0).matrix("cpu")
    assert torch.equal(matrix, make_rotation(kind, 12, 0).matrix())


def test_bad_arguments():
    with pytest.raises(OptionError, match='unknown rotation \'fourier\'; use "hadamard" or "qr"'):
        make_rotation("fourier", 64, 0)
    with pytest.raises(OptionError, match="length of at least 1, got 0"):
        make_rotation("qr", 0, 0)
    for kind in ("hadamard", "qr"):
        for method in (make_rotation(kind, 64, 0).apply, make_rotation(kind, 64, 0).invert):
            with pytest.raises(ShapeError, match=r"floating tensor \[\.\.\., 64\], got torch.float32 \[2, 63\]"):
                method(torch.zeros(2, 63))
            with pytest.raises(ShapeError, match=r"got torch.int64 \[64\]"):
                method(torch.zeros(64, dtype=torch.int64))
