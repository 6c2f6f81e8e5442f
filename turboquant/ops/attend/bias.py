"""BiasTerms: what the attention kernel reads of a layer's key bias."""

from dataclasses import dataclass
from functools import lru_cache

import torch

from turboquant.errors import OptionError
from turboquant.layout import BLOCK_TOKENS

# Tokens for which a query's turned coefficients serve: angles within them come from one table.
SPAN_TOKENS = 256

# Terms of the series that stands for the slowly turning pairs: as many as an operand has rows.
DEGREES = 16

# Pairs whose cosines, or sines, a thread has two of: one word.
PAIRS_TOGETHER = 8

# How far off the series may be, where a pair's largest share of a score is 1: the last digits of float32.
_SERIES_ERROR = 3e-7


@dataclass(frozen=True, eq=False)
class BiasTables:
    """What the kernels read of a rotary embedding, for key biases.

    Attributes:
        frequencies: [P] int64, turns per position of each rotated pair in units of 2^-64, zeros beyond `pairs`; P is
            a power of two and at least 16. A product with a position then drops whole turns and keeps all digits.
        spans: [2, 8, F / 8 + 1, 32, 8] float16: of positions 1/2 to 127 1/2, 16 a time, first what is the same at the
            positions' negatives: cos of the position times the frequency of each of the first F pairs, and the
            Chebyshev polynomials of degree 0, 2, .. 14 of the position / 128; then what changes its sign there, sin and
            the odd degrees. As operands.
        series: [2, (P - F) / 8, 32, 8] float16: those polynomials' factors in cos and sin of the other pairs, within
            those positions and their negatives, as one operand whose rows are the degrees, even ones first.
        turns: [2, 64, 2 P] float16: cos and sin of positions 0 to 63 times the frequency of each pair, side by side.
        Each of the last three: first rounded, then what that leaves out. An operand of 16 rows and 8 columns is two
        words of each thread: row 8 h + g, column 2 t + e is [4 g + t, 2 h + e]. Two lie side by side, so that a thread
        reads 16 bytes at once: of `spans` two of even functions or two of odd ones, the last one of each where their
        number is odd; of `series` cos and sin of 8 pairs.
        fast: F, a multiple of 8: the pairs that turn too quickly for the series, and what lies between them.
        pairs: rotated pairs.
    """

    frequencies: torch.Tensor
    spans: torch.Tensor
    series: torch.Tensor
    turns: torch.Tensor
    fast: int
    pairs: int

    @property
    def tensors(self) -> list[torch.Tensor]:
        """Every tensor held."""
        return [self.frequencies, self.spans, self.series, self.turns]


@dataclass(frozen=True, eq=False)
class BiasTerms:
    """A key bias and its rotary embedding, for the kernels.

    Attributes:
        bias: [G, D] float32, before the rotary embedding. lengths: [G] float32, of these.
        tables: on the device of the bias. interleaved, scaling: see KeyBias.
    """

    bias: torch.Tensor
    lengths: torch.Tensor
    tables: BiasTables
    interleaved: bool
    scaling: float


def bias_terms(bias: torch.Tensor, inverse_frequencies: torch.Tensor, scaling: float, interleaved: bool) -> BiasTerms:
    """See BiasTerms; inverse_frequencies: [pairs], radians per position. On the device of `bias`."""
    tables = bias_tables(inverse_frequencies)
    frequencies, spans, series, turns = (tensor.to(bias.device) for tensor in tables.tensors)
    own = BiasTables(frequencies, spans, series, turns, tables.fast, tables.pairs)
    return BiasTerms(bias, torch.linalg.vector_norm(bias, dim=-1), own, interleaved, scaling)


def bias_tables(inverse_frequencies: torch.Tensor) -> BiasTables:
    """See BiasTables; on the CPU, made once for all layers with these frequencies, radians per position [pairs]."""
    # kept for later calls, whatever device or mode is the default in this one
    with torch.device("cpu"), torch.inference_mode(False):
        return _tables(tuple(inverse_frequencies.double().tolist()))


