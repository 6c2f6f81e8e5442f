"""The kernel that decodes weights against plain PyTorch, bit for bit: in the interpreter, and on a GPU."""

import collections
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from streamer.errors import OptionError
from streamer.ops import lossless
from streamer.ops.lossless import decode, encode, reference
from streamer.ops.lossless import kernel as lossless_kernel
from streamer.ops.lossless.layout import BLOCK
from streamer.ops.lossless.together import CodedPart, PartsDecoder

ROOT = Path(__file__).parents[2]

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


def padded(nbytes: int) -> int:
    return -(-nbytes // 16) * 16


def unit_of(contents: list[torch.Tensor], seed: int) -> tuple[list[CodedPart], torch.Tensor, torch.Tensor]:
    """Parts of int16 patterns, coded, and of uint8, raw; the stored bytes, and the unit in which all else is 0xA5.

    Parts lie in one order among the stored bytes, in another in the unit, and come in a third; gaps are poisoned.
    """
    draw = torch.Generator().manual_seed(seed)
    stored = [reference.encode(one) if one.dtype == torch.int16 else one for one in contents]
    stored_at, at = [0] * len(contents), [0] * len(contents)
    stored_bytes, nbytes = 32, 48
    for i in torch.randperm(len(contents), generator=draw).tolist():
        stored_at[i] = stored_bytes
        stored_bytes += padded(stored[i].nbytes) + 16 * (i % 3)
    for i in torch.randperm(len(contents), generator=draw).tolist():
        at[i] = nbytes
        nbytes += padded(contents[i].nbytes) + 16 * (i % 2)
    source = torch.full((stored_bytes,), 0x5A, dtype=torch.uint8)
    unit = torch.full((nbytes + 32,), 0xA5, dtype=torch.uint8)
    for i in range(len(contents)):
        source[stored_at[i] : stored_at[i] + stored[i].nbytes] = stored[i]
        unit[at[i] : at[i] + contents[i].nbytes] = contents[i].view(torch.uint8)
    order = torch.randperm(len(contents), generator=draw).tolist()
    return [CodedPart(stored_at[i], stored[i].nbytes, at[i], contents[i].nbytes) for i in order], source, unit


def check_unit(contents: list[torch.Tensor], device: str, monkeypatch: pytest.MonkeyPatch, *, seed: int = 0) -> None:
    """Decodes a unit into poisoned memory by the kernel, and by PyTorch: nothing but the parts may change."""
    parts, source, unit = unit_of(contents, seed)
    for serves, place in ((True, device), (False, "cpu")):
        monkeypatch.setattr(lossless, "kernel_serves", lambda device, serves=serves: serves)
        out = torch.full_like(unit, 0xA5, device=place)
        decoder = PartsDecoder(parts, torch.device(place))
        assert (decoder.nbytes > 0) == (serves and len(parts) > 0)
        decoder.decode(source.to(place), out)
        assert torch.equal(out.cpu(), unit)


def raw_bytes(nbytes: int) -> torch.Tensor:
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(nbytes))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("seed", [0, 1])
def test_a_unit_of_parts(seed: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Coded parts of odd and even numbers of blocks with tails of 0, few and many weights, among raw ones."""
    contents = [
        patterns(2 * BLOCK, seed=1),
        raw_bytes(4096 + 16 * 5),
        patterns(3 * BLOCK + 7, seed=2),  # a tail at a multiple of 8, its last bytes apart
        patterns(BLOCK + BLOCK - 1, seed=3, rare=0.2),  # a tail of two chunks
        raw_bytes(2),
        raw_bytes(0),
        patterns(BLOCK + 1, seed=4),
        raw_bytes(13),
    ]
    check_unit(contents, device, monkeypatch, seed=seed)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("numbers", [[], [0], [5], [4096], [8192 + 4095], [1, 0, 0, 17]])
def test_units_of_raw_parts(numbers: list[int], device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    contents = [raw_bytes(nbytes) for nbytes in numbers]
    if any(numbers) or not numbers:
        check_unit(contents, device, monkeypatch)
    else:
        assert PartsDecoder(unit_of(contents, 0)[0], torch.device(device)).nbytes == 0  # nothing to launch


@pytest.mark.parametrize("device", DEVICES)
def test_more_parts_than_the_smallest_table_holds(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_unit([raw_bytes(1 + i % 50) for i in range(70)] + [patterns(BLOCK + 3)], device, monkeypatch)
    assert lossless_kernel.parts_table([(0, 0, 0, 1)] * 71)[0].numel() == 5 * 128  # the compiler wants a power of two


@pytest.mark.parametrize("device", DEVICES)
def test_wrong_bytes_of_a_unit_are_refused(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parts, source, unit = unit_of([patterns(BLOCK)], 0)
    source, unit = source.to(device), unit.to(device)
    monkeypatch.setattr(lossless, "kernel_serves", lambda device: True)
    decoder = PartsDecoder(parts, torch.device(device))
    with pytest.raises(OptionError, match=r"parts of \d+ stored and 8240 decoded bytes, got 9 and 8272"):
        decoder.decode(source[:9], unit)
    with pytest.raises(OptionError, match=r"parts of \d+ stored and 8240 decoded bytes, got \d+ and 8239"):
        decoder.decode(source, unit[:8239])
    with pytest.raises(OptionError, match="parts are decoded from and to what begins at multiples of 16 bytes, got"):
        decoder.decode(source, unit[8:])
    with pytest.raises(OptionError, match=r"parts begin at multiples of 16 bytes, got CodedPart\(stored_at=8,"):
        PartsDecoder([CodedPart(8, 16, 0, 16)], torch.device(device))


def test_lanes_move_whole_words(tmp_path: Path) -> None:
    """Places from a table hide what is aligned, unless the compiler is shown: lanes would move single bytes then."""
    code = (
        "from check_kernels import _NoGPU; from triton.runtime import driver; driver.set_active(_NoGPU(90));"
        "from streamer.ops.lossless import kernel;"
        "print(kernel.compile_parts(kernel.parts_table([])[0]).asm['ptx'])"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": f"{ROOT}:{ROOT / 'scripts'}", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    accesses = collections.Counter(re.findall(r"(?:ld|st)\.global\.[v.b0-9]+", done.stdout))
    assert {name: n for name, n in accesses.items() if not name.endswith("b64")} == {
        "ld.global.b32": 11,  # 3 of planes, 8 of signs; 128 lanes side by side
        "st.global.b32": 16,  # of weights
        "ld.global.v4.b32": 2,  # of raw bytes
        "st.global.v4.b32": 4,  # of raw bytes, of tails
        "ld.global.v2.b32": 4,  # of tails, which may begin at a multiple of 8
        "ld.global.b8": 4,  # an escape and a sign; the last bytes of a copy
        "st.global.b16": 1,
        "st.global.b8": 2,
    }


@contextmanager
def waiting_is_an_error() -> Iterator[None]:
    """Within this, what makes the host wait for the device raises."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that the mode is a prototype, and warnings are errors here
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_a_unit_far_apart_on_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Places beyond 2^31 bytes, decoded without a wait, and from a graph."""
    bits = patterns(40 * BLOCK + 9)
    coded = reference.encode(bits)
    stored = torch.zeros((1 << 31) + (1 << 20), dtype=torch.uint8, device="cuda")
    out = torch.zeros_like(stored)
    stored_at, at = (1 << 31) + 16, (1 << 31) + 4096
    stored[stored_at : stored_at + coded.nbytes] = coded.cuda()
    parts = [CodedPart(0, 100, 0, 100), CodedPart(stored_at, coded.nbytes, at, bits.nbytes)]
    decoder = PartsDecoder(parts, out.device)
    assert decoder.nbytes > 0
    with waiting_is_an_error():
        decoder.decode(stored, out)
    assert torch.equal(out[at : at + bits.nbytes].cpu().view(torch.int16), bits)
    assert not out[:at].any()
    out.zero_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        decoder.decode(stored, out)
    graph.replay()
    assert torch.equal(out[at : at + bits.nbytes].cpu().view(torch.int16), bits)
    assert not out[at + bits.nbytes :].any()


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
    with waiting_is_an_error():
        decode(coded, out)
    assert torch.equal(out.view(torch.int16).cpu(), weights.view(torch.int16))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        decode(coded, out)
    out.zero_()
    graph.replay()
    assert torch.equal(out.view(torch.int16).cpu(), weights.view(torch.int16))
