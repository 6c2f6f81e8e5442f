"""Our attention function and its mask function, and how transformers learns of them."""

import logging
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, Cache, PreTrainedModel

from turboquant.errors import StateError, UnsupportedModelError
from turboquant.hf.cache import ATTENTION_NAME, TurboQuantCache, _Handle
from turboquant.hf.dense import dense_attention
from turboquant.hf.masks import turboquant_mask

logger = logging.getLogger("turboquant")

# Arguments that would change the answer and that this function does not know how to honour.
_REFUSED = ("position_bias", "cu_seq_lens_q", "cu_seq_lens_k", "head_mask", "cache", "indices", "block_sequence_ids")


def turboquant_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: Any,
    value: Any,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention function for transformers' attention interface.

    Args:
        module: the attention module that calls. query: [B, H, T, D].
        key, value: handles of a compressed layer, or tensors [B, G, S, D] (sliding-window and 16-bit layers).
        attention_mask: what `turboquant_mask` made, or a [B, 1, T, S] mask.
        scaling: factor on the scores, D ** -0.5 when None. softcap, s_aux [H]: see ops.attend.
    Returns:
        ([B, T, H, Dv] in the dtype of query, None): weights are never formed.
    Raises:
        UnsupportedModelError: dropout, attention that is not causal, or an argument that would change the answer.
    """
    if dropout:
        raise UnsupportedModelError("the compressed cache is for inference: call model.eval() (dropout is not 0)")
    if is_causal is False or getattr(module, "is_causal", True) is False:
        raise UnsupportedModelError(f"{type(module).__name__} is not causal; the compressed cache serves decoders")
    refused = [name for name in _REFUSED if kwargs.get(name) is not None]
    if refused:
        raise UnsupportedModelError(f'attention "{ATTENTION_NAME}" does not support the argument {refused[0]}')
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if isinstance(key, _Handle):
        out = key.layer.attend(
            module, query, key.new, value.new, attention_mask, scale=scale, softcap=softcap, sink_logits=s_aux
        )
    else:
        out = dense_attention(
            module, query, key, value, attention_mask, scale=scale, softcap=softcap, sink_logits=s_aux
        )
    return out.transpose(1, 2).contiguous(), None


def register_attention() -> None:
    """Make attn_implementation="turboquant" known to transformers (attention and mask); safe to call again."""
    AttentionInterface.register(ATTENTION_NAME, turboquant_attention)
    AttentionMaskInterface.register(ATTENTION_NAME, turboquant_mask)


def wrap(model: PreTrainedModel, bits: float = 4, **options: Any) -> PreTrainedModel:
    """Give every `generate` of `model` a compressed cache, read in place by our attention.

    Args:
        model: a transformers decoder; it is changed in place (its attention, and the class that makes its cache).
        bits: see TurboQuantCache, like all further keyword options.
    Returns:
        The same model. If its code takes no attention functions, it keeps its own attention, and says so.
    Raises:
        OptionError, UnsupportedModelError: see TurboQuantCache; raised here, not at the first generate.
    """
    TurboQuantCache(model, bits, **options)
    register_attention()
    model.set_attn_implementation(ATTENTION_NAME)
    if model.config.get_text_config(decoder=True)._attn_implementation != ATTENTION_NAME:
        logger.warning(
            "%s takes no attention functions: its layers will be unpacked for each call", type(model).__name__
        )
    itself = weakref.ref(model)  # a model that refers to itself would wait for the garbage collector with its weights

    def make() -> Cache:
        present = itself()
        if present is None:
            raise StateError("the model of this cache no longer exists")
        return TurboQuantCache(present, bits, **options)

    install_cache(model, make)
    return model


def install_cache(model: PreTrainedModel, make: Callable[[], Cache]) -> None:
    """Let every `generate` of `model` that is given no cache, and asks for no kind of its own, use make()'s."""
    model._prepare_cache_for_generation = _CachePreparation(model, make)  # type: ignore[assignment]


def remove_cache(model: PreTrainedModel) -> None:
    """Undo install_cache."""
    model.__dict__.pop("_prepare_cache_for_generation", None)


class _CachePreparation:
    """Stands in for a model's `_prepare_cache_for_generation`."""

    def __init__(self, model: PreTrainedModel, make: Callable[[], Cache]):
        self._model, self._make = weakref.ref(model), make
        self._plain: Any = type(model)._prepare_cache_for_generation  # type: ignore[attr-defined]  # untyped mix-in

    def __call__(self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        has_own_kind = getattr(generation_config, "cache_implementation", None) is not None
        if (
            generation_config.use_cache is not False
            and not has_own_kind
            and model_kwargs.get("past_key_values") is None
        ):
            cache = self._make()
            if getattr(generation_config, "is_assistant", False):
                cache.activate_past_recording()  # its drafts will be taken back; generate marks only its own cache
            model_kwargs["past_key_values"] = cache
        return self._plain(self._model(), generation_config, model_kwargs, *args, **kwargs)
