"""Runtime: a model assembled for one plan, with the memory that it holds."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from transformers import Cache, PreTrainedModel

from streamer.architecture import Architecture, read_parameter
from streamer.checkpoint import Checkpoint
from streamer.model import RunSettings, StreamedLayer, assemble
from streamer.plan import CONTEXT_BYTES, Plan
from streamer.stats import RunStats
from streamer.weights import DeviceWeights, MappedWeights, PinnedSource, StagedSource, UnitReader
from turboquant import KeyBias
from turboquant.hf import install_cache, remove_cache


@dataclass
class Runtime:
    """A model assembled for one plan.

    Attributes:
        plan, architecture: what it was made from. model: transformers' model, ready to generate.
        weights: what its streamed modules wait for. key_biases: one or None per layer.
        device: of computation.
    """

    plan: Plan
    architecture: Architecture
    model: PreTrainedModel
    weights: DeviceWeights | MappedWeights
    key_biases: list[KeyBias | None]
    device: torch.device

    def abort(self) -> None:
        """After an error in mid-pass: every unit is where a new pass expects it."""
        self.weights.abort()
        for layer in self.architecture.layer_modules:
            cast(StreamedLayer, layer).reset()

    def close(self) -> None:
        """End copies and threads; device memory returns when the last reference to the model is dropped."""
        self.weights.close()
        # refers to the model that it belongs to: without it, dropping the runtime frees the model at once
        remove_cache(self.model)


def build_runtime(
    architecture: Architecture,
    plan: Plan,
    key_biases: list[KeyBias | None],
    checkpoint: Checkpoint,
    device: torch.device,
    stats: RunStats,
    make_cache: Callable[[], Cache],
    *,
    has_cap: bool,
) -> Runtime:
    """Allocate what the plan says, and assemble the model on it.

    Args:
        architecture: its model is changed in place and belongs to the runtime from here on.
        make_cache: called by generate when the user passes no cache.
        has_cap: hold torch's allocator to the plan's budget, less what the process takes beside it.
    """
    if device.type == "cuda" and has_cap:
        total = torch.cuda.get_device_properties(device).total_memory
        allowed = (plan.request.vram_bytes or total) - CONTEXT_BYTES
        torch.cuda.set_per_process_memory_fraction(max(0.0, min(1.0, allowed / total)), device)
    table = read_parameter(architecture.embedding, checkpoint, architecture.model)
    weights: DeviceWeights | MappedWeights
    if device.type == "cpu":
        known = {architecture.head.name: table} if architecture.is_tied else {}
        weights = MappedWeights(checkpoint, architecture.model, plan.units, known)
    else:
        reader = UnitReader(checkpoint, architecture.model, plan.units)
        staged = StagedSource(reader)
        streamed = [i for i in range(len(plan.units)) if i not in plan.resident]
        source = PinnedSource(reader, streamed) if plan.host == "pinned" and streamed else staged
        weights = DeviceWeights(plan.units, plan.resident, plan.ring_bytes, source, staged, device)
    resident = {p.name: read_parameter(p, checkpoint, architecture.model).to(device) for p in architecture.resident}
    settings = RunSettings(plan.prefill_chunk, architecture.uses_own_attention)
    model = assemble(architecture, plan.units, weights, resident, table, device, settings, stats)
    install_cache(model, make_cache)
    return Runtime(plan, architecture, model, weights, key_biases, device)


def measured_context_bytes(device: torch.device) -> int:
    """Device memory of this process beside torch's allocator (context, kernels), if it is alone on the device."""
    free, total = torch.cuda.mem_get_info(device)
    beside = total - free - torch.cuda.memory_reserved(device)
    return int(beside) if beside < 2 << 30 else CONTEXT_BYTES
