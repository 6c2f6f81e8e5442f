"""Random orthogonal rotations of the head axis, and their inverses, from a seed."""

import hashlib
import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from turboquant.errors import OptionError, ShapeError


class Rotation(ABC):
    """An orthogonal map of the last axis. Made by `make_rotation`; nothing is drawn before the first use.

    Two rotations with equal kind, dim and seed are equal. The tensors it needs are drawn on the CPU, whatever the
    device, and kept per device.

    Attributes:
        kind: "hadamard" or "qr".
        dim: length of the rotated axis.
        seed: the seed.
    """

    kind: str

    def __init__(self, dim: int, seed: int) -> None:
        self.dim = dim
        self.seed = seed
        self._matrices: dict[torch.device, Tensor] = {}

    def __repr__(self) -> str:
        return f"make_rotation({self.kind!r}, {self.dim}, {self.seed})"

    @abstractmethod
    def apply(self, x: Tensor) -> Tensor:
        """Rotates the last axis.

        Args:
            x: [..., dim], any floating dtype.
        Returns:
            [..., dim] float32, a new tensor on x's device.
        Raises:
            ShapeError: the last axis is not dim, or x is not floating point.
        """

    @abstractmethod
    def invert(self, y: Tensor) -> Tensor:
        """Undoes `apply`, up to float32 rounding.

        Args:
            y: [..., dim], any floating dtype.
        Returns:
            [..., dim] float32, a new tensor on y's device.
        Raises:
            ShapeError: the last axis is not dim, or y is not floating point.
        """

    @property
    def tensors(self) -> list[Tensor]:
        """What has been drawn so far and is kept: a matrix, or signs and a small factor, on each device used."""
        return list(self._matrices.values())

    def matrix(self, device: torch.device | str | None = None) -> Tensor:
        """The rotation as a matrix: `apply(x)` equals `x @ matrix().T` up to rounding.

        Args:
            device: where the matrix shall lie; None is the CPU.
        Returns:
            [dim, dim] float32, kept by this object: read it, do not write to it.
        """
        place = torch.device("cpu") if device is None else torch.device(device)
        if place not in self._matrices:
            # Kept tensors must stay usable in autograd, so they are not made as inference tensors.
            with torch.inference_mode(False), torch.no_grad():
                self._matrices[place] = self._draw_matrix().to(place).contiguous()
        return self._matrices[place]

    @abstractmethod
    def _draw_matrix(self) -> Tensor:
        """[dim, dim] float32 on the CPU."""

    def _generator(self) -> torch.Generator:
        # A digest keeps neighbouring seeds, dims and kinds unrelated, and is the same on every machine.
        digest = hashlib.blake2b(f"{self.kind}:{self.dim}:{self.seed}".encode(), digest_size=8).digest()
        return torch.Generator(device="cpu").manual_seed(int.from_bytes(digest, "little"))

    def _as_float32(self, x: Tensor) -> Tensor:
        if not x.is_floating_point() or x.dim() == 0 or x.shape[-1] != self.dim:
            raise ShapeError(
                f"the rotation takes a floating tensor [..., {self.dim}], got {x.dtype} {list(x.shape)}; "
                f"make_rotation(kind, dim, seed) must have the length of the last axis"
            )
        return x.to(torch.float32)


