"""Several coded tensors that lie side by side, decoded at once: what a unit of a pass is made of."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from streamer.ops.lossless import reference


@dataclass(frozen=True, slots=True)
class CodedPart:
    """Bytes of one tensor, or of a piece of it, as they are stored and as they are used.

    Attributes:
        stored_at, stored_bytes: where they lie among the stored bytes; coded bfloat16 weights if they are fewer than
            `nbytes`, else the bytes themselves.
        at, nbytes: where they belong among the decoded bytes; both places are multiples of 16.
    """

    stored_at: int
    stored_bytes: int
    at: int
    nbytes: int

    @property
    def is_coded(self) -> bool:
        """Whether the stored bytes are coded."""
        return self.stored_bytes < self.nbytes


class PartsDecoder:
    """Decodes the parts of one unit.

    Args:
        parts: of it, in any order. device: where its bytes will lie.
    """

    def __init__(self, parts: Sequence[CodedPart], device: torch.device):
        self._parts, self._device = tuple(parts), device

    @property
    def nbytes(self) -> int:
        """Bytes on the device that the decoder holds."""
        return 0

    def decode(self, stored: Tensor, out: Tensor) -> None:
        """All parts; bytes of `out` between them are left as they are. On a GPU by one launch that no call waits for.

        Args:
            stored: uint8 on the device, beginning at a multiple of 16 bytes, with every part. Its coded bytes are
                believed.
            out: uint8 on the device, beginning at a multiple of 16 bytes; overwritten.
        """
        for part in self._parts:
            source = stored[part.stored_at : part.stored_at + part.stored_bytes]
            target = out[part.at : part.at + part.nbytes]
            if part.is_coded:
                reference.decode(source, target.view(torch.int16))
            else:
                target.copy_(source)
