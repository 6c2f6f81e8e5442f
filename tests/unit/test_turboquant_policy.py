"""Precisions of layers."""

import pytest

from turboquant.errors import OptionError
from turboquant.policy import Precision, layer_precisions


@pytest.mark.parametrize("bits", [2, 3, 4, 16])
def test_the_widths_there_are(bits):
    assert Precision(bits, 4).key_bits == bits
    assert Precision(4, bits).value_bits == bits


@pytest.mark.parametrize("bits", [0, 1, 5, 8, 15, 32, -2, True])
def test_other_widths_are_refused(bits):
    with pytest.raises(OptionError, match=f"^key_bits must be 2, 3, 4 or 16, got {bits}$"):
        Precision(bits, 4)
    with pytest.raises(OptionError, match=f"^value_bits must be 2, 3, 4 or 16, got {bits}$"):
        Precision(4, bits)
    with pytest.raises(OptionError, match=f"^bits must be 2, 3, 4 or 16, got {bits}$"):
        layer_precisions(4, bits=bits)
    with pytest.raises(OptionError, match=f"^bits must be 2, 3, 4 or 16, got {bits}$"):
        layer_precisions(0, bits=bits, key_bits=4, value_bits=4)
    with pytest.raises(OptionError, match=f"^key_bits must be 2, 3, 4 or 16, got {bits}$"):
        layer_precisions(4, bits=3, key_bits=bits)


def test_a_precision_is_a_frozen_value():
    assert Precision(4, 3) == Precision(4, 3)
    assert len({Precision(4, 3), Precision(4, 3), Precision(3, 4)}) == 2
    with pytest.raises(AttributeError):
        Precision(4, 3).key_bits = 2


def test_bits_serve_both_unless_given_apart():
    assert layer_precisions(3, bits=3) == (Precision(3, 3),) * 3
    assert layer_precisions(2, bits=3, key_bits=4) == (Precision(4, 3),) * 2
    assert layer_precisions(2, bits=3, value_bits=2) == (Precision(3, 2),) * 2
    assert layer_precisions(1, bits=2, key_bits=16, value_bits=4) == (Precision(16, 4),)
    assert layer_precisions(0, bits=4) == ()


def test_protected_layers_stay_uncompressed():
    protected = layer_precisions(5, bits=3, protected_layers=(0, -1, 4, -4))
    assert [p.key_bits for p in protected] == [16, 16, 3, 3, 16]
    assert [p.value_bits for p in protected] == [16, 16, 3, 3, 16]


@pytest.mark.parametrize("index", [5, -6, 100])
def test_a_layer_that_does_not_exist(index):
    with pytest.raises(OptionError, match=f"protected layer {index} does not exist: the model has 5 layers.*-5 to 4"):
        layer_precisions(5, bits=3, protected_layers=[index])


def test_a_negative_number_of_layers():
    with pytest.raises(OptionError, match="must not be negative, got -1"):
        layer_precisions(-1, bits=3)
