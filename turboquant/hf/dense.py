"""Attention over uncompressed keys and values: the exact path of prompts, 16-bit layers and sliding windows."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn
from torch.backends.cuda import SDPAParams, can_use_flash_attention
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from turboquant.errors import UnsupportedModelError
from turboquant.hf.masks import CausalMask
from turboquant.ops.attend import Segment, attend

# One array of scores of the float32 path (softcap, learned sinks): queries go through it in blocks of that many bytes.
FLOAT32_SCORE_BYTES = 64 << 20


# cuDNN's attention builds and caches an execution plan for every new shape, and in decoding every step has a new
# length: 45 to 50 ms a token over the 28 layers of a 7B shape on an H100, more than the rest of the step.
_BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def _without_cudnn(q: torch.Tensor) -> AbstractContextManager[None]:
    return sdpa_kernel(_BACKENDS) if q.is_cuda else nullcontext()


def dense_attention(
    module: nn.Module,
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    scale: float,
    softcap: float | None = None,
    sink_logits: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of the newest T tokens over S dense ones; query i sits at token S - T + i.

    Args:
        module: the model's attention module (transformers' SDPA function asks it for its head groups).
        q: [B, H, T, D]. keys: [B, G, S, D]. values: [B, G, S, Dv].
        mask: None (causal), a CausalMask, or [B, 1, T, >= S] bool or float whose last S columns belong to the keys.
        scale, softcap, sink_logits [H]: see ops.attend.
    Returns:
        [B, H, T, Dv], dtype of q.
    Raises:
        UnsupportedModelError: a mask of another form.
    """
    tokens, length = q.shape[2], keys.shape[2]
    plain = softcap is None and sink_logits is None
    if plain and mask is None and q.is_cuda and tokens > 1:
        with _without_cudnn(q):
            return _causal(q, keys, values, scale)
    full = _full_mask(mask, tokens, length, q.device)
    if plain:
        with _without_cudnn(q):
            out, _ = sdpa_attention_forward(module, q, keys, values, full, scaling=scale, is_causal=full is None)
        return out.transpose(1, 2)
    return _attend_in_float32(q, keys, values, full, scale, softcap, sink_logits)


def _causal(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float) -> torch.Tensor:
    """Bottom-right causal attention without a [T, S] mask, which would push SDPA to a slower kernel."""
    groups = q.shape[1] // keys.shape[1]
    # asked as CausalBias asks, without is_causal: with it the answer is no for every T < S, though its kernel serves
    if groups > 1 and not can_use_flash_attention(SDPAParams(q, keys, values, None, 0.0, False, True)):
        # the memory-efficient kernel takes no groups of heads, and what comes after it makes all [H, T, S] scores
        keys, values = (x.repeat_interleave(groups, dim=1) for x in (keys, values))
    return nn.functional.scaled_dot_product_attention(
        q,
        keys,
        values,
        attn_mask=causal_lower_right(q.shape[2], keys.shape[2]),
        scale=scale,
        enable_gqa=keys.shape[1] != q.shape[1],
    )


def _full_mask(mask: torch.Tensor | None, tokens: int, length: int, device: torch.device) -> torch.Tensor | None:
    """The mask as [B or 1, 1, T, S], or None where plain causal attention of T = S (or one token) needs none."""
    if mask is not None and not isinstance(mask, CausalMask):
        if mask.ndim != 4 or mask.shape[-1] < length:
            raise UnsupportedModelError(
                f"the model hands over an attention mask of shape {list(mask.shape)} for {length} keys; [B, 1, T, S] "
                'was expected. Load it with attn_implementation="sdpa".'
            )
        return mask[..., -length:]
    if mask is None and tokens in (1, length):
        return None
    query = torch.arange(length - tokens, length, device=device)[:, None]
    token = torch.arange(length, device=device)[None, :]
    visible = (token <= query)[None, None]
    if isinstance(mask, CausalMask):
        if mask.sliding_window is not None:
            visible = visible & (token > query - mask.sliding_window)
        if mask.padding is not None:
            visible = visible & mask.padding[:, None, None, -length:]
            # a padding token sees itself: a row without any key would be NaN and spread through the next layer
            visible = visible | (token == query)
        if tokens == 1 and bool(mask.padding is None) and (mask.sliding_window or length) >= length:
            return None
    return visible


def _attend_in_float32(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    softcap: float | None,
    sink_logits: torch.Tensor | None,
) -> torch.Tensor:
    batch, heads, tokens, _ = q.shape
    kv_heads, length = keys.shape[1:3]
    groups = heads // kv_heads
    out = q.new_empty(batch, heads, tokens, values.shape[-1])
    block = max(1, FLOAT32_SCORE_BYTES // (4 * heads * length))
    for b in range(batch):
        row_keys, row_values = keys[b].float(), values[b].float()
        for start in range(0, tokens, block):
            part = q[b, :, start : start + block].float()
            count = part.shape[1]
            visible = terms = logits = None
            if mask is None:
                query = torch.arange(length - tokens + start, length - tokens + start + count, device=q.device)
                visible = torch.arange(length, device=q.device)[None, :] <= query[:, None]
            else:
                rows = mask[b if mask.shape[0] > 1 else 0, 0, start : start + count]
                if rows.dtype == torch.bool:
                    visible = rows | ~rows.any(-1, keepdim=True)  # a row that sees nothing (padding) would be NaN
                else:
                    terms = (rows.float() / scale).repeat(groups, 1)
            if visible is not None:
                visible = visible.repeat(groups, 1)
            if sink_logits is not None:
                logits = sink_logits.float().view(kv_heads, groups, 1).expand(-1, -1, count).flatten(1)
            result = attend(
                part.unflatten(0, (kv_heads, groups)).flatten(1, 2),
                [Segment(row_keys, row_values, terms, visible)],
                scale=scale,
                softcap=softcap,
                sink_logits=logits,
            )
            out[b, :, start : start + count] = result.unflatten(1, (groups, count)).flatten(0, 1).to(q.dtype)
    return out
