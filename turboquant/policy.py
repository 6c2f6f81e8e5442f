"""Which layer keeps its keys and values at how many bits."""

from collections.abc import Iterable
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
