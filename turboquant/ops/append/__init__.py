"""append: new keys and values, rotated, the keys' bias taken out, into their place; one launch for both sides.

Its definition in plain PyTorch is in turboquant/store.py: Rotation.apply, KeyBias.vectors, copies.
"""

from torch import Tensor

from turboquant.layout import PackedTokens
from turboquant.ops.attend.bias import BiasTerms
from turboquant.ops.devices import launching_on


def rotate(
    keys: Tensor,
    values: Tensor,
    matrices: tuple[Tensor, Tensor],
    bias: BiasTerms | None,
    positions: Tensor,
    out: tuple[Tensor, Tensor],
    packed: PackedTokens | None = None,
) -> None:
    """New keys and values, rotated in float32 and rounded once, by a kernel.

    A token's result has the same bits whatever call it comes in.

    Args:
        keys: [B, G, T, Dk] and values: [B, G, T, Dv], as the model made them.
        matrices: [Dk, Dk] and [Dv, Dv] float32, see Rotation.matrix.
        bias: what to take out of the keys, or None. positions: [B] int32, of each row's first token.
        out: where they go: two tensors [B, G, T, D] of any floating dtype; with `packed`, its tails, in which each
            token goes to its slot.
        packed: gives the tokens that each row holds (before these), the number of sinks and the length of the ring.
    """
    from turboquant.ops.append import kernel

    # a head's coordinates are read as a row
    keys = keys if keys.stride(-1) == 1 else keys.contiguous()
    values = values if values.stride(-1) == 1 else values.contiguous()
    with launching_on(keys.device):
        kernel.rotate(keys, values, *matrices, bias, positions, out, packed)
