"""BiasTerms: what the attention kernel reads of a layer's key bias."""

from dataclasses import dataclass

import torch

# Tokens for which a query's turned coefficients serve: angles within them come from one table.
SPAN_TOKENS = 128

# Pairs that a warp reads at once, 4 a thread.
PAIRS_TOGETHER = 16

# Radians over a span: up to them a series of degree 6 gives cos and sin to 1.6e-6 (0.5^7 / 7!).
_SLOW = 0.5

# Radians over a block, 64 positions: beyond them cos - 1 is no smaller than cos, and its last digit is larger.
_QUICK = 1.5


@dataclass(frozen=True, eq=False)
class BiasTerms:
    """A key bias and its rotary embedding, for the kernel.

    Attributes:
        bias: [G, D] float32, before the rotary embedding.
        frequencies: [P] int64, turns per position of each rotated pair in units of 2^-64, zeros beyond `pairs`; P is
            a power of two and at least 16. A product with a position then drops whole turns and keeps all digits.
        spans: [2, 8, P / 8 + 2, 32, 8] float16: cos, less 1 behind the first `quick` pairs, and sin, side by side, of
            positions 0 to 127 times the frequency of each pair, as a warp reads them: position 16 i + 8 h + g, pair
            8 (j - j % 2) + 4 t + 2 (j % 2) + k is [:, i, j, 4 g + t, 4 k + 2 h]; behind the pairs powers 0 to 6 of the
            position / 128, the same for every t, and 0. First rounded, then what that leaves out.
        steps: [P] float32: 128 times each frequency, in radians.
        quick: a multiple of 16, less than P: all these pairs turn by more than 1.5 radians in 64 positions.
        fast: a multiple of 16, at least 16: no pair behind these turns by more than half a radian in 128 positions.
        pairs: rotated pairs. interleaved, scaling: see KeyBias.
    """

    bias: torch.Tensor
    frequencies: torch.Tensor
    spans: torch.Tensor
    steps: torch.Tensor
    quick: int
    fast: int
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
    angles = torch.arange(SPAN_TOKENS, dtype=torch.float64)[:, None] * radians
    step = SPAN_TOKENS * radians
    quick = _whole(step[:-PAIRS_TOGETHER].abs() > 2 * _QUICK)
    # sin of half the angle: cos - 1 without cancellation
    cos = -2 * (angles / 2).sin().square()
    cos[:, :quick] = angles[:, :quick].cos()
    table = torch.stack((cos, angles.sin()), dim=-1)  # [positions, P, 2]
    powers = (torch.arange(SPAN_TOKENS) / SPAN_TOKENS).double()[:, None] ** torch.arange(8)
    powers[:, 7] = 0
    powers = powers.view(SPAN_TOKENS, 1, 4, 2).expand(-1, 4, -1, -1).flatten(1, 2)
    # [tile, half of it, g, sixteenth of the pairs, t, product, pair, cos or sin]
    apart = torch.cat((table, powers), dim=1).view(8, 2, 8, padded // 16 + 1, 4, 2, 2, 2)
    ordered = apart.permute(0, 3, 5, 2, 4, 6, 1, 7).reshape(8, padded // 8 + 2, 32, 8)
    spans = torch.stack((ordered.half(), (ordered - ordered.half()).half()))
    fast = padded - _whole(step.abs().flip(0) <= _SLOW)
    frequencies = torch.tensor(signed, dtype=torch.int64)
    device = bias.device
    return BiasTerms(
        bias,
        frequencies.to(device),
        spans.to(device),
        step.float().to(device),
        quick,
        max(fast, PAIRS_TOGETHER),
        pairs,
        interleaved,
        scaling,
    )


def padded_pairs(pairs: int) -> int:
    """Rotated pairs as the kernels hold them: a power of two, and at least 16."""
    return max(16, 1 << max(pairs - 1, 0).bit_length())


def _whole(holds: torch.Tensor) -> int:
    """Of how many the first this holds without a gap, in pairs that are read at once."""
    return int(holds.cumprod(0).sum()) // PAIRS_TOGETHER * PAIRS_TOGETHER
