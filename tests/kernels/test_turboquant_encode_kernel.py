"""The kernels of encode, unpack and append against plain PyTorch: in the interpreter, and on a GPU."""

import math
from typing import Any

import pytest
import torch

from turboquant import planes as bit_planes
from turboquant.blocks import read_records, write_records
from turboquant.codebook import embedded_codebook
from turboquant.key_bias import KeyBias
from turboquant.layout import BLOCK_TOKENS, BlockLayout, SideLayout, side_parts
from turboquant.ops.append import rotate
from turboquant.ops.attend import bias_terms
from turboquant.ops.encode import encode_records
from turboquant.ops.unpack import unpack_records
from turboquant.rotation import make_rotation

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
HEADS = 2


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make_layout(bits: int, dim: int, dtype: torch.dtype) -> BlockLayout:
    """Keys with a mean, values without, of the same width."""
    return BlockLayout(HEADS, SideLayout(bits, dim, dtype, True), SideLayout(bits, dim, dtype, False))


def encode_by_kernel(tokens: torch.Tensor, layout: BlockLayout, index: int, order: list[int]) -> torch.Tensor:
    """Records [n, bytes] of tokens [G, n * 64, D], written to places in that order in poisoned memory."""
    blocks = tokens.shape[1] // BLOCK_TOKENS
    records = torch.full((max(order) + 1, layout.nbytes), 0xFF, dtype=torch.uint8, device=tokens.device)
    table = torch.tensor([order], dtype=torch.int64, device=tokens.device) * layout.nbytes | 0b1010
    encode_records(tokens[None], layout, index, records, table, first_block=0, blocks=blocks)
    return records


