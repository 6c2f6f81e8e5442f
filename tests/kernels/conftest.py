"""What tests of kernels share: memory nobody wrote is NaN, and a covering set of cases."""

import itertools
import os
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # packed_tokens
# what deterministic algorithms ask for in some releases, and harmless in others; read when CUDA starts
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """torch.empty gives NaN, so that whoever reads before writing is found."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


def pairwise(axes: Mapping[str, Sequence[Any]], seed: int = 0) -> list[dict[str, Any]]:
    """Cases in which every two values of two axes meet at least once; the same for the same axes."""
    draw = random.Random(seed)
    names = list(axes)
    open_pairs = {
        (a, x, b, y) for a, b in itertools.combinations(range(len(names)), 2)
        for x in range(len(axes[names[a]])) for y in range(len(axes[names[b]]))
    }  # fmt: skip

    def pairs(case: Sequence[int]) -> set[tuple[int, int, int, int]]:
        return {(a, case[a], b, case[b]) for a, b in itertools.combinations(range(len(names)), 2)}

    cases = []
    while open_pairs:
        fixed = min(open_pairs)
        best: list[int] = []
        for _ in range(60):
            case = [draw.randrange(len(axes[name])) for name in names]
            case[fixed[0]], case[fixed[2]] = fixed[1], fixed[3]
            if not best or len(pairs(case) & open_pairs) > len(pairs(best) & open_pairs):
                best = case
        open_pairs -= pairs(best)
        cases.append({name: axes[name][i] for name, i in zip(names, best, strict=True)})
    return cases
