"""Which device a name such as "cuda:1" stands for on this machine."""

import torch

from streamer.errors import OptionError


def find_device(name: str | None) -> torch.device:
    """The device that a name stands for.

    Args:
        name: "cuda", "cuda:1" or "cpu"; None = the current CUDA device if there is one, else the CPU.
    Raises:
        OptionError: no such device, or one that nothing here runs on.
    Source: own.
    """
    if name is None:
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise OptionError(f"{name!r} is not a device: write cuda, cuda:1 or cpu") from error
    if device.type not in ("cuda", "cpu"):
        raise OptionError(f"device {name!r} cannot be used: write cuda, cuda:1 or cpu")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise OptionError(f"device {name!r} was asked for and {count} CUDA devices were found: write --device cpu")
        return torch.device("cuda", device.index or 0)
    return device
