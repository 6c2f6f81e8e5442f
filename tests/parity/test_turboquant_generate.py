"""TurboQuantCache inside transformers' generate, beside transformers' own cache, on tiny random models."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from turboquant import TurboQuantCache, UnsupportedModelError, wrap
from turboquant.hf import ATTENTION_NAME, CompressedLayer, DenseLayer
from turboquant.hf import attention as hf_attention

PAD = 127
FAMILIES = [
    "llama",
    "qwen2",
    "qwen3",
    "mistral",
    "gemma2",
    "gemma3_text",
    "phi3",
    "olmo2",
    "gpt_neox",
    "gpt_oss",
]
# transformers' SDPA leaves out the softcap of gemma2 and the learned sinks of gpt_oss
NEEDS_EAGER = ("gemma2", "gpt_oss")

Load = Callable[..., Any]


@pytest.fixture(scope="module")
def load(request: pytest.FixtureRequest) -> Load:
    """A function (family, attn_implementation) -> a tiny random model of its own, float32."""
    random_checkpoint: Callable[..., Path] = request.getfixturevalue("random_checkpoint")

    def make(family: str, attention: str | None = None) -> Any:
        attention = attention or ("eager" if family in NEEDS_EAGER else "sdpa")
        model = AutoModelForCausalLM.from_pretrained(
            random_checkpoint(family), dtype=torch.float32, attn_implementation=attention
        ).eval()
        model.get_output_embeddings().weight.data[PAD] = 0  # a model does not say its padding token
        return model

    return make


def prompts(*lengths: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random tokens, padded on the left."""
    generator = torch.Generator().manual_seed(seed)
    longest = max(lengths)
    ids = torch.full((len(lengths), longest), PAD)
    for row, length in enumerate(lengths):
        ids[row, longest - length :] = torch.randint(0, 120, (length,), generator=generator)
    return {"input_ids": ids, "attention_mask": (ids != PAD).long()}


def continuation(model: Any, inputs: dict[str, torch.Tensor], **options: Any) -> torch.Tensor:
    """New tokens, [B, n]."""
    settings: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, **options}
    tokens: torch.Tensor = model.generate(**inputs, **settings)
    return tokens[:, inputs["input_ids"].shape[1] :]


