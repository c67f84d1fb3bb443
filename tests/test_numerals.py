import pytest

from segtrust.numerals import interval_text, number


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.7142, "0.714"),
        (0.99991, "0.9999"),
        (0.00042, "0.0004"),
        (-0.0042, "−0.004"),
        (1.0, "1.000"),
        (0, "0.000"),
        (None, "–"),
        (3e-9, "3.0e−09"),
        (2.5, "2.500"),
    ],
)
def test_rounding_never_turns_a_number_into_zero_or_one(value, text):
    assert number(value) == text


def test_an_interval_that_reaches_below_zero_is_written_with_to():
    assert interval_text(-0.01, 0.02) == "[−0.010 to 0.020]"
    assert interval_text(0.27, 0.35, 2) == "[0.27–0.35]"
    assert interval_text(None, None) == ""
