"""Runtime: a model assembled for one plan, with the memory that it holds."""

import logging
import platform
import sys
import weakref
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from streamer.architecture import ABORT_PASS, Architecture, read_parameter
from streamer.checkpoint import Checkpoint
from streamer.model import RunSettings, StreamedLayer, assemble
from streamer.options import configures_allocator
from streamer.plan import CONTEXT_BYTES, CacheSettings, Plan
from streamer.rates import LINK_BYTES, link_rate
from streamer.stats import RunStats
from streamer.weights import DeviceWeights, HostWeights, MappedWeights, PackedWeights, PieceReader
from turboquant import KeyBias
from turboquant.hf import TurboQuantCache, install_cache, remove_cache

logger = logging.getLogger("streamer")

# What torch's allocator takes from a segment of large blocks.
_LARGE_BLOCK_BYTES = 2 << 20

# Share of the files in the page cache from which on a first pass is faster than new memory can be page-locked.
_WARM_SHARE = 0.9


class CacheFactory:
    """Makes the caches of a model, and remembers the last one for the report.

    Args:
        like: an empty tensor of the dtype and device that caches will hold, and as many rows.
    Attributes:
        planned_tokens: what the plan has room for on a device; None grows in steps.
        capacity_tokens: allocate the next cache for that many tokens; planned_tokens unless it is set.
        last: the cache made last, and last_capacity: its capacity.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        settings: CacheSettings,
        key_biases: list[KeyBias | None],
        planned_tokens: int | None,
        like: torch.Tensor,
    ):
        self._config, self._settings, self._key_biases, self._like = config, settings, key_biases, like
        self.planned_tokens = self.capacity_tokens = planned_tokens
        self.last: TurboQuantCache | None = None
        self.last_capacity: int | None = None

    def make(self) -> TurboQuantCache:
        """A new cache; the one before is let go of first."""
        settings = self._settings
        self.last = None
        self.last_capacity = self.capacity_tokens
        self.last = TurboQuantCache(
            self._config,
            settings.bits,
            key_bits=settings.key_bits,
            value_bits=settings.value_bits,
            layer_bits=settings.layer_bits,
            protected_layers=settings.protected_layers,
            window=settings.window,
            sinks=settings.sinks,
            decay=settings.decay,
            capacity_tokens=self.capacity_tokens,
            key_biases=self._key_biases,
        )
        self.last.allocate(self._like.shape[0], self._like.dtype, self._like.device)
        return self.last


@dataclass
class Runtime:
    """A model assembled for one plan.

    Attributes:
        plan, architecture: what it was made from. model: transformers' model, ready to generate.
        weights: what its streamed modules wait for. caches: makes what generate uses.
        files: what its weights are read from, packed or not.
        device: of computation. has_cap: torch's allocator is held to the plan's budget.
        link_bytes_per_s: of copies from page-locked memory to the device, measured when it was assembled; None where
            nothing streams.
    """

    plan: Plan
    architecture: Architecture
    model: PreTrainedModel
    weights: DeviceWeights | MappedWeights
    caches: CacheFactory
    files: Checkpoint
    device: torch.device
    has_cap: bool
    link_bytes_per_s: float | None = None

    def abort(self) -> None:
        """After an error in mid-pass: every unit is where a new pass expects it."""
        self.weights.abort()
        for layer in self.architecture.layer_modules:
            cast(StreamedLayer, layer).reset()

    def close(self) -> None:
        """End copies and threads; device memory returns when the last reference to the model is dropped."""
        self.weights.close()
        remove_cache(self.model)
        self.caches.last = None
        if self.has_cap:
            torch.cuda.set_per_process_memory_fraction(1.0, self.device)


# also where the caller is in inference mode: threads of ours write to these tensors outside of it
@torch.inference_mode(mode=False)
def build_runtime(
    architecture: Architecture,
    plan: Plan,
    key_biases: list[KeyBias | None],
    checkpoint: Checkpoint,
    device: torch.device,
    stats: RunStats,
    *,
    has_cap: bool,
    packed: PackedWeights | None = None,
) -> Runtime:
    """Allocate what the plan says, and assemble the model on it.

    Args:
        architecture: its model is changed in place and belongs to the runtime from here on.
        packed: where coded units are read; stays open as long as the checkpoint.
        has_cap: hold torch's allocator to the plan's budget, less what the process takes beside it.
    """
    has_cap = has_cap and device.type == "cuda"
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        _let_segments_grow(device)
    if has_cap:
        total = torch.cuda.get_device_properties(device).total_memory
        allowed = (plan.request.vram_bytes or total) - CONTEXT_BYTES
        torch.cuda.set_per_process_memory_fraction(max(0.0, min(1.0, allowed / total)), device)
    files = packed.checkpoint if packed is not None and plan.is_coded else checkpoint
    # small weights: asked of the disk before the readers of large ones keep it busy
    checkpoint.will_need(source for p in architecture.resident for source in p.sources)
    table = read_parameter(architecture.embedding, checkpoint, architecture.model)
    weights: DeviceWeights | MappedWeights | None = None
    link = None
    try:
        if device.type == "cpu":
            known = {architecture.head.name: table} if architecture.is_tied else {}
            weights = MappedWeights(checkpoint, architecture.model, plan.units, known)
        else:
            source = _host_weights(architecture, plan, checkpoint, packed, files, device)
            weights = DeviceWeights(plan.units, plan.resident, plan.ring_bytes, source, device)
            if plan.streamed_bytes:
                # before anything else uses the link, from the slots to the ring: memory that is there anyway
                link = link_rate(device, source=source.staging.tensor[:LINK_BYTES], target=weights.ring)
            weights.start()
        model = _assembled(architecture, plan, weights, table, checkpoint, device, stats)
    except BaseException:
        if weights is not None:
            weights.close()
        if has_cap:
            torch.cuda.set_per_process_memory_fraction(1.0, device)
        raise
    planned_tokens = plan.request.context if device.type == "cuda" else None
    like = torch.empty(plan.request.batch, 0, dtype=architecture.dtype, device=device)
    caches = CacheFactory(architecture.config, plan.request.cache, key_biases, planned_tokens, like)
    install_cache(model, caches.make)
    runtime = Runtime(plan, architecture, model, weights, caches, files, device, has_cap, link)
    abort = weakref.WeakMethod(runtime.abort)

    def abort_pass() -> None:
        method = abort()
        if method is not None:
            method()

    model.__dict__[ABORT_PASS] = abort_pass
    return runtime


def _let_segments_grow(device: torch.device) -> None:
    """Ask torch's allocator for segments that grow, unless its settings are the user's own.

    Separate segments cannot be joined: activations of a prompt in chunks left 0.4 to 0.7 GB unusable between them
    [H100], beside what the plan counts. torch has a public name for this setting only in the environment, which is
    read before an engine exists.
    """
    old = getattr(torch.cuda.memory, "_set_allocator_settings", None)
    change = getattr(torch._C, "_accelerator_setAllocatorSettings", old)  # which torch 2.10 brought
    # under WSL drivers have refused such segments in the middle of a run
    is_plain_linux = sys.platform == "linux" and "microsoft" not in platform.release().lower()
    if not is_plain_linux or change is None or configures_allocator():
        return
    change("expandable_segments:True")
    try:
        torch.empty(_LARGE_BLOCK_BYTES, dtype=torch.uint8, device=device)
    except torch.OutOfMemoryError:
        return  # what comes next says so, with all it knows
    except RuntimeError as error:
        change("expandable_segments:False")
        logger.warning("GPU memory comes in separate segments, the driver has no growing ones (%s)", error)


def _host_weights(
    architecture: Architecture,
    plan: Plan,
    checkpoint: Checkpoint,
    packed: PackedWeights | None,
    files: Checkpoint,
    device: torch.device,
) -> HostWeights:
    reader = PieceReader(
        checkpoint, architecture.model, plan.units, plan.slot_bytes, direct=plan.direct_io, packed=packed
    )
    is_warm = not plan.direct_io and files.cached_share() > _WARM_SHARE
    return HostWeights(
        reader, plan.resident, plan.kept, plan.staging_bytes, plan.slot_bytes, device, keeps_late=is_warm
    )


def _assembled(
    architecture: Architecture,
    plan: Plan,
    weights: DeviceWeights | MappedWeights,
    table: torch.Tensor,
    checkpoint: Checkpoint,
    device: torch.device,
    stats: RunStats,
) -> PreTrainedModel:
    resident = {p.name: read_parameter(p, checkpoint, architecture.model).to(device) for p in architecture.resident}
    settings = RunSettings(plan.prefill_chunk, architecture.uses_own_attention)
    embedding = architecture.embedding
    announce = partial(checkpoint.will_need_rows, embedding.sources[-1]) if embedding.is_stored_as_run else None
    return assemble(architecture, plan.units, weights, resident, table, device, settings, stats, announce)


def measured_context_bytes(device: torch.device) -> int:
    """Device memory of this process beside torch's allocator (context, kernels), if it is alone on the device."""
    free, total = torch.cuda.mem_get_info(device)
    beside = total - free - torch.cuda.memory_reserved(device)
    return int(beside) if beside < 2 << 30 else CONTEXT_BYTES
