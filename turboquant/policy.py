"""Which layer keeps its keys and values at how many bits, and from which age on at fewer."""

import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from turboquant.errors import OptionError

UNCOMPRESSED_BITS = 16
_ALLOWED_BITS = (2, 3, 4, UNCOMPRESSED_BITS)

# Between two widths keys take the larger: their errors cost more (docs/math.md).
_BETWEEN = {2.5: (3, 2), 3.5: (4, 3)}


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


# Relative squared error of codes with the unbiased scale, d / (1 - d) of the embedded code's d (docs/math.md).
CODE_ERRORS = {2: 0.1368, 3: 0.0361, 4: 0.00959}

_LAYER_BITS = re.compile(r"(-?\d+)(?:-(-?\d+))?:(2|3|4|16)(?:/(2|3|4|16))?", re.ASCII)

NO_DECAY = "off"
AUTO_DECAY = "auto"
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
    if text == AUTO_DECAY:
        raise OptionError(
            "decay auto is for a plan, which knows how much memory there is: give ages, as in 4096:3,32768:2, or off"
        )
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


def usual_precision(bits: float, key_bits: int | None = None, value_bits: int | None = None) -> Precision:
    """The precision of the layers for which nothing else is said.

    Args:
        bits: 2, 3, 4 or 16 (uncompressed) for keys and values alike; 2.5 is 3-bit keys and 2-bit values, 3.5 4-bit keys
            and 3-bit values.
        key_bits: 2, 3, 4 or 16 for keys alone; None takes bits. value_bits: the same for values.
    Raises:
        OptionError: another width.
    Source: own.
    """
    if bits not in _BETWEEN:
        _check_bits("bits", bits)
    keys, values = _BETWEEN.get(bits) or (int(bits), int(bits))
    return Precision(keys if key_bits is None else key_bits, values if value_bits is None else value_bits)


def layer_precisions(
    num_layers: int,
    *,
    bits: float,
    key_bits: int | None = None,
    value_bits: int | None = None,
    layer_bits: str = "",
    protected_layers: Iterable[int] = (),
) -> tuple[Precision, ...]:
    """The precision of every layer of a model.

    Args:
        num_layers: layers of the model.
        bits, key_bits, value_bits: see usual_precision.
        layer_bits: other widths for some layers, as in "0-3:4,-1:4/3": 4 bits for the first four, 4-bit keys and 3-bit
            values for the last. Of two entries for one layer the later holds.
        protected_layers: layers that stay uncompressed; negative indices count from the last.
    Returns:
        One Precision per layer, first layer first.
    Raises:
        OptionError: a width that does not exist, or a layer that does not.
    Source: own.
    """
    if num_layers < 0:
        raise OptionError(f"num_layers must not be negative, got {num_layers}")
    precisions = [usual_precision(bits, key_bits, value_bits)] * num_layers
    for first, last, own in parse_layer_bits(layer_bits):
        begin, end = _layer("layer", first, num_layers), _layer("layer", last, num_layers)
        if end < begin:
            raise OptionError(f"layers {first}-{last} of {num_layers} are none: give the lower one first")
        precisions[begin : end + 1] = [own] * (end + 1 - begin)
    for index in protected_layers:
        precisions[_layer("protected layer", index, num_layers)] = Precision(UNCOMPRESSED_BITS, UNCOMPRESSED_BITS)
    return tuple(precisions)


def parse_layer_bits(text: str) -> tuple[tuple[int, int, Precision], ...]:
    """The entries (first layer, last layer, precision) of a list such as "0-3:4,-1:4/3".

    Args:
        text: LAYER:BITS or FIRST-LAST:BITS with commas between; BITS is 2, 3, 4 or 16, or two of them as KEYS/VALUES;
            negative layers count from the last. Empty text has no entries.
    Raises:
        OptionError: another text.
    Source: own.
    """
    if not text:
        return ()
    found = [_LAYER_BITS.fullmatch(part.strip()) for part in text.split(",")]
    if None in found:
        raise OptionError(
            f"{text!r} does not say bits of layers: write LAYER:BITS or FIRST-LAST:BITS with 2, 3, 4 or 16 bits, or "
            "KEYS/VALUES, as in 0-3:4,-1:4/3"
        )
    return tuple(
        (int(match[1]), int(match[2] or match[1]), Precision(int(match[3]), int(match[4] or match[3])))
        for match in found
        if match is not None
    )


def format_layer_bits(precisions: Sequence[Precision]) -> str:
    """The text for `layer_bits` that gives these precisions, first layer first.

    Source: own; parse_layer_bits undoes it.
    """
    entries, first = [], 0
    for own, group in itertools.groupby(precisions):
        last = first + len(list(group)) - 1
        layers = str(first) if last == first else f"{first}-{last}"
        bits = str(own.key_bits) if own.key_bits == own.value_bits else f"{own.key_bits}/{own.value_bits}"
        entries.append(f"{layers}:{bits}")
        first = last + 1
    return ",".join(entries)


def assign_bits(sensitivities: Sequence[tuple[float, float]], average_bits: float) -> tuple[Precision, ...]:
    """Bits for the keys and values of each layer, with the least expected harm at an average width.

    A side's harm is taken to be proportional to the squared error of its code, and the harm of all sides to add up. A
    further bit then takes less harm away than the one before, so giving bits one by one to the side where the next
    takes most away is the best that whole bits can do (shown against all choices in the tests).

    Args:
        sensitivities: for each layer the harm (such as KL divergence) of its keys alone, and of its values alone, at 2
            bits; not negative.
        average_bits: 2 to 4, over keys and values of all layers; what does not fill another bit is left.
    Raises:
        OptionError: another average, or no layers.
    Source: own; marginal allocation is Fox's (Operations Research, 1966).
    """
    if not 2 <= average_bits <= 4 or not sensitivities:
        raise OptionError(f"2 to 4 bits can be assigned to layers, got {average_bits} for {len(sensitivities)} layers")
    harms = [harm for layer in sensitivities for harm in layer]
    bits = [2] * len(harms)

    def taken_away(i: int) -> float:
        return harms[i] * (CODE_ERRORS[bits[i]] - CODE_ERRORS[bits[i] + 1]) if bits[i] < 4 else -1.0

    for _ in range(int((average_bits - 2) * len(harms) + 1e-9)):  # 2.3 - 2 must not lose a bit to rounding
        bits[max(range(len(harms)), key=taken_away)] += 1
    return tuple(Precision(*pair) for pair in zip(bits[::2], bits[1::2], strict=True))


def _layer(name: str, index: int, num_layers: int) -> int:
    """A layer's number, counted from the first."""
    if not -num_layers <= index < num_layers:
        raise OptionError(
            f"{name} {index} does not exist: the model has {num_layers} layers, so give {-num_layers} to "
            f"{num_layers - 1}"
        )
    return index % num_layers


def _check_bits(name: str, bits: float) -> None:
    if isinstance(bits, bool) or bits not in _ALLOWED_BITS:
        between = " (or 2.5 or 3.5: keys one bit more than values)" if name == "bits" else ""
        raise OptionError(f"{name} must be 2, 3, 4 or 16{between}, got {bits}")
