"""attend's kernel against its reference: each axis alone and every pair of values together, in poisoned memory.

On the CPU the interpreter runs it, with short rows; on a GPU rows are long as well.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from covering import pairwise
from emulated_ptx import COPIES, emulated
from packed_tokens import Case, make_layer

from turboquant.errors import OptionError
from turboquant.key_bias import KeyBias
from turboquant.layout import BlockLayout, SideLayout
from turboquant.ops.attend import attend_packed, bias_terms, kernel
from turboquant.ops.attend.bias import bias_tables
from turboquant.ops.attend.fragments import _below_middle, _taken, held_bytes, programs_and_units, triton_bytes
from turboquant.ops.attend.kernel import _share as kernel_share
from turboquant.ops.attend.terms import bias_in_span, span_of_bias
from turboquant.policy import Precision
from turboquant.store import StoreOptions

# Queries, weights and centroids are rounded to 11 bits, results to the dtype's; bfloat16 keeps 8.
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1e-2, torch.float32: 2e-3}

AXES: dict[str, list[Any]] = {
    "key_bits": [2, 3, 4, 16],
    "value_bits": [2, 3, 4, 16],
    "key_dim": [64, 80, 96, 128, 256],
    "heads_per_group": [1, 4, 5, 7, 8],
    "lengths": [(1,), (63,), (64,), (65,), (1000,), (32768,), (700, 0, 201)],
    "queries": [1, 3, 16, 64],
    "dtype": [torch.float16, torch.bfloat16, torch.float32],
    "has_means": [True, False],
    "has_bias": [True, False],
    "softcap": [None, 20.0],
    "has_sink_logits": [False, True],
    "rotation": ["hadamard", "qr"],
    "is_aged": [False, True],
}


def alone(axes: dict[str, list[Any]]) -> list[dict[str, Any]]:
    """Every value of every axis, the others as they are by default."""
    return [{name: value} for name, values in axes.items() for value in values]


def name_of(case: dict[str, Any]) -> str:
    parts = []
    for name, value in case.items():
        text = str(value).removeprefix("torch.").replace(" ", "")
        parts.append(f"{name}={text}")
    return "-".join(parts)


def shorter(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Cases whose rows and calls the interpreter runs in a second or two; each once."""
    rows = {(1000,): (300,), (32768,): (420,), (700, 0, 201): (270, 0, 201)}
    kept: dict[str, dict[str, Any]] = {}
    for case in cases:
        case = dict(case)
        if "lengths" in case:
            case["lengths"] = rows.get(case["lengths"], case["lengths"])
        if case.get("queries", 1) > 5 and len(case) > 1:
            case["queries"] = 5
        kept[name_of(case)] = case
    return list(kept.values())


CASES = alone(AXES) + pairwise(AXES)
SHORT_CASES = shorter(CASES)


def check(case: Case, device: str) -> None:
    layer = make_layer(case, device)
    bias = layer.key_bias
    terms = None
    if bias is not None:
        terms = bias_terms(bias.bias, bias.inverse_frequencies, bias.scaling, bias.interleaved)
    out = attend_packed(
        layer.q,
        layer.packed,
        (layer.rotations[0].matrix(device), layer.rotations[1].matrix(device)),
        terms,
        scale=case.key_dim**-0.5,
        softcap=case.softcap,
        sink_logits=layer.sink_logits,
        most_blocks=layer.most_blocks,
        is_mixed=case.is_aged,
    )
    reference = layer.reference()
    assert out.shape == reference.shape
    assert out.dtype == case.dtype
    empty = [b for b, length in enumerate(case.lengths) if not length]
    assert (out[empty] == 0).all()
    error = (out.float() - reference).norm(dim=-1) / reference.norm(dim=-1)
    error[empty] = 0
    assert error.max() <= TOLERANCE[case.dtype], error.max()


