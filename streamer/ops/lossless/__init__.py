"""lossless: bfloat16 weights -> fewer bytes, and the same weights again, bit for bit."""

import logging
import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from streamer.errors import OptionError
from streamer.ops.lossless import reference
from streamer.ops.lossless.layout import coded_parts
from turboquant.ops.devices import LEAST_CAPABILITY, capability, launching_on, triton_serves

logger = logging.getLogger("streamer")

__all__ = ["CodedTensor", "decode", "encode", "least_coded_bytes"]


@dataclass(frozen=True)
class CodedTensor:
    """A bfloat16 tensor in coded bytes, or in its own where coding would not shorten it.

    Attributes:
        stored: [nbytes] uint8, contiguous; docs/format.md says what is in it.
        shape: of the tensor.
    """

    stored: Tensor
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        """Refuses bytes that cannot be those of the shape."""
        numel = math.prod(self.shape)
        is_flat = self.stored.dtype == torch.uint8 and self.stored.dim() == 1 and self.stored.is_contiguous()
        least = least_coded_bytes(numel)
        if not is_flat or not least <= self.nbytes <= 2 * numel:
            raise OptionError(
                f"a coded tensor of shape {list(self.shape)} is {least} to {2 * numel} contiguous uint8, "
                f"got {self.stored.dtype} {list(self.stored.shape)}"
            )

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor held."""
        return self.stored.nbytes

    @property
    def is_raw(self) -> bool:
        """Whether the bytes are the weights' own: coded ones are fewer, or they are not kept."""
        return self.nbytes == 2 * math.prod(self.shape)


def least_coded_bytes(numel: int) -> int:
    """The fewest bytes that many weights can take; the most are 2 * numel, and the weights alone know more.

    Exponents outside of their block's window add a byte each. 2 to 3 % of trained weights have one (docs/format.md).
    """
    return min(coded_parts(numel).escapes, 2 * numel)


def encode(weights: Tensor) -> CodedTensor:
    """A tensor in coded bytes; every bit pattern survives (tests/property/test_streamer_lossless.py).

    Args:
        weights: bfloat16, contiguous, of any shape, on any device.
    Returns:
        the coded tensor on the same device; where coding would not shorten it, a view of the weights themselves. The
        same weights give the same bytes on every device.
    Raises:
        OptionError: another dtype, or not contiguous.
    Source: own; streamer/ops/lossless/reference.py.
    """
    _check(weights, "encode takes")
    shape = tuple(weights.shape)
    raw = weights.view(-1).view(torch.uint8)
    if coded_parts(weights.numel()).escapes < raw.numel():
        stored = reference.encode(raw.view(torch.int16))
        if stored.numel() < raw.numel():
            return CodedTensor(stored, shape)
    return CodedTensor(raw, shape)


def decode(coded: CodedTensor, out: Tensor | None = None) -> Tensor:
    """The tensor that coded bytes stand for; on a GPU by a kernel, which no call waits for.

    Args:
        coded: as `encode` gives it.
        out: bfloat16 of its shape, contiguous, on its device: overwritten. None makes one.
    Returns:
        `out`, or a new tensor that the caller owns.
    Raises:
        OptionError: `out` has another dtype, shape or device, or is not contiguous; or, where the kernel decodes, it
            or the coded bytes do not begin at a multiple of 16 bytes.
    Source: own; streamer/ops/lossless/reference.py.
    """
    if out is None:
        out = torch.empty(coded.shape, dtype=torch.bfloat16, device=coded.stored.device)
    _check(out, "decode writes")
    if tuple(out.shape) != coded.shape or out.device != coded.stored.device:
        raise OptionError(
            f"a tensor {list(coded.shape)} on {coded.stored.device} cannot be decoded into one of "
            f"{list(out.shape)} on {out.device}"
        )
    if coded.is_raw:
        out.view(-1).view(torch.uint8).copy_(coded.stored)
    elif kernel_serves(out.device):
        from streamer.ops.lossless import kernel

        with launching_on(out.device):
            kernel.decode(coded.stored, out.view(-1).view(torch.int16))
    else:
        reference.decode(coded.stored, out.view(-1).view(torch.int16))
    return out


def has_kernel(device: torch.device) -> bool:
    """Whether a GPU has what the kernel needs: compute capability 8.0, and triton 3.6 beside it."""
    return torch.version.hip is None and capability(device) >= LEAST_CAPABILITY and triton_serves()


@cache
def kernel_serves(device: torch.device) -> bool:
    """Whether the kernel decodes there; says once if a GPU is left to PyTorch."""
    if device.type != "cuda":
        return False
    if has_kernel(device):
        return True
    logger.warning(
        "%s: coded weights are decoded by plain PyTorch, the kernel needs compute capability 8.0 and triton 3.6", device
    )
    return False


def _check(weights: Tensor, what: str) -> None:
    if weights.dtype != torch.bfloat16 or not weights.is_contiguous():
        order = "" if weights.is_contiguous() else " that is not contiguous"
        raise OptionError(f"{what} a contiguous bfloat16 tensor, got {weights.dtype} {list(weights.shape)}{order}")
