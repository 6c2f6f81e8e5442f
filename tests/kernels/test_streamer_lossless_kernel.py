"""The kernel that decodes weights against plain PyTorch, bit for bit: in the interpreter, and on a GPU."""

import pytest
import torch

from streamer.errors import OptionError
from streamer.ops.lossless import decode, encode, reference
from streamer.ops.lossless import kernel as lossless_kernel
from streamer.ops.lossless.layout import BLOCK

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def patterns(numel: int, *, first: int = 118, rare: float = 0.03, seed: int = 0) -> torch.Tensor:
    """[numel] int16: exponents first to first + 6, and a share of patterns from anywhere; all signs and mantissas."""
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(0, 2**16, (numel,), generator=generator)
    near = bits & 0x807F | first + torch.randint(0, 7, (numel,), generator=generator) << 7
    is_rare = torch.rand(numel, generator=generator) < rare
    return torch.where(is_rare, bits, near).to(torch.int16)


def check(bits: torch.Tensor, device: str, *, warps: int = 1) -> None:
    """Codes and decodes patterns into the middle of other memory, which must stay as it is."""
    stored = reference.encode(bits).to(device)
    room = torch.full((bits.numel() + 32,), -1, dtype=torch.int16, device=device)
    lossless_kernel.decode(stored, room[16 : 16 + bits.numel()], warps=warps)
    expected = torch.full((bits.numel(),), -1, dtype=torch.int16)
    reference.decode(stored.cpu(), expected)
    assert torch.equal(expected, bits)
    assert torch.equal(room[16 : 16 + bits.numel()].cpu(), bits)
    assert (room[:16] == -1).all()
    assert (room[16 + bits.numel() :] == -1).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("numel", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK, 3 * BLOCK + 77])
def test_lengths(numel: int, device: str) -> None:
    check(patterns(numel), device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("first", [0, 1, 127, 248])
def test_windows(first: int, device: str) -> None:
    check(patterns(2 * BLOCK, first=first), device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rare", [0.0, 0.5, 1.0], ids=["no escape", "every other", "all but few"])
def test_numbers_of_escapes(rare: float, device: str) -> None:
    """As many rounds of patches as the worst group has escapes, none and 32 included."""
    bits = patterns(2 * BLOCK, rare=rare)
    if rare == 1.0:
        bits.view(2, 16, 128, 2)[:, :, 7] = -1  # NaN, which no window holds: all 32 of group 7
    check(bits, device)


@pytest.mark.parametrize("device", DEVICES)
def test_each_place_of_an_escape(device: str) -> None:
    """One escape in each group, at another bit of it, each with an exponent of its own: ranks over all groups."""
    bits = patterns(BLOCK, rare=0.0)
    pairs = bits.view(16, 128, 2)
    for g in range(128):
        h, k = divmod(g % 32, 16)
        pairs[k, g, h] = torch.tensor((g % 100) << 7 | 0x5A - (g & 1) * 2**15).to(torch.int16)
    check(bits, device)


@pytest.mark.parametrize("device", DEVICES)
def test_all_patterns(device: str) -> None:
    every = torch.arange(2**16).to(torch.int16)
    if device == "cpu":
        every = every[::7]  # the interpreter takes a quarter of a second for a block
    check(torch.stack((every, patterns(every.numel())), 1).view(-1), device)


@pytest.mark.parametrize("device", DEVICES)
def test_more_warps_give_the_same(device: str) -> None:
    check(patterns(2 * BLOCK), device, warps=4)


@pytest.mark.parametrize("place", ["coded", "weights"])
def test_what_begins_elsewhere_is_refused(place: str) -> None:
    stored = reference.encode(patterns(BLOCK))
    out = torch.empty(BLOCK + 1, dtype=torch.int16)
    shifted = torch.cat((stored[:8], stored))[8:]
    arguments = (shifted, out[:-1]) if place == "coded" else (stored, out[1:])
    with pytest.raises(OptionError, match="the kernel reads and writes what begins at multiples of 16 bytes"):
        lossless_kernel.decode(*arguments)


@pytest.mark.gpu
def test_a_layer_on_the_gpu() -> None:
    """A matrix of a 14B layer, coded there and here to the same bytes, decoded by the dispatch without a wait."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.exp(0.4 * torch.randn(13824, 1, generator=generator))
    weights = (0.02 * rows * torch.randn(13824, 5120, generator=generator)).bfloat16()
    coded = encode(weights.cuda())
    assert torch.equal(coded.stored.cpu(), encode(weights).stored)
    assert coded.nbytes < 0.71 * weights.nbytes
    out = torch.full_like(weights, float("nan"), device="cuda")
    decode(coded, out)  # compiles
    out.fill_(float("nan"))
    torch.cuda.set_sync_debug_mode("error")
    try:
        decode(coded, out)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(out.view(torch.int16).cpu(), weights.view(torch.int16))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        decode(coded, out)
    out.zero_()
    graph.replay()
    assert torch.equal(out.view(torch.int16).cpu(), weights.view(torch.int16))
