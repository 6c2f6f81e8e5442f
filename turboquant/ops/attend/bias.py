"""BiasTerms: what the attention kernel reads of a layer's key bias."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class BiasTerms:
    """A key bias and its rotary embedding, for the kernel.

    Attributes:
        bias: [G, D] float32, before the rotary embedding.
        frequencies: [P] int64, turns per position of each rotated pair in units of 2^-64, zeros beyond `pairs`; P is
            a power of two and at least 16. A product with a position then drops whole turns and keeps all digits.
        table: [64, 2 P] float16: cos - 1 and sin of position t times each pair's frequency, side by side.
        pairs: rotated pairs. interleaved, scaling: see KeyBias.
    """

    bias: torch.Tensor
    frequencies: torch.Tensor
    table: torch.Tensor
    pairs: int
    interleaved: bool
    scaling: float


def bias_terms(bias: torch.Tensor, inverse_frequencies: torch.Tensor, scaling: float, interleaved: bool) -> BiasTerms:
    """See BiasTerms; inverse_frequencies: [pairs], radians per position. On the device of `bias`."""
    pairs = inverse_frequencies.numel()
    padded = padded_pairs(pairs)
    radians = torch.zeros(padded, dtype=torch.float64)
    radians[:pairs] = inverse_frequencies.double().cpu()
    turns = [int(turn * 2.0**64) for turn in (radians / (2 * torch.pi)).tolist()]
    signed = [(turn + (1 << 63)) % (1 << 64) - (1 << 63) for turn in turns]
    angles = torch.arange(64, dtype=torch.float64)[:, None] * radians
    # sin of half the angle: cos - 1 without cancellation
    table = torch.stack((-2 * (angles / 2).sin().square(), angles.sin()), dim=-1).flatten(1)
    frequencies = torch.tensor(signed, dtype=torch.int64)
    device = bias.device
    return BiasTerms(bias, frequencies.to(device), table.half().to(device), pairs, interleaved, scaling)


def padded_pairs(pairs: int) -> int:
    """Rotated pairs as the kernels hold them: a power of two, and at least 16."""
    return max(16, 1 << max(pairs - 1, 0).bit_length())
