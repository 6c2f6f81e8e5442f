"""tq-stream pack and unpack through click's runner: streams, exit statuses, messages."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from streamer import packing
from streamer.cli import main
from streamer.cli.group import Terminated


def tq_stream(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture
def wide(random_checkpoint: Callable[..., Path]) -> Path:
    """A bf16 model whose matrices have several blocks."""
    return random_checkpoint("llama", dtype="bfloat16", hidden_size=256, intermediate_size=512)


def test_packed_and_unpacked(wide: Path, tmp_path: Path) -> None:
    done = tq_stream("pack", wide)
    assert done.exit_code == 0, done.output
    said = re.fullmatch(
        r"the CPU codes the weights\n[\d.]+ MiB of safetensors are [\d.]+ MiB packed \(([\d.]+) %\)\n", done.stderr
    )
    assert said is not None, done.stderr
    assert 69 < float(said[1]) < 73
    folder = Path(done.stdout.rstrip("\n"))
    assert folder.parent == tmp_path / "tq-stream-cache" / "packed"
    again = tq_stream("pack", wide, "--offline", "--device", "cpu")
    assert (again.stdout, again.stderr) == (done.stdout, done.stderr)
    target = tmp_path / "unpacked"
    back = tq_stream("unpack", folder, target)
    assert (back.exit_code, back.stdout, back.stderr) == (0, f"{target}\n", "")
    for path in target.iterdir():
        assert path.read_bytes() == (wide / path.name).read_bytes()
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in target.iterdir()}
    assert tq_stream("run", target, "x", "--device", "cpu", "--max-new-tokens", "1").exit_code == 0


def test_what_cannot_be_packed_or_unpacked(random_checkpoint: Callable[..., Path], wide: Path, tmp_path: Path) -> None:
    done = tq_stream("pack", random_checkpoint("llama"))
    assert (done.exit_code, done.stdout) == (1, "")
    assert "holds float32, and only bfloat16 weights get smaller without loss: there is nothing to pack" in done.stderr
    done = tq_stream("unpack", wide, tmp_path / "out")
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr == f"Error: {wide} holds no packed.json: give the folder that tq-stream pack has printed\n"
    folder = Path(tq_stream("pack", wide).stdout.rstrip("\n"))
    done = tq_stream("unpack", folder, wide)
    assert done.exit_code == 2
    assert f"{wide / 'model.safetensors'} exists: give another folder" in done.stderr
    (folder / "model.safetensors.packed").write_bytes(b"")
    done = tq_stream("unpack", folder, tmp_path / "out")
    assert done.exit_code == 1
    assert f"{folder / 'model.safetensors.packed'} ends at byte 0" in done.stderr


@pytest.mark.parametrize(("interrupt", "status"), [(KeyboardInterrupt, 130), (Terminated, 143)])
def test_an_interrupted_run_says_how_it_goes_on(
    interrupt: type[KeyboardInterrupt], status: int, wide: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: Any, **options: Any) -> None:
        raise interrupt

    monkeypatch.setattr(packing, "pack_slice", interrupted)
    done = tq_stream("pack", wide)
    assert (done.exit_code, done.stdout) == (status, "")
    assert done.stderr == "the CPU codes the weights\nInterrupted; the same command goes on from here.\n"
    monkeypatch.undo()


def test_a_gpu_that_is_not_there_is_refused(wide: Path) -> None:
    done = tq_stream("pack", wide, "--device", "cuda")
    assert (done.exit_code, done.stdout) == (2, "")
    assert "device 'cuda' was asked for and 0 CUDA devices were found: write --device cpu" in done.stderr


def test_wrong_usage() -> None:
    assert "Missing argument 'MODEL'" in tq_stream("pack").stderr
    assert "Missing argument 'FOLDER'" in tq_stream("unpack", "x").stderr
