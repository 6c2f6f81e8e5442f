"""Which layer keeps its keys and values at how many bits, and from which age on at fewer."""

import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from turboquant.errors import OptionError

UNCOMPRESSED_BITS = 16
_ALLOWED_BITS = (2, 3, 4, UNCOMPRESSED_BITS)


@dataclass(frozen=True)
class Precision:
    """Bits per coordinate of one layer's keys and values; 16 leaves them uncompressed.

    Attributes:
        key_bits: 2, 3, 4 or 16.
        value_bits: 2, 3, 4 or 16.
    Raises:
        OptionError: another width.
    """

    key_bits: int
    value_bits: int

    def __post_init__(self) -> None:
        _check_bits("key_bits", self.key_bits)
        _check_bits("value_bits", self.value_bits)


@dataclass(frozen=True)
class DecayStep:
    """Tokens older than `age_tokens` keep at most `bits` bits.

    Attributes:
        age_tokens: tokens of the row that came after them. bits: 2 or 3, for keys and values alike.
    """

    age_tokens: int
    bits: int


NO_DECAY = "off"
_DECAY_STEP = re.compile(r"(\d+):([23])", re.ASCII)


def parse_decay(text: str) -> tuple[DecayStep, ...]:
    """The steps of a decay such as "4096:3,32768:2": tokens older than 4096 keep 3 bits, older than 32768 keep 2.

    Args:
        text: AGE:BITS, in tokens and 2 or 3 bits, with commas between; ages ascend and bits descend. "off" is none.
    Raises:
        OptionError: another text, or steps out of order.
    Source: own.
    """
    if text == NO_DECAY:
        return ()
    found = [_DECAY_STEP.fullmatch(part.strip()) for part in text.split(",")]
    if None in found:
        raise OptionError(
            f"{text!r} is not a decay: write AGE:BITS with 2 or 3 bits, ages in tokens, as in 4096:3,32768:2, or off"
        )
    steps = tuple(DecayStep(int(match[1]), int(match[2])) for match in found if match is not None)
    for one, next_one in itertools.pairwise(steps):
        if next_one.age_tokens <= one.age_tokens or next_one.bits >= one.bits:
            raise OptionError(
                f"decay {text!r}: {next_one.age_tokens}:{next_one.bits} stands behind {one.age_tokens}:{one.bits}; "
                "older tokens keep fewer bits, so give rising ages with falling bits, as in 4096:3,32768:2"
            )
    return steps


def check_decay(steps: Sequence[DecayStep], precisions: Iterable[Precision]) -> None:
    """Refuse a decay with which no layer would lose a bit.

    Raises:
        OptionError: no layer is coded with more bits than the last step keeps.
    """
    coded = [bits for own in precisions for bits in (own.key_bits, own.value_bits) if bits != UNCOMPRESSED_BITS]
    if steps and max(coded, default=0) <= steps[-1].bits:
        have = f"its codes have {max(coded)} bits" if coded else "it is not coded"
        raise OptionError(
            f"a decay to {steps[-1].bits} bits takes nothing from this cache: {have}; give more bits, or decay off"
        )


def layer_precisions(
    num_layers: int,
    *,
    bits: int,
    key_bits: int | None = None,
    value_bits: int | None = None,
    protected_layers: Iterable[int] = (),
) -> tuple[Precision, ...]:
    """The precision of every layer of a model.

    Args:
        num_layers: layers of the model.
        bits: 2, 3, 4 or 16 (uncompressed); for keys and values alike.
        key_bits: the same choice for keys alone; None takes bits.
        value_bits: the same choice for values alone; None takes bits.
        protected_layers: layers that stay uncompressed; negative indices count from the last.
    Returns:
        One Precision per layer, first layer first.
    Raises:
        OptionError: a width that does not exist, or a layer that does not.
    Source: own.
    """
    if num_layers < 0:
        raise OptionError(f"num_layers must not be negative, got {num_layers}")
    _check_bits("bits", bits)
    usual = Precision(bits if key_bits is None else key_bits, bits if value_bits is None else value_bits)
    precisions = [usual] * num_layers
    for index in protected_layers:
        if not -num_layers <= index < num_layers:
            raise OptionError(
                f"protected layer {index} does not exist: the model has {num_layers} layers, "
                f"so give {-num_layers} to {num_layers - 1}"
            )
        precisions[index] = Precision(UNCOMPRESSED_BITS, UNCOMPRESSED_BITS)
    return tuple(precisions)


def _check_bits(name: str, bits: int) -> None:
    if isinstance(bits, bool) or bits not in _ALLOWED_BITS:
        raise OptionError(f"{name} must be 2, 3, 4 or 16, got {bits}")
