"""Several coded tensors that lie side by side, decoded at once: what a unit of a pass is made of."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from streamer.errors import OptionError
from streamer.ops import lossless
from streamer.ops.lossless import reference
from streamer.ops.lossless.layout import ALIGNED_BYTES, BLOCK
from turboquant.ops.devices import launching_on


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
    """Decodes the parts of one unit; where the kernel serves, it is compiled and its table made when this is.

    Args:
        parts: of it, in any order. device: where its bytes will lie.
    Raises:
        OptionError: a part begins elsewhere than at a multiple of 16 bytes.
    """

    def __init__(self, parts: Sequence[CodedPart], device: torch.device):
        for part in parts:
            if part.stored_at % ALIGNED_BYTES or part.at % ALIGNED_BYTES:
                raise OptionError(f"parts begin at multiples of {ALIGNED_BYTES} bytes, got {part}")
        self._parts, self._device = tuple(parts), device
        self._stored_bytes = max((part.stored_at + part.stored_bytes for part in parts), default=0)
        self._nbytes = max((part.at + part.nbytes for part in parts), default=0)
        self._table: Tensor | None = None
        if any(part.nbytes for part in parts) and lossless.kernel_serves(device):
            from streamer.ops.lossless import kernel

            table, programs = kernel.parts_table([_fields(part) for part in parts])
            self._table = table.to(device)
            with launching_on(device):
                self._launch = kernel.parts_launch(self._table, programs)

    @property
    def nbytes(self) -> int:
        """Bytes on the device that the decoder holds."""
        return 0 if self._table is None else self._table.nbytes

    def decode(self, stored: Tensor, out: Tensor) -> None:
        """All parts; bytes of `out` between them are left as they are. On a GPU by one launch that no call waits for.

        Args:
            stored: uint8 on the device, beginning at a multiple of 16 bytes, with every part. Its coded bytes are
                believed.
            out: uint8 on the device, beginning at a multiple of 16 bytes; overwritten.
        Raises:
            OptionError: one of them is too short, or begins elsewhere.
        Source: own; both ways give the same bytes (tests/kernels/test_streamer_lossless_kernel.py).
        """
        if stored.numel() < self._stored_bytes or out.numel() < self._nbytes:
            raise OptionError(
                f"parts of {self._stored_bytes} stored and {self._nbytes} decoded bytes, got {stored.numel()} and "
                f"{out.numel()}"
            )
        if self._table is not None:
            if (stored.data_ptr() | out.data_ptr()) % ALIGNED_BYTES:
                raise OptionError(
                    f"parts are decoded from and to what begins at multiples of {ALIGNED_BYTES} bytes, got "
                    f"{stored.data_ptr():#x} and {out.data_ptr():#x}"
                )
            with launching_on(self._device):
                self._launch(stored, out)
            return
        for part in self._parts:
            source = stored[part.stored_at : part.stored_at + part.stored_bytes]
            target = out[part.at : part.at + part.nbytes]
            if part.is_coded:
                reference.decode(source, target.view(torch.int16))
            else:
                target.copy_(source)


def _fields(part: CodedPart) -> tuple[int, int, int, int]:
    """A part as `kernel.parts_table` takes it."""
    blocks = part.nbytes // (2 * BLOCK) if part.is_coded else 0
    return part.stored_at, part.at, blocks, part.nbytes - 2 * BLOCK * blocks
