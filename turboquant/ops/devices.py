"""Which devices the Triton kernels serve, and what they ask a device about."""

import importlib.util
import logging
import os
from functools import cache

import torch

logger = logging.getLogger("turboquant")

# The kernels have run in Triton's interpreter only, and been compiled for GPUs. Until their tests have passed on one,
# plain PyTorch reads the cache there too.
KERNELS_RUN_ON_GPUS = False

# The oldest compute capability that has bfloat16 in its tensor cores and asynchronous copies.
_LEAST_CAPABILITY = 80


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


def is_interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def is_capturing() -> bool:
    """Whether launches go into a CUDA graph instead of running: host state must not change then."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


@cache
def kernels_serve(device: torch.device) -> bool:
    """Whether operations on that device run as kernels; says once if a GPU is left to plain PyTorch."""
    if not KERNELS_RUN_ON_GPUS or device.type != "cuda" or torch.version.hip is not None:
        return False
    if capability(device) < _LEAST_CAPABILITY:
        logger.warning("%s: compute capability below 8.0, the cache is read by plain PyTorch", device)
        return False
    if importlib.util.find_spec("triton") is None:
        logger.warning("triton is not installed: the cache is read by plain PyTorch")
        return False
    return True
