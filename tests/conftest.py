"""What all tests share: no network, no home folder, no GPU unless asked; the demo model; tiny random checkpoints."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from random_models import MORE_RANDOM_MODELS, RANDOM_MODELS, VOCAB_SIZE

from streamer.options import cache_dir

# Read by huggingface_hub when it is imported, so set before anything can import it.
os.environ["HF_HUB_OFFLINE"] = "1"
# Taken before the fixture below moves the cache folder away.
_USER_MODELS = cache_dir() / "models"


def pytest_configure(config: pytest.Config) -> None:
    """Hides the GPU and interprets Triton's kernels, except in a run that selects the tests marked gpu."""
    selected = config.getoption("markexpr", "") or ""
    if "gpu" not in selected or "not gpu" in selected:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips the tests marked gpu where no device is visible."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no CUDA device visible; on a machine with one run pytest -m gpu"))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Writes a failure down at once where TQ_STREAM_FAILURES names a file: a run that is cut prints none."""
    path = os.environ.get("TQ_STREAM_FAILURES")
    if path and report.failed and "PYTEST_XDIST_WORKER" not in os.environ:
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(f"{report.nodeid} ({report.when})\n{report.longreprtext}\n")


@pytest.fixture(autouse=True)
def own_cache(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache folder of the test's own, and no network, whatever the person running it has set."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    if request.node.get_closest_marker("user_cache") is None:
        monkeypatch.setenv("TQ_STREAM_CACHE", str(tmp_path / "tq-stream-cache"))


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """The converted demo model, a checkpoint folder in the cache of the person running the tests."""
    folder = _USER_MODELS / "smollm2-135m"
    if not (folder / "model.safetensors.index.json").is_file():
        pytest.skip(f"no demo model in {folder}; make it with scripts/make_demo_model.py")
    return folder


@pytest.fixture(scope="session")
def random_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A function from a model_type of RANDOM_MODELS to a checkpoint folder: tiny random weights, a tokenizer of bytes.

    Further keyword arguments change the config; dtype="bfloat16" and max_shard_size="50KB" change how it is saved.
    The same arguments give the same folder all session: tests read it and leave it as it is.
    """
    made: dict[str, Path] = {}

    def make(model_type: str, **changes: Any) -> Path:
        key = json.dumps([model_type, changes], sort_keys=True)
        if key not in made:
            made[key] = _write_random_checkpoint(tmp_path_factory.mktemp(model_type), model_type, **changes)
        return made[key]

    return make


def _write_random_checkpoint(
    folder: Path, model_type: str, *, dtype: str = "float32", max_shard_size: str = "50GB", **changes: Any
) -> Path:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from make_checkpoint import write_tokenizer

    # No end-of-sequence token: a random model would choose it at random, and generations would differ in length.
    special = {"pad_token_id": VOCAB_SIZE - 1, "eos_token_id": None, "bos_token_id": None}
    config = AutoConfig.for_model(model_type, **((RANDOM_MODELS | MORE_RANDOM_MODELS)[model_type] | special | changes))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            # As made, the weights leave all logits nearly equal and the biases zero: a wrong layer would not show.
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * 0.125 if parameter.dim() > 1 else parameter + noise * 0.1)
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=max_shard_size)
    write_tokenizer(folder, config.vocab_size)
    return folder
