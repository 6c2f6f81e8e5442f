"""Precisions of layers."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from turboquant.codebook import embedded_codebook
from turboquant.errors import OptionError
from turboquant.policy import (
    CODE_ERRORS,
    Precision,
    assign_bits,
    format_layer_bits,
    layer_precisions,
    parse_layer_bits,
    usual_precision,
)


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
    with pytest.raises(OptionError, match=rf"^bits must be 2, 3, 4 or 16 \(or 2.5 or 3.5: .*\), got {bits}$"):
        layer_precisions(4, bits=bits)
    with pytest.raises(OptionError, match=rf"^bits must be 2, 3, 4 or 16 \(or 2.5 or 3.5: .*\), got {bits}$"):
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


def test_between_two_widths_keys_have_the_larger():
    assert usual_precision(2.5) == Precision(3, 2)
    assert usual_precision(3.5) == Precision(4, 3)
    assert usual_precision(3.5, value_bits=4) == Precision(4, 4)
    assert usual_precision(3.5, key_bits=2) == Precision(2, 3)
    assert layer_precisions(2, bits=2.5) == (Precision(3, 2),) * 2
    with pytest.raises(OptionError, match=r"^bits must be .*, got 4.5$"):
        usual_precision(4.5)
    with pytest.raises(OptionError, match=r"^key_bits must be 2, 3, 4 or 16, got 2.5$"):
        Precision(2.5, 2)


def test_layers_may_have_bits_of_their_own():
    found = layer_precisions(6, bits=3, layer_bits="0-1:4, -1:4/2,3:2,3:16/4", protected_layers=[2])
    assert found == tuple(Precision(*own) for own in [(4, 4), (4, 4), (16, 16), (16, 4), (3, 3), (4, 2)])
    assert layer_precisions(3, bits=3, layer_bits="-2--1:2") == (Precision(3, 3), Precision(2, 2), Precision(2, 2))


@pytest.mark.parametrize("text", ["4", "0:5", "0:4/", "a:4", "0-:4", "0:4,", "0-3", "0:2.5"])
def test_other_texts_are_no_bits_of_layers(text):
    with pytest.raises(OptionError, match="does not say bits of layers: write LAYER:BITS or FIRST-LAST:BITS"):
        parse_layer_bits(text)


def test_bits_for_layers_that_do_not_exist():
    with pytest.raises(OptionError, match="^layer 5 does not exist: the model has 5 layers, so give -5 to 4$"):
        layer_precisions(5, bits=3, layer_bits="0-5:4")
    with pytest.raises(OptionError, match="layers 3-1 of 5 are none"):
        layer_precisions(5, bits=3, layer_bits="3-1:4")


@given(st.lists(st.tuples(*[st.sampled_from([2, 3, 4, 16])] * 2), max_size=12))
def test_any_precisions_can_be_written_and_read(widths):
    wanted = tuple(Precision(*own) for own in widths)
    assert layer_precisions(len(wanted), bits=3, layer_bits=format_layer_bits(wanted)) == wanted


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_errors_of_codes_are_those_of_the_embedded_code(bits):
    """Of N(0, 1), by a sum over its density; the unbiased scale makes d / (1 - d) of the plain error d."""
    x = torch.linspace(-8, 8, 400_001, dtype=torch.float64)
    density = torch.exp(-(x**2) / 2)
    codebook = embedded_codebook(bits)
    missed = (x - codebook.decode(codebook.encode(x.float())).double()) ** 2
    plain = float((density * missed).sum() / density.sum())
    assert plain / (1 - plain) == pytest.approx(CODE_ERRORS[bits], rel=2e-3)


@given(
    st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=3),
    st.integers(200, 400).map(lambda hundredths: hundredths / 100),
)
def test_assigned_bits_are_the_best_of_all_that_fit(sensitivities, average_bits):
    def harm(precisions):
        return sum(
            h * CODE_ERRORS[bits]
            for own, pair in zip(precisions, sensitivities, strict=True)
            for h, bits in zip(pair, (own.key_bits, own.value_bits), strict=True)
        )

    sides = 2 * len(sensitivities)
    fits = [c for c in itertools.product((2, 3, 4), repeat=sides) if sum(c) <= average_bits * sides + 1e-9]
    choices = [[Precision(*pair) for pair in zip(c[::2], c[1::2], strict=True)] for c in fits]
    assigned = assign_bits(sensitivities, average_bits)
    assert list(assigned) in choices
    assert harm(assigned) <= min(map(harm, choices)) + 1e-12


def test_an_average_that_cannot_be_assigned():
    for average in (1.9, 4.1, float("nan")):
        with pytest.raises(OptionError, match="2 to 4 bits can be assigned to layers, got"):
            assign_bits([(1.0, 1.0)], average)
    with pytest.raises(OptionError, match="for 0 layers"):
        assign_bits([], 3)
    assert assign_bits([(1.0, 0.0)] * 5, 2.3) == (Precision(3, 2),) * 3 + (Precision(2, 2),) * 2


def test_what_counts_is_what_a_bit_takes_away():
    """A third bit takes 3.80 times as much as a fourth, while what is left of the errors differs by 3.79."""
    assert assign_bits([(3.795, 1.0)], 3) == (Precision(3, 3),)
    assert assign_bits([(3.805, 1.0)], 3) == (Precision(4, 2),)
