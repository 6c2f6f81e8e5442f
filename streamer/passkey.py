"""Passkey retrieval: whether a model still finds, with each cache, a number that a long text mentions.

Real caches on a real text: what has to be found is known and is said once, so an answer is right or wrong, and an error
of a cache that no average shows is seen.
"""

import copy
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache

from streamer.errors import OptionError
from streamer.quality import CacheSetting
from turboquant import TurboQuantCache
from turboquant.hf import CompressedLayer

# After Mohtashami and Jaggi, Landmark attention (arXiv 2305.16300), with "secret" where the key follows: their question
# ends in words that "is the pass key" follows as well, with which small models then answer.
_SENTENCE = "\n\nThe secret pass key is {key}. Remember it. {key} is the pass key.\n\n"
_QUESTION = "\n\nQuestion: What is the secret pass key?\nAnswer: The secret pass key is"

# Shares of the text before the sentence. None is near the end: the newest tokens are not coded, and test nothing.
DEPTHS = (0.0, 0.2, 0.4, 0.6, 0.8)

# A space, five digits and a full stop, each a token of its own in some vocabularies, and one to spare.
ANSWER_TOKENS = 8

UNCOMPRESSED = "uncompressed"


@dataclass(frozen=True)
class PasskeyTrial:
    """One text to search.

    Attributes:
        key: five digits. depth: share of the text before the sentence that says them.
        text: [1, S] token ids, the sentence included. question: [1, T] token ids of what is asked after it.
    """

    key: str
    depth: float
    text: torch.Tensor
    question: torch.Tensor


@dataclass(frozen=True)
class Retrieval:
    """What was found with one cache in texts of one length.

    Attributes:
        setting: its name, or "uncompressed". tokens: of each text. trials: texts.
        found: answers with the key. found_by_depth: the same for each share of the text before the sentence.
    """

    setting: str
    tokens: int
    trials: int
    found: int
    found_by_depth: dict[float, int]


def passkey_trials(ids: Sequence[int], tokenizer: Any, tokens: int, count: int, *, seed: int = 0) -> list[PasskeyTrial]:
    """Texts of a length with a pass key in each, taken at random places of a long text, all depths alike.

    Args:
        ids: token ids of the text; a token that begins every text (BOS) begins each of these too.
        tokenizer: of the model. tokens: of each text. count: of texts. seed: of keys and places.
    Raises:
        OptionError: the long text is too short, or a text of that length has no room for the sentence.
    Source: after Mohtashami and Jaggi 2023; words, places and depths are our own.
    """

    def encode(words: str) -> list[int]:
        return list(tokenizer(words, add_special_tokens=False)["input_ids"])

    generator = random.Random(seed)
    begin = [ids[0]] if len(ids) and ids[0] == tokenizer.bos_token_id else []
    question = torch.tensor([encode(_QUESTION)])
    trials = []
    for i in range(count):
        key, depth = str(generator.randint(10_000, 99_999)), DEPTHS[i % len(DEPTHS)]
        sentence = encode(_SENTENCE.format(key=key))
        around = tokens - len(begin) - len(sentence)
        if around < 0:
            raise OptionError(f"a text of {tokens} tokens has no room for a pass key: give {tokens - around} or more")
        if len(ids) - len(begin) < around:
            raise OptionError(
                f"a pass key in {tokens} tokens was asked for and the text has {len(ids)}: give a smaller length, or a "
                "longer text"
            )
        start = generator.randint(len(begin), len(ids) - around)
        before = start + round(around * depth)
        text = [*begin, *ids[start:before], *sentence, *ids[before : start + around]]
        trials.append(PasskeyTrial(key, depth, torch.tensor([text]), question))
    return trials


@torch.inference_mode()
def measure_passkeys(
    model: Any,
    tokenizer: Any,
    trials: Sequence[PasskeyTrial],
    settings: Sequence[CacheSetting],
    *,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Retrieval]:
    """Ask for each trial's key, with an uncompressed cache and with each setting, and count the answers that have it.

    A text is read once: a prompt is read exactly, whatever the cache, and coded after that, so every cache can be
    given the same keys and values. The question, a call of its own, and each token of the greedy answer read the codes.

    Args:
        model: of transformers under our attention (`wrap`), or an engine's. tokenizer: its own.
        trials: texts of one length. settings: caches to judge.
        on_progress: called with trials done and trials in all.
    Returns:
        one Retrieval for the uncompressed cache, then one for each setting, in order.
    Raises:
        OptionError: no trials. UnsupportedModelError: no cache for this model.
    Source: own.
    """
    if not trials:
        raise OptionError("no pass key to look for: give one trial or more")
    names = [UNCOMPRESSED, *(setting.name for setting in settings)]
    found = [dict.fromkeys(DEPTHS, 0) for _ in names]
    for done, trial in enumerate(trials, 1):
        read = DynamicCache(config=model.config)
        model(input_ids=trial.text.to(model.device), past_key_values=read, use_cache=True, logits_to_keep=1)
        caches = [_given(TurboQuantCache(model, **setting.options), read) for setting in settings]
        for cache, counts in zip((read, *caches), found, strict=True):
            counts[trial.depth] += trial.key in _answer(model, tokenizer, trial, cache)
        if on_progress is not None:
            on_progress(done, len(trials))
    tokens = trials[0].text.shape[1]
    return [
        Retrieval(name, tokens, len(trials), sum(counts.values()), counts)
        for name, counts in zip(names, found, strict=True)
    ]


def _given(cache: TurboQuantCache, read: DynamicCache) -> TurboQuantCache:
    """An empty cache with what an uncompressed one has read, as if the model had read it with this one."""
    plain: list[Any] = read.layers
    for i, (layer, source) in enumerate(zip(cache.layers, plain, strict=True)):
        if isinstance(layer, CompressedLayer):
            layer.lazy_initialization(source.keys, source.values)
            layer.store.append(source.keys, source.values)
        else:
            cache.layers[i] = copy.deepcopy(source)  # it will grow on its own
    return cache


def _answer(model: Any, tokenizer: Any, trial: PasskeyTrial, cache: Any) -> str:
    """The greedy answer to a trial's question, as far as its key or as ANSWER_TOKENS."""
    ids, text = trial.question.to(model.device), ""
    answer: list[int] = []
    while len(answer) < ANSWER_TOKENS and trial.key not in text:
        logits = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        ids = logits[:, -1:].argmax(-1)
        answer.append(int(ids))
        text = tokenizer.decode(answer)
    return text
