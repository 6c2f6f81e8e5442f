"""Which devices the Triton kernels serve, and what they ask a device about."""

import importlib.metadata
import logging
import os
import re
from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch

logger = logging.getLogger("turboquant")

# The oldest Triton whose compiler has run them.
LEAST_TRITON = (3, 6)

# The oldest compute capability that has bfloat16 in its tensor cores and asynchronous copies.
LEAST_CAPABILITY = 80


@cache
def capability(device: torch.device) -> int:
    """Compute capability as a number, 90 for 9.0; 0 where there is none."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 4 elsewhere, so that Triton's interpreter splits work as well."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


@cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory of a multiprocessor; of an H100 elsewhere."""
    if device.type != "cuda":
        return 228 << 10
    return int(torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor)


def is_interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def is_capturing() -> bool:
    """Whether launches go into a CUDA graph instead of running: host state must not change then."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def launching_on(device: torch.device) -> AbstractContextManager[None]:
    """Triton launches on the current device: within this, that is the one the tensors lie on."""
    if device.type == "cuda" and device.index not in (None, torch.cuda.current_device()):
        return torch.cuda.device(device)
    return nullcontext()


# Narrower heads than the tensor cores multiply, wider ones than registers hold.
LEAST_DIM, MOST_DIM = 16, 256


def triton_serves() -> bool:
    """Whether a Triton that compiles the kernels is installed."""
    for name in ("triton", "pytorch-triton", "triton-windows"):
        try:
            version = re.match(r"(\d+)\.(\d+)", importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            continue
        if version is not None:
            return (int(version[1]), int(version[2])) >= LEAST_TRITON
    return False


@cache
def kernels_serve(device: torch.device, *dims: int) -> bool:
    """Whether the cache is read by kernels there, for heads of these widths; says once if a GPU is left to PyTorch."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    if capability(device) < LEAST_CAPABILITY:
        logger.warning("%s: compute capability below 8.0, the cache is read by plain PyTorch", device)
        return False
    if not triton_serves():
        least = ".".join(map(str, LEAST_TRITON))
        logger.warning("triton %s or newer is not installed: the cache is read by plain PyTorch", least)
        return False
    if any(not LEAST_DIM <= dim <= MOST_DIM for dim in dims):
        logger.warning("heads of %s coordinates: the cache is read by plain PyTorch", max(dims))
        return False
    return True
