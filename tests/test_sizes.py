import pytest

from capgap.errors import UserError
from capgap.sizes import (
    ParameterCounts,
    format_count,
    forward_flops,
    parse_count,
    training_flops,
)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("3B", 3_000_000_000),
        ("1.1M", 1_100_000),
        ("300k", 300_000),
        (" 2.5 m ", 2_500_000),
        ("1_000", 1000),
        ("50,000", 50_000),
        ("1e6", 1_000_000),
        ("1.5T", 1_500_000_000_000),
        (123, 123),
        (1e6, 1_000_000),
    ],
)
def test_parse_count(text, count):
    assert parse_count(text) == count
    assert isinstance(parse_count(text), int)


@pytest.mark.parametrize("wrong", ["", "k", "3X", "1.5", 2.5, 0, -3, "-1M", True, "nan", "1.0005k"])
def test_parse_count_refuses(wrong):
    with pytest.raises(UserError) as error:
        parse_count(wrong)
    assert repr(wrong) in str(error.value)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (3.02e9, "3.02B"),
        (50_123, "50.1k"),
        (999_999, "1M"),
        (999, "999"),
        (85_000_000, "85M"),
        (2.5e12, "2.5T"),
        (0, "0"),
    ],
)
def test_format_count(count, text):
    assert format_count(count) == text


def test_parameter_counts_and_flops():
    counts = ParameterCounts(embedding=100, attention=20, ffn=30, norms=5, head=7)
    assert counts.non_embedding == 55
    assert counts.total == 162
    assert counts.as_dict() == {
        "embedding": 100,
        "attention": 20,
        "ffn": 30,
        "norms": 5,
        "head": 7,
        "non_embedding": 55,
        "total": 162,
    }
    # MiniMA's compute, printed as 4.0e21: student 6 S D + teacher forward 2 T D
    minima = training_flops(3_020_000_000, 126 * 10**9) + forward_flops(6_880_000_000, 126 * 10**9)
    assert minima == pytest.approx(4.02e21, rel=0.002)
