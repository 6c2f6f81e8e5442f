"""tq-stream doctor: what this machine has, how fast it is, and what will work on it."""

import json
import os
import platform
import shutil
import tempfile
import threading
import urllib.error
import urllib.request
from importlib import metadata
from pathlib import Path
from typing import Any

import click
import psutil

from streamer.cli.group import CONTEXT_SETTINGS
from streamer.interrupts import ends_at_once
from streamer.options import GB, cache_dir, format_size, offline_from_environment

_PACKAGES = ("tq-stream", "torch", "transformers", "accelerate", "safetensors", "triton")

_HUB_TIMEOUT_S = 2.0


@click.command(context_settings=CONTEXT_SETTINGS)
@click.option("--json", "as_json", is_flag=True, allow_from_autoenv=False, help="Print JSON; sizes are bytes.")
def doctor(as_json: bool) -> None:
    """Say what this machine has and what will work on it.

    Versions, GPUs and the speed of the link to them, memory, the cache folder and the hub. The exit status is 0
    whatever is found.

    \b
    Examples:
      tq-stream doctor
      tq-stream doctor --json
    """
    findings = examine()
    click.echo(json.dumps(findings) if as_json else describe(findings))


def examine() -> dict[str, Any]:
    """What the machine has, as plain data: versions, gpus, cuda_fault, memory, cache, hub_cache, hub, works."""
    versions = {"python": platform.python_version()} | {name: _version(name) for name in _PACKAGES}
    gpus, fault = _gpus()
    memory = psutil.virtual_memory()
    findings: dict[str, Any] = {
        "versions": versions,
        "gpus": gpus,
        "cuda_fault": fault,
        "memory": {"total_bytes": memory.total, "free_bytes": memory.available},
        "cache": _folder(cache_dir()),
        "hub_cache": _folder(_hub_cache()),
        "hub": _hub(),
    }
    return findings | {"works": _works(findings)}


def describe(findings: dict[str, Any]) -> str:
    """The findings of `examine` as lines to read."""
    versions = findings["versions"]
    lines = ["versions   " + ", ".join(f"{name} {version or 'missing'}" for name, version in versions.items())]
    for gpu in findings["gpus"]:
        lines.append(
            f"GPU {gpu['index']}      {gpu['name']}, {format_size(gpu['total_bytes'])}, "
            f"{format_size(gpu['free_bytes'])} free, compute capability {gpu['capability']}"
        )
        if gpu["link_fault"] is None:
            lines.append(
                f"           host to GPU: {gpu['pinned_gb_per_s']:.1f} GB/s from page-locked memory, "
                f"{gpu['pageable_gb_per_s']:.1f} GB/s from pageable memory"
            )
        else:
            lines.append(f"           host to GPU: not measured ({gpu['link_fault']})")
    if not findings["gpus"]:
        lines.append(f"GPU        none: {findings['cuda_fault']}")
    memory = findings["memory"]
    lines.append(f"memory     {format_size(memory['total_bytes'])}, {format_size(memory['free_bytes'])} free")
    lines.append(f"cache      {_described(findings['cache'])}")
    lines.append(f"downloads  {_described(findings['hub_cache'])}")
    lines.append(f"hub        {findings['hub']['state']}")
    return "\n".join([*lines, "", *(f"{work['what']}: {work['state']}" for work in findings["works"])])


def _described(folder: dict[str, Any]) -> str:
    if folder["fault"] is not None:
        return f"{folder['path']}, not writable ({folder['fault']})"
    return f"{folder['path']}, writable, {format_size(folder['free_bytes'])} free on its disk"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _gpus() -> tuple[list[dict[str, Any]], str | None]:
    """The CUDA devices, and why there is none."""
    try:
        with ends_at_once():
            import torch
    except (ImportError, OSError) as error:  # a library that torch is linked with is missing
        return [], f"torch cannot be imported ({_first_line(error)})"
    if torch.version.cuda is None:
        return [], "this torch is built without CUDA"
    if not torch.cuda.is_available():
        return [], f"torch {torch.__version__} sees no CUDA device; is a driver installed, is CUDA_VISIBLE_DEVICES set?"
    from streamer.rates import link_rate

    gpus = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        gpu: dict[str, Any] = {
            "index": index,
            "name": properties.name,
            "total_bytes": properties.total_memory,
            "free_bytes": None,
            "capability": f"{properties.major}.{properties.minor}",
            "pinned_gb_per_s": None,
            "pageable_gb_per_s": None,
            "link_fault": None,
        }
        try:
            gpu["free_bytes"] = torch.cuda.mem_get_info(index)[0]
            gpu["pinned_gb_per_s"] = link_rate(torch.device("cuda", index), is_pinned=True) / GB
            gpu["pageable_gb_per_s"] = link_rate(torch.device("cuda", index), is_pinned=False) / GB
        except RuntimeError as error:  # no memory left on it, say
            gpu["free_bytes"] = gpu["free_bytes"] or 0
            gpu["link_fault"] = _first_line(error)
        gpus.append(gpu)
    return gpus, None