def ulps(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Steps of float16 between two positive numbers."""
    return (a.view(torch.int16).int() - b.view(torch.int16).int()).abs()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dim", [8, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("index", [0, 1])
def test_records_are_the_references(index: int, bits: int, dim: int, dtype: torch.dtype, device: str) -> None:
    layout = make_layout(bits, dim, dtype)
    tokens = (normal(HEADS, 2 * BLOCK_TOKENS, dim) + 2 * normal(HEADS, 1, dim, seed=1)).to(dtype).to(device)
    order = [4, 1]
    records = encode_by_kernel(tokens, layout, index, order)
    untouched = [i for i in range(len(records)) if i not in order]
    assert (records[untouched] == 0xFF).all()
    parts = side_parts(records[order], layout, index)
    x = tokens.float().unflatten(1, (2, BLOCK_TOKENS)).transpose(0, 1)  # [n, G, 64, D]
    if index == 0:
        assert parts.mean is not None
        exact = x.double().mean(2)
        # one step of float16 beside the exact mean, for sums of another order
        assert ((parts.mean.double() - exact).abs() <= exact.abs() * 2**-10 + 2**-24).all()
        x = x - parts.mean.float()[:, :, None]
    assert parts.scales is not None
    n = x.norm(dim=-1)
    u = x * (math.sqrt(dim) / n)[..., None]
    codebook = embedded_codebook(bits)
    codes = bit_planes.unpack(parts.planes, dim)
    differs = codes != codebook.encode(u)
    borders = torch.tensor([-t for t in codebook.thresholds] + [0.0, *codebook.thresholds], device=device)
    distance = (u[..., None] - borders).abs().amin(-1)
    assert (distance[differs] < 1e-5).all()
    assert differs.float().mean() < 1e-3
    scale = (n * math.sqrt(dim) / (u * codebook.decode(codes)).sum(-1)).half()
    assert (ulps(parts.scales.contiguous(), scale.contiguous()) <= 1).all()
    packed = bit_planes.pack(codes, bits)
    assert all(torch.equal(a, b) for a, b in zip(parts.planes, packed, strict=True))
    # the other side of the records was not touched
    other = side_parts(records[order], layout, 1 - index)
    assert all((part.view(torch.uint8) == 0xFF).all() for part in other.planes)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("device", DEVICES)
def test_vectors_that_cannot_be_coded(device: str) -> None:
    """Zero has scale 0, NaN and infinity have NaN, too large is infinity; as in plain PyTorch, byte by byte."""
    layout = BlockLayout(1, SideLayout(4, 16, torch.float32, False), SideLayout(4, 16, torch.float32, False))
    tokens = normal(1, BLOCK_TOKENS, 16)
    tokens[0, 0] = 0
    tokens[0, 1, 3] = math.nan
    tokens[0, 2, 5] = -math.inf
    tokens[0, 3] = -1e30
    tokens[0, 4] = 1e6
    tokens[0, 5] *= 1e-9
    records = encode_by_kernel(tokens.to(device), layout, 0, [0])
    wanted = torch.full((1, layout.nbytes), 0xFF, dtype=torch.uint8)
    write_records(wanted, layout, 0, tokens)
    found, expected = side_parts(records.cpu(), layout, 0), side_parts(wanted, layout, 0)
    assert found.scales is not None
    assert expected.scales is not None
    assert torch.equal(found.scales.isnan(), expected.scales.isnan())
    special = torch.tensor([0, 3, 4, 5])
    assert torch.equal(found.scales[..., special], expected.scales[..., special])
    for ours, theirs in zip(found.planes, expected.planes, strict=True):
        assert torch.equal(ours[:, :, :6], theirs[:, :, :6])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [8, 16, 32, 64, 72, 80, 128, 256])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_rows_are_unpacked(bits: int, dim: int, out_dtype: torch.dtype, device: str) -> None:
    layout = make_layout(bits, dim, torch.float32)
    records = torch.full((5, layout.nbytes), 0xFF, dtype=torch.uint8)
    order = [3, 0]
    for index in (0, 1):
        tokens = normal(HEADS, 2 * BLOCK_TOKENS, dim, seed=index) + 1
        for i, place in enumerate(order):
            part = tokens[:, BLOCK_TOKENS * i : BLOCK_TOKENS * (i + 1)]
            write_records(records[place : place + 1], layout, index, part)
    for index in (0, 1):
        entries = torch.tensor(order, device=device) * layout.nbytes | 5
        wide = torch.full((HEADS, 3 * BLOCK_TOKENS, dim), math.nan, dtype=out_dtype, device=device)
        unpack_records(layout, index, records.to(device).view(-1), entries, wide[:, : 2 * BLOCK_TOKENS])
        assert wide[:, 2 * BLOCK_TOKENS :].isnan().all()
        exact = read_records(records[order], layout, index)
        coded = exact
        if (mean := side_parts(records[order], layout, index).mean) is not None:
            coded = exact - mean.float().transpose(0, 1).repeat_interleave(BLOCK_TOKENS, 1)
        # centroids are float16 in the kernel; the result is rounded to the dtype of out (the interpreter cuts it)
        rounding = 0.0 if out_dtype == torch.float32 else 2**-7 if device == "cpu" else 2**-8
        limit = 2**-11 * coded.abs() + rounding * exact.abs() + 1e-6
        assert ((wide[:, : 2 * BLOCK_TOKENS].float().cpu() - exact).abs() <= limit).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rotary", [(16, False), (16, True), (6, False), (0, False), None])
@pytest.mark.parametrize("dim", [16, 80])
def test_new_tokens_are_rotated_and_lose_their_bias(dim: int, rotary: Any, device: str) -> None:
    keys = normal(2, 20, HEADS, dim).to(device).transpose(1, 2)  # strides as projections leave them
    values = normal(2, 20, HEADS, 24, seed=1).to(device).transpose(1, 2)
    rotations = make_rotation("hadamard", dim, 1), make_rotation("qr", 24, 2)
    positions = torch.tensor([100_000, 3], dtype=torch.int32, device=device)
    wanted = keys.float()
    terms = None
    if rotary is not None:
        pairs = rotary[0] // 2
        bias = KeyBias(50 * normal(HEADS, dim), 10_000.0 ** -torch.linspace(0, 1, pairs), 1.2, rotary[1])
        bias = bias.to(keys.device)
        terms = bias_terms(bias.bias, bias.inverse_frequencies, bias.scaling, bias.interleaved)
        wanted = wanted - bias.vectors(positions[:, None] + torch.arange(20, device=device))
    out = torch.empty(2, HEADS, 20, dim, device=device), torch.empty(2, HEADS, 20, 24, device=device)
    matrices = rotations[0].matrix(device), rotations[1].matrix(device)
    rotate(keys, values, matrices, terms, positions, out)
    # an angle is off by 2^-24 of a turn at most, of a bias of 50
    torch.testing.assert_close(out[0], rotations[0].apply(wanted), rtol=1e-5, atol=2e-4)
    torch.testing.assert_close(out[1], rotations[1].apply(values.float()), rtol=1e-5, atol=1e-5)