@pytest.fixture
def made_caches(monkeypatch: pytest.MonkeyPatch) -> list[TurboQuantCache]:
    """Every cache that a wrapped model makes from here on."""
    made: list[TurboQuantCache] = []

    def make(*args: Any, **kwargs: Any) -> TurboQuantCache:
        made.append(TurboQuantCache(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(hf_attention, "TurboQuantCache", make)
    return made


# ---------------------------------------------------------------- 16 bits: token for token


@pytest.mark.parametrize("family", FAMILIES)
def test_sixteen_bits_are_transformers_own_answer(load: Load, family: str, made_caches: list[TurboQuantCache]) -> None:
    model, inputs = load(family), prompts(40, 25, 31)
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    expected = model.generate(**inputs, **options)
    given = model.generate(**inputs, **options, past_key_values=TurboQuantCache(model.config, bits=16))
    wrapped = wrap(load(family), bits=16)
    assert wrapped.config._attn_implementation == ATTENTION_NAME
    in_place = wrapped.generate(**inputs, **options)
    assert made_caches[-1].get_seq_length() == 40 + 12 - 1
    for got in (given, in_place):
        assert torch.equal(got.sequences, expected.sequences)
        for ours, theirs in zip(got.logits, expected.logits, strict=True):
            torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_sixteen_bits_search_the_same_beams(load: Load, family: str) -> None:
    model, inputs = load(family), prompts(40, 25, 31)
    expected = continuation(model, inputs, num_beams=3)
    assert torch.equal(
        continuation(model, inputs, num_beams=3, past_key_values=TurboQuantCache(model.config, bits=16)), expected
    )
    assert torch.equal(continuation(wrap(model, bits=16), inputs, num_beams=3), expected)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt_oss"])
def test_coded_layers_answer_exactly_while_nothing_is_coded(
    load: Load, family: str, made_caches: list[TurboQuantCache]
) -> None:
    """All tokens lie in the window: the in-place path itself, softcap and learned sinks included, is exact."""
    model, inputs = load(family), prompts(40, 25, 31)
    expected = continuation(model, inputs)
    assert torch.equal(continuation(wrap(load(family), bits=2), inputs), expected)
    assert torch.equal(continuation(model, inputs, past_key_values=TurboQuantCache(model, bits=2)), expected)


def test_sampled_sequences_are_the_same(load: Load) -> None:
    model, inputs = load("llama"), prompts(20, 33)
    options: dict[str, Any] = {"do_sample": True, "num_return_sequences": 3}
    torch.manual_seed(0)
    expected = continuation(model, inputs, **options)
    assert expected.shape[0] == 6
    torch.manual_seed(0)
    assert torch.equal(
        continuation(model, inputs, past_key_values=TurboQuantCache(model, bits=16), **options), expected
    )
    torch.manual_seed(0)
    assert torch.equal(continuation(wrap(model, bits=4), inputs, **options), expected)


@pytest.mark.parametrize("bits", [16, 4])
def test_a_conversation_goes_on_with_the_same_cache(load: Load, bits: int) -> None:
    model = load("qwen2")
    inputs = prompts(60)
    expected = continuation(model, inputs, max_new_tokens=30)
    in_place = wrap(load("qwen2"), bits=bits)
    for asked in (model, in_place):
        cache = TurboQuantCache(asked, bits=bits)
        first = asked.generate(**inputs, max_new_tokens=10, do_sample=False, past_key_values=cache)
        follow_up = torch.cat((first, prompts(8, seed=3)["input_ids"]), 1)
        both = {"input_ids": follow_up, "attention_mask": torch.ones_like(follow_up)}
        fresh = continuation(model, both, max_new_tokens=10)
        assert torch.equal(continuation(asked, both, max_new_tokens=10, past_key_values=cache), fresh)
        assert torch.equal(first[:, 60:], expected[:, :10])


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_prompt_fed_in_pieces(load: Load, family: str) -> None:
    """Rows whose padding is longer than the first pieces."""
    model, inputs = load(family), prompts(40, 7, 31)
    expected = continuation(model, inputs)
    wrapped = wrap(load(family), bits=4)
    assert torch.equal(continuation(wrapped, inputs, prefill_chunk_size=9), expected)


# ---------------------------------------------------------------- coded


def coded_inputs() -> dict[str, torch.Tensor]:
    return prompts(150, 90, 210)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "gpt_neox", "gpt_oss"])
def test_a_row_answers_the_same_alone_and_in_a_padded_batch(
    load: Load, family: str, made_caches: list[TurboQuantCache]
) -> None:
    model, inputs = wrap(load(family), bits=4, window=16), coded_inputs()
    out = model.generate(**inputs, max_new_tokens=12, do_sample=False, return_dict_in_generate=True, output_logits=True)
    assert all(bool(step.isfinite().all()) for step in out.logits)
    assert any(row.coded_tokens >= 128 for row in made_caches[-1].report())
    for row in range(3):
        real = int(inputs["attention_mask"][row].sum())
        alone = {name: tensor[row : row + 1, -real:] for name, tensor in inputs.items()}
        assert torch.equal(continuation(model, alone)[0], out.sequences[row, 210:])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_config_is_enough_and_any_attention_serves(load: Load, attention: str) -> None:
    """A padded batch whose codes are unpacked for transformers' own attention."""
    model, inputs = load("llama", attention), coded_inputs()
    cache = TurboQuantCache(model.config, bits=3, window=16)
    options: dict[str, Any] = {"max_new_tokens": 40, "do_sample": False}
    out = model.generate(**inputs, **options, past_key_values=cache, return_dict_in_generate=True, output_logits=True)
    exact = model.generate(**inputs, **options, return_dict_in_generate=True, output_logits=True)
    assert cache.report()[0].coded_tokens == 192
    assert all(bool(step.isfinite().all()) for step in out.logits)
    assert torch.equal(out.logits[0], exact.logits[0]), "a prompt is read exactly"
    off = float((out.logits[1] - exact.logits[1]).norm() / exact.logits[1].norm())
    assert 0 < off < 0.2, "the second step reads codes"


def test_in_place_and_unpacked_are_one_answer(load: Load) -> None:
    inputs = prompts(4 + 16 + 3 * 64)  # the next block is coded 64 tokens later
    model = load("llama")
    unpacked = continuation(model, inputs, past_key_values=TurboQuantCache(model, bits=2, window=16), max_new_tokens=25)
    assert not torch.equal(unpacked, continuation(model, inputs, max_new_tokens=25)), "2 bits show"
    assert torch.equal(continuation(wrap(model, bits=2, window=16), inputs, max_new_tokens=25), unpacked)


