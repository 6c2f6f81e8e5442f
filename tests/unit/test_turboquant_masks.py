"""The mask function of our attention, and attention over dense tensors under its masks."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, DynamicCache
from transformers.masking_utils import (
    causal_mask_function,
    create_causal_mask,
    create_sliding_window_causal_mask,
    sdpa_mask,
    sliding_window_causal_mask_function,
)

from turboquant import UnsupportedModelError
from turboquant.hf import ATTENTION_NAME, CausalMask, register_attention, turboquant_mask
from turboquant.hf.dense import _causal, _full_mask, dense_attention

register_attention()


def left_padding(pads: list[int], columns: int) -> torch.Tensor:
    return torch.arange(columns)[None, :] >= torch.tensor(pads)[:, None]


class GroupedAttention(nn.Module):
    """What transformers' SDPA function asks an attention module for."""

    num_key_value_groups = 2


def config(**changes: Any) -> Any:
    made = AutoConfig.for_model("mistral", sliding_window=5, num_hidden_layers=1, **changes)
    made._attn_implementation = ATTENTION_NAME
    return made


def test_plain_causal_needs_no_mask() -> None:
    assert turboquant_mask(2, 4, 4) is None
    assert turboquant_mask(2, 4, 4, attention_mask=torch.ones(2, 4, dtype=torch.long)) is None
    assert turboquant_mask(2, 1, 9, q_offset=8) is None


def test_padding_and_windows_travel_as_one_row_per_sequence() -> None:
    padding = left_padding([0, 3], 40_000)
    mask = turboquant_mask(2, 40_000, 40_000, attention_mask=padding.long())
    assert isinstance(mask, CausalMask)
    assert mask.pads == (0, 3)
    assert mask.sliding_window is None
    assert mask.padding is not None
    assert torch.equal(mask.padding, padding)
    assert mask.nbytes == 2 * 40_000
    window = turboquant_mask(
        2, 9, 9, mask_function=sliding_window_causal_mask_function(5), local_size=5, config=config()
    )
    assert isinstance(window, CausalMask)
    assert (window.sliding_window, window.padding, window.pads) == (5, None, (0, 0))
    assert not isinstance(window.padding, CausalMask)


@pytest.mark.parametrize(
    "mask", [[[1, 1, 0]], [[0, 1, 0, 1]], [[1, 1]]], ids=["right", "hole", "shorter than the tokens"]
)
def test_padding_that_is_not_on_the_left_is_refused(mask: list[list[int]]) -> None:
    columns = max(3, len(mask[0]))
    with pytest.raises(UnsupportedModelError, match='padding_side = "left"'):
        turboquant_mask(1, columns, columns, attention_mask=torch.tensor(mask))


def test_moved_masks_stay_masks_and_computed_ones_are_tensors() -> None:
    padding = left_padding([0, 2], 6)
    mask = CausalMask.make(padding, padding, (0, 2), 4)
    for moved in (mask.to("cpu"), mask.to(torch.bool), mask.clone(), mask.contiguous(), mask.detach()):
        assert isinstance(moved, CausalMask)
        assert (moved.pads, moved.sliding_window) == ((0, 2), 4)
        assert moved.padding is not None
    for computed in (
        mask[:, :3],
        mask.float(),
        ~mask,
        mask & mask,
        mask.to(torch.float32),
        mask[:, None],
        mask.sum(-1),
    ):
        assert type(computed) is torch.Tensor
    prefix = mask.first_columns(3)
    assert prefix.shape == (2, 3)
    assert prefix.pads == (0, 2)
    assert prefix.padding is not None
    assert torch.equal(prefix.padding, padding[:, :3])


@pytest.mark.parametrize("make", [create_causal_mask, create_sliding_window_causal_mask])
def test_packed_sequences_do_not_see_each_other(make: Any) -> None:
    ours = make(config(), torch.zeros(1, 6, 8), None, None, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]]))
    assert type(ours) is torch.Tensor
    assert ours.shape == (1, 1, 6, 6)
    assert not bool(ours[0, 0, 5, 2])
    assert bool(ours[0, 0, 5, 3])


def test_any_other_pattern_is_made_in_full() -> None:
    joined = create_causal_mask(
        config(), torch.zeros(1, 4, 8), None, None, or_mask_function=lambda b, h, q, kv: (q < 2) & (kv < 2)
    )
    assert bool(joined[0, 0, 0, 1]), "the first two tokens see each other"
    chunked = config(attention_chunk_size=5)
    assert (
        type(turboquant_mask(1, 9, 9, mask_function=causal_mask_function, local_size=5, config=chunked))
        is not CausalMask
    )


