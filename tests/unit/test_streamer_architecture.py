"""The meta model against its checkpoint: files that lie are named, and nothing but our own errors comes out."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from streamer.architecture import read_architecture
from streamer.checkpoint import Checkpoint
from streamer.errors import CheckpointError, StreamerError, TensorMismatchError, UnsupportedModelError


def changed(folder: Path, target: Path, file: str, **changes: Any) -> Path:
    """A copy of a checkpoint with values of one of its JSON files replaced."""
    shutil.copytree(folder, target)
    path = target / file
    content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    path.write_text(json.dumps(content | changes), encoding="utf-8")
    return target


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": 600},
        {"hidden_size": 65},
        {"hidden_size": "big"},
        {"hidden_size": None},
        {"num_attention_heads": 0},
        {"num_attention_heads": 7},
        {"quantization_config": []},
        {"quantization_config": {"quant_method": "awq"}},
        {"rope_parameters": {"rope_type": "foo"}},
        {"hidden_act": "nope"},
        {"dtype": "abc"},
        {"model_type": "nosuchmodel"},
        {"num_hidden_layers": 2},
        {"num_hidden_layers": 4},
        {"vocab_size": 127},
    ],
    ids=str,
)
def test_a_config_that_lies_is_one_of_our_errors(
    changes: dict[str, Any], random_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    folder = changed(random_checkpoint("llama"), tmp_path / "model", "config.json", **changes)
    with pytest.raises(StreamerError) as caught:
        read_architecture(folder, Checkpoint.open(folder))
    assert isinstance(caught.value, (UnsupportedModelError, CheckpointError))
    assert "\n" not in str(caught.value)


def test_more_layers_in_the_checkpoint_than_in_the_config(
    random_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """It would run without them and print nonsense."""
    folder = changed(random_checkpoint("llama"), tmp_path / "model", "config.json", num_hidden_layers=2)
    with pytest.raises(
        TensorMismatchError, match=r"config.json says 2 layers, and the checkpoint has tensor .*layers\.2"
    ):
        read_architecture(folder, Checkpoint.open(folder))


def test_a_generation_config_that_is_no_json(random_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(random_checkpoint("llama"), folder)
    (folder / "generation_config.json").write_text("{", encoding="utf-8")
    with pytest.raises(UnsupportedModelError, match=r"generation_config.json cannot be used"):
        read_architecture(folder, Checkpoint.open(folder))


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe"])
def test_experts_are_merged_as_transformers_merges_them(
    model_type: str, random_checkpoint: Callable[..., Path]
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from streamer.architecture import read_parameter

    folder = random_checkpoint(model_type)
    checkpoint = Checkpoint.open(folder)
    architecture = read_architecture(folder, checkpoint)
    wanted = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    merged = 0
    for layer in architecture.layers:
        for unit in layer:
            for parameter in unit.parameters:
                merged += parameter.conversion is not None
                value = read_parameter(parameter, checkpoint, architecture.model)
                assert torch.equal(value, wanted[parameter.name]), parameter.name
    assert merged == 6
