"""Tiny checkpoints whose answers end at --max-new-tokens only."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def endless(random_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A function like random_checkpoint, whose model has no token that ends an answer: random weights may choose it."""

    def make(model_type: str, **changes: object) -> Path:
        folder = tmp_path_factory.mktemp("endless") / model_type
        shutil.copytree(random_checkpoint(model_type, **changes), folder)
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        del settings["eos_token"]
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        return folder

    return make


@pytest.fixture(scope="session")
def tiny(endless: Callable[..., Path]) -> Path:
    """Three layers, context 512, a tokenizer whose tokens are bytes."""
    return endless("llama")


@pytest.fixture(scope="session")
def tiny_with_long_context(endless: Callable[..., Path]) -> Path:
    """The same with room for an answer that takes minutes."""
    return endless("llama", max_position_embeddings=100_000)
