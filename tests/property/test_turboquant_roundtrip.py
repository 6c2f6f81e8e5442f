"""Properties of packing, encoding and rotating that hold for any input."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from turboquant.ops.age import age
from turboquant.ops.encode import encode
from turboquant.ops.encode.reference import SCALE_RULES
from turboquant.ops.unpack import unpack
from turboquant.planes import pack, vector_bytes
from turboquant.planes import unpack as unpack_codes
from turboquant.rotation import make_rotation

BITS = st.sampled_from([2, 3, 4])
HEAD_DIMS = st.integers(1, 24).map(lambda eighth: 8 * eighth)
SHAPES = st.lists(st.integers(0, 4), max_size=3).map(tuple)
SEEDS = st.integers(0, 2**31)

# A first call may draw a rotation or a table, so times vary; examples are drawn the same way in every run.
steady = settings(max_examples=40, deadline=None, derandomize=True)


def vectors(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@steady
@given(BITS, HEAD_DIMS, SHAPES, SEEDS)
def test_unpack_undoes_pack(bits, head_dim, shape, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (*shape, head_dim), generator=generator, dtype=torch.uint8)
    planes = pack(codes, bits)
    assert torch.equal(unpack_codes(planes, head_dim), codes)
    for kept in range(1, len(planes)):
        assert torch.equal(unpack_codes(planes[:kept], head_dim), codes >> len(planes) - kept)
    assert sum(plane.nbytes for plane in planes) == codes[..., 0].numel() * (vector_bytes(head_dim, bits) - 2)


@steady
@given(BITS, HEAD_DIMS, SEEDS, st.integers(-9, 9), st.sampled_from(SCALE_RULES))
def test_a_power_of_two_changes_only_the_scale(bits, head_dim, seed, exponent, rule):
    """Scales stay within float16's normal numbers (6e-5 to 65504): about 1 times 2^exponent."""
    x = vectors((3, head_dim), seed)
    encoded, scaled = encode(x, bits, rule=rule), encode(x * 2.0**exponent, bits, rule=rule)
    assert all(torch.equal(a, b) for a, b in zip(encoded.planes, scaled.planes, strict=True))
    assert torch.equal(encoded.scale.float() * 2.0**exponent, scaled.scale.float())


@steady
@given(BITS, HEAD_DIMS, SEEDS)
def test_a_negated_vector_decodes_to_the_negative(bits, head_dim, seed):
    x = vectors((3, head_dim), seed)
    encoded, negated = encode(x, bits), encode(-x, bits)
    assert torch.equal(unpack(encoded.planes, encoded.scale), -unpack(negated.planes, negated.scale))


@steady
@given(BITS, HEAD_DIMS, SEEDS, st.lists(st.integers(1, 9), min_size=1, max_size=5), st.sampled_from(SCALE_RULES))
def test_any_chunking_gives_the_same_bytes(bits, head_dim, seed, chunks, rule):
    rotation = make_rotation("hadamard", head_dim, seed)
    x = vectors((sum(chunks), head_dim), seed)
    whole = encode(rotation.apply(x), bits, rule=rule)
    pieces = [encode(rotation.apply(piece), bits, rule=rule) for piece in x.split(chunks)]
    assert torch.equal(torch.cat([piece.scale for piece in pieces]), whole.scale)
    for index, plane in enumerate(whole.planes):
        assert torch.equal(torch.cat([piece.planes[index] for piece in pieces]), plane)


@steady
@given(st.sampled_from([3, 4]), HEAD_DIMS, SEEDS)
def test_ageing_gives_the_codes_of_fewer_bits(bits, head_dim, seed):
    x = vectors((4, head_dim), seed)
    encoded, fewer = encode(x, bits), encode(x, bits - 1)
    planes, scale = age(encoded.planes, encoded.scale)
    assert all(torch.equal(a, b) for a, b in zip(planes, fewer.planes, strict=True))
    # Both scales are about |x|/√D over a gain that is between 0.6 and 1 for each code.
    assert ((scale.float() / fewer.scale.float() - 1).abs() < 0.35).all()


@steady
@given(st.sampled_from(["hadamard", "qr"]), st.integers(1, 200), SEEDS)
def test_rotations_keep_lengths_and_are_undone(kind, dim, seed):
    rotation = make_rotation(kind, dim, seed)
    x = vectors((3, dim), seed)
    y = rotation.apply(x)
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(rotation.invert(y), x, rtol=0, atol=1e-5)
