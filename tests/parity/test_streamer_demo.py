"""The demo model streamed on the CPU equals transformers token for token: real weights, real text, any chunk size."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from streamer import StreamingEngine

pytestmark = pytest.mark.slow

NEW_TOKENS = 200

# The opening of the Declaration of Independence (1776), repeated to the length that is asked for.
TEXT = (
    "When in the Course of human events, it becomes necessary for one people to dissolve the political bands which "
    "have connected them with another, and to assume among the powers of the earth, the separate and equal station "
    "to which the Laws of Nature and of Nature's God entitle them, a decent respect to the opinions of mankind "
    "requires that they should declare the causes which impel them to the separation. "
)


@pytest.fixture(scope="module")
def tokenizer(demo_model: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(demo_model)


@pytest.fixture(scope="module")
def in_float32(demo_model: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(demo_model, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def engine(demo_model: Path) -> Iterator[StreamingEngine]:
    with StreamingEngine(demo_model, bits=16, dtype="float32", device="cpu") as made:
        yield made


def ids_of(tokenizer: PreTrainedTokenizerBase, length: int) -> list[int]:
    return list(tokenizer(TEXT * (1 + length // 60))["input_ids"][:length])


@pytest.mark.parametrize("length", [1, 5, 1500])
def test_greedy_answers_in_any_chunks(
    length: int, tokenizer: PreTrainedTokenizerBase, in_float32: PreTrainedModel, demo_model: Path
) -> None:
    ids = ids_of(tokenizer, length)
    wanted = in_float32.generate(torch.tensor([ids]), max_new_tokens=NEW_TOKENS, do_sample=False)[0, length:]
    text = tokenizer.decode(wanted, skip_special_tokens=True)
    for chunk in (7, 64, 4096) if length > 5 else (4096,):
        with StreamingEngine(demo_model, bits=16, dtype="float32", device="cpu", prefill_chunk=chunk) as engine:
            assert engine.generate_ids(ids, max_new_tokens=NEW_TOKENS, temperature=0) == text, chunk
            assert engine.stats.new_tokens == len(wanted)


def test_greedy_answer_in_the_chat_template(
    tokenizer: PreTrainedTokenizerBase, in_float32: PreTrainedModel, engine: StreamingEngine
) -> None:
    prompt = "Explain the tides."
    encoded = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    wanted = in_float32.generate(**encoded, max_new_tokens=NEW_TOKENS, do_sample=False)[
        0, encoded["input_ids"].shape[1] :
    ]
    text = tokenizer.decode(wanted, skip_special_tokens=True)
    assert engine.generate(prompt, max_new_tokens=NEW_TOKENS, temperature=0) == text
    assert "".join(engine.stream(prompt, max_new_tokens=NEW_TOKENS, temperature=0)) == text


def test_bfloat16_follows_the_reference_until_it_is_undecided_itself(
    tokenizer: PreTrainedTokenizerBase, demo_model: Path
) -> None:
    """Chunked and whole prompts round differently in bf16; transformers differs from itself at such near ties."""
    reference = AutoModelForCausalLM.from_pretrained(demo_model, dtype=torch.bfloat16).eval()
    ids = ids_of(tokenizer, 300)
    out = reference.generate(
        torch.tensor([ids]), max_new_tokens=64, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    gaps = [float(pair[0] - pair[1]) for pair in (step[0].float().topk(2).values for step in out.logits)]
    decided = next((i for i, gap in enumerate(gaps) if gap <= 0.25), len(gaps))
    assert decided > 0
    for chunk in (7, 4096):
        with StreamingEngine(demo_model, bits=16, device="cpu", prefill_chunk=chunk) as engine:
            got = engine.model.generate(torch.tensor([ids]), max_new_tokens=64, do_sample=False)
        assert torch.equal(got[0, len(ids) :][:decided], out.sequences[0, len(ids) :][:decided]), chunk


@pytest.mark.parametrize(("bits", "wanted"), [(4, "Paris"), (3, "Paris"), (2, "")])
def test_compressed_answers_make_sense(bits: int, wanted: str, demo_model: Path) -> None:
    question = "What is the capital of France? Answer in one sentence."
    filler = "Here is a text to keep in mind. " + TEXT * 3  # longer than the window, so that codes are read
    with StreamingEngine(demo_model, bits=bits, device="cpu") as engine:
        assert wanted in engine.generate(f"{filler}\n\n{question}", max_new_tokens=40, temperature=0)
        report = engine.memory_report()
        measured = next(row for row in report.rows if row.name == "KV cache")
        assert measured.measured_bytes == measured.predicted_bytes


def test_a_decaying_cache_finds_what_it_was_told_and_holds_what_was_predicted(
    tokenizer: PreTrainedTokenizerBase, demo_model: Path
) -> None:
    """A number in the block that aged most, 400 tokens of text after it."""
    told, asked = (tokenizer(text)["input_ids"] for text in ("The key is 48213. Remember it.", " The key is"))
    ids = [*told, *ids_of(tokenizer, 400), *asked]
    with StreamingEngine(demo_model, dtype="float32", device="cpu", decay="150:3,280:2") as engine:
        assert engine.generate_ids(ids, max_new_tokens=6, temperature=0).startswith(" 48213")
        (row,) = (row for row in engine.memory_report().rows if row.name == "KV cache")
        assert row.measured_bytes == row.predicted_bytes
        assert engine._runtime is not None
        cache = engine._runtime.caches.last
        assert cache is not None
    for layer in cache.layers:
        pool = layer.store._records()  # type: ignore[union-attr]
        assert [pool.layout_of(block).key.bits for block in layer.store._rows[0].blocks] == [2, 3, 3, 4]  # type: ignore[union-attr]
