"""What users type (sizes, dtypes) as values the program computes with; the only file that reads the environment.

Nothing heavy is imported here, so that the command line can print its help at once.
"""

import os
import re
from fractions import Fraction
from pathlib import Path

from streamer.errors import OptionError

KIB, MIB, GIB, TIB = 2**10, 2**20, 2**30, 2**40

# Rates are printed in decimal units, as data sheets give them.
GB = 10**9

# A bare letter means the binary unit: people who type 8G for a graphics card mean the 8 GiB that it is sold with.
_BYTES_PER_UNIT = {
    "b": 1,
    "k": KIB,
    "kib": KIB,
    "kb": 10**3,
    "m": MIB,
    "mib": MIB,
    "mb": 10**6,
    "g": GIB,
    "gib": GIB,
    "gb": GB,
    "t": TIB,
    "tib": TIB,
    "tb": 10**12,
}
# How weights are kept and moved.
CODECS = AUTO_CODEC, RAW, LOSSLESS = ("auto", "raw", "lossless")

_SIZE = re.compile(r"(\d+(?:\.\d+)?|\.\d+)\s*([a-z]+)", re.ASCII)

_DTYPES = {
    "auto": "auto",
    "bfloat16": "bfloat16",
    "bf16": "bfloat16",
    "float16": "float16",
    "fp16": "float16",
    "half": "float16",
    "float32": "float32",
    "fp32": "float32",
    "float": "float32",
}


def parse_size(size: str | int) -> int:
    """The number of bytes that a size stands for.

    Args:
        size: text such as "8GiB", "24GB", "512MiB" or "1.5G" (a bare K, M, G or T is the binary unit; letter case and
            a space before the unit do not matter), or an int, which is bytes already; >= 0.
    Returns:
        bytes, a fraction of a byte dropped.
    Raises:
        OptionError: no number with a known unit, or negative.
    Source: own.
    """
    if isinstance(size, int) and not isinstance(size, bool):
        if size < 0:
            raise OptionError(f"a size cannot be negative, got {size} bytes")
        return size
    match = _SIZE.fullmatch(size.strip().lower()) if isinstance(size, str) else None
    if match is None or match[2] not in _BYTES_PER_UNIT:
        raise OptionError(f"{size!r} is not a size: write a number and a unit, as in 8GiB, 24GB, 512MiB or 1.5G")
    # Fraction, not float: 4.1 * 10**9 would come out one byte short.
    return int(Fraction(match[1]) * _BYTES_PER_UNIT[match[2]])


def format_size(size_bytes: int) -> str:
    """A size as people read it, in the largest binary unit up to GiB, such as "7.6 GiB".

    Args:
        size_bytes: bytes; a negative number keeps its sign.
    Returns:
        one decimal and the unit; whole bytes below 1 KiB.
    Source: own.
    """
    for unit, unit_bytes in (("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        # Half of the last digit printed is allowed for, else 1 GiB less a byte would read "1024.0 MiB".
        if abs(size_bytes) >= unit_bytes * (1 - 0.05 / 1024):
            return f"{size_bytes / unit_bytes:.1f} {unit}"
    return f"{size_bytes} B"


def parse_dtype(name: str) -> str:
    """The full name of a dtype in which a model can be computed.

    Args:
        name: "auto" (as the checkpoint is stored), "bfloat16", "float16", "float32" or a usual short form ("bf16",
            "fp16", "half", "fp32", "float"); letter case does not matter.
    Returns:
        "auto", "bfloat16", "float16" or "float32".
    Raises:
        OptionError: any other name.
    Source: own.
    """
    dtype = _DTYPES.get(name.strip().lower())
    if dtype is None:
        raise OptionError(f"{name!r} is not a dtype to compute in: choose auto, bfloat16, float16 or float32")
    return dtype


def format_coded_share(share: float, *, is_likely: bool) -> str:
    """The bytes of coded weights over those of the weights, for users; is_likely: before they have been packed."""
    text = f"{100 * share:.1f} % of their bytes"
    return f"likely {text}, which packing will show" if is_likely else text


def cache_dir() -> Path:
    """The folder where tq-stream keeps what it makes (converted models, measurements); it may not exist yet.

    Returns:
        $TQ_STREAM_CACHE, else $XDG_CACHE_HOME/tq-stream, else ~/.cache/tq-stream.
    Source: own; a relative XDG_CACHE_HOME is ignored, as the XDG base directory specification asks.
    """
    own = os.environ.get("TQ_STREAM_CACHE", "")
    if own:
        return Path(own).expanduser().absolute()
    xdg = os.environ.get("XDG_CACHE_HOME", "")
    if xdg and Path(xdg).is_absolute():
        return Path(xdg) / "tq-stream"
    return Path.home() / ".cache" / "tq-stream"


def packed_dir() -> Path:
    """The folder of the cache in which packed weights are kept."""
    return cache_dir() / "packed"


def offline_from_environment() -> bool:
    """Whether the environment forbids the network, by HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE.

    Returns:
        True if either is 1, on, yes or true in any letter case (the values that huggingface_hub accepts).
    Source: own.
    """
    names = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    return any(os.environ.get(name, "").strip().lower() in {"1", "on", "yes", "true"} for name in names)


def configures_allocator() -> bool:
    """Whether the user has settings of torch's GPU allocator in the environment."""
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
    return any(os.environ.get(name, "").strip() for name in names)