@pytest.mark.parametrize("case", SHORT_CASES, ids=name_of)
def test_attend_in_the_interpreter(case: dict[str, Any]) -> None:
    settings = {"groups": 1, "lengths": (270,), "heads_per_group": 4} | case
    check(Case(**settings), "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_attend_on_a_gpu(case: dict[str, Any]) -> None:
    check(Case(**({"groups": 2, "heads_per_group": 5} | case)), "cuda")


FURTHER: list[dict[str, Any]] = [
    {"rotary_dim": 64, "has_bias": True},
    {"rotary_dim": 0, "has_bias": True},
    {"interleaved": True, "has_bias": True},
    {"interleaved": True, "rotary_dim": 32, "has_bias": True, "queries": 3},
    {"window": 0, "sinks": 0, "queries": 3},
    {"window": 0, "sinks": 0, "lengths": (64,)},
    {"window": 5, "sinks": 1, "queries": 16, "has_bias": True},
    {"value_dim": 64},
    {"key_dim": 32},
    {"key_dim": 72, "key_bits": 4},
    {"key_dim": 64, "value_dim": 128, "key_bits": 4, "value_bits": 2},
    {"value_scale": 1e-5},
    {"value_scale": 3e3},
    {"lengths": (2,), "queries": 3},  # a query that was padding
]


@pytest.mark.parametrize("case", FURTHER, ids=name_of)
def test_further_shapes_in_the_interpreter(case: dict[str, Any]) -> None:
    settings = {"groups": 1, "lengths": (270,), "dtype": torch.float32} | case
    check(Case(**settings), "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("case", FURTHER, ids=name_of)
def test_further_shapes_on_a_gpu(case: dict[str, Any]) -> None:
    check(Case(**({"lengths": (5000,), "dtype": torch.float32} | case)), "cuda")


# Few query rows of coded tokens: their own kernels, written in assembly.
FRAGMENTS: list[dict[str, Any]] = [
    {"has_means": False},
    {"has_bias": True, "lengths": (700,)},
    {"has_bias": True, "has_means": False, "heads_per_group": 2, "queries": 3, "lengths": (270,)},
    {"has_bias": True, "lengths": (270, 0, 140), "heads_per_group": 5, "key_dim": 64, "groups": 2},
    {"has_bias": True, "softcap": 20.0, "key_bits": 4, "value_bits": 2},
    {"has_bias": True, "lengths": (63,)},
    {"has_bias": True, "window": 5, "sinks": 1, "interleaved": True, "heads_per_group": 8, "dtype": torch.bfloat16},
    {"has_bias": True, "rotary_dim": 64, "window": 0, "sinks": 0, "has_sink_logits": True},
    {"key_dim": 64, "value_dim": 256, "key_bits": 2, "value_bits": 4, "rotation": "qr"},
    {"key_dim": 256, "value_dim": 64, "key_bits": 4, "value_scale": 1e-5},
    {"queries": 8, "heads_per_group": 1, "lengths": (200,), "value_scale": 3e3},
    {"has_bias": True, "sinks": 100, "key_dim": 64, "lengths": (300,)},
    {"has_bias": True, "sinks": 300, "key_dim": 64, "lengths": (600,)},
    {"window": 0, "sinks": 0, "queries": 8, "heads_per_group": 1, "lengths": (128,)},  # queries within a block
    # the same in a unit below the middle of its span
    {"has_bias": True, "window": 0, "sinks": 0, "queries": 8, "heads_per_group": 1, "lengths": (64,), "key_dim": 64},
    {"has_bias": True, "rotary_dim": 64, "softcap": 20.0},  # a constant on all tokens shows through a cap alone
    {"is_aged": True, "lengths": (700,)},
    # few tokens have all the weight: tops move by less than a weight may pass them, and by more than float16 holds
    {"query_scale": 4.0, "lengths": (700,), "heads_per_group": 8},
    {"query_scale": 10.0, "lengths": (1000,), "heads_per_group": 8, "dtype": torch.bfloat16, "value_dim": 64},
    {"key_bits": 4, "value_bits": 4},
    {"key_dim": 256, "value_dim": 256, "dtype": torch.bfloat16, "key_bits": 4, "value_bits": 4},
    {"key_dim": 256, "value_dim": 256, "key_bits": 4, "value_bits": 4},  # units that do not fit
    {"has_bias": True, "key_dim": 256, "value_dim": 256, "dtype": torch.bfloat16, "heads_per_group": 3},
    {"is_aged": True, "has_bias": True, "key_bits": 4, "value_bits": 3, "lengths": (600,), "heads_per_group": 5},
    {"is_aged": True, "key_bits": 2, "value_bits": 4, "key_dim": 64, "value_dim": 128, "groups": 2, "queries": 3},
]


@pytest.fixture
def emulated_assembly(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Within this, the interpreter runs the kernels that are written in assembly."""
    monkeypatch.setattr(kernel, "RUNS_ASSEMBLY", True)
    yield from emulated(monkeypatch)


# Multiprocessors that a call is spread over: where few programs share many tokens, each of their warps takes several
# spans of a key bias, and several rounds of block means; where programs have many blocks, those of the tail take some.
@pytest.mark.usefixtures("emulated_assembly")
@pytest.mark.parametrize(
    ("case", "processors"),
    [(case, 4) for case in FRAGMENTS]
    + [(case, 1) for case in FRAGMENTS if {"window", "sinks"} & case.keys()]
    + [
        ({"has_bias": has_bias, "lengths": (2250,), "key_dim": 64, "heads_per_group": 2}, processors)
        for has_bias in (False, True)
        for processors in (1, 3)
    ],
    ids=lambda value: name_of(value) if isinstance(value, dict) else f"processors={value}",
)
def test_fragments_emulated(case: dict[str, Any], processors: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "multiprocessors", lambda device: processors)
    check(Case(**({"groups": 1, "lengths": (400,), "dtype": torch.float32} | case)), "cpu")


@pytest.mark.usefixtures("emulated_assembly")
@pytest.mark.parametrize(
    "case",
    [
        {"has_bias": True, "lengths": (600,), "key_dim": 64, "heads_per_group": 2},
        {"key_bits": 4, "value_bits": 4, "lengths": (700,)},  # three units
        {"is_aged": True, "lengths": (2250, 0, 300), "key_dim": 64, "heads_per_group": 2},
    ],
    ids=name_of,
)
def test_copies_are_waited_for(case: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(COPIES, "IS_LATE", True)
    monkeypatch.setattr(kernel, "multiprocessors", lambda device: 3)
    check(Case(**({"groups": 1, "dtype": torch.float32} | case)), "cpu")


def test_programs_of_the_tail_take_blocks_without_fragments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "multiprocessors", lambda device: 4)
    grids = []
    split = kernel._attend_split

    class Launched:
        def __getitem__(self, grid: Any) -> Any:
            grids.append(grid)
            return split[grid]

    monkeypatch.setattr(kernel, "_attend_split", Launched())
    check(Case(groups=1, lengths=(2250,), key_dim=64, heads_per_group=5, value_bits=16, dtype=torch.float32), "cpu")
    assert grids[0][0] in {8, 12}  # as many programs as fit, and none for the tail alone


@pytest.mark.gpu
@pytest.mark.parametrize("processors", [None, 16])
@pytest.mark.parametrize("case", FRAGMENTS, ids=name_of)
def test_fragments_on_a_gpu(case: dict[str, Any], processors: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if processors is not None:
        monkeypatch.setattr(kernel, "multiprocessors", lambda device: processors)
    check(Case(**({"groups": 2, "dtype": torch.float32} | case | {"lengths": (9000, 0, 3001)})), "cuda")


def check_joined(parts: int, dim: int, has_sink_logits: bool, by_hand: bool, device: str) -> None:
    groups, heads_per_group, tokens = 2, 3, 2
    rows = heads_per_group * tokens
    draw = torch.Generator().manual_seed(parts)
    # parts of few tokens beside parts that outweigh them, and some without any
    top = 20 * torch.randn(groups, parts, rows, generator=draw)
    mass = torch.rand(groups, parts, rows, generator=draw)
    acc = mass[..., None] * torch.randn(groups, parts, rows, dim, generator=draw)
    is_empty = torch.rand(groups, parts, rows, generator=draw) < 0.2
    is_empty[1, :, 4] = True
    top[is_empty], mass[is_empty], acc[is_empty] = -1e30, 0.0, 0.0
    matrix = torch.linalg.qr(torch.randn(dim, dim, generator=draw))[0].contiguous()
    logits = torch.randn(groups * heads_per_group, generator=draw)
    out = torch.empty(1, tokens, groups * heads_per_group, dim, device=device)
    parts_of = (one.to(device) for one in (top, mass, acc, matrix))
    sinks = logits.to(device) if has_sink_logits else None
    kernel.merge_parts(*parts_of, sinks, out, by_hand=by_hand, overlaps=False)
    weights = torch.exp2(top.double())  # [G, parts, rows]
    total = (weights * mass).sum(1)
    if has_sink_logits:
        total += logits.double().exp().view(groups, heads_per_group, 1).expand(-1, -1, tokens).flatten(1)
    joined = (weights[..., None] * acc).sum(1) / total.clamp_min(1e-300)[..., None]
    expected = (joined @ matrix.double()).unflatten(1, (heads_per_group, tokens)).flatten(0, 1).transpose(0, 1)
    torch.testing.assert_close(out[0].cpu().double(), expected, rtol=2e-5, atol=2e-5)


JOINED = [(1, 128, False), (64, 128, True), (65, 64, False), (150, 64, True)]


@pytest.mark.usefixtures("emulated_assembly")
@pytest.mark.parametrize("by_hand", [True, False])
@pytest.mark.parametrize(("parts", "dim", "has_sink_logits"), JOINED)
def test_parts_are_joined(parts: int, dim: int, has_sink_logits: bool, by_hand: bool) -> None:
    check_joined(parts, dim, has_sink_logits, by_hand, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("by_hand", [True, False])
@pytest.mark.parametrize(("parts", "dim", "has_sink_logits"), JOINED)
def test_parts_are_joined_on_a_gpu(parts: int, dim: int, has_sink_logits: bool, by_hand: bool) -> None:
    check_joined(parts, dim, has_sink_logits, by_hand, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("is_captured", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
def test_launches_that_overlap_change_nothing(
    has_bias: bool, is_captured: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Calls in a row, each with other queries, records, tails and one token more, which at the twentieth fills a block,
    by launches that overlap and by some that do not.
    """
    # poisoning is a launch of its own between ours
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    layer = make_layer(Case(groups=2, lengths=(900,), has_bias=has_bias, dtype=torch.bfloat16), "cuda")
    for tail in (layer.packed.key_tail, layer.packed.value_tail):
        tail.normal_()  # slots that are still empty are read as well
    bias = layer.key_bias
    terms = bias_terms(bias.bias, bias.inverse_frequencies, bias.scaling, bias.interleaved) if bias else None
    matrices = tuple(rotation.matrix("cuda") for rotation in layer.rotations)
    queries = [torch.randn_like(layer.q) for _ in range(50)]
    lengths = layer.packed.lengths - 20
    tables = [layer.packed.table.clone() for _ in range(2)]
    tables[1][:, :4] = tables[0][:, [2, 3, 0, 1]]
    tails = [torch.randn_like(layer.packed.key_tail) for _ in range(2)]

    def calls() -> list[torch.Tensor]:
        found = []
        for i, q in enumerate(queries):
            layer.packed.table.copy_(tables[i % 2])
            layer.packed.key_tail.copy_(tails[i % 2])
            layer.packed.value_tail.copy_(tails[(i + 1) % 2])
            found.append(attend_packed(q, layer.packed, matrices, terms, scale=0.1, most_blocks=layer.most_blocks))
            layer.packed.lengths.add_(1)
        return found

    def answers(overlaps_from: int) -> list[torch.Tensor]:
        monkeypatch.setattr(kernel, "_OVERLAPS_FROM", overlaps_from)
        layer.packed.lengths.copy_(lengths)
        found = calls()
        if is_captured:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                found = calls()
            layer.packed.lengths.copy_(lengths)
            graph.replay()
        torch.cuda.synchronize()
        return [out.clone() for out in found]

    wanted = answers(1000)
    for _ in range(4):
        assert all(torch.equal(a, b) for a, b in zip(answers(90), wanted, strict=True))


@triton.jit
def _bias_of_positions(
    coefficients,
    frequencies,
    table,
    series,
    factor,
    out,
    rows,
    positions,
    PAIRS: tl.constexpr,
    FAST: tl.constexpr,
):
    """out [8, positions]: what the bias adds in each query row; a program for each 256 positions."""
    thread = tl.arange(0, 128)
    g = thread % 32 // 4
    t = thread % 4
    own = tl.minimum(g, rows - 1)
    even = tl.minimum(2 * t, rows - 1)
    odd = tl.minimum(2 * t + 1, rows - 1)
    even_constant = tl.load(factor + 4 * even + 2) / tl.load(factor + 4 * even + 1)
    odd_constant = tl.load(factor + 4 * odd + 2) / tl.load(factor + 4 * odd + 1)
    position = 256 * tl.program_id(0) + 0 * thread
    constants = (even_constant, odd_constant)
    span = span_of_bias(position + 128, coefficients + own * (2 * PAIRS), frequencies, series, constants, PAIRS, FAST)
    for j in tl.range(0, 4):
        i = thread // 32 * 4 + j
        token, found = bias_in_span(i, span, table, FAST)
        s0, s1, s2, s3 = found
        to = position + 16 * i + token
        even_scale = tl.load(factor + 4 * even + 1) * 1.4426950408889634
        odd_scale = tl.load(factor + 4 * odd + 1) * 1.4426950408889634
        tl.store(out + 2 * t * positions + to, s0 * even_scale, mask=to < positions)
        tl.store(out + (2 * t + 1) * positions + to, s1 * odd_scale, mask=to < positions)
        tl.store(out + 2 * t * positions + to + 8, s2 * even_scale, mask=to + 8 < positions)
        tl.store(out + (2 * t + 1) * positions + to + 8, s3 * odd_scale, mask=to + 8 < positions)


@triton.jit(do_not_specialize=["count"])
def _store_order(out, count):
    """out: for each of `count` units the one that is taken then, and behind them how many of its span lie below."""
    for start in tl.range(0, count, 16):
        below = _below_middle(start, count)
        for u in tl.range(start, tl.minimum(start + 16, count)):
            tl.store(out + u, _taken(u + 0 * count, below, True))
            tl.store(out + count + u, below)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_units_of_a_span_are_taken_from_its_middle_on(device: str) -> None:
    for count in range(1, 50):
        out = torch.full((2, count), -1, dtype=torch.int32, device=device)
        _store_order[(1,)](out, count)
        order, below = out.tolist()
        assert sorted(order) == list(range(count))
        for u in range(0, count, 2):
            middle = u // 16 * 16 + below[u]
            k = u % 16 // 2
            # mirrored: the k-th below and the k-th above, of which the last may be missing
            assert order[u : u + 2] == [middle - 1 - k, middle + k][: count - u]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
# the ring of recent tokens is as wide as one span takes, and wider; its turn ends at slot 8, 0 and 1 of 16
@pytest.mark.parametrize(
    ("base", "window", "length", "dim"),
    [(10.0, 128, 700, 128), (6e4, 128, 700, 128), (6e4, 176, 724, 128), (6e4, 192, 517, 128), (1e6, 128, 420, 256)],
)
def test_the_bias_of_every_token(
    base: float,
    window: int,
    length: int,
    dim: int,
    device: str,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    """Key terms before a softmax hides their digits. At base 10 no pair turns slowly."""
    if device == "cpu":
        request.getfixturevalue("emulated_assembly")
    found = []
    split = kernel._attend_split

    class Launched:
        def __getitem__(self, grid: Any) -> Any:
            def launch(*args: Any, **options: Any) -> None:
                split[grid](*args, **options)
                found.append(dict(zip(split.arg_names, args, strict=False)))

            return launch

    monkeypatch.setattr(kernel, "_attend_split", Launched())
    case = Case(
        groups=1, lengths=(length,), window=window, has_bias=True, has_means=False, key_dim=dim, dtype=torch.float32
    )
    layer = make_layer(case, device)
    frequencies = base ** -torch.linspace(0, 1, case.key_dim // 2, dtype=torch.float64, device=device)
    key_bias = KeyBias(layer.key_bias.bias, frequencies.float(), 1.0, False)
    terms = bias_terms(key_bias.bias, key_bias.inverse_frequencies, 1.0, False)
    assert (0 < terms.tables.fast < terms.tables.frequencies.numel()) == (base > 10)
    matrices = tuple(rotation.matrix(device) for rotation in layer.rotations)
    attend_packed(layer.q, layer.packed, matrices, terms, scale=1.0, most_blocks=layer.most_blocks)
    blocks = 64 * layer.most_blocks
    positions = torch.arange(length, device=device)
    q = layer.q[0, :, 0].float()
    expected = key_bias.scores(q[None], positions)[0] * 1.4426950408889634
    size = q.norm(dim=-1, keepdim=True) * key_bias.bias.norm()
    call = found[0]
    # the sinks and the ring of recent tokens, as the programs of the tail store them
    ring = layer.packed.key_tail.shape[2] - case.sinks
    for slots, tokens in (
        (torch.arange(case.sinks), positions[: case.sinks]),
        (case.sinks + torch.arange(blocks, length - case.sinks) % ring, positions[case.sinks + blocks :]),
    ):
        in_tail = call["terms"][:, slots.to(device)] - expected[:, tokens]
        assert (in_tail.abs() / size).max() < 1e-6
    # all positions, as the programs of blocks find them in registers
    rows = len(q)
    out = torch.empty(8, length, device=device)
    _bias_of_positions[(3,)](
        call["coefficients"],
        terms.tables.frequencies,
        terms.tables.spans,
        terms.tables.series,
        call["factor"],
        out,
        rows,
        length,
        PAIRS=terms.tables.frequencies.numel(),
        FAST=terms.tables.fast,
    )
    assert ((out[:rows] - expected).abs() / size).max() < 1e-6


@pytest.mark.parametrize("in_fragments", [False, True])
def test_a_broken_vector_shows(in_fragments: bool, request: pytest.FixtureRequest) -> None:
    """A value with NaN makes its row NaN instead of passing for a zero."""
    if in_fragments:
        request.getfixturevalue("emulated_assembly")
    case = Case(groups=1, lengths=(270,), key_dim=64)
    layer = make_layer(case)
    at = layer.blocks[0][0][0] + layer.packed.layout.key.nbytes
    layer.records[at : at + 2] = 0xFF
    out = attend_packed(
        layer.q,
        layer.packed,
        (layer.rotations[0].matrix(), layer.rotations[1].matrix()),
        None,
        scale=0.125,
        most_blocks=layer.most_blocks,
    )
    assert out.isnan().all()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("bits", [2, 4, 16])
def test_values_of_small_weight_may_be_left_out_within_the_bound(bits: int, device: str) -> None:
    case = Case(groups=1, lengths=(3000,), key_dim=64, value_bits=bits, dtype=torch.float32, heads_per_group=1)
    layer = make_layer(case, device)

    def answer(skip_below: float) -> torch.Tensor:
        return attend_packed(
            layer.q,
            layer.packed,
            (layer.rotations[0].matrix(device), layer.rotations[1].matrix(device)),
            None,
            scale=2.0,  # scores far apart, as in a real layer that looks at few tokens
            most_blocks=layer.most_blocks,
            skip_below=skip_below,
        )

    exact = answer(0.0)
    keys, values, _ = layer.tokens(0)
    q = layer.rotations[0].apply(layer.q[0].float()).flatten(0, 1)  # [H, D]
    weights = torch.softmax(2 * q @ keys[0].T, -1)
    largest = (weights * values[0].norm(dim=-1)).amax(-1)
    length = values[0].norm(dim=-1)
    ratio = float(length.max() / length.min())  # of codes, and more
    errors = []
    for threshold in (1e-6, 1e-4, 1e-2):
        error = (answer(threshold) - exact)[0, :, 0].norm(dim=-1)
        assert (error <= threshold * 3000 * ratio * largest + 1e-6 * exact[0, :, 0].norm(dim=-1)).all()
        errors.append(float(error.max()))
    assert errors[-1] > 0  # something was left out
    assert torch.equal(answer(0.0), exact)


def test_a_threshold_that_leaves_everything_out_is_refused() -> None:
    with pytest.raises(OptionError, match="skip_below must be at least 0 and less than 1; got 1.5"):
        StoreOptions(Precision(3, 3), skip_below=1.5)


@triton.jit
def _store_shares(out, splits, tails, blocks, fewer):
    first, last = kernel_share(tl.program_id(0), splits, tails, blocks, fewer)
    tl.store(out + 2 * tl.program_id(0), first)
    tl.store(out + 2 * tl.program_id(0) + 1, last)


@pytest.mark.parametrize("blocks", [0, 1, 7, 30, 100, 1000])
@pytest.mark.parametrize(("splits", "tails", "fewer"), [(1, 0, 0), (9, 0, 0), (9, 4, 3), (49, 4, 6), (5, 4, 6)])
def test_every_block_is_in_one_share(splits: int, tails: int, fewer: int, blocks: int) -> None:
    out = torch.zeros(splits, 2, dtype=torch.int32)
    _store_shares[(splits,)](out, splits, tails, blocks, fewer)
    shares = [range(first, last) for first, last in out.tolist()]
    assert [block for share in shares for block in share] == list(range(blocks))
    alone = shares[: splits - tails]
    assert all(len(share) <= max(len(alone[0]) - fewer, 0) for share in shares[len(alone) :])
    assert len({len(share) for share in alone if share}) <= 2  # all as many, but for what is left over


# Shared memory of a multiprocessor (CUDA programming guide, table of compute capabilities), KiB.
@pytest.mark.parametrize(
    ("bits", "dim", "itemsize", "shared", "expected"),
    [
        (3, 128, 2, 228, (3, 4)),
        (4, 128, 2, 228, (3, 3)),
        (3, 128, 2, 100, (3, 2)),
        (4, 128, 2, 100, (3, 2)),
        (4, 256, 2, 228, (2, 2)),
        (4, 256, 2, 100, (2, 2)),
        (4, 256, 4, 228, (2, 0)),
    ],
)
def test_programs_fit_the_shared_memory(
    bits: int, dim: int, itemsize: int, shared: int, expected: tuple[int, int]
) -> None:
    side = SideLayout(bits, dim, torch.bfloat16, False)
    layout = BlockLayout(8, side, side)
    own = triton_bytes(itemsize)
    programs, units = programs_and_units(3 if dim == 128 else 2, layout, own, shared << 10)
    assert (programs, units) == expected
    assert held_bytes(units, layout) % 1024 == 0
    assert programs * (held_bytes(units, layout) + own + 1024) <= shared << 10
    assert held_bytes(units, layout) + own <= 48 << 10


@pytest.mark.parametrize(("base", "pairs", "fast"), [(1e6, 64, 16), (1e4, 64, 24), (1e6, 32, 8), (10.0, 64, 64)])
def test_a_series_stands_for_pairs_that_turn_slowly(base: float, pairs: int, fast: int) -> None:
    frequencies = base ** (-torch.arange(pairs, dtype=torch.float64) / pairs)
    tables = bias_tables(frequencies)
    assert tables.fast == fast
    assert len(tables.series[0]) == (pairs - fast) // 8
    # a series of degree 15 leaves out twice the Bessel function J16 (DLMF 10.35.2), 6e-7 at 5.5 radians
    assert (128 * frequencies[fast:] < 5.5).all()


def test_pairs_in_no_order_are_all_fast() -> None:
    assert bias_tables(torch.cat((torch.full((48,), 1e-4), torch.ones(16)))).fast == 64


def test_pairs_that_turn_by_half_a_turn_are_refused() -> None:
    """Half of their angle, which the middle of a span takes, would be one of two."""
    with pytest.raises(OptionError, match=r"4 radians a position.*less than pi"):
        bias_tables(torch.tensor([4.0, 0.1]))


def test_without_rotary_all_is_series() -> None:
    tables = bias_tables(torch.zeros(0))
    assert (tables.fast, tables.pairs) == (0, 0)
