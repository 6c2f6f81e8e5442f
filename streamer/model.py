"""transformers' model with its layers replaced by ones whose weights come and go.

Composition only: a StreamedLayer owns transformers' layer and calls it, a Gate owns one large child of it, a
StreamedEmbedding and a StreamedHead own the ends. Their `forward` is the page on which waiting for bytes, computing
and releasing stand in that order.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

import torch
from torch import nn
from transformers import Cache, PreTrainedModel

from streamer.architecture import Architecture, Parameter, Unit
from streamer.errors import UnsupportedModelError
from streamer.stats import RunStats
from turboquant.hf import CausalMask, CompressedLayer

# Arguments of a layer that have one entry per token of the prompt, and the axis on which those lie.
_TOKEN_AXIS = {"position_ids": -1, "cache_position": 0, "position_embeddings": -2, "per_layer_input": 1}

# Tensor arguments of a layer that hold for all its tokens alike.
_NOT_PER_TOKEN = frozenset({"attention_mask", "past_key_values", "layer_past", "alibi"})


class Weights(Protocol):
    """What a streamed module asks of its weights (DeviceWeights, MappedWeights)."""

    blocked_s: float

    def parameter(self, unit: int, parameter: Parameter) -> torch.Tensor: ...
    def is_lent(self, unit: int) -> bool: ...
    def wait(self, unit: int) -> None: ...
    def release(self, unit: int) -> None: ...


class Gate(nn.Module):
    """A large child of a layer: its bytes are waited for just before it runs, and given back after its last use."""

    def __init__(self, child: nn.Module, weights: Weights, unit: int):
        super().__init__()
        # a tuple, so that the child's parameters are not this model's: they are views that come and go
        self._owned = (child,)
        self._weights, self._unit = weights, unit
        self.use = _Use()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_owned"][0], name)  # layers ask their children for settings

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Wait, run the child, release."""
        use = self.use
        if not use.is_open:
            if use.is_done:
                raise UnsupportedModelError(
                    f"a layer calls its part {type(self._owned[0]).__name__} twice; its bytes are gone after the first "
                    "time: this model cannot be streamed (run it with --device cpu, or whole on the GPU, with "
                    "--codec raw)"
                )
            self._weights.wait(self._unit)
            use.is_open = True
        out = self._owned[0](*args, **kwargs)
        if use.is_last:
            self._weights.release(self._unit)
            use.is_open, use.is_done = False, self._weights.is_lent(self._unit)
        return out

    @property
    def was_used(self) -> bool:
        """Whether a layer that has run has used its part as streaming needs it: once, to the end."""
        return self.use.is_done or not self._weights.is_lent(self._unit)


class _Use:
    """Where a gate is in a pass; an object of its own because setting a module's attribute costs microseconds."""

    __slots__ = ("is_done", "is_last", "is_open")

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """As before a pass."""
        self.is_open, self.is_last, self.is_done = False, True, False


