"""attend: softmax attention over segments of keys and values, merged by log-sum-exp. The definition, in float32."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from turboquant.errors import ShapeError


@dataclass(frozen=True, eq=False)
class Segment:
    """Some tokens of one sequence, rows rotated, as the attention reads them.

    Attributes:
        keys: [G, S, Dk] float32.
        values: [G, S, Dv] float32.
        score_terms: [G, N, S] float32 added to q . k before scaling (key bias, block means), or None.
        visible: [N, S] bool, which query row sees which token, or None for all.
    """

    keys: torch.Tensor
    values: torch.Tensor
    score_terms: torch.Tensor | None = None
    visible: torch.Tensor | None = None


def attend(
    q: torch.Tensor,
    segments: Iterable[Segment],
    *,
    scale: float,
    softcap: float | None = None,
    sink_logits: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of N query rows per KV head over the tokens of all segments.

    Args:
        q: [G, N, Dk] float32, rotated as the keys are; N = query heads of the group times query tokens.
        segments: at least one; each row must see at least one token over all of them.
        scale: factor on the scores, usually Dk ** -0.5.
        softcap: scores become softcap * tanh(score / softcap) (Gemma 2), or None.
        sink_logits: [G, N] learned logits that take part in the normaliser only (gpt-oss), or None.
    Returns:
        [G, N, Dv] float32, rotated as the values are; a new tensor.
    Raises:
        ShapeError: no segment.
    Source: own; merging is the online softmax of Milakov and Gimelshein 2018 (arXiv 1805.02867).
    """
    highest = normaliser = weighted = None
    if sink_logits is not None:
        highest, normaliser = sink_logits.float(), torch.ones_like(sink_logits, dtype=torch.float32)
    for segment in segments:
        scores = q @ segment.keys.transpose(-1, -2)  # [G, N, S]
        if segment.score_terms is not None:
            scores = scores + segment.score_terms
        scores = scores * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if segment.visible is not None:
            scores = scores.masked_fill(~segment.visible, float("-inf"))
        top = scores.amax(-1)  # [G, N]
        if highest is not None:
            top = torch.maximum(top, highest)
        # a row that has seen nothing yet has top = -inf; exp(-inf - -inf) would be NaN
        safe_top = torch.where(top == float("-inf"), torch.zeros_like(top), top)
        p = torch.exp(scores - safe_top[..., None])
        mass, part = p.sum(-1), p @ segment.values
        if normaliser is not None and highest is not None:
            shrink = torch.exp(highest - safe_top)
            mass = mass + normaliser * shrink
            if weighted is not None:
                part = part + weighted * shrink[..., None]
        highest, normaliser, weighted = top, mass, part
    if weighted is None or normaliser is None:
        raise ShapeError("attend needs at least one segment of tokens; got none")
    return weighted / normaliser[..., None]