@pytest.mark.parametrize("pads", [[0, 0], [0, 4], [7, 2]], ids=str)
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("past", [0, 3, 20])
@pytest.mark.parametrize("tokens", [1, 8])
@pytest.mark.parametrize("form", ["plain", "softcap", "sinks"])
def test_dense_attention_hides_what_transformers_hides(
    tokens: int, past: int, window: int | None, pads: list[int], form: str
) -> None:
    """Masks as transformers asks for them with its own cache in place, against its full boolean mask."""
    generator = torch.Generator().manual_seed(0)
    columns = past + tokens
    padding = left_padding(pads, columns)
    cache = DynamicCache(config=config() if window else None)
    if past:
        cache.update(torch.zeros(2, 2, past, 8), torch.zeros(2, 2, past, 8), 0)
    length, offset = cache.get_mask_sizes(tokens, 0)
    make = create_sliding_window_causal_mask if window else create_causal_mask
    mask = make(config(), torch.zeros(2, tokens, 8), padding.long(), cache)
    function = sliding_window_causal_mask_function(window) if window else causal_mask_function
    full = sdpa_mask(
        2,
        tokens,
        length,
        q_offset=past,
        kv_offset=offset,
        mask_function=function,
        attention_mask=padding,
        allow_is_causal_skip=False,
    )
    assert full is not None
    q = torch.randn(2, 4, tokens, 8, generator=generator)
    keys, values = torch.randn(2, 2, 2, length, 8, generator=generator)
    softcap = 3.0 if form == "softcap" else None
    sinks = torch.randn(4, generator=generator) if form == "sinks" else None
    got = dense_attention(GroupedAttention(), q, keys, values, mask, scale=0.5, softcap=softcap, sink_logits=sinks)
    assert bool(got.isfinite().all())
    scores = q.double() @ keys.repeat_interleave(2, 1).double().transpose(-1, -2) * 0.5
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~full, -torch.inf)
    if sinks is not None:
        scores = torch.cat((scores, sinks.double().view(1, 4, 1, 1).expand(2, -1, tokens, 1)), -1)
    want = torch.softmax(scores, -1)[..., :length] @ values.repeat_interleave(2, 1).double()
    real = padding[:, None, -tokens:, None].expand_as(got)  # what padding answers is nobody's business
    torch.testing.assert_close(got.double()[real], want[real], atol=2e-6, rtol=1e-4)


def test_float_masks_are_added() -> None:
    generator = torch.Generator().manual_seed(0)
    q, keys, values = torch.randn(3, 1, 2, 3, 8, generator=generator)
    hidden = torch.zeros(1, 1, 3, 3).masked_fill(torch.ones(3, 3).triu(1).bool(), torch.finfo(torch.float32).min)
    plain = dense_attention(nn.Module(), q, keys, values, None, scale=0.5)
    torch.testing.assert_close(dense_attention(nn.Module(), q, keys, values, hidden, scale=0.5), plain)
    capped = dense_attention(nn.Module(), q, keys, values, None, scale=0.5, sink_logits=torch.full((2,), -1e4))
    torch.testing.assert_close(capped, plain)
    summed = dense_attention(nn.Module(), q, keys, values, hidden, scale=0.5, sink_logits=torch.full((2,), -1e4))
    torch.testing.assert_close(summed, plain)


def test_rows_that_see_nothing_are_finite() -> None:
    q = keys = values = torch.randn(1, 1, 4, 8, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(1, 1, 4, 4, dtype=torch.bool).tril()
    mask[:, :, :2] = False
    for softcap in (None, 3.0):
        assert bool(dense_attention(nn.Module(), q, keys, values, mask, scale=1.0, softcap=softcap).isfinite().all())


def test_padding_sees_itself_so_that_no_row_is_empty() -> None:
    padding = left_padding([0, 3], 5)
    mask = _full_mask(CausalMask.make(padding, padding, (0, 3), None), 5, 5, torch.device("cpu"))
    assert mask is not None
    assert torch.equal(
        mask[1, 0].int(),
        torch.tensor([[1, 0, 0, 0, 0], [0, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 1, 1]]).int(),
    )


def test_a_mask_of_another_form_is_refused() -> None:
    q = torch.zeros(1, 1, 4, 8)
    with pytest.raises(UnsupportedModelError, match=r"shape \[1, 4\] for 4 keys"):
        dense_attention(nn.Module(), q, q, q, torch.ones(1, 4, dtype=torch.bool), scale=1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("tokens", "length"), [(9, 9), (4, 9), (1, 9)])
@pytest.mark.parametrize("groups", [1, 3])
def test_the_causal_form_of_gpus_answers_like_the_mask(
    tokens: int, length: int, groups: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 2 * groups, tokens, 8, generator=generator, dtype=dtype)
    keys, values = torch.randn(2, 2, 2, length, 8, generator=generator, dtype=dtype)
    visible = torch.arange(length) <= torch.arange(length - tokens, length)[:, None]
    scores = (q @ keys.repeat_interleave(groups, 1).transpose(-1, -2) * 0.5).masked_fill(~visible, -torch.inf)
    want = torch.softmax(scores, -1) @ values.repeat_interleave(groups, 1)
    torch.testing.assert_close(_causal(q, keys, values, 0.5), want)
