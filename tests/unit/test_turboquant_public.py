"""The public surface of turboquant, and what importing it does not do."""

import subprocess
import sys

import turboquant


def test_public_names_are_pinned() -> None:
    assert turboquant.__all__ == [
        "CompressedKV",
        "KeyBias",
        "LayerReport",
        "OptionError",
        "Precision",
        "ShapeError",
        "StateError",
        "StoreOptions",
        "TurboQuantCache",
        "TurboQuantError",
        "TurboQuantIP",
        "TurboQuantIndex",
        "TurboQuantMSE",
        "UnsupportedModelError",
        "wrap",
    ]
    assert all(getattr(turboquant, name) is not None for name in turboquant.__all__)


def test_a_name_that_does_not_exist_is_no_attribute() -> None:
    assert not hasattr(turboquant, "TurboQuantCash")


def test_import_starts_no_cuda_and_no_transformers() -> None:
    code = (
        "import sys, turboquant, torch\n"
        "assert not torch.cuda.is_initialized()\n"
        "assert 'transformers' not in sys.modules\n"
        "turboquant.CompressedKV(turboquant.StoreOptions(turboquant.Precision(3, 3)))\n"
        "assert 'transformers' not in sys.modules\n"
        "from turboquant import TurboQuantCache\n"
        "assert 'transformers' in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
