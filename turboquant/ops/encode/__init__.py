"""encode: rotated vectors -> bit planes and scales."""

from dataclasses import dataclass

from torch import Tensor

from turboquant.codebook import embedded_codebook
from turboquant.errors import ShapeError
from turboquant.layout import BlockLayout
from turboquant.ops.devices import launching_on
from turboquant.ops.encode import reference
from turboquant.planes import pack, plane_bytes


@dataclass(frozen=True)
class EncodedVectors:
    """Vectors as bit planes (turboquant/planes.py) of the embedded code, and one scale each.

    Attributes:
        planes: bits - 1 uint8 tensors, most significant first: [..., D/4], then [..., D/8] each.
        scale: [...] float16.
    """

    planes: tuple[Tensor, ...]
    scale: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors held."""
        return sum(plane.nbytes for plane in self.planes) + self.scale.nbytes


def encode(x: Tensor, bits: int, *, rule: str = "unbiased") -> EncodedVectors:
    """Vectors in the embedded code, with the scale that the rule asks for.

    A row's result has the same bits whatever batch it lies in.

    Args:
        x: [..., D] floating, already rotated (and less its block's mean, where one is kept); D a multiple of 8.
        bits: 2, 3 or 4.
        rule: how the scale is chosen; "plain", "corrected" (length kept), "unbiased" (the product of a vector with
            its reconstruction is its squared length: tests/unit/test_turboquant_encode.py) or "optimal" (least
            squared error for these codes: same file).
    Returns:
        Planes and float16 scales, new tensors. A zero vector has scale 0. A vector with NaN or infinity has scale
        NaN, and one too large for float16 has scale infinity: both come out of `unpack` as such, never clamped.
    Raises:
        OptionError: another width, unknown rule, or D is not a positive multiple of 8.
        ShapeError: x is not floating point, or has no axis.
    Source: own; see turboquant/ops/encode/reference.py for the rules.
    """
    if not x.is_floating_point() or x.dim() == 0:
        raise ShapeError(f"encode takes a floating tensor [..., D], got {x.dtype} {list(x.shape)}")
    plane_bytes(x.shape[-1], bits)
    codes, scale = reference.encode_codes(x, embedded_codebook(bits), rule)
    return EncodedVectors(pack(codes, bits), scale)


def encode_records(
    tokens: Tensor,
    layout: BlockLayout,
    index: int,
    anchor: Tensor,
    table: Tensor,
    *,
    first_block: int,
    blocks: int,
    first_slot: int = 0,
    first_token: int = 0,
    ring: int = 1 << 30,
    when_due: tuple[Tensor, int, int] | None = None,
) -> None:
    """Blocks of rotated tokens into records, by the rule "unbiased", by a kernel: one launch for all of them.

    Args:
        tokens: [B, G, slots, D]; token t of a row lies in slot first_slot + t % ring.
        layout, index: of the records, and keys (0) or values (1).
        anchor, table: see PackedTokens; entry `first_block` + i of row b gives the record of its tokens
            `first_token` + 64 i and on.
        blocks: how many.
        when_due: (lengths [B] int32, sinks, window): instead, of each row the block that its newest token has pushed
            out of the window, if it has pushed one out; the device decides, as a captured graph needs it.
    """
    from turboquant.ops.encode import kernel

    with launching_on(anchor.device):
        kernel.encode_records(
            tokens,
            layout,
            index,
            anchor,
            table,
            first_block=first_block,
            blocks=blocks,
            first_slot=first_slot,
            first_token=first_token,
            ring=ring,
            when_due=when_due,
        )