def test_beams_of_coded_rows_share_and_part(load: Load, made_caches: list[TurboQuantCache]) -> None:
    """Beam search over codes: in place and unpacked agree, and no block is lost."""
    model, inputs = load("llama"), prompts(100)
    options: dict[str, Any] = {"num_beams": 3, "max_new_tokens": 60}
    unpacked = continuation(model, inputs, past_key_values=TurboQuantCache(model, bits=4, window=0), **options)
    in_place = continuation(wrap(model, bits=4, window=0), inputs, **options)
    assert torch.equal(in_place, unpacked)
    store: Any = made_caches[-1].layers[0].store  # type: ignore[union-attr]
    pool = store._records()
    named = [block for row in store._rows for block in row.blocks]
    assert sorted(set(named) | set(pool.free)) == list(range(len(pool)))
    assert pool.uses == [named.count(block) for block in range(len(pool))]


# ---------------------------------------------------------------- assisted generation


def repetitive() -> dict[str, torch.Tensor]:
    ids = prompts(20)["input_ids"].repeat(1, 8)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt_oss"])
@pytest.mark.parametrize(("bits", "wraps"), [(16, False), (16, True), (4, True)], ids=["16", "16-wrap", "4-wrap"])
def test_prompt_lookup_changes_nothing(load: Load, family: str, bits: int, wraps: bool) -> None:
    model, inputs = load(family), repetitive()
    if wraps:
        wrap(model, bits=bits, window=16)

    def cache() -> dict[str, Any]:
        return {} if wraps else {"past_key_values": TurboQuantCache(model, bits=bits)}

    plain = continuation(model, inputs, max_new_tokens=40, **cache())
    looked_up = continuation(model, inputs, max_new_tokens=40, prompt_lookup_num_tokens=3, **cache())
    assert torch.equal(looked_up, plain)


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_wrapped_assistant_takes_its_drafts_back(load: Load, family: str) -> None:
    model, assistant = load(family), wrap(load(family), bits=4, window=16)
    inputs = prompts(70)
    expected = continuation(model, inputs, max_new_tokens=30)
    with_drafts = continuation(model, inputs, max_new_tokens=30, assistant_model=assistant)
    assert torch.equal(with_drafts, expected)


# ---------------------------------------------------------------- wrap


def test_wrap_makes_a_cache_only_where_none_is_asked_for(load: Load, made_caches: list[TurboQuantCache]) -> None:
    model, inputs = wrap(load("llama"), bits=4, protected_layers=[-1]), prompts(10)
    made_caches.clear()
    continuation(model, inputs, max_new_tokens=3)
    assert [type(layer) for layer in made_caches[0].layers] == [CompressedLayer, CompressedLayer, DenseLayer]
    continuation(model, inputs, max_new_tokens=3, use_cache=False)
    own = DynamicCache(config=model.config)
    continuation(model, inputs, max_new_tokens=3, past_key_values=own)
    assert own.get_seq_length() == 12
    continuation(model, inputs, max_new_tokens=3, cache_implementation="dynamic")
    assert len(made_caches) == 1


def test_wrap_refuses_at_once(load: Load) -> None:
    with pytest.raises(ValueError, match="bits must be"):
        wrap(load("llama"), bits=5)
    with pytest.raises(TypeError, match="windw"):
        wrap(load("llama"), windw=4)


def test_training_is_refused(load: Load) -> None:
    model = wrap(load("gpt2"), bits=4).train()
    with pytest.raises(UnsupportedModelError, match="model.eval"):
        model(**prompts(5), past_key_values=TurboQuantCache(model))


def test_a_model_without_attention_functions_keeps_its_own_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    from transformers import BloomConfig, BloomForCausalLM

    torch.manual_seed(0)
    model = BloomForCausalLM(BloomConfig(vocab_size=128, hidden_size=64, n_layer=2, n_head=4)).eval()
    inputs = prompts(40, 25)
    expected = continuation(model, inputs, pad_token_id=PAD)
    assert torch.equal(continuation(wrap(model, bits=4), inputs, pad_token_id=PAD), expected)
    assert "BloomForCausalLM takes no attention functions" in caplog.text