class _HadamardRotation(Rotation):
    """(H_m ⊗ Q_k)·diag(s), dim = m·k with m a power of two: Walsh-Hadamard, small Haar factor, random signs.

    Only elementwise sums and products in a fixed order: a row's result has the same bits whatever batch it lies in.
    """

    kind = "hadamard"

    def __init__(self, dim: int, seed: int) -> None:
        super().__init__(dim, seed)
        self._butterfly_dim = dim & -dim  # m: the largest power of two that divides dim
        self._factor_dim = dim // self._butterfly_dim  # k
        self._parts: dict[torch.device, tuple[Tensor, Tensor]] = {}

    @property
    def tensors(self) -> list[Tensor]:
        return [*super().tensors, *(tensor for parts in self._parts.values() for tensor in parts)]

    def apply(self, x: Tensor) -> Tensor:
        signs, factor = self._signs_and_factor(x.device)
        return self._butterflies(self._mix(self._grid(self._as_float32(x) * signs), factor)).flatten(-2)

    def invert(self, y: Tensor) -> Tensor:
        signs, factor = self._signs_and_factor(y.device)
        return self._mix(self._butterflies(self._grid(self._as_float32(y))), factor.T).flatten(-2) * signs

    def _draw_matrix(self) -> Tensor:
        return self.apply(torch.eye(self.dim, dtype=torch.float32, device="cpu")).T.contiguous()

    def _signs_and_factor(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if device not in self._parts:
            with torch.inference_mode(False):
                generator = self._generator()
                coins = torch.randint(0, 2, (self.dim,), generator=generator, device="cpu")
                signs = (2 * coins - 1).to(torch.float32)
                factor = _haar(self._factor_dim, generator)
                self._parts[device] = signs.to(device), factor.to(device)
        return self._parts[device]

    def _grid(self, x: Tensor) -> Tensor:
        return x.reshape(*x.shape[:-1], self._butterfly_dim, self._factor_dim)  # [..., m, k]

    def _mix(self, grid: Tensor, factor: Tensor) -> Tensor:
        """Multiplies the axis k by the k x k factor, without a matmul, whose summation order depends on the batch."""
        if self._factor_dim == 1:
            return grid * factor[0]
        total = grid[..., :1] * factor[:, 0]
        for j in range(1, self._factor_dim):
            total = total + grid[..., j : j + 1] * factor[:, j]
        return total  # [..., m, k]

    def _butterflies(self, grid: Tensor) -> Tensor:
        """The orthonormal Walsh-Hadamard transform of the axis m (Sylvester order; symmetric, its own inverse)."""
        size = self._butterfly_dim
        batch, columns = grid.shape[:-2], grid.shape[-1]
        width = 1
        while width < size:
            first, second = grid.reshape(*batch, size // (2 * width), 2, width, columns).unbind(-3)  # [..., m/2w, w, k]
            grid = torch.stack((first + second, first - second), -3).flatten(-4, -2)  # [..., m, k]
            width *= 2
        return grid * (1 / math.sqrt(size))


class _QRRotation(Rotation):
    """A Haar-distributed dense matrix. Applied by a matmul: the last bits may depend on the batch around a row."""

    kind = "qr"

    def apply(self, x: Tensor) -> Tensor:
        return self._as_float32(x) @ self.matrix(x.device).T

    def invert(self, y: Tensor) -> Tensor:
        return self._as_float32(y) @ self.matrix(y.device)

    def _draw_matrix(self) -> Tensor:
        return _haar(self.dim, self._generator())


def make_rotation(kind: str, dim: int, seed: int) -> Rotation:
    """A random rotation of an axis of length dim.

    Args:
        kind: "hadamard" (random signs and Walsh-Hadamard butterflies, with a small Haar factor where dim is no power
            of two; O(dim log dim); rows are bit-identical in any batch) or "qr" (dense Haar matrix; one matmul).
        dim: length of the axis, at least 1.
        seed: any integer; equal arguments give equal rotations.
    Returns:
        The rotation; its tensors are drawn at the first use.
    Raises:
        OptionError: unknown kind, or dim below 1.
    Source: TurboQuant (arXiv 2504.19874), section 3, for the Haar rotation; the Hadamard form is own, after the usual
        randomized Hadamard transform (Ailon and Chazelle 2009).
    """
    if dim < 1:
        raise OptionError(f"the rotated axis must have a length of at least 1, got {dim}")
    if kind == "hadamard":
        return _HadamardRotation(dim, seed)
    if kind == "qr":
        return _QRRotation(dim, seed)
    raise OptionError(f'unknown rotation {kind!r}; use "hadamard" or "qr"')


def _haar(dim: int, generator: torch.Generator) -> Tensor:
    """[dim, dim] float32, orthogonal to float32 rounding, Haar-distributed."""
    gaussian = torch.randn(dim, dim, generator=generator, dtype=torch.float64, device="cpu")
    q, r = torch.linalg.qr(gaussian)
    # QR is unique only up to the signs of R's diagonal; making them positive makes Q Haar (Mezzadri 2007).
    haar: Tensor = q * torch.where(r.diagonal() < 0, -1.0, 1.0)
    return haar.to(torch.float32)
