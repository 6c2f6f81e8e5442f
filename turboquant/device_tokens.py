"""DeviceTokens: what the kernels read of one layer besides its records and tails, kept up to date on the device."""

from collections.abc import Sequence

import torch

from turboquant.key_bias import KeyBias
from turboquant.ops.attend.bias import BiasTerms, bias_terms
from turboquant.rotation import Rotation

ANCHOR_BYTES = 16


class DeviceTokens:
    """Block table, lengths and matrices of one layer.

    Args:
        batch: rows. rotations: of keys and values. key_bias: of the layer, or None. device: where the tensors lie.
    Attributes:
        anchor, table: uint8, and [B, blocks] int64, see PackedTokens. lengths, coded: [B] int32.
        matrices: [D, D] float32 of both rotations. bias: the key bias as the kernels read it, or None.
    """

    def __init__(
        self, batch: int, rotations: tuple[Rotation, Rotation], key_bias: KeyBias | None, device: torch.device
    ):
        # records are found by their distance from it, whatever slab they are in
        self.anchor = torch.zeros(ANCHOR_BYTES, dtype=torch.uint8, device=device)
        self.table = torch.zeros(batch, 0, dtype=torch.int64, device=device)
        self.lengths = torch.zeros(batch, dtype=torch.int32, device=device)
        self.coded = torch.zeros(batch, dtype=torch.int32, device=device)
        self.matrices = rotations[0].matrix(device), rotations[1].matrix(device)
        self.bias: BiasTerms | None = None
        if key_bias is not None:
            self.bias = bias_terms(key_bias.bias, key_bias.inverse_frequencies, key_bias.scaling, key_bias.interleaved)

    @property
    def tensors(self) -> list[torch.Tensor]:
        """Every tensor held, but for the matrices, which are the rotations', and the bias itself."""
        own = [self.anchor, self.table, self.lengths, self.coded]
        return own + ([self.bias.lengths, *self.bias.tables.tensors] if self.bias is not None else [])

    def make_room(self, blocks: int) -> None:
        """Let every row name that many blocks."""
        if blocks > self.table.shape[1]:
            wide = self.table.new_zeros(self.table.shape[0], blocks)
            wide[:, : self.table.shape[1]] = self.table
            self.table = wide

    def name_blocks(self, row: int, first: int, offsets: Sequence[int]) -> None:
        """Blocks `first` and on of a row lie at these offsets; no host synchronisation."""
        start = 0
        while start < len(offsets):  # runs of equal distance go in one write
            stop = start + 1
            step = offsets[stop] - offsets[start] if stop < len(offsets) else 0
            while stop < len(offsets) and offsets[stop] - offsets[stop - 1] == step:
                stop += 1
            view = self.table[row, first + start : first + stop]
            if stop - start == 1:
                view.fill_(offsets[start])
            else:
                torch.arange(offsets[start], offsets[start] + step * (stop - start), step, out=view)
            start = stop

    def set_counts(self, lengths: Sequence[int], coded: Sequence[int]) -> None:
        """Tokens and coded blocks of each row; no host synchronisation."""
        for tensor, values in ((self.lengths, lengths), (self.coded, coded)):
            if len(set(values)) == 1:
                tensor.fill_(values[0])
            else:
                for row, value in enumerate(values):
                    tensor[row].fill_(value)

    def select_rows(self, rows: torch.Tensor) -> None:
        """Keep the rows that `rows` [n] names, in that order."""
        self.table = self.table.index_select(0, rows)
        self.lengths = self.lengths.index_select(0, rows)
        self.coded = self.coded.index_select(0, rows)


def device_tokens_bytes(batch: int, blocks: int, key_dim: int, value_dim: int) -> int:
    """Bytes of a DeviceTokens and its matrices, before it exists; a key bias's tables come on top."""
    return ANCHOR_BYTES + 8 * batch * blocks + 8 * batch + 4 * (key_dim**2 + value_dim**2)
