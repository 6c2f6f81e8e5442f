"""attend: against plain softmax attention in float64 over dense tensors."""

from typing import Any

import pytest
import torch

from turboquant import CompressedKV, Precision, ShapeError, StoreOptions
from turboquant.ops.attend import Segment, attend


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def plain_attention(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    scale: float,
    visible: torch.Tensor | None = None,
    terms: torch.Tensor | None = None,
    softcap: float | None = None,
    sink_logits: torch.Tensor | None = None,
) -> torch.Tensor:
    """The formula: q [G, N, D], keys [G, S, D], values [G, S, Dv], visible [N, S], sink_logits [G, N]."""
    scores = torch.einsum("gnd,gsd->gns", q.double(), keys.double())
    if terms is not None:
        scores = scores + terms
    scores = scores * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if visible is not None:
        scores = scores.masked_fill(~visible, -torch.inf)
    if sink_logits is not None:
        scores = torch.cat((scores, sink_logits.double()[..., None]), -1)
    weights = torch.softmax(scores, -1)[..., : keys.shape[1]]
    return torch.einsum("gns,gsd->gnd", weights, values.double())


@pytest.mark.parametrize("sinks", [False, True], ids=["", "sink_logits"])
@pytest.mark.parametrize("softcap", [None, 2.0], ids=["", "softcap"])
@pytest.mark.parametrize("hides", [False, True], ids=["", "visible"])
@pytest.mark.parametrize("splits", [[37], [4, 32, 1], [1, 1, 35]], ids=str)
def test_segments_answer_as_one_softmax(splits: list[int], hides: bool, softcap: float | None, sinks: bool) -> None:
    q, keys, values = draw(2, 6, 8), draw(2, 37, 8, seed=1), draw(2, 37, 12, seed=2)
    terms = draw(2, 6, 37, seed=3)
    # row 0 sees the last token only: nothing of the first segments
    visible = torch.rand(6, 37, generator=torch.Generator().manual_seed(4)) < 0.5 if hides else None
    if visible is not None:
        visible[0], visible[:, -1] = False, True
    options: dict[str, Any] = {"scale": 0.7, "softcap": softcap, "sink_logits": draw(2, 6, seed=5) if sinks else None}
    ends = torch.tensor(splits).cumsum(0).tolist()
    segments = [
        Segment(keys[:, a:b], values[:, a:b], terms[:, :, a:b], visible[:, a:b] if visible is not None else None)
        for a, b in zip([0, *ends], ends, strict=False)
    ]
    got = attend(q, segments, **options)
    want = plain_attention(q, keys, values, visible=visible, terms=terms, **options)
    torch.testing.assert_close(got.double(), want, atol=2e-6, rtol=1e-5)


def test_large_scores_do_not_overflow() -> None:
    q, keys, values = 100 * draw(1, 2, 8), 100 * draw(1, 9, 8, seed=1), draw(1, 9, 8, seed=2)
    got = attend(q, [Segment(keys[:, :4], values[:, :4]), Segment(keys[:, 4:], values[:, 4:])], scale=1.0)
    torch.testing.assert_close(got.double(), plain_attention(q, keys, values, scale=1.0), atol=1e-5, rtol=1e-5)


def test_no_segment_is_refused() -> None:
    with pytest.raises(ShapeError, match="at least one segment"):
        attend(draw(1, 1, 8), [], scale=1.0)


@pytest.mark.parametrize("sinks", [False, True], ids=["", "sink_logits"])
@pytest.mark.parametrize("softcap", [None, 2.0], ids=["", "softcap"])
@pytest.mark.parametrize("tokens", [1, 7])
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("length", [7, 60, 333])
def test_a_store_answers_as_plain_attention_over_its_unpacked_tokens(
    length: int, groups: int, tokens: int, softcap: float | None, sinks: bool
) -> None:
    store = CompressedKV(StoreOptions(Precision(3, 2), window=20))
    keys, values = draw(2, 2, length, 16, seed=1), draw(2, 2, length, 24, seed=2)
    store.append(keys, values)
    q = draw(2, 2 * groups, tokens, 16, seed=3)
    logits = draw(2 * groups, seed=4) if sinks else None
    got = store.attend(q, scale=0.4, softcap=softcap, sink_logits=logits)
    held_keys, held_values = store.unpacked()
    visible = (torch.arange(length) <= torch.arange(length - tokens, length)[:, None]).repeat(groups, 1)
    for b in range(2):
        want = plain_attention(
            q[b].reshape(2, groups * tokens, 16),
            held_keys[b],
            held_values[b],
            scale=0.4,
            visible=visible,
            softcap=softcap,
            sink_logits=logits.view(2, groups, 1).expand(-1, -1, tokens).flatten(1) if logits is not None else None,
        )
        torch.testing.assert_close(got[b].double(), want.view(2 * groups, tokens, 24), atol=5e-6, rtol=1e-4)


def test_a_row_of_one_token_answers_its_value() -> None:
    store = CompressedKV(StoreOptions(Precision(4, 4)))
    values = draw(1, 2, 1, 16, seed=2)
    store.append(draw(1, 2, 1, 16, seed=1), values)
    got = store.attend(draw(1, 4, 1, 16, seed=3), scale=1.0)
    torch.testing.assert_close(got, values.repeat_interleave(2, 1), atol=1e-6, rtol=1e-5)
