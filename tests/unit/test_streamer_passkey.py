"""Passkeys: the texts, caches given what another has read, and what counts as found."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from streamer import StreamingEngine
from streamer.errors import OptionError
from streamer.passkey import ANSWER_TOKENS, DEPTHS, PasskeyTrial, _given, measure_passkeys, passkey_trials
from streamer.quality import parse_setting
from turboquant import TurboQuantCache


@pytest.fixture(scope="module", params=["llama", "gemma2"])
def engine(request: pytest.FixtureRequest, random_checkpoint: Callable[..., Path]) -> Any:
    with StreamingEngine(random_checkpoint(request.param), bits=16, device="cpu", dtype="float32") as engine:
        yield engine


@pytest.fixture(scope="module")
def demo(demo_model: Path) -> Any:
    with StreamingEngine(str(demo_model), bits=16, device="cpu", dtype="float32") as engine:
        yield engine


def ids_of(engine: Any, words: int = 400) -> list[int]:
    return list(engine.encode(" ".join(f"{i * i % 97}" for i in range(words)), chat_template=False))


def test_texts_hold_their_key_once_at_their_depth(engine: Any) -> None:
    ids = ids_of(engine)
    trials = passkey_trials(ids, engine.tokenizer, 300, 12)
    assert [trial.depth for trial in trials] == [*DEPTHS, *DEPTHS, *DEPTHS[:2]]
    assert len({trial.key for trial in trials}) == 12
    for trial in trials:
        assert trial.text.shape == (1, 300)
        text = engine.tokenizer.decode(trial.text[0])
        sentence = f"\n\nThe secret pass key is {trial.key}. Remember it. {trial.key} is the pass key.\n\n"
        before, _, after = text.partition(sentence)
        assert len(before) == pytest.approx(trial.depth * (300 - len(sentence)), abs=1)  # a token is a byte here
        assert before + after in engine.tokenizer.decode(ids)  # a piece of the text, all of it, in order
        assert (
            engine.tokenizer.decode(trial.question[0])
            == "\n\nQuestion: What is the secret pass key?\nAnswer: The secret pass key is"
        )
    again, other = (passkey_trials(ids, engine.tokenizer, 300, 12, seed=seed) for seed in (0, 1))
    assert [trial.text.tolist() for trial in again] == [trial.text.tolist() for trial in trials]
    assert [trial.key for trial in other] != [trial.key for trial in trials]


def test_a_token_that_begins_every_text_begins_these(engine: Any) -> None:
    class WithBegin:
        bos_token_id = 7

        def __call__(self, *arguments: Any, **options: Any) -> Any:
            return engine.tokenizer(*arguments, **options)

    trials = passkey_trials([7, *ids_of(engine)], WithBegin(), 300, 5)
    assert all(trial.text.shape == (1, 300) and trial.text[0].tolist().count(7) == 1 for trial in trials)
    assert all(trial.text[0, 0] == 7 for trial in trials)
    assert not any((trial.text == 7).any() for trial in passkey_trials(ids_of(engine), WithBegin(), 300, 5))


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (40, "a text of 40 tokens has no room for a pass key: give 69 or more"),
        (2000, "a pass key in 2000 tokens was asked for and the text has 1134: give a smaller length"),
    ],
)
def test_lengths_that_do_not_fit_are_refused(tokens: int, message: str, engine: Any) -> None:
    with pytest.raises(OptionError, match=re.escape(message)):
        passkey_trials(ids_of(engine), engine.tokenizer, tokens, 1)


def test_no_trials_are_refused(engine: Any) -> None:
    with pytest.raises(OptionError, match="give one trial or more"):
        measure_passkeys(engine.assemble(400, 2), engine.tokenizer, [], [])


@pytest.mark.parametrize(
    "setting", ["4", "2", "key_bits=3,value_bits=16,window=64", "3,protected_layers=1", "4,decay=192:3/320:2", "16"]
)
def test_a_cache_given_what_was_read_is_one_that_has_read_it(setting: str, engine: Any) -> None:
    """Same bytes, and bit for bit the same predictions for a question and for single tokens after it."""
    model = engine.assemble(400, 3)
    ids = torch.tensor([ids_of(engine)[:330]])
    options = parse_setting(setting).options
    with torch.inference_mode():
        read, own = DynamicCache(config=model.config), TurboQuantCache(model, **options)
        for cache in (read, own):
            model(input_ids=ids[:, :300], past_key_values=cache, use_cache=True)
        given = _given(TurboQuantCache(model, **options), read)
        for start, stop in ((300, 320), (320, 321), (321, 322)):
            wanted, found = (
                model(input_ids=ids[:, start:stop], past_key_values=cache, use_cache=True).logits
                for cache in (own, given)
            )
            assert torch.equal(wanted, found)
        assert read.get_seq_length() == 300  # what was read serves further caches
        coded = [row.nbytes for row in own.report() if row.kind == "compressed"]
        assert coded == [row.nbytes for row in given.report() if row.kind == "compressed"]
        assert bool(coded) == (setting != "16")


class Parrot:
    """A tokenizer of digits and a model that says what it is told, by the cache that it is asked with."""

    device = "cpu"

    def __init__(self, engine: Any, answers: dict[str, str]):
        self.model, self.answers, self.calls = engine.assemble(400, 3), answers, 0
        self.config = self.model.config

    def __call__(self, input_ids: torch.Tensor, past_key_values: Any, **options: Any) -> Any:
        out = self.model(input_ids=input_ids, past_key_values=past_key_values, **options)
        if input_ids.shape[1] > 100:
            return out  # the text
        kind = "uncompressed" if isinstance(past_key_values, DynamicCache) else "coded"
        said = past_key_values.get_seq_length() - 300 - QUESTION_TOKENS
        out.logits[:] = 0
        out.logits[0, -1, ord(self.answers[kind][said])] = 1
        self.calls += 1
        return out


QUESTION_TOKENS = 5


class Letters:
    """The tokenizer of Parrot: a token is a character."""

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))


def test_an_answer_counts_if_it_holds_the_key(engine: Any) -> None:
    """At its depth; an answer is read as far as its key, or as ANSWER_TOKENS."""
    text, question = torch.tensor([ids_of(engine)[:300]]), torch.ones(1, QUESTION_TOKENS, dtype=torch.long)
    trials = [PasskeyTrial("12345", 0.6, text, question), PasskeyTrial("54321", 0.2, text, question)]
    parrot = Parrot(engine, {"uncompressed": " 12345. Yes", "coded": " 1234 12345"})
    seen: list[tuple[int, int]] = []
    exact, coded = measure_passkeys(
        parrot, Letters(), trials, [parse_setting("3")], on_progress=lambda done, of: seen.append((done, of))
    )
    assert (exact.setting, exact.tokens, exact.trials, exact.found) == ("uncompressed", 300, 2, 1)
    assert exact.found_by_depth == {0.0: 0, 0.2: 0, 0.4: 0, 0.6: 1, 0.8: 0}
    assert (coded.setting, coded.found, sum(coded.found_by_depth.values())) == ("3", 0, 0)
    assert parrot.calls == 6 + ANSWER_TOKENS * 3
    assert seen == [(1, 2), (2, 2)]


@pytest.mark.slow
def test_the_demo_model_finds_keys_at_four_and_three_bits(demo: Any) -> None:
    """Two texts of 600 tokens, 400 of them coded; docs/quality.md has all lengths and twenty texts of each."""
    license_text = (Path(__file__).parents[2] / "LICENSE").read_text(encoding="utf-8")
    ids = demo.encode(license_text, chat_template=False)
    trials = passkey_trials(ids, demo.tokenizer, 600, 2)
    wanted = [parse_setting(setting) for setting in ("4", "3")]
    found = measure_passkeys(demo.assemble(700, 3), demo.tokenizer, trials, wanted)
    assert [(row.setting, row.found) for row in found] == [("uncompressed", 2), ("4", 2), ("3", 2)]
