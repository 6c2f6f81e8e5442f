"""Finds the constant part of each layer's keys by asking the model's own attention code for it.

The attention of a layer is called with zero hidden states: what it then hands to its cache is its key bias, turned
by its own rotary embedding. Separate and fused projections, partial rotary and YaRN factors need no knowledge of
ours, and the formula that we subtract is used only after it has reproduced those keys at several positions.
"""

import inspect
import logging
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import nn
from torch.func import functional_call
from transformers import PreTrainedConfig

from turboquant.errors import ShapeError
from turboquant.key_bias import KeyBias

logger = logging.getLogger("turboquant")

# Where the formula is compared with the model's own keys.
_POSITIONS = (0, 1, 2, 7, 63, 500, 2000)

# A norm after the projection makes its bias depend on the text: nothing constant is left to take out.
_KEY_NORMS = ("k_norm", "k_layernorm", "key_layernorm", "qk_norm")

# Frequencies that change with the length of the text: R_t of an old token would not stay what was subtracted.
_MOVING_ROPE = ("dynamic", "longrope", "su")


_CACHE_ARGUMENTS = ("past_key_values", "layer_past", "past_key_value")


class _KeysSeen(Exception):
    """Carries the keys out of the attention's forward: nothing after the cache update is needed."""

    def __init__(self, keys: torch.Tensor):
        super().__init__("keys seen")
        self.keys = keys


