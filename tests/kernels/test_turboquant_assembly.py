"""The byte-permute decoder, which Triton's interpreter never runs, instruction by instruction in Python."""

import itertools
import re
import struct

import numpy as np
import pytest
import torch
from emulated_ptx import LANES, executed

from turboquant.codebook import embedded_codebook
from turboquant.ops.attend.fragments import _RAISED, _SCORES, _VALUES
from turboquant.ops.attend.lanes import _COPIES, _SHARED_LOADS, _SHARED_STORES
from turboquant.ops.attend.terms import _BIAS, _MEANS, _SERIES
from turboquant.ops.unpack.kernel import _CONSTRAINTS, _assembly, coordinate, permute_table, tables
from turboquant.planes import pack

DIM = 64
QUARTER, EIGHTH = DIM // 4, DIM // 8


def words(values: torch.Tensor) -> int:
    return int.from_bytes(bytes(values.tolist()), "little")


@pytest.mark.parametrize(("held", "read"), [(1, 1), (2, 2), (3, 3), (1, 2), (1, 3), (2, 3)])
def test_every_code_decodes_to_its_centroid(held: int, read: int) -> None:
    """Also blocks that have lost planes, read as if they had them: noise in the missing ones changes nothing."""
    draw = torch.Generator().manual_seed(held + 10 * read)
    table = dict(zip(("$12", "$16", "$20", "$24"), permute_table(held, read), strict=True)) | {"$28": 0x80800000}
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


def test_tops_move_only_where_a_weight_would_pass_the_leeway() -> None:
    """Rows of each thread apart, and of each column of a warp together."""
    sums = 16
    assembly, _ = _RAISED.value[sums,]
    tops = np.repeat([[50.0], [-30.0]], LANES, axis=1).astype(np.float32)
    for rise in itertools.product((-5.0, 7.9, 8.1, 40.0), repeat=2):
        highest = tops - 100
        highest[0, 9], highest[1, 22] = tops[:, 0] + np.array(rise, np.float32)  # of columns t = 1 and t = 2
        before = np.arange(1, sums + 3, dtype=np.float32)[:, None] * np.ones((1, LANES), np.float32)
        inputs = [*highest, *tops, *before]
        found = executed(assembly, {f"${sums + 4 + i}": one.view(np.uint32) for i, one in enumerate(inputs)}, sums + 4)
        values = [one.astype(np.uint32).view(np.float32) for one in found]
        moved = max(rise) > 8
        expected = tops.copy()
        if moved:
            expected[0, 1::4] = max(tops[0, 0], tops[0, 0] + rise[0])
            expected[1, 2::4] = max(tops[1, 0], tops[1, 0] + rise[1])
        np.testing.assert_array_equal(values[:2], expected)
        by = np.exp2(tops - expected)
        np.testing.assert_allclose(values[2:4], before[:2] * by, rtol=1e-6)
        for i, one in enumerate(values[4:]):
            np.testing.assert_allclose(one, before[2 + i] * by[i % 2], rtol=1e-6)


PIECES = [_SCORES, _RAISED, _VALUES, _SHARED_STORES, _COPIES, _SHARED_LOADS, _BIAS, _SERIES, _MEANS]


def test_outputs_do_not_lie_where_inputs_are_still_read() -> None:
    """Compilers may give an output the register of an input, but where it is said to be clobbered early."""
    texts = [text for table in PIECES for text in table.value.values()]
    texts += [(_assembly(planes, shifted), _CONSTRAINTS) for planes in (1, 2, 3) for shifted in (False, True)]
    assert len(texts) > 100
    for assembly, constraints in texts:
        kinds = constraints.split(",")
        outputs = sum(kind.startswith("=") for kind in kinds)
        steps = [{int(name) for name in re.findall(r"\$(\d+)", step)} for step in assembly.split(";")]
        last_read = max(i for i, names in enumerate(steps) if any(name >= outputs for name in names))
        assert max(set.union(*steps)) < len(kinds)
        for output in range(outputs):
            written = next((i for i, names in enumerate(steps) if output in names), last_read)
            assert written >= last_read or "&" in kinds[output], (assembly, output)


@pytest.mark.parametrize("quarter", [16, 20, 24, 32, 64])
def test_positions_are_a_permutation_of_the_coordinates(quarter: int) -> None:
    padded = 1 << (quarter - 1).bit_length()
    p = torch.arange(4 * padded)
    real = p // 8 * 2 + p % 2 < quarter
    found = coordinate.fn(p, quarter)[real]
    assert sorted(found.tolist()) == list(range(4 * quarter))
