"""TurboQuantIndex: nearest neighbours among vectors of 1 to 8 bits a coordinate, without training."""

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from turboquant.errors import OptionError, ShapeError, StateError
from turboquant.quantizer import QuantizedVectors, TurboQuantMSE

METRICS = ("cosine", "ip", "l2")

_FORMAT = "turboquant index 1"

# Vectors that are encoded, or compared with queries, at once: bounds the float32 numbers beside the codes.
_TILE = 16_384


class TurboQuantIndex:
    """Vectors as codes, searched exhaustively. Ids are the vectors' places, in the order in which they were added.

    Args:
        dim: length of the vectors.
        bits: bits per coordinate, 1 to 8; 2, 3 and 4 are packed where dim is a multiple of 8, others take a byte each.
        metric: "cosine", "ip" (inner product) or "l2" (squared distance).
        center: take the mean of the vectors of the first `add` out of all vectors before coding, and out of queries;
            what it adds to the scores is kept exactly. Better where vectors share a part, as embeddings do; the first
            `add` should be large. Costs 4 bytes a vector, but for "l2", which needs them anyway.
        seed: of the rotation.
        device: where codes lie and searches run.
    Raises:
        OptionError: an argument that cannot be honoured.
    Source: TurboQuant (arXiv 2504.19874), section 4.4, with the unbiased scale of `turboquant.ops.encode.encode`.
    """

    def __init__(
        self,
        dim: int,
        bits: int = 4,
        metric: str = "cosine",
        *,
        center: bool = True,
        seed: int = 0,
        device: str | torch.device = "cpu",
    ) -> None:
        if metric not in METRICS:
            raise OptionError(f"unknown metric {metric!r}; use one of {', '.join(METRICS)}")
        self.dim = dim
        self.bits = bits
        self.metric = metric
        self.center = center
        self.seed = seed
        self.device = torch.device(device)
        self._quantizer = TurboQuantMSE(dim, bits, seed=seed, rule="unbiased")
        self._tiles: list[QuantizedVectors] = []
        # of each vector y, the mean taken out: its squared length for "l2", else its product with the mean
        self._offsets: list[Tensor] = []
        self._mean: Tensor | None = None  # [dim] float32
        self._count = 0

    def __len__(self) -> int:
        """Vectors held."""
        return self._count

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors held: codes, scales, exact parts of the scores, and the mean."""
        parts = [*self._offsets, *([self._mean] if self._mean is not None else [])]
        return sum(tile.nbytes for tile in self._tiles) + sum(part.nbytes for part in parts)

    def add(self, vectors: Tensor) -> range:
        """Take vectors in.

        Args:
            vectors: [n, dim] floating, finite; on any device. "cosine" scales them to length 1 first.
        Returns:
            Their ids.
        Raises:
            ShapeError: another shape, no floating point numbers, or numbers that are not finite; nothing is added.
        """
        x = self._checked(vectors, "vectors")
        first = self._count
        if self._mean is None and len(x):
            self._mean = x.mean(0) if self.center else torch.zeros(self.dim, device=self.device)
        for tile in x.split(_TILE):
            if not len(tile):
                continue
            y = tile - self._mean
            self._tiles.append(self._quantizer.quantize(y))
            if self.metric == "l2":
                self._offsets.append(y.square().sum(-1))
            elif self.center:
                self._offsets.append(y @ self._mean)
        self._count += len(x)
        return range(first, self._count)

    def search(self, queries: Tensor, k: int = 10) -> tuple[Tensor, Tensor]:
        """The k nearest of each query.

        Args:
            queries: [m, dim] floating, finite.
            k: at least 1 and at most the number of vectors.
        Returns:
            (scores [m, k] float32, ids [m, k] int64), best first: cosines or inner products, the largest first, or
            squared distances, the smallest first. They are estimates: codes are.
        Raises:
            ShapeError: queries of another shape, or not finite.
            StateError: the index is empty.
            OptionError: k is less than 1 or more than there are vectors.
        """
        q = self._checked(queries, "queries")
        if not self._count:
            raise StateError("the index holds no vectors; add some before searching")
        if not 1 <= k <= self._count:
            raise OptionError(f"k must be 1 to {self._count}, the number of vectors; got {k}")
        assert self._mean is not None  # noqa: S101  set with the first vector
        # <q, x> = <q - m, y> + <m, y> + <q, m>, of which codes estimate the first alone
        p = q - self._mean
        turned = self._quantizer.rotation.apply(p)
        best = torch.empty(len(q), 0, device=self.device)
        ids = torch.empty(len(q), 0, dtype=torch.int64, device=self.device)
        first = 0
        for i, tile in enumerate(self._tiles):
            scores = turned @ self._quantizer.dequantize_rotated(tile).T
            if self.metric == "l2":
                scores = 2 * scores - self._offsets[i]
            elif self.center:
                scores = scores + self._offsets[i]
            own = torch.arange(first, first + scores.shape[1], device=self.device).expand_as(scores)
            first += scores.shape[1]
            scores, own = torch.cat((best, scores), 1), torch.cat((ids, own), 1)
            best, at = scores.topk(min(k, scores.shape[1]), dim=1)
            ids = own.gather(1, at)
        if self.metric == "l2":
            best = (p.square().sum(-1, keepdim=True) - best).clamp(min=0)
        else:
            best = best + (q @ self._mean)[:, None]
        return best, ids

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the index into a file, which `load` reads; an existing one is replaced."""
        state: dict[str, Any] = {
            "format": _FORMAT,
            "options": {"dim": self.dim, "bits": self.bits, "metric": self.metric, "center": self.center}
            | {"seed": self.seed},
            "codes": [tuple(part.cpu() for part in tile.codes) for tile in self._tiles],
            "scales": [tile.scale.cpu() for tile in self._tiles],
            "offsets": [offsets.cpu() for offsets in self._offsets],
            "mean": self._mean.cpu() if self._mean is not None else None,
        }
        # whole or not at all: a reader never meets half a file
        target = Path(path)
        unfinished = target.with_name(target.name + ".unfinished")
        torch.save(state, unfinished)
        unfinished.replace(target)

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: str | torch.device = "cpu") -> "TurboQuantIndex":
        """The index that `save` has written.

        Raises:
            OptionError: the file is no such index.
            OSError: it cannot be read.
        """
        try:
            state = torch.load(path, map_location=device, weights_only=True)
        except OSError:
            raise
        except Exception as error:  # noqa: BLE001  whatever a file of another kind makes torch raise
            raise OptionError(f"{path} is no TurboQuantIndex: {str(error).splitlines()[0]}") from None
        if not isinstance(state, dict) or state.get("format") != _FORMAT:
            raise OptionError(f"{path} is no TurboQuantIndex of a version that this one reads ({_FORMAT})")
        index = cls(**state["options"], device=device)
        index._tiles = [
            QuantizedVectors(tuple(codes), scale) for codes, scale in zip(state["codes"], state["scales"], strict=True)
        ]
        index._offsets = state["offsets"]
        index._mean = state["mean"]
        index._count = sum(len(scale) for scale in state["scales"])
        return index

    def _checked(self, x: Tensor, name: str) -> Tensor:
        """x as float32 [n, dim] on the index's device, of length 1 for "cosine"."""
        if x.dim() != 2 or x.shape[1] != self.dim or not x.is_floating_point():
            raise ShapeError(f"{name} must be [n, {self.dim}] floating point, got {list(x.shape)} {x.dtype}")
        x = x.to(self.device, torch.float32)
        if not x.isfinite().all():
            raise ShapeError(f"{name} must be finite; row {int((~x.isfinite()).any(1).nonzero()[0])} is not")
        return torch.nn.functional.normalize(x, dim=1) if self.metric == "cosine" else x
