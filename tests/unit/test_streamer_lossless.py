"""The codec of weights: its bytes as docs/format.md draws them, patterns, sizes of real weights, wrong arguments."""

import struct
from pathlib import Path

import pytest
import torch

from streamer.checkpoint import Checkpoint
from streamer.errors import OptionError
from streamer.ops import lossless
from streamer.ops.lossless import CodedTensor, decode, encode, least_coded_bytes, reference

BLOCK, RECORD = 4096, 4096 + 3 * 512


def decode_by_the_page(stored: bytes, numel: int) -> list[int]:
    """Weights as 16-bit patterns, read weight by weight as docs/format.md says; shares no code with the package."""
    blocks = numel // BLOCK
    entries_at, tail_at = RECORD * blocks, (RECORD + 8) * blocks
    escapes_at = tail_at + 2 * (numel % BLOCK)
    patterns = [0] * (BLOCK * blocks)
    for b in range(blocks):
        (entry,) = struct.unpack_from("<Q", stored, entries_at + 8 * b)
        base, escape = entry & 0xFF, escapes_at + (entry >> 8)
        for g in range(128):
            words = [struct.unpack_from("<I", stored, RECORD * b + BLOCK + 512 * p + 4 * g)[0] for p in range(3)]
            for bit in range(32):
                h, k = divmod(bit, 16)
                index = sum((words[p] >> bit & 1) << p for p in range(3))
                exponent = base + index
                if index == 7:
                    exponent, escape = stored[escape], escape + 1
                signs = stored[RECORD * b + 512 * (k // 2) + 4 * g + 2 * h + k % 2]
                patterns[BLOCK * b + 256 * k + 2 * g + h] = (signs & 0x80) << 8 | exponent << 7 | signs & 0x7F
    return patterns + list(struct.unpack_from(f"<{numel % BLOCK}H", stored, tail_at))


def patterns_of(weights: torch.Tensor) -> list[int]:
    return (weights.view(-1).view(torch.int16).int() & 0xFFFF).tolist()


def skewed(numel: int) -> torch.Tensor:
    """Normal numbers with 3 % from anywhere, infinities and NaN among them."""
    generator = torch.Generator().manual_seed(3)
    weights = torch.randn(numel, generator=generator).bfloat16()
    other = torch.randint(-(2**15), 2**15, (numel,), generator=generator).to(torch.int16).view(torch.bfloat16)
    return torch.where(torch.rand(numel, generator=generator) < 0.03, other, weights)


def test_bytes_are_those_of_the_page() -> None:
    weights = skewed(2 * BLOCK + 77)
    coded = encode(weights)
    assert not coded.is_raw
    assert decode_by_the_page(bytes(coded.stored.tolist()), weights.numel()) == patterns_of(weights)


def test_a_block_by_hand() -> None:
    """1.0 has exponent 127: the least base that has it in its window is 121, the index 6; one escape, 2^-100."""
    weights = torch.ones(BLOCK).bfloat16()
    weights[2 * (128 * 9 + 5) + 1] = -(2.0**-100)  # pair 9 of group 5, second weight: bit 25
    stored = encode(weights).stored
    planes = stored[4096:RECORD].view(torch.int32).view(3, 128)
    assert planes[0].tolist() == [0] * 5 + [1 << 25] + [0] * 122
    assert (planes[1] == -1).all()
    assert (planes[2] == -1).all()
    assert stored[:4096].nonzero().tolist() == [[512 * 4 + 4 * 5 + 2 + 1]]
    assert stored[RECORD:].tolist() == [121, 0, 0, 0, 0, 0, 0, 0, 27]


def test_all_patterns_survive() -> None:
    """Each of the 65,536 in a block of others in which it is an escape or, at 248 bases, in the window."""
    patterns = torch.arange(2**16)
    for exponent in (0, 1, 120, 248, 249, 254, 255):
        near = (patterns & 0x807F | exponent << 7).repeat(4)
        mixed = torch.stack((patterns, near[: 2**16], near[: 2**16], near[: 2**16]), 1).view(-1).to(torch.int16)
        weights = mixed.view(torch.bfloat16)
        coded = encode(weights)
        assert coded.is_raw == (exponent == 255)  # which no window holds
        assert torch.equal(decode(coded).view(torch.int16), mixed)


def test_what_would_not_shrink_is_the_tensor_itself() -> None:
    """A byte fewer is coded, no byte fewer is not: 4096 weights and 2552 escapes take 8192 bytes."""
    for escapes, is_raw in ((2551, False), (2552, True)):
        weights = torch.ones(BLOCK).bfloat16()
        weights[:escapes] = float("inf")
        coded = encode(weights)
        assert coded.is_raw == is_raw
        assert coded.nbytes == (8192 if is_raw else 5640 + escapes)
        assert (coded.stored.data_ptr() == weights.data_ptr()) == is_raw
        assert torch.equal(decode(coded), weights)


def test_bases_follow_the_scales_of_blocks() -> None:
    """Blocks 2^12 apart have no exponent in common; each has its own window."""
    weights = torch.randn(4, BLOCK, generator=torch.Generator().manual_seed(0))
    scaled = weights * 2.0 ** torch.tensor([[-24], [-12], [0], [12]])
    assert encode(scaled.bfloat16()).nbytes == encode(weights.bfloat16()).nbytes


def test_sizes_are_known_before() -> None:
    assert [least_coded_bytes(numel) for numel in (0, 1, 4095, 4096, 4097, 3 * 4096)] == [0, 2, 8190, 5640, 5642, 16920]


@pytest.mark.slow
def test_the_demo_model_takes_71_percent(demo_model: Path) -> None:
    """All of its bf16 weights, norms and embedding included, each tensor for itself; every bit comes back."""
    stored = weights_bytes = 0
    with Checkpoint.open(demo_model) as checkpoint:
        for name, entry in checkpoint.tensors.items():
            assert entry.dtype == torch.bfloat16
            weights = checkpoint.tensor(name)
            coded = encode(weights)
            assert torch.equal(decode(coded).view(torch.int16), weights.view(torch.int16)), name
            stored += coded.nbytes
            weights_bytes += weights.nbytes
    assert weights_bytes == 269_030_016
    assert stored <= 0.705 * weights_bytes  # the issue asks for 0.715, all headers included


def test_decodes_into_a_given_tensor() -> None:
    weights = skewed(131 * BLOCK + 5)  # more blocks than are coded at once
    coded = encode(weights)
    # bytes that begin anywhere, as on a page or in a slot
    shifted = torch.cat((coded.stored.new_zeros(3), coded.stored))[3:]
    out = torch.empty_like(weights)
    assert decode(CodedTensor(shifted, coded.shape), out) is out
    assert torch.equal(out.view(torch.int16), weights.view(torch.int16))


@pytest.mark.parametrize("blocks", [1, 128, 129, 4096])
def test_steps_of_any_size_give_the_same_bytes(blocks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU codes at once is not what a CPU does; numbers of exponents outgrow 16 bits behind 128 blocks."""
    weights = skewed(300 * BLOCK + 5)
    weights[128 * BLOCK :] *= 2.0**20  # other windows there
    coded = encode(weights)
    monkeypatch.setattr(reference, "_STEP_BLOCKS", blocks)
    assert torch.equal(encode(weights).stored, coded.stored)
    assert torch.equal(decode(coded).view(torch.int16), weights.view(torch.int16))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (torch.ones(8), r"encode takes a contiguous bfloat16 tensor, got torch.float32 \[8\]"),
        (torch.ones(8, 4).bfloat16().T, r"got torch.bfloat16 \[4, 8\] that is not contiguous"),
    ],
)
def test_other_tensors_are_refused(weights: torch.Tensor, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        encode(weights)


def test_wrong_outputs_are_refused() -> None:
    coded = encode(torch.ones(BLOCK).bfloat16())
    with pytest.raises(OptionError, match=r"a tensor \[4096\] on cpu cannot be decoded into one of \[64, 64\] on cpu"):
        decode(coded, torch.empty(64, 64, dtype=torch.bfloat16))
    with pytest.raises(OptionError, match="decode writes a contiguous bfloat16 tensor, got torch.float16"):
        decode(coded, torch.empty(4096, dtype=torch.float16))


@pytest.mark.parametrize("nbytes", [5639, 8193])
def test_bytes_of_another_length_are_refused(nbytes: int) -> None:
    message = rf"a coded tensor of shape \[4096\] is 5640 to 8192 contiguous uint8, got torch.uint8 \[{nbytes}\]"
    with pytest.raises(OptionError, match=message):
        CodedTensor(torch.zeros(nbytes, dtype=torch.uint8), (4096,))


@pytest.mark.parametrize(
    ("capability", "has_triton", "serves"), [(80, True, True), (75, True, False), (90, False, False)]
)
def test_which_gpus_the_kernel_serves(
    capability: int, has_triton: bool, serves: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(lossless, "capability", lambda device: capability)
    monkeypatch.setattr(lossless, "triton_serves", lambda: has_triton)
    asked = lossless.kernel_serves.__wrapped__
    assert not asked(torch.device("cpu"))
    assert asked(torch.device("cuda:0")) == serves
    warned = [
        "cuda:0: coded weights are decoded by plain PyTorch, the kernel needs compute capability 8.0 and triton 3.6"
    ]
    assert [record.getMessage() for record in caplog.records] == ([] if serves else warned)
