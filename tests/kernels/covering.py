"""A set of cases in which every two values of two axes meet."""

import itertools
import random
from collections.abc import Mapping, Sequence
from typing import Any


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