@lru_cache(maxsize=8)
def _tables(inverse_frequencies: tuple[float, ...]) -> BiasTables:
    pairs = len(inverse_frequencies)
    padded = max(16, 1 << max(pairs - 1, 0).bit_length())
    radians = torch.zeros(padded, dtype=torch.float64)
    radians[:pairs] = torch.tensor(inverse_frequencies, dtype=torch.float64)
    turns = [int(turn * 2.0**64) for turn in (radians / (2 * torch.pi)).tolist()]
    signed = [(turn + (1 << 63)) % (1 << 64) - (1 << 63) for turn in turns]

    if radians.abs().max() >= torch.pi:
        raise OptionError(
            f"a rotary embedding turns by {radians.abs().max():g} radians a position, a key bias needs less than pi"
        )

    half = SPAN_TOKENS // 2
    positions = torch.arange(-half, half, dtype=torch.float64) + 0.5
    pair_table = _cos_sin(positions, radians)  # [positions, P, 2]
    polynomials = torch.cos((positions / half).acos()[:, None] * torch.arange(DEGREES))
    # cos and sin of all pairs as sums of them, by least squares
    factors = torch.linalg.lstsq(polynomials, pair_table.flatten(1)).solution
    error = (polynomials @ factors - pair_table.flatten(1)).abs().amax(0).view(padded, 2).amax(1)
    too_quick = (error > _SERIES_ERROR).nonzero()
    fast = 0 if not len(too_quick) else (int(too_quick[-1]) // PAIRS_TOGETHER + 1) * PAIRS_TOGETHER

    above = [torch.cat((pair_table[half:, :fast, i], polynomials[half:, i::2]), dim=1) for i in (0, 1)]
    even, odd = (_as_operands(_in_rows(functions)) for functions in above)
    # whole pairs of operands of either kind, then what is left of both
    whole = even.shape[1] // 2 * 2
    spans = torch.cat((even[:, :whole], odd[:, :whole], even[:, whole:], odd[:, whole:]), dim=1)
    by_degree = factors.view(DEGREES, -1, PAIRS_TOGETHER, 2)[:, fast // PAIRS_TOGETHER :].transpose(2, 3)
    series = _as_operands(torch.cat((by_degree[::2], by_degree[1::2])).flatten(1))
    return BiasTables(
        torch.tensor(signed, dtype=torch.int64),
        _high_and_low(_side_by_side(spans)),
        _high_and_low(_side_by_side(series)[0]),
        _high_and_low(_cos_sin(torch.arange(BLOCK_TOKENS).double(), radians).flatten(1)),
        fast,
        pairs,
    )


def _cos_sin(positions: torch.Tensor, radians: torch.Tensor) -> torch.Tensor:
    angles = positions[:, None] * radians
    return torch.stack((angles.cos(), angles.sin()), dim=-1)


def _in_rows(x: torch.Tensor) -> torch.Tensor:
    """Tokens [n, ..] in the order of a product's rows, see `lanes.token_of_row`."""
    return x.reshape(-1, 2, 4, *x.shape[1:]).transpose(1, 2).flatten(0, 2)


def _as_operands(x: torch.Tensor) -> torch.Tensor:
    """[rows, columns] as operands of mma.m16n8k8, as BiasTables says: [rows / 16, columns / 8, 32, 4]."""
    rows, columns = x.shape
    # [operand, half of its rows, g, its columns, t, e]
    apart = x.reshape(rows // 16, 2, 8, columns // 8, 4, 2)
    return apart.permute(0, 3, 2, 4, 1, 5).reshape(rows // 16, columns // 8, 32, 4)


def _side_by_side(x: torch.Tensor) -> torch.Tensor:
    """Operands [n, m, 32, 4] two at a time: [n, m / 2, 32, 8]."""
    n, m = x.shape[:2]
    return x.reshape(n, m // 2, 2, 32, 4).transpose(2, 3).reshape(n, m // 2, 32, 8)


def _high_and_low(x: torch.Tensor) -> torch.Tensor:
    return torch.stack((x.half(), (x - x.half()).half()))
