"""What an assembled model asks of torch's allocator; the rest of the runtime is tested through the engine."""

import logging

import pytest
import torch

from streamer import runtime
from streamer.options import configures_allocator

CPU = torch.device("cpu")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the allocator is told; on Linux, with no settings of the user's own."""
    told: list[str] = []
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", told.append, raising=False)
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setattr("platform.release", lambda: "6.8.0-generic")
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    return told


def test_segments_are_asked_to_grow(asked: list[str]) -> None:
    runtime._let_segments_grow(CPU)
    assert asked == ["expandable_segments:True"]


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_settings_of_the_user_stay(name: str, asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "max_split_size_mb:128")
    assert configures_allocator()
    runtime._let_segments_grow(CPU)
    assert asked == []


@pytest.mark.parametrize(("system", "release"), [("win32", "11"), ("linux", "5.15.167.4-microsoft-standard-WSL2")])
def test_systems_without_growing_segments_are_left_alone(
    system: str, release: str, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.platform", system)
    monkeypatch.setattr("platform.release", lambda: release)
    runtime._let_segments_grow(CPU)
    assert asked == []


def test_a_driver_that_refuses_growing_segments_is_said_and_done_without(
    asked: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*shape: object, **options: object) -> None:
        raise RuntimeError("CUDA driver error: operation not supported")

    monkeypatch.setattr(torch, "empty", refuse)
    with caplog.at_level(logging.WARNING, "streamer"):
        runtime._let_segments_grow(CPU)
    assert asked == ["expandable_segments:True", "expandable_segments:False"]
    assert "the driver has no growing ones (CUDA driver error: operation not supported)" in caplog.text


def test_memory_that_is_used_up_is_no_refusal(asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*shape: object, **options: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "empty", refuse)
    runtime._let_segments_grow(CPU)
    assert asked == ["expandable_segments:True"]
