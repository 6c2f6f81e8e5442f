"""Decay: how many planes the blocks of a row have, by how many blocks came after them.

    blocks after it   0 ... d1-1 | d1 ... d2-1   | d2 ...
    bits              as coded   | of one step   | of the next

A block changes when a later one is coded, so nothing has to be watched between two blocks, and what a row holds
depends on how many blocks it has, not on how its tokens came.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise

from turboquant.errors import OptionError
from turboquant.layout import BLOCK_TOKENS, BlockLayout
from turboquant.policy import DecayStep


class DecaySchedule:
    """Which blocks are due for fewer planes as a row grows.

    Args:
        steps: see parse_decay; none = blocks stay as they are coded.
        window: newest tokens that stay uncompressed.
    Attributes:
        distances: for each step the blocks that must come after a block before it is due. Behind it are these, of 64
            tokens each, and the window: the least number with which its newest token is older than the step says.
        most_blocks: blocks that a row may take at once with no block passing two steps; None = any number.
    Raises:
        OptionError: a step that would begin within the window.
    """

    def __init__(self, steps: Sequence[DecayStep], window: int):
        if steps and steps[0].age_tokens <= window:
            raise OptionError(
                f"decay begins at an age of {steps[0].age_tokens} tokens, and the newest {window} are not coded: "
                f"give a first age above {window}"
            )
        self._steps = tuple(steps)
        self.distances = tuple(-(-(step.age_tokens - window) // BLOCK_TOKENS) for step in steps)
        gaps = [later - one for one, later in pairwise((0, *self.distances)) if later > one]
        self.most_blocks = min(gaps, default=None)

    def due(self, before: int, after: int) -> Iterator[tuple[int, int, int]]:
        """What a row that grows from `before` to `after` blocks has to age first: (first block, end, bits to keep).

        Oldest first: the records that they leave are free for the blocks that come next.
        """
        for step, distance in zip(reversed(self._steps), reversed(self.distances), strict=True):
            first, last = max(0, before - distance), max(0, after - distance)
            if first < last:
                yield first, last, step.bits

    def records(self, blocks: int, layout: BlockLayout) -> dict[BlockLayout, int]:
        """Records of each layout that a row has in use at most while it grows to `blocks` blocks.

        Their sum is `blocks`: a full row uses all of them.
        """
        layouts = [layout, *(layout.at_most(step.bits, step.bits) for step in self._steps)]
        counts: Counter[BlockLayout] = Counter()
        for own, begin, end in zip(layouts, (0, *self.distances), (*self.distances, blocks), strict=True):
            counts[own] += max(0, min(blocks, end) - begin)
        return {own: count for own, count in counts.items() if count}
