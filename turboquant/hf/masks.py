"""The mask function that goes with our attention: what transformers asks for once per forward, for each mask kind.

A [B, 1, T, S] mask of a 32k prompt is 1 GiB, so none is made: a plain causal mask is None, and padding and
sliding windows travel as a CausalMask, a [B, S] tensor of booleans. Any other pattern (packed sequences, image
blocks, chunked attention) is made in full by transformers' own function: right first.
"""

from collections.abc import Callable
from typing import Any

import torch
from transformers.masking_utils import causal_mask_function, sdpa_mask

from turboquant.errors import UnsupportedModelError


class CausalMask(torch.Tensor):
    """A causal mask with padding or a sliding window: [B, S] bool (True = real token) and two attributes.

    Attributes:
        padding: [B, S] bool tensor, or None when no token is padding.
        pads: columns of left padding of each row, as integers (so that no layer has to ask the device).
        sliding_window: a query sees this many newest tokens, itself included; None = all.
    It is a tensor so that model code that moves or inspects its mask argument keeps working: what moves or copies it
    keeps the attributes, every other operation gives a plain tensor.
    """

    padding: torch.Tensor | None
    pads: tuple[int, ...]
    sliding_window: int | None

    @staticmethod
    def make(
        columns: torch.Tensor, padding: torch.Tensor | None, pads: tuple[int, ...], sliding_window: int | None
    ) -> "CausalMask":
        """A mask over `columns` [B, S] bool."""
        mask = columns.as_subclass(CausalMask)
        mask.padding, mask.pads, mask.sliding_window = padding, pads, sliding_window
        return mask

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Results are plain tensors; those of `to`, `clone` and their like are masks again while they are boolean."""
        with torch._C.DisableTorchFunctionSubclass():
            out = func(*args, **(kwargs or {}))
        source = args[0] if args else None
        if func in _KEEPING and isinstance(source, CausalMask) and out.dtype == torch.bool:
            padding = source.padding.to(out.device) if source.padding is not None else None
            return CausalMask.make(out, padding, source.pads, source.sliding_window)
        return out

    def first_columns(self, count: int) -> "CausalMask":
        """The mask of a prefix of the tokens."""
        plain = self.as_subclass(torch.Tensor)
        padding = self.padding[:, :count] if self.padding is not None else None
        return CausalMask.make(plain[:, :count], padding, self.pads, self.sliding_window)


# Operations after which a mask is still the same mask.
_KEEPING = (
    torch.Tensor.to,
    torch.Tensor.cpu,
    torch.Tensor.cuda,
    torch.Tensor.bool,
    torch.Tensor.clone,
    torch.Tensor.contiguous,
    torch.Tensor.detach,
)


def turboquant_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> torch.Tensor | None:
    """Mask for our attention function, with the signature that transformers' mask interface calls.

    Returns:
        None (causal, all tokens real), a CausalMask, or [B, 1, T, S] bool for any other pattern.
    Raises:
        UnsupportedModelError: padding that is not on the left.
    """
    config = kwargs.get("config")
    window = getattr(config, "sliding_window", None)
    chunk = getattr(config, "attention_chunk_size", None)
    is_causal = mask_function is causal_mask_function
    is_sliding = local_size is not None and local_size == window and local_size != chunk
    # a static cache has slots behind the newest token: keys do not end where the queries do
    has_empty_slots = bool(kv_offset + kv_length > q_offset + q_length)
    if use_vmap or not allow_is_causal_skip or has_empty_slots or not (is_causal or is_sliding):
        return sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            local_size=local_size,
            allow_is_causal_skip=False,
            use_vmap=use_vmap,
            device=device,
        )
    columns = kv_offset + kv_length
    padding, pads = None, (0,) * batch_size
    if attention_mask is not None:
        padding, pads = _left_padding(attention_mask.bool(), columns)
    sliding_window = int(local_size) if is_sliding and local_size is not None else None
    if padding is None and sliding_window is None:
        return None
    real = padding if padding is not None else torch.ones(batch_size, columns, dtype=torch.bool, device=device)
    return CausalMask.make(real, padding, pads, sliding_window)


def _left_padding(mask: torch.Tensor, columns: int) -> tuple[torch.Tensor | None, tuple[int, ...]]:
    """mask [B, S'] as ([B, columns] or None when all tokens are real, columns of padding of each row)."""
    mask = mask[:, :columns]
    if mask.shape[1] < columns:  # columns that the caller does not name are hidden, as in transformers' own masks
        mask = torch.nn.functional.pad(mask, (0, columns - mask.shape[1]), value=False)
    counts = (~mask).sum(-1)
    starts = (mask.cumsum(-1) == 0).sum(-1)
    pairs = torch.stack((counts, starts)).tolist()  # the one question to the device per forward
    if pairs[0] != pairs[1]:
        raise UnsupportedModelError(
            "attention_mask hides tokens after the first real one; the compressed cache takes left padding only. "
            'Set tokenizer.padding_side = "left", or use attn_implementation="sdpa".'
        )
    if not any(pairs[0]):
        return None, tuple(pairs[0])
    return mask, tuple(pairs[0])
