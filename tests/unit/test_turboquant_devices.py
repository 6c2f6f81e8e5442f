"""Which Triton the kernels need."""

from importlib import metadata

import pytest

from turboquant.ops.devices import triton_serves


@pytest.mark.parametrize(
    ("installed", "serves"), [("3.6.0", True), ("3.10.1+git", True), ("4.0a1", True), ("3.5.1", False), (None, False)]
)
def test_kernels_need_a_triton_that_compiles_them(
    installed: str | None, serves: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(name: str) -> str:
        if installed is None:
            raise metadata.PackageNotFoundError(name)
        return installed

    monkeypatch.setattr(metadata, "version", version)
    assert triton_serves() is serves
