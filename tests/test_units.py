from __future__ import annotations

import pytest

from moeinf.errors import UsageError
from moeinf.units import align_up, format_bytes, format_seconds, parse_size


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("123", 123),
        ("900MiB", 900 << 20),
        ("12GB", 12_000_000_000),
        (" 1.5 g ", 3 << 29),
        ("2TiB", 2 << 40),
        ("1kb", 1000),
        ("50%", 500),
        ("0.5%", 5),
    ],
)
def test_parse_size(text: str, expected: int) -> None:
    assert parse_size(text, whole_bytes=1000) == expected


@pytest.mark.parametrize("text", ["", "-1", "12 parsecs", "1e9", "MiB", "nan", "1,5GB"])
def test_parse_size_refuses(text: str) -> None:
    with pytest.raises(UsageError, match="is not a size"):
        parse_size(text, whole_bytes=1000)


def test_a_share_is_no_more_than_all() -> None:
    with pytest.raises(UsageError, match="150% is more than there is"):
        parse_size("150%", whole_bytes=1000)


def test_a_share_needs_something_to_be_a_share_of() -> None:
    with pytest.raises(UsageError):
        parse_size("50%")


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1536, "1.50 KiB"),
        (10 << 20, "10.0 MiB"),
        (1000 << 20, "0.98 GiB"),
        (200 << 40, "200 TiB"),
    ],
)
def test_format_bytes(size: int, expected: str) -> None:
    assert format_bytes(size) == expected


@pytest.mark.parametrize(
    ("seconds", "expected"), [(0.0123, "12 ms"), (2.44, "2.4 s"), (185, "3 min 05 s"), (7800, "2 h 10 min")]
)
def test_format_seconds(seconds: float, expected: str) -> None:
    assert format_seconds(seconds) == expected


def test_align_up() -> None:
    assert [align_up(size, 4096) for size in (0, 1, 4096, 4097)] == [0, 4096, 4096, 8192]
