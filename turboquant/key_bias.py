"""KeyBias: the part of every key that does not depend on the text, R_t b, as vectors and as a score term.

A key projection with a bias adds the same vector b to every key before the rotary embedding, so R_t b after it.
In Qwen2.5 that constant is up to 97 % of a key's energy, and the error of any rotation code is proportional to
the energy it codes. The term depends on the position alone: it is subtracted before a key is coded, and its
share of the score, q . R_t b, is added back when the key is read. The result is the same whatever b is used, so
a position that is off by a constant costs precision, never correctness.
"""

from dataclasses import dataclass

import torch

from turboquant.errors import ShapeError
from turboquant.ops.attend.bias import bias_tables


@dataclass(frozen=True, eq=False)
class KeyBias:
    """Bias of one layer's key projection and the rotary embedding that turns it.

    Attributes:
        bias: [G, D] float32, the bias of each KV head before the rotary embedding.
        inverse_frequencies: [R / 2] float32, radians per position of each rotated pair; empty without rotary.
        scaling: factor on the rotated part (the attention factor of YaRN; 1 elsewhere).
        interleaved: pairs are coordinates (2i, 2i + 1) instead of (i, i + R / 2).
    The first R coordinates of a head turn; the rest (partial rotary) are constant.
    Source: own; the rotary embedding is Su et al. 2021 (arXiv 2104.09864), equation 34.
    """

    bias: torch.Tensor
    inverse_frequencies: torch.Tensor
    scaling: float = 1.0
    interleaved: bool = False

    def __post_init__(self) -> None:
        rotary_dim = 2 * self.inverse_frequencies.numel()
        if self.bias.ndim != 2 or rotary_dim > self.bias.shape[-1]:
            raise ShapeError(
                f"a key bias is [kv_heads, head_dim] with head_dim >= the rotary width; got {tuple(self.bias.shape)} "
                f"and a rotary width of {rotary_dim}"
            )

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors held."""
        return self.bias.nbytes + self.inverse_frequencies.nbytes

    @property
    def table_nbytes(self) -> int:
        """Bytes of what the kernels read besides the bias (ops/attend/bias.py): tables, and a length for each head."""
        return sum(tensor.nbytes for tensor in bias_tables(self.inverse_frequencies).tensors) + 4 * self.bias.shape[0]

    def to(self, device: torch.device) -> "KeyBias":
        """The same bias on `device`."""
        return KeyBias(self.bias.to(device), self.inverse_frequencies.to(device), self.scaling, self.interleaved)

    def _pairs(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Split the last axis: first and second member of each rotated pair, and the part that does not turn."""
        rotary_dim = 2 * self.inverse_frequencies.numel()
        turned, rest = x[..., :rotary_dim], x[..., rotary_dim:]
        if self.interleaved:
            return turned[..., 0::2], turned[..., 1::2], rest
        return turned[..., : rotary_dim // 2], turned[..., rotary_dim // 2 :], rest

    def _cos_sin(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # float64: at position 100,000 a float32 angle is off by 0.004 rad, more than a 4-bit cell of a large bias
        angles = positions.double()[..., None] * self.inverse_frequencies.double()
        return (angles.cos() * self.scaling).float(), (angles.sin() * self.scaling).float()

    def vectors(self, positions: torch.Tensor) -> torch.Tensor:
        """R_t b for each position.

        Args:
            positions: [..., S] integer, position of each token.
        Returns:
            [..., G, S, D] float32, a new tensor.
        """
        cos, sin = self._cos_sin(positions)  # [..., S, R / 2]
        first, second, rest = self._pairs(self.bias)  # [G, R / 2] twice, [G, D - R]
        cos, sin = cos[..., None, :, :], sin[..., None, :, :]
        first, second = first[:, None, :], second[:, None, :]
        turned_first = first * cos - second * sin  # [..., G, S, R / 2]
        turned_second = second * cos + first * sin
        rest = rest[:, None, :].expand(*turned_first.shape[:-1], rest.shape[-1])
        if self.interleaved:
            turned = torch.stack((turned_first, turned_second), dim=-1).flatten(-2)
            return torch.cat((turned, rest), dim=-1)
        return torch.cat((turned_first, turned_second, rest), dim=-1)

    def scores(self, q: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """q . R_t b without building R_t b: one product with a cosine table and one with a sine table.

        Args:
            q: [G, N, D] float32, queries as the model made them (not rotated by a code's rotation).
            positions: [S] integer.
        Returns:
            [G, N, S] float32.
        """
        cos, sin = self._cos_sin(positions)  # [S, R / 2]
        q_first, q_second, q_rest = self._pairs(q)
        b_first, b_second, b_rest = (part[:, None, :] for part in self._pairs(self.bias))
        along_cos = q_first * b_first + q_second * b_second  # [G, N, R / 2]
        along_sin = q_second * b_first - q_first * b_second
        constant = (q_rest * b_rest).sum(-1, keepdim=True)  # [G, N, 1]
        return along_cos @ cos.T + along_sin @ sin.T + constant
