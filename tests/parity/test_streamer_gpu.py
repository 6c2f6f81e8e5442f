"""Streaming on a GPU: the ring's answers, the bytes it moves, the memory it takes, and what is left after an error."""

import json
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from random_models import RANDOM_MODELS
from transformers import AutoModelForCausalLM

from streamer import StreamingEngine
from streamer.benchmark import unmapped_host_bytes
from streamer.engine import plan_report
from streamer.errors import CheckpointError
from streamer.plan import PROCESS_BYTES, SMALLEST_SLOT_BYTES
from streamer.rates import disk_bytes_read
from streamer.weights.memory import HostMemory

pytestmark = pytest.mark.gpu

NEW_TOKENS = 24


def prompt(length: int, batch: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 120, (batch, length), generator=torch.Generator().manual_seed(seed)).cuda()


def answer(model: Any, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 127} | options
    return model.generate(ids, attention_mask=torch.ones_like(ids), **options)


@pytest.mark.parametrize("resident", [0, 1, None], ids=["all-streamed", "one-resident", "all-resident"])
@pytest.mark.parametrize("model_type", sorted(RANDOM_MODELS))
def test_equals_transformers_token_for_token(
    model_type: str, resident: int | None, random_checkpoint: Callable[..., Path]
) -> None:
    folder = random_checkpoint(model_type)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).cuda().eval()
    with StreamingEngine(folder, bits=16, device="cuda", resident=resident, prefill_chunk=7) as engine:
        for length in (1, 45):
            ids = prompt(length)
            assert torch.equal(answer(engine.model, ids), answer(reference, ids)), length


def test_the_prompt_crosses_the_link_once(random_checkpoint: Callable[..., Path]) -> None:
    with StreamingEngine(random_checkpoint("llama"), bits=3, device="cuda", resident=0, prefill_chunk=16) as engine:
        model = engine.model
        answer(model, prompt(300), max_new_tokens=1)
        assert engine._runtime is not None
        weights, plan = engine._runtime.weights, engine.plan
        assert plan is not None
        before = weights.bytes_moved
        answer(model, prompt(300), max_new_tokens=1)
        assert weights.bytes_moved - before == plan.streamed_bytes
        before = weights.bytes_moved
        answer(model, prompt(300), max_new_tokens=5)
        assert weights.bytes_moved - before == 5 * plan.streamed_bytes


def test_random_answers_over_many_passes_with_a_busy_link(random_checkpoint: Callable[..., Path]) -> None:
    """A unit read before its copy has ended, or overwritten before it was read, would change some answer."""
    folder = random_checkpoint("llama", hidden_size=512, intermediate_size=2048, num_hidden_layers=12)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).cuda().eval()
    with StreamingEngine(folder, bits=16, device="cuda", resident=0) as engine:
        for seed in range(20):
            ids = prompt(30 + seed, seed=seed)
            assert torch.equal(answer(engine.model, ids), answer(reference, ids)), seed


def test_compressed_answers_do_not_depend_on_the_device(random_checkpoint: Callable[..., Path]) -> None:
    folder = random_checkpoint("qwen2", head_dim=64, num_hidden_layers=2)
    ids = prompt(300)
    with StreamingEngine(folder, bits=4, device="cuda", resident=0) as engine:
        on_gpu = answer(engine.model, ids, output_logits=True, return_dict_in_generate=True)
    on_cpu = answer(
        StreamingEngine(folder, bits=4, device="cpu").model,
        ids.cpu(),
        output_logits=True,
        return_dict_in_generate=True,
    )
    # sums run in another order, so a coordinate within rounding of a threshold may take the next code
    difference = (on_gpu.logits[1].cpu() - on_cpu.logits[1]).abs().max()
    assert difference < 0.02 * on_cpu.logits[1].std()


