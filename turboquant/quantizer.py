"""The paper's two vector quantizers, with codebooks that are optimal for their own width (not embedded ones)."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from turboquant import planes as bit_planes
from turboquant.codebook import lloyd_max
from turboquant.errors import OptionError, ShapeError
from turboquant.ops.encode.reference import SCALE_RULES, encode_codes, fixed_order_sum
from turboquant.rotation import make_rotation


@dataclass(frozen=True)
class QuantizedVectors:
    """Vectors as codes and one scale each, as `TurboQuantMSE.quantize` gives them.

    Attributes:
        codes: bit planes (turboquant/planes.py) where bits is 2, 3 or 4 and the dimension a multiple of 8; else one
            uint8 tensor [..., dim] of codes, which takes a byte per coordinate.
        scale: [...] float16.
    """

    codes: tuple[Tensor, ...]
    scale: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors held."""
        return sum(part.nbytes for part in self.codes) + self.scale.nbytes


class TurboQuantMSE:
    """Rotation and scalar Lloyd-Max codes: the quantizer made for a small squared error.

    Args:
        dim: length of the vectors.
        bits: bits per coordinate, 1 to 8.
        seed: of the rotation.
        rotation: "hadamard" or "qr".
        rule: how the scale is chosen, see `turboquant.ops.encode.encode`; "plain" is the paper's.
    Raises:
        OptionError: an argument that cannot be honoured.
    Source: TurboQuant (arXiv 2504.19874), algorithm 1; its errors are held to the exact values in
        tests/unit/test_turboquant_quantizer.py.
    """

    def __init__(self, dim: int, bits: int, *, seed: int = 0, rotation: str = "hadamard", rule: str = "plain") -> None:
        if rule not in SCALE_RULES:
            raise OptionError(f"unknown scale rule {rule!r}; use one of {', '.join(SCALE_RULES)}")
        self.dim = dim
        self.bits = bits
        self.rule = rule
        self.rotation = make_rotation(rotation, dim, seed)
        self.codebook = lloyd_max(bits)
        self._is_packed = bits in (2, 3, 4) and dim % 8 == 0

    def quantize(self, x: Tensor) -> QuantizedVectors:
        """The codes and scales of vectors.

        Args:
            x: [..., dim] floating.
        Returns:
            New tensors on x's device. Zero, NaN, infinite and too large vectors: as in `turboquant.ops.encode.encode`.
        Raises:
            ShapeError: the last axis is not dim, or x is not floating point.
        """
        codes, scale = encode_codes(self.rotation.apply(x), self.codebook, self.rule)
        return QuantizedVectors(bit_planes.pack(codes, self.bits) if self._is_packed else (codes,), scale)

    def dequantize(self, quantized: QuantizedVectors) -> Tensor:
        """The vectors that codes and scales stand for.

        Args:
            quantized: made by a quantizer with these arguments.
        Returns:
            [..., dim] float32, a new tensor.
        Raises:
            ShapeError: quantized was made for another dim or bits.
        """
        return self.rotation.invert(self.dequantize_rotated(quantized))

    def dequantize_rotated(self, quantized: QuantizedVectors) -> Tensor:
        """As `dequantize`, but still rotated.

        Args:
            quantized: made by a quantizer with these arguments.
        Returns:
            [..., dim] float32, a new tensor.
        Raises:
            ShapeError: quantized was made for another dim or bits.
        """
        sizes = bit_planes.plane_bytes(self.dim, self.bits) if self._is_packed else (self.dim,)
        found = tuple(part.shape[-1] for part in quantized.codes)
        if found != sizes:
            raise ShapeError(
                f"dim {self.dim} at {self.bits} bits has {list(sizes)} code bytes per vector, got {list(found)}; "
                "use the quantizer that made these codes"
            )
        codes = bit_planes.unpack(quantized.codes, self.dim) if self._is_packed else quantized.codes[0]
        return quantized.scale.to(torch.float32).unsqueeze(-1) * self.codebook.decode(codes)


