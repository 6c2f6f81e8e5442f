"""Coding weights: every bit comes back, whatever the weights; and the bytes stay within what the layout says."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from streamer.ops.lossless import decode, encode, least_coded_bytes
from streamer.ops.lossless.layout import BLOCK, MAX_BASE, WINDOW

SEEDS = st.integers(0, 2**31)
# lengths around whole blocks, and around the steps of 127 blocks in which they are coded
LENGTHS = st.one_of(
    st.integers(0, 3 * BLOCK),
    st.builds(lambda blocks, more: blocks * BLOCK + more, st.integers(1, 3), st.integers(-1, 1)),
    st.sampled_from([127 * BLOCK, 128 * BLOCK + 1]),
)

steady = settings(max_examples=60, deadline=None, derandomize=True)


def bits_of(weights: torch.Tensor) -> torch.Tensor:
    """[N] int16: comparing numbers would take NaN for unequal and the two zeros for equal."""
    return weights.contiguous().view(-1).view(torch.int16)


def check_round_trip(bits: torch.Tensor) -> float:
    """Encodes and decodes int16 patterns; gives the share of bytes that are left."""
    weights = bits.view(torch.bfloat16)
    coded = encode(weights)
    assert torch.equal(bits_of(decode(coded)), bits)
    assert least_coded_bytes(bits.numel()) <= coded.nbytes <= 2 * bits.numel()
    return coded.nbytes / max(1, 2 * bits.numel())


@steady
@given(LENGTHS, SEEDS)
def test_any_patterns_survive(length: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    check_round_trip(torch.randint(-(2**15), 2**15, (length,), generator=generator).to(torch.int16))


@steady
@given(LENGTHS, SEEDS, st.integers(0, 255), st.integers(1, 40), st.floats(0, 1))
def test_patterns_in_few_exponents_survive(length: int, seed: int, first: int, spread: int, rare: float) -> None:
    """Exponents of a narrow range, at either end too, with some from anywhere: windows and escapes of every kind."""
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(0, 2**16, (length,), generator=generator)
    near = (first + torch.randint(0, spread, (length,), generator=generator)).clamp_(max=255)
    is_near = torch.rand(length, generator=generator) >= rare
    bits = torch.where(is_near, bits & 0x807F | near << 7, bits)
    check_round_trip(bits.to(torch.int16))


@steady
@given(st.integers(1, 3), SEEDS, st.integers(0, 255))
def test_one_exponent_takes_the_least_bytes(blocks: int, seed: int, exponent: int) -> None:
    """Up to 254 every exponent is in some window; 255, of infinities and NaN, is in none: nothing gets shorter."""
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(0, 2**16, (blocks * BLOCK,), generator=generator) & 0x807F | exponent << 7
    weights = bits.to(torch.int16).view(torch.bfloat16)
    coded = encode(weights)
    is_in_a_window = exponent < MAX_BASE + WINDOW
    assert coded.nbytes == (least_coded_bytes(bits.numel()) if is_in_a_window else 2 * bits.numel())
    assert coded.is_raw == (not is_in_a_window)
    assert torch.equal(bits_of(decode(coded)), bits_of(weights))


@settings(max_examples=12, deadline=None, derandomize=True)
@given(SEEDS, st.floats(1e-30, 1e30), st.floats(0, 0.5))
def test_gaussian_weights_shrink_to_71_percent(seed: int, scale: float, row_spread: float) -> None:
    """Rows of 4096 whose scales differ by up to a factor of e within two standard deviations."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.exp(row_spread * torch.randn(64, 1, generator=generator))
    weights = scale * rows * torch.randn(64, 4096, generator=generator)
    assert check_round_trip(bits_of(weights.bfloat16())) < 0.71


@steady
@given(st.lists(st.integers(0, 5), max_size=3).map(tuple), SEEDS)
def test_shapes_come_back(shape: tuple[int, ...], seed: int) -> None:
    weights = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()
    decoded = decode(encode(weights))
    assert decoded.shape == weights.shape
    assert torch.equal(bits_of(decoded), bits_of(weights))