def test_an_error_in_mid_pass_leaves_the_engine_usable(random_checkpoint: Callable[..., Path]) -> None:
    with StreamingEngine(random_checkpoint("llama"), bits=16, device="cuda", resident=0) as engine:
        ids = prompt(20)
        wanted = answer(engine.model, ids)
        calls = 0

        def fail_once(what: str, share: float) -> None:
            nonlocal calls
            calls += 1
            if calls == 2:
                raise RuntimeError("planted")

        engine.stats.on_progress = fail_once
        with pytest.raises(RuntimeError, match="planted"):
            engine.generate_ids(ids[0].tolist(), max_new_tokens=4, temperature=0)
        engine.stats.on_progress = None
        assert torch.equal(answer(engine.model, ids), wanted)


def test_peak_memory_stays_below_the_prediction(random_checkpoint: Callable[..., Path]) -> None:
    """Small model, so that context and workspaces, which the allocator does not see, are left out on both sides."""
    folder = random_checkpoint(
        "llama", hidden_size=1024, intermediate_size=4096, num_hidden_layers=8, max_position_embeddings=4096
    )
    # cuBLAS and cuBLASLt, which adds biases, keep workspaces from here on
    square = torch.ones(16, 16, dtype=torch.bfloat16, device="cuda")
    torch.nn.functional.linear(square @ square, square, square[0])
    for bits, length in ((16, 2000), (3, 2000)):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        base = torch.cuda.memory_allocated()
        with StreamingEngine(
            folder, bits=bits, device="cuda", resident=0, context=length + NEW_TOKENS, prefill_chunk=256
        ) as engine:
            engine.generate_ids(prompt(length)[0].tolist(), max_new_tokens=NEW_TOKENS, temperature=0)
            assert engine.plan is not None
            predicted = sum(
                term.nbytes for term in engine.plan.terms if term.where == "device" and "context" not in term.name
            )
        assert torch.cuda.max_memory_allocated() - base <= predicted
        assert torch.cuda.memory_allocated() - base < 1 << 20


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("bits", [16, 3])
def test_the_predicted_memory_is_enough(bits: int, dtype: str, random_checkpoint: Callable[..., Path]) -> None:
    """Under a hard cap at the prediction, with a prompt in chunks: nothing is lost between blocks of the allocator."""
    folder = random_checkpoint(
        "llama", hidden_size=2048, intermediate_size=8192, num_hidden_layers=4, max_position_embeddings=16384
    )
    options: dict[str, Any] = {
        "bits": bits, "dtype": dtype, "resident": 0, "context": 12000 + NEW_TOKENS, "prefill_chunk": 4096
    }  # fmt: skip
    peak = plan_report(folder, vram="40GiB", **options).device_peak
    assert peak is not None
    predicted = peak.predicted_bytes
    with StreamingEngine(folder, device="cuda", vram=predicted, **options) as engine:
        for length in (12000, 5000, 12000):
            engine.generate_ids(prompt(length)[0].tolist(), max_new_tokens=NEW_TOKENS, temperature=0)


def test_two_hundred_generations_take_no_more_memory(random_checkpoint: Callable[..., Path]) -> None:
    with StreamingEngine(random_checkpoint("llama"), bits=3, device="cuda", resident=0) as engine:
        ids = prompt(40)[0].tolist()
        for _ in range(5):
            engine.generate_ids(ids, max_new_tokens=4, temperature=0)
        held, host, threads = torch.cuda.memory_reserved(), unmapped_host_bytes(), threading.active_count()
        for _ in range(200):
            engine.generate_ids(ids, max_new_tokens=4, temperature=0)
        assert torch.cuda.memory_reserved() == held
        assert threading.active_count() <= threads
        assert host is not None
        assert (unmapped_host_bytes() or 0) < host + (16 << 20)  # a block of Python's own allocator may come and go


