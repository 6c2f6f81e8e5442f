"""Coded weights on a GPU: every logit is that of the weights as they are, bit for bit, wherever the bytes are."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from streamer import StreamingEngine, packed
from streamer.checkpoint import Checkpoint
from streamer.codec import pack_for_run
from streamer.errors import CheckpointError
from streamer.options import packed_dir
from streamer.packing import pack
from streamer.plan import PROCESS_BYTES, SMALLEST_SLOT_BYTES

pytestmark = pytest.mark.gpu

NEW_TOKENS = 12
SHAPE: dict[str, Any] = {"num_hidden_layers": 6, "hidden_size": 256, "intermediate_size": 1056, "dtype": "bfloat16"}


@pytest.fixture
def folder(random_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """Packed, matrices in one to five records; biases, and tails that fill no block."""
    monkeypatch.setattr(packed, "SLICE_BYTES", 128 << 10)
    made = random_checkpoint("qwen2", **SHAPE)
    pack(made, packed_dir(), threads=2)
    return made


def prompt(length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 120, (1, length), generator=torch.Generator().manual_seed(seed)).cuda()


def logits(engine: StreamingEngine, ids: torch.Tensor) -> torch.Tensor:
    made: Any = engine.model.generate(  # type: ignore[operator]  # of GenerationMixin
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        pad_token_id=127,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return torch.stack(made.logits)


@pytest.mark.parametrize("bits", [16, 3])
@pytest.mark.parametrize("resident", [0, 2, 6], ids=["all-streamed", "two-resident", "all-resident"])
def test_logits_are_the_same_bit_for_bit(resident: int, bits: int, folder: Path) -> None:
    found = {}
    for codec in ("raw", "lossless"):
        options: dict[str, Any] = {"bits": bits, "device": "cuda", "resident": resident, "prefill_chunk": 7}
        with StreamingEngine(folder, codec=codec, **options) as engine:
            found[codec] = [logits(engine, prompt(length)) for length in (1, 45, 3)]
            assert engine.plan is not None
            assert engine.plan.is_coded == (codec == "lossless")
    assert all(torch.equal(a, b) for a, b in zip(found["raw"], found["lossless"], strict=True))


def test_a_run_packs_what_it_wants_coded(random_checkpoint: Callable[..., Path]) -> None:
    folder = random_checkpoint("qwen2", **(SHAPE | {"hidden_size": 512, "intermediate_size": 2048}))
    ids, shares = prompt(30), []
    with StreamingEngine(folder, bits=16, device="cuda", resident=0, codec="raw") as engine:
        wanted = logits(engine, ids)
    lines: list[str] = []
    for _ in range(2):
        with StreamingEngine(
            folder, device="cuda", bits=16, resident=0, codec="lossless", on_note=lines.append
        ) as engine:
            engine.memory_report()
            engine.stats.on_progress = lambda what, share: shares.append((what, share))
            assert torch.equal(logits(engine, ids), wanted)
            assert engine.plan is not None
            assert engine.plan.is_coded
    assert ("packing", 1.0) in shares
    assert sum("has not been packed" in line for line in lines) == 1


def test_packing_for_a_run_gives_its_memory_back(random_checkpoint: Callable[..., Path]) -> None:
    """Page-locked memory, too, which torch would keep: the run's plan does not count it."""

    def held() -> tuple[int, int]:
        # what torch owns; what it says is in use stays high in some releases (pytorch/pytorch#182404)
        return int(torch.cuda.host_memory_stats()["allocated_bytes.current"]), torch.cuda.memory_reserved()

    folder = random_checkpoint("qwen2", **(SHAPE | {"hidden_size": 512, "intermediate_size": 2048}))
    torch.zeros(1 << 20, dtype=torch.uint8).pin_memory().cuda()
    before = held()
    with Checkpoint.open(folder) as checkpoint:
        pack_for_run(checkpoint, torch.device("cuda"), ram_bytes=64 << 30, on_note=str).close()
    assert all(after <= earlier for after, earlier in zip(held(), before, strict=True))