@dataclass(frozen=True)
class SketchedVectors:
    """Vectors as coarse codes and a sign sketch of what these miss, as `TurboQuantIP.quantize` gives them.

    Attributes:
        coarse: codes of bits - 1 bits; None where bits is 1.
        signs: [..., ceil(dim / 8)] uint8; bit i of byte j is 1 where sketch coordinate 8j + i is not negative. Bits
            past dim are 0.
        residual_norm: [...] float16, length of what the coarse codes miss.
    """

    coarse: QuantizedVectors | None
    signs: Tensor
    residual_norm: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors held."""
        return (self.coarse.nbytes if self.coarse else 0) + self.signs.nbytes + self.residual_norm.nbytes


class TurboQuantIP:
    """`TurboQuantMSE` at bits - 1, and one QJL sign per coordinate of the residual: unbiased inner products.

    Warning: do not feed its reconstructions to softmax attention. Their squared error is several times that of
    `TurboQuantMSE` at the same bits, and `TurboQuantMSE(..., rule="unbiased")` has unbiased inner products with four
    to six times less variance, at no cost (both shown in tests/unit/test_turboquant_quantizer.py). This class is here
    for the paper's algorithm itself.

    Args:
        dim: length of the vectors.
        bits: bits per coordinate, 1 to 8, one of which is the sign; at 1 there are no coarse codes.
        seed: of the rotation and of the sketch.
        rotation: "hadamard" or "qr", of the coarse codes.
    Raises:
        OptionError: an argument that cannot be honoured.
    Source: TurboQuant (arXiv 2504.19874), algorithm 2; QJL (arXiv 2406.03482).
    """

    def __init__(self, dim: int, bits: int, *, seed: int = 0, rotation: str = "hadamard") -> None:
        if bits not in range(1, 9):
            raise OptionError(f"an inner-product code has 1 to 8 bits, got {bits}")
        self.dim = dim
        self.bits = bits
        self.seed = seed
        self.rotation = make_rotation(rotation, dim, seed)
        self.mse = TurboQuantMSE(dim, bits - 1, seed=seed, rotation=rotation) if bits > 1 else None
        # E[sign(<s, r>) s] = √(2/π)·r/|r| for s ~ N(0, I); the mean over dim rows of the sketch is inverted by this.
        self._sketch_factor = math.sqrt(math.pi / 2) / dim
        self._sketches: dict[torch.device, Tensor] = {}

    def quantize(self, x: Tensor) -> SketchedVectors:
        """The coarse codes, residual signs and residual lengths of vectors.

        Args:
            x: [..., dim] floating.
        Returns:
            New tensors on x's device.
        Raises:
            ShapeError: the last axis is not dim, or x is not floating point.
        """
        self._check_vectors(x)
        residual = x.to(torch.float32)
        coarse = None
        if self.mse is not None:
            coarse = self.mse.quantize(x)
            residual = residual - self.mse.dequantize(coarse)
        norm = fixed_order_sum(residual * residual).sqrt().to(torch.float16)
        return SketchedVectors(coarse, _pack_signs(residual @ self._sketch(x.device).T >= 0), norm)

    def dequantize(self, quantized: SketchedVectors) -> Tensor:
        """Vectors whose inner products are unbiased estimates; see the warning of this class.

        Args:
            quantized: made by a quantizer with these arguments.
        Returns:
            [..., dim] float32, a new tensor.
        Raises:
            ShapeError: quantized was made for another dim or bits.
        """
        signs, weight = self._signs_and_weight(quantized)
        correction = weight.unsqueeze(-1) * (signs @ self._sketch(signs.device))
        if self.mse is None or quantized.coarse is None:
            return correction
        return self.mse.dequantize(quantized.coarse) + correction

    def inner_product(self, q: Tensor, quantized: SketchedVectors) -> Tensor:
        """Estimates of <q, x>, from the rotated and the sketched q; no x is built.

        Args:
            q: [..., dim] floating; its leading axes broadcast with those of the vectors (q[:, None] against [N]
                vectors gives all pairs).
            quantized: made by a quantizer with these arguments.
        Returns:
            [...] float32, a new tensor.
        Raises:
            ShapeError: q's last axis is not dim, or quantized was made for another dim or bits.
        """
        self._check_vectors(q)
        signs, weight = self._signs_and_weight(quantized)
        sketched = q.to(torch.float32) @ self._sketch(q.device).T
        estimate: Tensor = weight * torch.linalg.vecdot(sketched, signs)
        if self.mse is None or quantized.coarse is None:
            return estimate
        estimate += torch.linalg.vecdot(self.rotation.apply(q), self.mse.dequantize_rotated(quantized.coarse))
        return estimate

    def _sketch(self, device: torch.device) -> Tensor:
        """[dim, dim] float32, entries N(0, 1)."""
        if device not in self._sketches:
            # Kept tensors must stay usable in autograd, so they are not made as inference tensors.
            with torch.inference_mode(False):
                generator = torch.Generator(device="cpu").manual_seed(self.seed)
                sketch = torch.randn(self.dim, self.dim, generator=generator, dtype=torch.float32, device="cpu")
                self._sketches[device] = sketch.to(device)
        return self._sketches[device]

    def _signs_and_weight(self, quantized: SketchedVectors) -> tuple[Tensor, Tensor]:
        """(signs [..., dim] of ±1, factor [...] of the sketch's part), float32."""
        if quantized.signs.shape[-1] != -(-self.dim // 8) or (quantized.coarse is None) != (self.mse is None):
            raise ShapeError(
                f"these vectors have {quantized.signs.shape[-1]} sign bytes and "
                f"{'no' if quantized.coarse is None else 'some'} coarse codes, which is not dim {self.dim} at "
                f"{self.bits} bits; use the quantizer that made them"
            )
        return _unpack_signs(quantized.signs, self.dim), self._sketch_factor * quantized.residual_norm.to(torch.float32)

    def _check_vectors(self, x: Tensor) -> None:
        if not x.is_floating_point() or x.dim() == 0 or x.shape[-1] != self.dim:
            raise ShapeError(f"vectors must be floating [..., {self.dim}], got {x.dtype} {list(x.shape)}")


def _pack_signs(is_positive: Tensor) -> Tensor:
    """[..., D] bool -> [..., ceil(D / 8)] uint8, coordinate 8j + i at bit i of byte j."""
    padded = torch.nn.functional.pad(is_positive.to(torch.uint8), (0, -is_positive.shape[-1] % 8))
    packed = padded[..., 0::8]
    for i in range(1, 8):
        packed = packed | padded[..., i::8] << i
    return packed


def _unpack_signs(signs: Tensor, dim: int) -> Tensor:
    """[..., ceil(dim / 8)] uint8 -> [..., dim] float32 of ±1."""
    bits = torch.stack([signs >> i & 1 for i in range(8)], -1).flatten(-2)[..., :dim]
    return bits.to(torch.float32).mul(2.0).sub(1.0)