def least_ram(folder: Path) -> int:
    """Host memory with which a model streams and keeps nothing."""
    with StreamingEngine(folder, device="cuda", resident=0, context=64) as engine:
        rows = engine.memory_report().rows  # of the plan: nothing is assembled
    converting = next(row.predicted_bytes for row in rows if row.name == "weights in conversion")
    return PROCESS_BYTES + converting + 4 * SMALLEST_SLOT_BYTES


@pytest.mark.parametrize("direct_io", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.4])
@pytest.mark.parametrize("model_type", ["llama", "qwen3_moe", "gpt2"])
def test_staged_weights_give_the_same_answers(
    model_type: str, share: float, direct_io: bool, random_checkpoint: Callable[..., Path]
) -> None:
    folder = random_checkpoint(model_type)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).cuda().eval()
    size = sum(p.nbytes for p in reference.parameters())
    ram = least_ram(folder) + int(share * size)
    with StreamingEngine(
        folder, bits=16, device="cuda", resident=0, ram=ram, direct_io=direct_io, prefill_chunk=7
    ) as engine:
        for length in (1, 45, 3):
            ids = prompt(length)
            assert torch.equal(answer(engine.model, ids), answer(reference, ids)), length
        assert engine.plan is not None
        assert engine.plan.host == "staged"  # --ram counts, whatever the machine has
        assert bool(engine.plan.kept) == bool(share)


@pytest.mark.parametrize("allowed", [0, 1, 4])
def test_refused_page_locking_is_said_and_changes_no_answer(
    allowed: int,
    random_checkpoint: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """From the first allocation on, or half-way."""
    folder = random_checkpoint("llama", num_hidden_layers=6)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).cuda().eval()
    monkeypatch.setattr("streamer.weights.host._SEGMENT_BYTES", 1)
    pin, count = HostMemory.pin, [0]

    def refuse(memory: HostMemory) -> bool:
        count[0] += 1
        return count[0] <= allowed and pin(memory)

    monkeypatch.setattr(HostMemory, "pin", refuse)
    ids = prompt(45)
    with StreamingEngine(folder, bits=16, device="cuda", resident=0) as engine:
        for _ in range(3):
            assert torch.equal(answer(engine.model, ids), answer(reference, ids))
    lines = [record.message for record in caplog.records if record.name == "streamer"]
    assert any("are read from the files in every pass" in line for line in lines)
    assert any("bounce buffer" in line for line in lines) == (allowed == 0)
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("tq-stream-")] == []


def test_a_shard_cut_in_mid_stream_is_an_error_that_can_be_mended(random_checkpoint: Callable[..., Path]) -> None:
    folder = random_checkpoint("llama", hidden_size=256, intermediate_size=1024, num_hidden_layers=8)
    ids = prompt(20)
    shard = next(folder.glob("*.safetensors"))
    content = shard.read_bytes()
    with StreamingEngine(folder, bits=16, device="cuda", resident=0, ram=least_ram(folder)) as engine:
        wanted = answer(engine.model, ids)
        held = torch.cuda.memory_allocated()
        with shard.open("r+b") as file:
            file.truncate(len(content) // 2)
        with pytest.raises(CheckpointError, match="ends at byte"):
            answer(engine.model, ids)
        shard.write_bytes(content)
        assert torch.equal(answer(engine.model, ids), wanted)
        assert torch.cuda.memory_allocated() <= held + (1 << 20)
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("tq-stream-")] == []


