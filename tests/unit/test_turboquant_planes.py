"""Bit planes, against docs/format.md."""

import pytest
import torch

from turboquant.errors import OptionError, ShapeError
from turboquant.planes import pack, plane_bytes, unpack, vector_bytes


def codes_of(shape: tuple[int, ...], bits: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 1 << bits, shape, generator=generator, dtype=torch.uint8)


def test_the_example_of_the_format_page():
    planes = pack(torch.arange(8, dtype=torch.uint8), 3)
    assert [plane.tolist() for plane in planes] == [[0xE4, 0xE4], [0x33]]


def test_each_coordinate_of_16_has_its_own_place():
    """Written out from the drawing of docs/format.md for D = 16."""
    field_shift = [0, 0, 0, 0, 2, 2, 2, 2, 4, 4, 4, 4, 6, 6, 6, 6]
    field_byte = [0, 1, 2, 3] * 4
    bit_shift = [2, 2, 0, 0, 3, 3, 1, 1, 6, 6, 4, 4, 7, 7, 5, 5]
    bit_byte = [0, 1] * 8
    for coordinate in range(16):
        for code in range(16):
            codes = torch.zeros(16, dtype=torch.uint8)
            codes[coordinate] = code
            expected = [[0] * 4, [0] * 2, [0] * 2]
            expected[0][field_byte[coordinate]] = (code >> 2) << field_shift[coordinate]
            expected[1][bit_byte[coordinate]] = (code >> 1 & 1) << bit_shift[coordinate]
            expected[2][bit_byte[coordinate]] = (code & 1) << bit_shift[coordinate]
            assert [plane.tolist() for plane in pack(codes, 4)] == expected


@pytest.mark.parametrize("head_dim", [8, 64, 80, 96, 128])
def test_one_mask_joins_a_nibbles_bits(head_dim):
    """The expressions of docs/format.md that a byte-permute decoder uses give field | bit << 2, four ways."""
    codes = codes_of((head_dim,), 3)
    first, second = (plane.int() for plane in pack(codes, 3))
    quarter, eighth = head_dim // 4, head_dim // 8
    wanted = (codes >> 1 | (codes & 1) << 2).int().reshape(4, quarter)
    low, high = first[:eighth], first[eighth:]
    joined = {
        (0, 2, 0): low & 0x33 | second & 0x44,
        (1, 3, 0): low >> 2 & 0x33 | second >> 1 & 0x44,
        (0, 2, 1): high & 0x33 | second << 2 & 0x44,
        (1, 3, 1): high >> 2 & 0x33 | second << 1 & 0x44,
    }
    for (low_field, high_field, half), selector in joined.items():
        columns = slice(half * eighth, (half + 1) * eighth)
        assert torch.equal(selector & 0xF, wanted[low_field, columns])
        assert torch.equal(selector >> 4, wanted[high_field, columns])


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("shape", [(8,), (3, 64), (2, 3, 5, 80), (1, 96), (7, 128), (0, 64), (2, 0, 8)], ids=str)
def test_unpack_undoes_pack(bits, shape):
    codes = codes_of(shape, bits)
    planes = pack(codes, bits)
    assert [plane.shape[-1] for plane in planes] == list(plane_bytes(shape[-1], bits))
    assert torch.equal(unpack(planes, shape[-1]), codes)


@pytest.mark.parametrize("bits", [3, 4])
def test_without_the_last_plane_a_code_loses_its_lowest_bit(bits):
    codes = codes_of((5, 96), bits)
    planes = pack(codes, bits)
    assert torch.equal(unpack(planes[:-1], 96), codes >> 1)
    for kept, direct in zip(planes[:-1], pack(codes >> 1, bits - 1), strict=True):
        assert torch.equal(kept, direct)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_strided_codes_pack_like_contiguous_ones(bits):
    codes = codes_of((64, 6), bits).T
    for strided, contiguous in zip(pack(codes, bits), pack(codes.contiguous(), bits), strict=True):
        assert torch.equal(strided, contiguous)


@pytest.mark.parametrize(
    ("head_dim", "expected"), [(64, (18, 26, 34)), (80, (22, 32, 42)), (96, (26, 38, 50)), (128, (34, 50, 66))]
)
def test_vector_bytes_count_planes_and_scale(head_dim, expected):
    for bits, size in zip((2, 3, 4), expected, strict=True):
        assert vector_bytes(head_dim, bits) == size
        held = sum(plane.nbytes for plane in pack(codes_of((head_dim,), bits), bits))
        assert held + torch.zeros((), dtype=torch.float16).nbytes == size


@pytest.mark.parametrize("bits", [0, 1, 5, 16])
def test_other_widths_have_no_planes(bits):
    with pytest.raises(OptionError, match=f"2, 3 or 4 bits, got {bits}"):
        pack(torch.zeros(8, dtype=torch.uint8), bits)
    with pytest.raises(OptionError, match=f"2, 3 or 4 bits, got {bits}"):
        plane_bytes(64, bits)


@pytest.mark.parametrize("head_dim", [0, 4, 12, 100])
def test_head_dim_is_a_multiple_of_8(head_dim):
    with pytest.raises(OptionError, match=f"multiple of 8, got {head_dim}"):
        pack(torch.zeros(2, head_dim, dtype=torch.uint8), 3)
    with pytest.raises(OptionError, match=f"multiple of 8, got {head_dim}"):
        vector_bytes(head_dim, 3)


def test_codes_are_uint8():
    with pytest.raises(ShapeError, match=r"uint8 codes \[\.\.\., D\], got torch\.int64 \[2, 64\]"):
        pack(torch.zeros(2, 64, dtype=torch.int64), 3)
    with pytest.raises(ShapeError, match=r"got torch\.uint8 \[\]"):
        pack(torch.zeros((), dtype=torch.uint8), 3)


def test_planes_that_do_not_fit_are_refused():
    planes = pack(codes_of((3, 64), 4), 4)
    with pytest.raises(ShapeError, match=r"plane 0 of 3 must be uint8 \[3, 32\] for head_dim 128"):
        unpack(planes, 128)
    with pytest.raises(ShapeError, match=r"plane 2 of 3 must be uint8 \[3, 8\] for head_dim 64, got torch.uint8 \[2"):
        unpack((*planes[:2], planes[2][:2]), 64)
    with pytest.raises(ShapeError, match=r"plane 1 of 2 .* got torch\.int32"):
        unpack((planes[0], planes[1].int()), 64)
    with pytest.raises(OptionError, match="got 1"):
        unpack((), 64)
    with pytest.raises(OptionError, match="got 5"):
        unpack((*planes, planes[2]), 64)