def _hub_cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def _folder(path: Path) -> dict[str, Any]:
    """A folder that may have to be made first: free bytes of its disk, and why nothing can be written to it."""
    existing = next(parent for parent in (path, *path.parents) if parent.exists())
    found: dict[str, Any] = {"path": str(path), "free_bytes": None, "fault": None}
    if not existing.is_dir():
        return found | {"fault": f"{existing} is a file"}
    try:
        found["free_bytes"] = shutil.disk_usage(existing).free
        # a trial, because permissions alone do not tell: a disk may be mounted read-only
        with tempfile.TemporaryFile(dir=existing):
            return found
    except OSError as error:
        return found | {"fault": error.strerror or str(error)}


def _hub() -> dict[str, Any]:
    """Whether the hub answers; nothing is sent when the environment forbids the network."""
    from huggingface_hub import constants

    endpoint = constants.ENDPOINT
    if offline_from_environment():
        state = "offline: HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set, nothing was sent"
        return {"endpoint": endpoint, "is_offline": True, "is_reachable": None, "state": state}
    fault = _contact(endpoint)
    state = f"{endpoint} answers" if fault is None else f"{endpoint} cannot be reached ({fault})"
    return {"endpoint": endpoint, "is_offline": False, "is_reachable": fault is None, "state": state}


def _contact(endpoint: str) -> str | None:
    """Why a server does not answer within the time limit; None when it does."""
    faults: list[str | None] = []
    silence = f"no answer in {_HUB_TIMEOUT_S:g} s"

    def ask() -> None:
        try:
            with urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=_HUB_TIMEOUT_S):
                faults.append(None)
        except urllib.error.HTTPError:  # an answer all the same
            faults.append(None)
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", error)
            faults.append(silence if isinstance(reason, TimeoutError) else _first_line(reason))

    # in a thread, because looking up a name has a time limit of its own that can be much longer
    worker = threading.Thread(target=ask, daemon=True)
    worker.start()
    worker.join(_HUB_TIMEOUT_S)
    return faults[0] if faults else silence


def _kernels(capability: str, installed: str) -> str:
    """Whether kernels read a compressed cache on a GPU of that compute capability."""
    # not at the top: torch comes along, which doctor may be asked about because it cannot be imported
    from turboquant.ops.devices import LEAST_CAPABILITY, LEAST_TRITON, triton_serves

    slowly = "plain PyTorch reads a compressed cache, slowly"
    if not triton_serves():
        return f"no, {installed} and they need {'.'.join(map(str, LEAST_TRITON))}: {slowly}"
    major, minor = (int(part) for part in capability.split("."))
    if 10 * major + minor < LEAST_CAPABILITY:
        return f"no, compute capability {capability} is below {LEAST_CAPABILITY / 10:.1f}: {slowly}"
    return f"yes, they read a compressed cache ({installed})"


def _works(findings: dict[str, Any]) -> list[dict[str, str]]:
    gpus, memory = findings["gpus"], findings["memory"]
    if gpus:
        streaming = f"yes, on {gpus[0]['name']}; plan with: tq-stream memory-report MODEL"
    else:
        streaming = "no, there is no GPU; plans for one can be made: tq-stream memory-report MODEL --vram 24GiB"
    triton = findings["versions"]["triton"]
    installed = f"triton {triton} is installed" if triton else "triton is not installed"
    kernels = _kernels(gpus[0]["capability"], installed) if gpus else f"not needed without a GPU ({installed})"
    hub, places = findings["hub"], (findings["cache"], findings["hub_cache"])
    blocked = [place for place in places if place["fault"] is not None]
    if blocked:
        names = " and ".join(place["path"] for place in blocked)
        downloads = f"no, {names} cannot be written to; set TQ_STREAM_CACHE or HF_HOME to a folder that can"
    elif hub["is_offline"]:
        downloads = "no, the network is forbidden; models in folders and in the cache work"
    elif not hub["is_reachable"]:
        downloads = "no, the hub cannot be reached; models in folders and in the cache work"
    else:
        downloads = "yes"
    return [
        {"what": "GPU streaming", "state": streaming},
        {
            "what": "CPU runs",
            "state": f"yes, on {os.cpu_count()} cores; weights stay in the files, {format_size(memory['free_bytes'])} "
            "are free for the rest",
        },
        {"what": "Triton kernels", "state": kernels},
        {"what": "Downloads", "state": downloads},
    ]


def _first_line(error: object) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