@pytest.mark.parametrize("at", [1, 3, 9])
@pytest.mark.parametrize("kind", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("staged", [False, True])
def test_an_interrupt_or_error_anywhere_leaves_the_engine_usable(
    staged: bool, kind: type[BaseException], at: int, random_checkpoint: Callable[..., Path]
) -> None:
    """In the first pass, while residents and page-locked memory are being filled, and in a later one."""
    folder = random_checkpoint("llama", num_hidden_layers=6)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).cuda().eval()
    ids = prompt(20)
    ram = least_ram(folder) if staged else None
    with StreamingEngine(folder, bits=16, device="cuda", resident=2, ram=ram) as engine:
        calls = raised = 0

        def fail(what: str, share: float) -> None:
            nonlocal calls
            calls += 1
            if calls == at:
                raise kind("planted")

        engine.stats.on_progress = fail
        for _ in range(1 + at // 6):
            try:
                engine.generate_ids(ids[0].tolist(), max_new_tokens=4, temperature=0)
            except kind as error:
                raised += "planted" in str(error)
        assert calls >= at
        assert raised == 1
        engine.stats.on_progress = None
        assert torch.equal(answer(engine.model, ids), answer(reference, ids))


def test_an_engine_may_be_built_in_inference_mode(random_checkpoint: Callable[..., Path]) -> None:
    folder = random_checkpoint("llama")
    ids = prompt(20)[0].tolist()
    with StreamingEngine(folder, bits=3, device="cuda", resident=0) as engine:
        with torch.inference_mode():
            first = engine.generate_ids(ids, max_new_tokens=8, temperature=0)
        assert engine.generate_ids(ids, max_new_tokens=8, temperature=0) == first


def test_the_process_stays_within_both_budgets(random_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """In a process of its own: the driver's count for the GPU, context included; all host memory but files' pages."""
    folder = random_checkpoint(
        "llama", hidden_size=1024, intermediate_size=4096, num_hidden_layers=16, max_position_embeddings=4096
    )
    program = tmp_path / "program.py"
    program.write_text(
        """
import faulthandler, json, sys, threading, time
faulthandler.dump_traceback_later(100, exit=True)
import torch
from streamer import StreamingEngine
from streamer.benchmark import unmapped_host_bytes
from streamer.errors import CheckpointError
from streamer.plan import PROCESS_BYTES, SMALLEST_SLOT_BYTES
from streamer.rates import disk_bytes_read
from streamer.weights.memory import HostMemory
from streamer.benchmark import HostPeak
vram, ram, peaks, stop = int(sys.argv[2]), int(sys.argv[3]), [0], threading.Event()
base = torch.cuda.device_memory_used(0)
def watch():
    while not stop.wait(0.02):
        peaks[0] = max(peaks[0], torch.cuda.device_memory_used(0) - base)
thread = threading.Thread(target=watch, daemon=True); thread.start()
with HostPeak() as host, StreamingEngine(sys.argv[1], bits=3, vram=vram, ram=ram, context=2048) as engine:
    ids = torch.randint(1, 120, (2000,)).tolist()
    for _ in range(3):
        engine.generate_ids(ids, max_new_tokens=8, temperature=0)
    plan = engine.plan
stop.set(); thread.join()
print(json.dumps({"device": peaks[0], "host": host.peak_bytes, "planned_device": plan.device_bytes,
                  "planned_host": plan.bytes_at("host"), "staged": plan.staged_bytes, "kept": len(plan.kept)}))
""",
        encoding="utf-8",
    )
    vram, ram = (5 << 30) // 4, (15 << 30) // 8
    done = subprocess.run(
        [sys.executable, str(program), str(folder), str(vram), str(ram)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    print(found)
    assert found["kept"]
    assert found["staged"]
    assert found["device"] <= found["planned_device"] <= vram
    assert found["host"] <= found["planned_host"] <= ram


def test_what_is_kept_is_not_read_again(random_checkpoint: Callable[..., Path]) -> None:
    """Around the page cache, so that what the process reads from the disk is what it asks for."""
    folder = random_checkpoint("llama", hidden_size=1024, intermediate_size=4096, num_hidden_layers=16)
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    ids = prompt(5)
    with StreamingEngine(
        folder, bits=16, device="cuda", resident=0, ram=least_ram(folder) + size // 2, direct_io=True
    ) as engine:
        answer(engine.model, ids)
        assert engine.plan is not None
        staged = engine.plan.staged_bytes
        assert size // 3 < staged < 2 * size // 3
        before = disk_bytes_read()
        assert before is not None
        answer(engine.model, ids, max_new_tokens=10)
        read = (disk_bytes_read() or 0) - before
    # readers run ahead by the slots at most, and whole blocks are read
    assert 9 * staged <= read <= 11.5 * staged


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("groups", [1, 7])
@pytest.mark.parametrize(("tokens", "length"), [(1, 1), (1, 1000), (300, 300), (100, 1000)])
def test_dense_attention_against_float64(tokens: int, length: int, groups: int, dtype: torch.dtype) -> None:
    """Keys and values are views of a longer buffer, as a 16-bit layer keeps them."""
    from turboquant.hf.dense import dense_attention

    generator = torch.Generator("cuda").manual_seed(0)
    kv_heads, dim = 4, 128

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device="cuda").to(dtype)

    q = random(1, kv_heads * groups, tokens, dim)
    keys, values = (random(1, kv_heads, length + 77, dim)[:, :, :length] for _ in range(2))
    module = torch.nn.Module()
    module.num_key_value_groups = groups
    module.is_causal = True
    got = dense_attention(module, q, keys, values, None, scale=dim**-0.5)
    wide_keys, wide_values = (x.double().repeat_interleave(groups, dim=1) for x in (keys, values))
    scores = q.double() @ wide_keys.transpose(2, 3) * dim**-0.5
    future = torch.ones(tokens, length, dtype=torch.bool, device="cuda").triu(length - tokens + 1)
    wanted = scores.masked_fill(future, float("-inf")).softmax(-1) @ wide_values
    error = (got.double() - wanted).norm(dim=-1) / wanted.norm(dim=-1)
    # bf16 keeps 8 bits of p and of the result: 2 ** -8 each, and their sums; float32 may be multiplied as tf32
    assert error.max() < (1e-2 if dtype == torch.bfloat16 else 2e-3)


def test_heads_of_a_group_share_their_keys_in_a_chunk() -> None:
    """Keys and values made for every query head took a chunk of a long prompt more memory than all else."""
    from turboquant.hf.dense import dense_attention

    # as many queries as fill the GPU: FlashAttention divides the keys of fewer, and keeps parts of the sums in float32
    q = torch.randn(1, 40, 1024, 128, device="cuda", dtype=torch.bfloat16)
    keys, values = (torch.randn(1, 8, 16384, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    module = torch.nn.Module()
    module.num_key_value_groups = 5
    module.is_causal = True
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = dense_attention(module, q, keys, values, None, scale=128**-0.5)
    assert torch.cuda.max_memory_allocated() - before < 2 * out.nbytes < keys.nbytes


def test_a_refused_registration_leaves_the_device_usable() -> None:
    segment = HostMemory(1 << 20)
    assert segment.pin()
    assert not segment.pin()  # registered already: the driver refuses
    assert torch.ones(3, device="cuda").sum().item() == 3
    segment.close()


@pytest.mark.parametrize("spare", range(0, 14, 2))
def test_partly_resident_layers_read_a_prompt_in_chunks(spare: int, random_checkpoint: Callable[..., Path]) -> None:
    folder = random_checkpoint("llama", num_hidden_layers=6, intermediate_size=160)
    ids = prompt(45)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).cuda().eval()
    wanted = answer(reference, ids)
    # the cap is on all that torch holds in this process, earlier tests' leavings included; the plan is of the engine's
    del reference
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    with StreamingEngine(folder, bits=16, device="cuda", resident=0, context=128, prefill_chunk=7) as least:
        assert least.model is not None
        assert least.plan is not None
        needs = least.plan.device_bytes
        part = sum(unit.nbytes for unit in least.plan.units) // 14
    vram = needs + spare * part + part // 3
    with StreamingEngine(folder, bits=16, device="cuda", vram=vram, context=128, prefill_chunk=7) as engine:
        assert torch.equal(answer(engine.model, ids), wanted)