class _Recorder:
    """A cache that only looks at the keys it is given."""

    is_compileable = False

    def update(self, keys: torch.Tensor, values: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        raise _KeysSeen(keys)

    def get_seq_length(self, *args: Any) -> int:
        return 0


def decoder_layers(model: nn.Module, num_layers: int) -> nn.ModuleList | None:
    """The ModuleList that holds the decoder's layers, wherever the family keeps it; None if there is none."""
    for _, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == num_layers:
            return module
    return None


def attention_of(layer: nn.Module) -> nn.Module | None:
    """The self-attention module of a decoder layer: the innermost of such a name that is handed the cache."""
    for name, child in layer.named_children():
        if "attn" in name.lower() or "attention" in name.lower():  # norms and projections can be called so too
            nested = attention_of(child)
            if nested is not None:
                return nested
            if _cache_argument(child) is not None:
                return child
    return None


def _cache_argument(module: nn.Module) -> str | None:
    """The name under which a module's forward takes the cache, or None."""
    accepted = inspect.signature(module.forward).parameters
    return next((name for name in _CACHE_ARGUMENTS if name in accepted), None)


def find_key_biases(model: nn.Module) -> list[KeyBias | None]:
    """One KeyBias (or None) for each layer of a transformers decoder whose weights are in memory."""
    config = model.config.get_text_config(decoder=True)  # type: ignore[operator,union-attr]  # untyped attribute
    layers = decoder_layers(model, config.num_hidden_layers)
    if layers is None:
        return [None] * config.num_hidden_layers
    rotary = rotary_of(model)
    found = []
    for i, layer in enumerate(layers):
        attention = attention_of(layer)
        biases = {}
        if attention is not None:
            biases = {n: p.detach() for n, p in attention.named_parameters() if n.endswith("bias")}
        found.append(key_bias_of(attention, rotary, config, i, biases) if attention is not None else None)
    return found


def rotary_of(model: nn.Module) -> nn.Module | None:
    """The rotary embedding that the decoder shares between its layers, or None."""
    for name, module in model.named_modules():
        if name.rsplit(".", 1)[-1] in ("rotary_emb", "rotary_embedding"):
            return cast(nn.Module, module)
    return None


def key_bias_of(
    attention: nn.Module,
    rotary: nn.Module | None,
    config: PreTrainedConfig,
    layer: int,
    biases: Mapping[str, torch.Tensor],
) -> KeyBias | None:
    """The KeyBias of one layer.

    Args:
        attention: the layer's attention module; its weights are not read and may be on the meta device.
        rotary: the decoder's rotary embedding, or None for other position schemes.
        config: the decoder's config. layer: its index.
        biases: values of the module's parameters whose name ends with "bias".
    Returns:
        float32 tensors on the CPU; None when keys have no constant part, or none that this can take out (then the
        block means alone serve, and one line says so).
    """
    if any(bias.is_meta for bias in biases.values()):
        logger.warning("layer %d: its biases are not in memory; block means only", layer)
        return None
    if not any("o_proj" not in n and "dense" not in n and bool(b.any()) for n, b in biases.items()):
        return None
    if any(getattr(attention, name, None) not in (None, False) for name in _KEY_NORMS):
        return None
    rope = getattr(config, "rope_parameters", None) or {}
    if rotary is not None and any(kind in str(rope.get("rope_type", "default")) for kind in _MOVING_ROPE):
        logger.warning(
            "layer %d: rotary type %s changes with length; its key bias stays in the codes (block means only)",
            layer,
            rope.get("rope_type"),
        )
        return None
    try:
        return _probe(attention, rotary, config, layer, biases)
    except (TypeError, AttributeError, RuntimeError, KeyError, IndexError, ShapeError) as error:
        logger.warning("layer %d: the key bias could not be read (%s); block means only", layer, error)
        return None


def _probe(
    attention: nn.Module,
    rotary: nn.Module | None,
    config: PreTrainedConfig,
    layer: int,
    biases: Mapping[str, torch.Tensor],
) -> KeyBias | None:
    keys_at = _key_function(attention, biases)
    positions = torch.tensor([_POSITIONS])
    if rotary is None:
        keys = keys_at(None, positions)[0]  # [G, P, D]
        if not bool(keys.any()) or not torch.allclose(keys, keys[:, :1].expand_as(keys)):
            return None
        return KeyBias(keys[:, 0].clone(), torch.empty(0))
    cos, sin = _tables(rotary, config, layer, positions)
    plain = keys_at((torch.ones_like(cos), torch.zeros_like(sin)), positions)[0]
    if not bool(plain.any()):
        return None
    bias = plain[:, 0].clone()  # [G, D]
    target = keys_at((cos, sin), positions)[0]  # [G, P, D]
    for candidate in _candidates(bias, cos[0], sin[0]):
        if (candidate.vectors(positions[0]) - target).abs().max() <= 1e-3 * bias.abs().max():
            return candidate
    logger.warning("layer %d: its rotary embedding has a form that we do not know; block means only", layer)
    return None


def _candidates(bias: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> list[KeyBias]:
    """Ways to read the tables [P, R]: halves or neighbours paired, frequencies once or twice in a row."""
    at_one = _POSITIONS.index(1)
    scaling = float(torch.hypot(cos[at_one], sin[at_one]).mean())
    angles = torch.atan2(sin[at_one], cos[at_one]).double()
    width, found = angles.numel(), []
    for frequencies in (angles[: width // 2], angles[0::2], angles):
        for interleaved in (False, True):
            if 2 * frequencies.numel() <= bias.shape[-1]:
                found.append(KeyBias(bias, frequencies.float(), scaling, interleaved))
    return found


def _tables(
    rotary: nn.Module, config: PreTrainedConfig, layer: int, positions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    kwargs: dict[str, Any] = {}
    if "layer_type" in inspect.signature(rotary.forward).parameters:
        kwargs["layer_type"] = config.layer_types[layer]
    device = next((b.device for b in rotary.buffers()), torch.device("cpu"))
    cos, sin = rotary(torch.zeros(1, 1, 1, device=device), positions.to(device), **kwargs)
    return cos.float().cpu(), sin.float().cpu()


def _key_function(
    attention: nn.Module, biases: Mapping[str, torch.Tensor]
) -> Callable[[tuple[torch.Tensor, torch.Tensor] | None, torch.Tensor], torch.Tensor]:
    """A function (cos and sin, positions [1, P]) -> the keys [1, G, P, D] that zero hidden states give."""
    # zero hidden states make every weight matrix irrelevant, so one input column stands for all of them
    parameters = {}
    for name, parameter in attention.named_parameters():
        if name in biases:
            parameters[name] = biases[name].float().cpu()
        elif parameter.ndim == 2:
            owner = attention.get_submodule(name.rpartition(".")[0])
            is_transposed = type(owner).__name__ == "Conv1D"  # GPT-2's linear layer keeps [in, out]
            parameters[name] = (
                torch.zeros(1, parameter.shape[1]) if is_transposed else torch.zeros(parameter.shape[0], 1)
            )
        else:
            parameters[name] = torch.ones(parameter.shape)
    accepted = inspect.signature(attention.forward).parameters

    def keys_at(tables: tuple[torch.Tensor, torch.Tensor] | None, positions: torch.Tensor) -> torch.Tensor:
        hidden = torch.zeros(1, positions.shape[1], 1)
        kwargs: dict[str, Any] = {"attention_mask": None, "position_embeddings": tables, "position_ids": positions}
        kwargs = {name: value for name, value in kwargs.items() if name in accepted}
        cache_name = _cache_argument(attention)
        if cache_name is None:
            raise TypeError(f"{type(attention).__name__}.forward takes no cache")
        kwargs[cache_name] = _Recorder()
        try:
            functional_call(attention, parameters, (hidden,), kwargs)
        except _KeysSeen as seen:
            return seen.keys
        raise TypeError(f"{type(attention).__name__} did not update its cache")

    return keys_at
