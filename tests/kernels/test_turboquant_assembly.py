"""The byte-permute decoder, which Triton's interpreter never runs, instruction by instruction in Python."""

import struct

import numpy as np
import pytest
import torch
from emulated_ptx import LANES, executed

from turboquant.codebook import embedded_codebook
from turboquant.ops.unpack.kernel import _assembly, coordinate, permute_table, tables
from turboquant.planes import pack

DIM = 64
QUARTER, EIGHTH = DIM // 4, DIM // 8


def words(values: torch.Tensor) -> int:
    return int.from_bytes(bytes(values.tolist()), "little")


@pytest.mark.parametrize(("held", "read"), [(1, 1), (2, 2), (3, 3), (1, 2), (1, 3), (2, 3)])
def test_every_code_decodes_to_its_centroid(held: int, read: int) -> None:
    """Also blocks that have lost planes, read as if they had them: noise in the missing ones changes nothing."""
    draw = torch.Generator().manual_seed(held + 10 * read)
    table = dict(zip(("$12", "$16", "$20", "$24"), permute_table(held, read), strict=True)) | {"$28": 0x80808080}
    seen = set()
    for _ in range(40):
        codes = torch.randint(0, 2 << held, (DIM,), generator=draw).to(torch.uint8)
        planes = list(pack(codes, held + 1))
        while len(planes) < 3:
            planes.append(torch.randint(0, 256, (EIGHTH,), generator=draw).to(torch.uint8))
        centroids = embedded_codebook(held + 1).decode(codes).half()
        for j in range(0, QUARTER, 4):
            inputs = {name: entry & 0xFFFFFFFF for name, entry in table.items()}
            inputs["$8"] = words(planes[0][j : j + 4])
            inputs["$9"] = words(planes[1][j % EIGHTH : j % EIGHTH + 4])
            inputs["$10"] = words(planes[2][j % EIGHTH : j % EIGHTH + 4])
            inputs["$11"] = 4 if j >= EIGHTH else 1
            operands = {name: np.full(LANES, value, np.uint32) for name, value in inputs.items()}
            out = [int(register[0]) for register in executed(_assembly(read), operands, 8)]
            for field in range(4):
                decoded = struct.unpack("<4e", struct.pack("<2I", out[2 * field], out[2 * field + 1]))
                own = slice(field * QUARTER + j, field * QUARTER + j + 4)
                assert list(decoded) == centroids[own].tolist()
                seen.update(codes[own].tolist())
    assert seen == set(range(2 << held))


def test_tables_hold_what_the_decoder_is_given() -> None:
    centroids, registers = tables(torch.device("cpu"))
    for held in (1, 2, 3):
        codes = torch.arange(2 << held, dtype=torch.uint8)
        wanted = embedded_codebook(held + 1).decode(codes).half()
        assert torch.equal(centroids[held - 1, codes.int() << (3 - held)], wanted)
        assert torch.equal(centroids[held - 1, (codes.int() << (3 - held)) + (1 << (3 - held)) - 1], wanted)
        for read in range(held, 4):
            assert tuple(registers[read - 1, held - 1].tolist()) == permute_table(held, read)


@pytest.mark.parametrize("quarter", [16, 20, 24, 32, 64])
def test_positions_are_a_permutation_of_the_coordinates(quarter: int) -> None:
    padded = 1 << (quarter - 1).bit_length()
    p = torch.arange(4 * padded)
    real = p // 8 * 2 + p % 2 < quarter
    found = coordinate.fn(p, quarter)[real]
    assert sorted(found.tolist()) == list(range(4 * quarter))
