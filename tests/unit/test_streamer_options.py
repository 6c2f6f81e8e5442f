"""Sizes, dtypes and the environment."""

import subprocess
import sys
from pathlib import Path

import pytest

from streamer.errors import OptionError, StreamerError
from streamer.options import cache_dir, format_size, offline_from_environment, parse_dtype, parse_size


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("8GiB", 8 * 2**30),
        ("24GB", 24 * 10**9),
        ("512MiB", 512 * 2**20),
        ("512mb", 512 * 10**6),
        ("1.5G", 3 * 2**29),
        ("8g", 8 * 2**30),
        (" 2 TiB ", 2 * 2**40),
        ("1TB", 10**12),
        ("3t", 3 * 2**40),
        ("64K", 2**16),
        ("64kib", 2**16),
        ("64kB", 64_000),
        ("7m", 7 * 2**20),
        ("100B", 100),
        (".5GiB", 2**29),
        ("0GiB", 0),
        # In floating point 4.1 * 10**9 is a byte short.
        ("4.1GB", 4_100_000_000),
        (12345, 12345),
        (0, 0),
    ],
)
def test_parse_size_gives_bytes(text: str | int, expected: int) -> None:
    assert parse_size(text) == expected


@pytest.mark.parametrize(
    "text", ["", "8", "GiB", "8 gigs", "-8GiB", "8GiBs", "1e3MB", "1.GB", "8GiB 2", "٨GiB", True, 1.5]
)
def test_parse_size_refuses_and_shows_how_to_write_one(text: object) -> None:
    with pytest.raises(OptionError, match="is not a size: write a number and a unit, as in 8GiB, 24GB") as caught:
        parse_size(text)  # type: ignore[arg-type]
    assert repr(text) in str(caught.value)


def test_parse_size_refuses_a_negative_number() -> None:
    with pytest.raises(OptionError, match="cannot be negative, got -1 bytes"):
        parse_size(-1)


def test_option_error_is_a_value_error_and_a_streamer_error() -> None:
    assert issubclass(OptionError, ValueError)
    assert issubclass(OptionError, StreamerError)


@pytest.mark.parametrize(
    ("size_bytes", "expected"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (2**20 - 1, "1.0 MiB"),
        (2**30 - 1, "1.0 GiB"),
        (2**30 - 2**20, "1023.0 MiB"),
        (8_160_437_862, "7.6 GiB"),
        (-(3 * 2**29), "-1.5 GiB"),
        (5 * 2**40, "5120.0 GiB"),
    ],
)
def test_format_size(size_bytes: int, expected: str) -> None:
    assert format_size(size_bytes) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [("bfloat16", "bfloat16"), ("BF16", "bfloat16"), ("fp16", "float16"), ("half", "float16"), ("float16", "float16")]
    + [("float32", "float32"), ("fp32", "float32"), ("float", "float32"), (" auto ", "auto")],
)
def test_parse_dtype(name: str, expected: str) -> None:
    assert parse_dtype(name) == expected


def test_parse_dtype_refuses_and_lists_the_choices() -> None:
    with pytest.raises(
        OptionError, match="'int8' is not a dtype to compute in: choose auto, bfloat16, float16 or float32"
    ):
        parse_dtype("int8")


def test_cache_dir_order(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("TQ_STREAM_CACHE", str(tmp_path / "own"))
    assert cache_dir() == tmp_path / "own"
    monkeypatch.setenv("TQ_STREAM_CACHE", "~/own")
    assert cache_dir() == tmp_path / "home" / "own"
    monkeypatch.setenv("TQ_STREAM_CACHE", "")
    assert cache_dir() == tmp_path / "xdg" / "tq-stream"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_dir() == tmp_path / "home" / ".cache" / "tq-stream"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("TQ_STREAM_CACHE")
    assert cache_dir() == tmp_path / "home" / ".cache" / "tq-stream"


@pytest.mark.parametrize(
    ("value", "expected"), [("1", True), ("TRUE", True), ("yes", True), ("on", True)] + [("0", False), ("", False)]
)
@pytest.mark.parametrize("name", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_offline_from_environment(monkeypatch: pytest.MonkeyPatch, name: str, value: str, expected: bool) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("TRANSFORMERS_OFFLINE", raising=False)
    assert offline_from_environment() is False
    monkeypatch.setenv(name, value)
    assert offline_from_environment() is expected


def test_options_and_resolve_import_nothing_heavy() -> None:
    heavy = {"torch", "transformers", "huggingface_hub"}
    code = f"import sys, streamer.options, streamer.resolve; print({heavy} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"
