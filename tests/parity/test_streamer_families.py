"""A streamed model equals transformers' own, token for token, for every family, chunk size and padded batch."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from random_models import MORE_RANDOM_MODELS, RANDOM_MODELS
from transformers import AutoModelForCausalLM

from streamer import StreamingEngine

MODEL_TYPES = tuple(RANDOM_MODELS)

NEW_TOKENS = 24


def reference(folder: Path, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model.generate(ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=127)


def prompts(batch: int, longest: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Left-padded token ids and mask: rows of longest, longest - 7, longest - 14, ... tokens."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 120, (batch, longest), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(batch):
        mask[row, : 7 * row] = 0
        ids[row, : 7 * row] = 127
    return ids, mask


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_single_prompts_in_any_chunks(model_type: str, random_checkpoint: Callable[..., Path]) -> None:
    folder = random_checkpoint(model_type)
    for longest, chunk in ((1, 4096), (5, 7), (45, 7), (45, 4096)):
        ids, mask = prompts(1, longest)
        engine = StreamingEngine(folder, bits=16, device="cpu", prefill_chunk=chunk)
        got = engine.model.generate(
            ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=127
        )
        assert torch.equal(got, reference(folder, ids, mask)), (longest, chunk)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_left_padded_batch_longer_than_the_window(model_type: str, random_checkpoint: Callable[..., Path]) -> None:
    folder = random_checkpoint(model_type)
    ids, mask = prompts(3, 40)
    engine = StreamingEngine(folder, bits=16, device="cpu", prefill_chunk=7)
    got = engine.model.generate(ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=127)
    assert torch.equal(got, reference(folder, ids, mask))


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_batch_and_single_agree_at_4_bits(model_type: str, random_checkpoint: Callable[..., Path]) -> None:
    folder = random_checkpoint(model_type)
    ids, mask = prompts(3, 230)
    engine = StreamingEngine(folder, bits=4, device="cpu", prefill_chunk=50)
    together = engine.model.generate(
        ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=127
    )
    for row in range(3):
        alone = engine.model.generate(
            ids[row : row + 1, 7 * row :], max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=127
        )
        assert torch.equal(together[row, 7 * row :], alone[0]), row


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gpt_oss", "qwen2"])
def test_a_conversation_goes_on_in_the_same_cache(model_type: str, random_checkpoint: Callable[..., Path]) -> None:
    """The second turn goes through the layers in chunks, behind tokens that are cached already."""
    folder = random_checkpoint(model_type)
    ids, mask = prompts(2, 40)
    more = torch.randint(0, 120, (2, 33), generator=torch.Generator().manual_seed(9))
    options = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 127, "return_dict_in_generate": True}
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    engine = StreamingEngine(folder, bits=16, device="cpu", prefill_chunk=7)
    answers = []
    for model in (reference, engine.model):
        first = model.generate(ids, attention_mask=mask, **options)
        both = torch.cat([first.sequences, more], dim=1)
        seen = torch.cat([mask, torch.ones(2, both.shape[1] - 40, dtype=mask.dtype)], dim=1)
        second = model.generate(both, attention_mask=seen, past_key_values=first.past_key_values, **options)
        answers.append(second.sequences)
    assert torch.equal(*answers)


@pytest.mark.parametrize("model_type", MORE_RANDOM_MODELS)
def test_more_families_alone_and_in_a_padded_batch(model_type: str, random_checkpoint: Callable[..., Path]) -> None:
    folder = random_checkpoint(model_type)
    engine = StreamingEngine(folder, bits=16, device="cpu", prefill_chunk=7)
    for batch in (1, 3):
        ids, mask = prompts(batch, 45)
        got = engine.model.generate(
            ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=127
        )
        assert torch.equal(got, reference(folder, ids, mask)), batch


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_a_window_that_the_model_does_not_use(model_type: str, random_checkpoint: Callable[..., Path]) -> None:
    """Left over in a converted config; transformers' cache keeps it, so its answer is the one to give."""
    folder = random_checkpoint(model_type, sliding_window=16)
    ids, mask = prompts(1, 45)
    engine = StreamingEngine(folder, bits=16, device="cpu", prefill_chunk=7)
    got = engine.model.generate(ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=127)
    assert torch.equal(got, reference(folder, ids, mask))


def test_a_static_cache_of_the_users(random_checkpoint: Callable[..., Path]) -> None:
    folder = random_checkpoint("llama")
    ids, mask = prompts(1, 45)
    engine = StreamingEngine(folder, bits=16, device="cpu", prefill_chunk=7)
    got = engine.model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        pad_token_id=127,
        cache_implementation="static",
        disable_compile=True,
    )
    assert torch.equal(got, reference(folder, ids, mask))
