"""Text comes piece by piece, without broken characters, and the pieces joined are the whole answer."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from streamer.text import TextPieces

SAMPLES = [
    "Hello, world.",
    "naïve café – 東京の天気 🌊🌊",
    "🧑‍🚀 and 👩‍👩‍👧",
    "a" * 50,
    "  leading and  double  spaces ",
]


@pytest.mark.parametrize("text", SAMPLES)
def test_pieces_join_to_the_whole_without_broken_characters(text: str, demo_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    ids = tokenizer(text)["input_ids"]
    pieces = TextPieces(tokenizer)
    got = [pieces.add(token) for token in ids]
    assert all("\N{REPLACEMENT CHARACTER}" not in piece for piece in got)
    assert "".join(got) + pieces.finish() == tokenizer.decode(ids) == pieces.text


def test_an_answer_that_ends_inside_a_character_gives_what_there_is(demo_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    ids = tokenizer("🌊")["input_ids"]
    assert len(ids) > 1
    pieces = TextPieces(tokenizer)
    assert pieces.add(ids[0]) == ""
    assert pieces.finish() == "\N{REPLACEMENT CHARACTER}"


def test_a_tokenizer_that_falls_back_to_bytes() -> None:
    """Llama 2, Mistral, Gemma: a character outside the vocabulary is several byte tokens, joined on decoding."""
    vocabulary = {"<unk>": 0, "Hello": 1, " world": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    model = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    model.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model)
    ids = [1, *(3 + byte for byte in "🎉🎉🎉🎉".encode()), 2, 2, 2, 2, 2, 2, 2]
    pieces = TextPieces(tokenizer)
    got = [pieces.add(token) for token in ids]
    assert "".join(got) + pieces.finish() == "Hello🎉🎉🎉🎉" + " world" * 7 == pieces.text


def test_special_tokens_give_no_text(demo_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    pieces = TextPieces(tokenizer)
    assert pieces.add(tokenizer.eos_token_id) == ""