@pytest.mark.parametrize("direct_io", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.4])
def test_coded_weights_from_the_files_in_every_pass(share: float, direct_io: bool, folder: Path) -> None:
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    ram = PROCESS_BYTES + 4 * SMALLEST_SLOT_BYTES + int(share * size)
    with StreamingEngine(folder, bits=16, device="cuda", resident=0, codec="raw") as engine:
        wanted = [logits(engine, prompt(length)) for length in (45, 3)]
    with StreamingEngine(
        folder, bits=16, device="cuda", resident=0, codec="lossless", ram=ram, direct_io=direct_io
    ) as engine:
        assert all(torch.equal(logits(engine, prompt(n)), w) for n, w in zip((45, 3), wanted, strict=True))
        assert engine.plan is not None
        assert engine.plan.host == "staged"
        assert bool(engine.plan.kept) == bool(share)


def test_random_answers_over_many_passes_with_a_busy_link(random_checkpoint: Callable[..., Path]) -> None:
    """A unit decoded before its copy has ended, or over weights that are still read, would change some logit."""
    folder = random_checkpoint("qwen2", **(SHAPE | {"hidden_size": 512, "intermediate_size": 2048}))
    pack(folder, packed_dir(), threads=2)
    found = {}
    for codec in ("raw", "lossless"):
        with StreamingEngine(folder, bits=16, device="cuda", resident=0, codec=codec) as engine:
            found[codec] = [logits(engine, prompt(30 + seed, seed)) for seed in range(20)]
    for seed in range(20):
        assert torch.equal(found["raw"][seed], found["lossless"][seed]), seed


def test_an_error_in_mid_pass_leaves_the_engine_usable(folder: Path) -> None:
    with StreamingEngine(folder, bits=16, device="cuda", resident=2, codec="lossless") as engine:
        wanted = logits(engine, prompt(20))
        calls = 0

        def fail_once(what: str, share: float) -> None:
            nonlocal calls
            calls += 1
            if calls == 3:
                raise RuntimeError("planted")

        engine.stats.on_progress = fail_once
        with pytest.raises(RuntimeError, match="planted"):
            engine.generate_ids(prompt(20)[0].tolist(), max_new_tokens=4, temperature=0)
        engine.stats.on_progress = None
        assert torch.equal(logits(engine, prompt(20)), wanted)


def test_peak_memory_stays_below_the_prediction(random_checkpoint: Callable[..., Path]) -> None:
    folder = random_checkpoint(
        "qwen2",
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=8,
        max_position_embeddings=4096,
        dtype="bfloat16",
    )
    pack(folder, packed_dir(), threads=2)
    # cuBLAS and cuBLASLt, which adds biases, keep workspaces from here on
    square = torch.ones(16, 16, dtype=torch.bfloat16, device="cuda")
    torch.nn.functional.linear(square @ square, square, square[0])
    for resident in (0, 3):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        base = torch.cuda.memory_allocated()
        with StreamingEngine(
            folder, bits=16, device="cuda", resident=resident, codec="lossless", context=2048, prefill_chunk=256
        ) as engine:
            engine.generate_ids(prompt(2000)[0].tolist(), max_new_tokens=NEW_TOKENS, temperature=0)
            assert engine.plan is not None
            predicted = sum(
                term.nbytes for term in engine.plan.terms if term.where == "device" and "context" not in term.name
            )
        assert torch.cuda.max_memory_allocated() - base <= predicted
        assert torch.cuda.memory_allocated() - base < 1 << 20


def test_a_packed_file_cut_in_mid_stream_is_an_error_that_can_be_mended(folder: Path) -> None:
    ids = prompt(20)
    ram = PROCESS_BYTES + 4 * SMALLEST_SLOT_BYTES
    with StreamingEngine(folder, bits=16, device="cuda", resident=0, ram=ram, codec="lossless") as engine:
        wanted = logits(engine, ids)
        assert engine._runtime is not None
        file = next(iter(engine._runtime.files.tensors.values())).shard
        content = file.read_bytes()
        with file.open("r+b") as stored:
            stored.truncate(len(content) // 2)
        with pytest.raises(CheckpointError, match=file.name):
            logits(engine, ids)
        file.write_bytes(content)
        assert torch.equal(logits(engine, ids), wanted)
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("tq-stream-")] == []