class StreamedLayer(nn.Module):
    """One decoder layer. A long prompt goes through it in chunks: its weights cross the link once per prompt."""

    def __init__(self, layer: nn.Module, index: int, gates: Sequence[Gate], settings: "RunSettings", stats: RunStats):
        super().__init__()
        self._owned = (layer,)
        self._index, self._gates, self._settings, self._stats = index, tuple(gates), settings, stats
        self._signature = inspect.signature(layer.forward)
        if "hidden_states" not in self._signature.parameters:
            raise UnsupportedModelError(
                f"{type(layer).__name__} takes no hidden_states: layers of this model cannot be streamed"
            )

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_owned"][0], name)  # models ask their layers for settings

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' layer, over all tokens or chunk by chunk."""
        call = self._named(args, kwargs)
        hidden = call["hidden_states"]
        if self._index == 0:
            self._stats.on_pass(hidden.shape[1], self._blocked_s())
        chunks = self._chunks(call, hidden.shape[1])
        if len(chunks) == 1:
            out = self._owned[0](**call)
            self._finish()
            return out
        for gate in self._gates:
            gate.use.is_last = False
        cache = _cache_of(call)
        # in place: rows of a chunk that has been read are not needed again; but the model may keep the embedding
        out = torch.empty_like(hidden) if self._index == 0 else hidden
        try:
            with _prompt(cache, self._index, hidden.shape[1]):
                past = _cached_tokens(cache, self._index)
                for number, (start, stop) in enumerate(chunks):
                    if stop == hidden.shape[1]:
                        for gate in self._gates:
                            gate.use.is_last = True
                    part = self._owned[0](**_slice(call, start, stop, hidden.shape[1], past))
                    out[:, start:stop] = part[0] if isinstance(part, tuple) else part
                    self._stats.on_chunk(self._index, number + 1, len(chunks))
        finally:
            for gate in self._gates:
                gate.use.is_last = True
        self._finish()
        return (out,) if isinstance(part, tuple) else out

    def reset(self) -> None:
        """After an error in mid-pass: no part is open."""
        for gate in self._gates:
            gate.use.reset()

    def _named(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        if len(args) == 1:  # as nearly all models call their layers
            kwargs["hidden_states"] = args[0]
            return kwargs
        bound = self._signature.bind(*args, **kwargs)
        named: dict[str, Any] = {}
        for name, value in bound.arguments.items():
            if self._signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
                named.update(value)
            else:
                named[name] = value
        return named

    def _chunks(self, call: dict[str, Any], tokens: int) -> list[tuple[int, int]]:
        size = self._settings.prefill_chunk
        cache = _cache_of(call)
        # chunks of a prompt see each other through the cache only
        if tokens <= size or not self._settings.may_chunk or not isinstance(cache, Cache) or cache.is_compileable:
            return [(0, tokens)]
        mask = call.get("attention_mask")
        is_full = mask is None or (isinstance(mask, CausalMask) and mask.sliding_window is None)
        if is_full and any(cache.is_sliding[self._index : self._index + 1]):
            self._stats.note(
                "the config states a sliding window that the model's attention does not use: prompts go through in "
                "one chunk"
            )
            return [(0, tokens)]
        for name, value in call.items():
            if name == "hidden_states" or name in _TOKEN_AXIS or name in _NOT_PER_TOKEN:
                continue
            if isinstance(value, torch.Tensor) and tokens in value.shape:
                self._stats.note(f"layer argument {name} cannot be split: prompts go through in one chunk")
                return [(0, tokens)]
        return [(start, min(start + size, tokens)) for start in range(0, tokens, size)]

    def _finish(self) -> None:
        for gate in self._gates:
            if not gate.was_used:
                raise UnsupportedModelError(
                    f"layer {self._index} did not call its part {type(gate._owned[0]).__name__}, so nothing waited for "
                    "its bytes: this model cannot be streamed (run it with --device cpu, or whole on the GPU, with "
                    "--codec raw)"
                )
            gate.use.reset()
        self._stats.on_layer(self._index, self._blocked_s())

    def _blocked_s(self) -> float:
        """Seconds that this thread has waited for readers of weights since the model was assembled."""
        return self._gates[0]._weights.blocked_s if self._gates else 0.0


class RunSettings:
    """What may change between two generations of one assembled model."""

    def __init__(self, prefill_chunk: int, may_chunk: bool):
        self.prefill_chunk, self.may_chunk = prefill_chunk, may_chunk


@contextmanager
def _prompt(cache: Any, index: int, tokens: int) -> Iterator[None]:
    """Tell a compressed layer that `tokens` tokens come in chunks and read each other uncompressed."""
    layer = cache.layers[index] if isinstance(cache, Cache) and index < len(cache.layers) else None
    with ExitStack() as stack:
        if isinstance(layer, CompressedLayer):
            stack.enter_context(layer.prompt(tokens))
        yield


def _cache_of(call: dict[str, Any]) -> Any:
    """The cache among a layer's arguments, under the name that the family gives it."""
    return call.get("past_key_values", call.get("layer_past"))


def _cached_tokens(cache: Any, index: int) -> int:
    return int(cache.get_seq_length(index)) if isinstance(cache, Cache) else 0


def _slice(call: dict[str, Any], start: int, stop: int, tokens: int, past: int) -> dict[str, Any]:
    """The arguments of a layer for the tokens [start, stop) of a prompt of `tokens`, `past` tokens being cached."""
    part = dict(call)
    part["hidden_states"] = call["hidden_states"][:, start:stop]
    for name, axis in _TOKEN_AXIS.items():
        if name in call:
            part[name] = _narrow(call[name], axis, start, stop, tokens)
    mask = call.get("attention_mask")
    if isinstance(mask, CausalMask):
        part["attention_mask"] = mask.first_columns(past + stop)
    elif isinstance(mask, torch.Tensor) and mask.ndim == 4:
        part["attention_mask"] = mask[:, :, start:stop, : mask.shape[-1] - (tokens - stop)]
    return part


def _narrow(value: Any, axis: int, start: int, stop: int, tokens: int) -> Any:
    if isinstance(value, (tuple, list)):
        return type(value)(_narrow(item, axis, start, stop, tokens) for item in value)
    if isinstance(value, torch.Tensor) and value.shape[axis] == tokens:
        return value.narrow(axis, start, stop - start)
    return value


class StreamedEmbedding(nn.Module):
    """The embedding: rows of the tokens at hand are gathered on the host, where the table stays.

    The class's own forward runs on the gathered rows, so scaled embeddings (Gemma) need no code here.
    """

    def __init__(
        self,
        embedding: nn.Module,
        table: torch.Tensor,
        device: torch.device,
        settings: RunSettings,
        announce: Callable[[torch.Tensor], None] | None = None,
    ):
        super().__init__()
        self._owned = (embedding, table)
        self._device, self._settings, self._announce = device, settings, announce
        embedding.padding_idx = None  # type: ignore[assignment]  # matters to gradients only, and counts table rows
        # no values: for code that asks the model, or this table, for its device and dtype
        self.weight = nn.Parameter(
            torch.empty(0, table.shape[1], dtype=table.dtype, device=device), requires_grad=False
        )
        self.embedding_dim = table.shape[1]
        self.num_embeddings = table.shape[0]

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        """token_ids [B, T] on any device -> hidden [B, T, E] on the model's."""
        embedding, table = self._owned
        on_host = token_ids.cpu()
        if self._announce is not None and on_host.numel() > 1:
            self._announce(on_host)
        out: torch.Tensor | None = None
        step = max(self._settings.prefill_chunk, 1)
        for start in range(0, on_host.shape[1], step):
            part = on_host[:, start : start + step]
            rows = table.index_select(0, part.flatten()).to(self._device)  # [B * t, E]
            embedding._parameters["weight"] = nn.Parameter(rows, requires_grad=False)
            hidden = embedding(torch.arange(rows.shape[0], device=self._device).view(part.shape))
            if part.shape == on_host.shape:
                out = hidden
                break
            if out is None:
                out = hidden.new_empty(*on_host.shape, hidden.shape[-1])
            out[:, start : start + step] = hidden
        embedding._parameters["weight"] = None
        if out is None:
            raise ValueError("an embedding was asked for no tokens")
        return out


class StreamedHead(nn.Module):
    """The output matrix, in one piece or in slices of rows that go through the ring."""

    def __init__(self, head: nn.Module, parameter: Parameter, weights: Weights, units: Sequence[tuple[int, Unit]]):
        super().__init__()
        bias = getattr(head, "bias", None)
        self.bias = bias
        self._weights = weights
        self._slices = [(unit, part.rows, weights.parameter(unit, parameter)) for unit, part in units]
        self.out_features = parameter.shape[0]

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [B, T, E] -> logits [B, T, V]."""
        parts = []
        for unit, rows, weight in self._slices:
            self._weights.wait(unit)
            bias = self.bias
            if bias is not None and rows is not None:
                bias = bias[rows[0] : rows[1]]
            parts.append(nn.functional.linear(hidden, weight, bias))
            self._weights.release(unit)
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


class ChunkedNorm(nn.Module):
    """The norm after the last layer, over a long prompt in chunks: its float32 copy would be the largest tensor."""

    def __init__(self, norm: nn.Module, settings: RunSettings):
        super().__init__()
        self.norm, self._settings = norm, settings

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [B, T, E], overwritten when it is longer than a chunk."""
        size = self._settings.prefill_chunk
        if hidden.ndim != 3 or hidden.shape[1] <= size:
            return self.norm(hidden)  # type: ignore[no-any-return]
        for start in range(0, hidden.shape[1], size):
            hidden[:, start : start + size] = self.norm(hidden[:, start : start + size])
        return hidden


def assemble(
    architecture: Architecture,
    units: Sequence[Unit],
    weights: Weights,
    resident: dict[str, torch.Tensor],
    table: torch.Tensor,
    device: torch.device,
    settings: RunSettings,
    stats: RunStats,
    announce_rows: Callable[[torch.Tensor], None] | None = None,
) -> PreTrainedModel:
    """Put streamed modules into the architecture's model and bind every parameter.

    Args:
        units: of a pass, in order; those of the head last.
        weights: where their bytes are.
        resident: value of each parameter that is in no unit, by name, on the device.
        table: [V, E] embedding table on the host. announce_rows: told of the rows that a prompt is about to read.
    Returns:
        architecture.model, changed in place: no parameter of it is on meta.
    """
    model = architecture.model
    for name, value in resident.items():
        _bind(model, name, value)
    moved: dict[int, torch.Tensor] = {}  # a buffer that two modules share stays shared
    for name, buffer in list(model.named_buffers(remove_duplicate=False)):
        owner, _, leaf = name.rpartition(".")
        model.get_submodule(owner)._buffers[leaf] = moved.setdefault(id(buffer), buffer.to(device))
    index_of = {(unit.name, unit.rows): i for i, unit in enumerate(units)}
    layers = architecture.layer_modules
    for number, layer_units in enumerate(architecture.layers):
        layer = layers[number]
        gates = []
        for unit in layer_units:
            position = index_of[unit.name, unit.rows]
            for parameter in unit.parameters:
                _bind(model, parameter.name, weights.parameter(position, parameter))
            child_name = unit.name.rpartition(".")[2]
            gate = Gate(getattr(layer, child_name), weights, position)
            gates.append(gate)
            layer._modules[child_name] = gate
        layers[number] = StreamedLayer(layer, number, gates, settings, stats)
    head_units = [(i, unit) for i, unit in enumerate(units) if unit.rows is not None]
    embedding_name = architecture.embedding.name.rpartition(".")[0]
    head_name = architecture.head.name.rpartition(".")[0]
    embedding, head = model.get_submodule(embedding_name), model.get_submodule(head_name)
    _replace(model, embedding_name, StreamedEmbedding(embedding, table, device, settings, announce_rows))
    _replace(model, head_name, StreamedHead(head, architecture.head, weights, head_units))
    decoder = model.get_submodule(architecture.layer_path.rpartition(".")[0])
    children = list(decoder.named_children())
    first_after = 1 + next(i for i, (_, child) in enumerate(children) if child is layers)
    for child_name, child in children[first_after:]:
        if "norm" in type(child).__name__.lower():
            decoder._modules[child_name] = ChunkedNorm(child, settings)
    return model


def _bind(model: nn.Module, name: str, value: torch.Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    if leaf in module._buffers:
        module._buffers[leaf] = value
    else:
        module._parameters[leaf] = nn.Parameter(value, requires_grad=False)


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    owner, _, leaf = name.rpartition(".")
    model.get_submodule(owner)._modules[leaf] = module
