"""Streaming on a GPU: the ring's answers, the bytes it moves, the memory it takes, and what is left after an error."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from random_models import RANDOM_MODELS
from transformers import AutoModelForCausalLM

from streamer import StreamingEngine

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

        def fail_once(fraction: float) -> None:
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


def test_generating_again_and_again_takes_no_more_memory(random_checkpoint: Callable[..., Path]) -> None:
    with StreamingEngine(random_checkpoint("llama"), bits=3, device="cuda", resident=0) as engine:
        ids = prompt(200)[0].tolist()
        for _ in range(3):
            engine.generate_ids(ids, max_new_tokens=8, temperature=0)
        before = torch.cuda.memory_reserved()
        for _ in range(50):
            engine.generate_ids(ids, max_new_tokens=8, temperature=0)
        assert torch.cuda.memory_reserved() == before


@pytest.mark.parametrize("groups", [1, 7])
@pytest.mark.parametrize(("tokens", "length"), [(1, 1), (1, 1000), (300, 300), (100, 1000)])
def test_dense_attention_in_bfloat16_against_float64(tokens: int, length: int, groups: int) -> None:
    """Keys and values are views of a longer buffer, as a 16-bit layer keeps them."""
    from turboquant.hf.dense import dense_attention

    generator = torch.Generator("cuda").manual_seed(0)
    kv_heads, dim = 4, 128

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device="cuda").bfloat16()

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
    assert error.max() < 1e-2  # bf16 keeps 8 bits of p and of the result: 2 ** -8 each, and their sums


def test_a_refused_registration_leaves_the_device_usable() -> None:
    from streamer.weights.host import PinnedSegment

    segment = PinnedSegment(1 << 20)
    assert segment.pin()
    assert not segment.pin()  # registered already: the driver refuses
    assert torch.ones(3, device="cuda").sum().item() == 3
    segment.close()


@pytest.mark.parametrize("spare", range(0, 14, 2))
def test_partly_resident_layers_read_a_prompt_in_chunks(spare: int, random_checkpoint: Callable[..., Path]) -> None:
    folder = random_checkpoint("llama", num_hidden_layers=6, intermediate_size=160)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).cuda().eval()
    with StreamingEngine(folder, bits=16, device="cuda", resident=0, context=128, prefill_chunk=7) as least:
        assert least.model is not None
        assert least.plan is not None
        needs = least.plan.device_bytes
        part = sum(unit.nbytes for unit in least.plan.units) // 14
    ids = prompt(45)
    with StreamingEngine(
        folder, bits=16, device="cuda", vram=needs + spare * part + part // 3, context=128, prefill_chunk=7
    ) as engine:
        assert torch.equal(answer(engine.model, ids), answer(reference, ids))
