"""attend: queries over keys and values stored in segments (sinks, planes, recent window)."""

from torch import Tensor

from turboquant.layout import PackedTokens
from turboquant.ops.attend.bias import BiasTerms, bias_terms
from turboquant.ops.attend.reference import Segment, attend
from turboquant.ops.devices import launching_on

__all__ = ["BiasTerms", "Segment", "attend", "attend_packed", "bias_terms"]


def attend_packed(
    q: Tensor,
    packed: PackedTokens,
    matrices: tuple[Tensor, Tensor],
    bias: BiasTerms | None,
    *,
    scale: float,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    most_blocks: int,
    is_mixed: bool = False,
    skip_below: float = 0.0,
) -> Tensor:
    """Attention of the newest T tokens of each row over all its tokens, read in place by a kernel.

    Nothing is copied to the host, so a CUDA graph can hold it. On compute capability 9.0 and later its launches overlap
    with each other (programmatic dependent launch).

    Args:
        q: [B, H, T, Dk], queries as the model made them; H a multiple of the layout's heads.
        packed: the layer's tokens. matrices: of the rotations of keys and values, see Rotation.matrix.
        bias: the key bias that was taken out, or None.
        scale, softcap, sink_logits [H]: see `attend`.
        most_blocks: of any row, at least; decides how many programs share a row.
        is_mixed: blocks may have fewer planes than the layout says, as the entries of the table tell.
        skip_below: the values of a block are not read where no token's weight, times the scale of its value, is above
            this share of the largest so far (Yuan et al. 2025, arXiv 2512.12087, skip by the weights alone). Scores
            are always read, so the softmax is exact; what is missing of a row is at most skip_below * tokens *
            max_t |weight_t value_t|, times the ratio of the longest to the shortest code, which is close to 1.
    Returns:
        [B, H, T, Dv] in q's dtype, a new tensor; a row that holds no token gives zeros.
    Source: own; split-K decoding is Flash-Decoding's (Dao et al. 2023).
    """
    from turboquant.ops.attend import kernel

    q = q if q.stride(-1) == 1 else q.contiguous()
    with launching_on(q.device):
        return kernel.attend_packed(
            q,
            packed,
            *matrices,
            bias,
            scale=scale,
            softcap=softcap,
            sink_logits=sink_logits,
            most_blocks=most_blocks,
            is_mixed=is_mixed,
            skip_below=skip_below,
        )
