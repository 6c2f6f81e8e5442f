"""One generation: sampling options as transformers takes them, token ids as text, an early end, a seed."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from streamer.errors import OptionError
from streamer.stats import RunStats
from streamer.text import TextPieces
from streamer.weights import DeviceWeights, MappedWeights


def generation_config(
    base: GenerationConfig,
    tokenizer: PreTrainedTokenizerBase,
    new_tokens: int,
    *,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
) -> GenerationConfig:
    """The checkpoint's own generation config with what the user asked for.

    Args:
        base: of the checkpoint; not changed. tokenizer: its end token ends an answer too.
        new_tokens: longest answer. temperature: 0 = greedy. top_p, top_k: None = the checkpoint's.
    Raises:
        OptionError: a value out of range, or one that would have no effect.
    """
    config = GenerationConfig(**base.to_diff_dict())
    config.max_new_tokens, config.max_length = new_tokens, None
    # a checkpoint may say otherwise (fine-tuning leaves use_cache false): here the engine's cache is the cache
    config.use_cache, config.cache_implementation = True, None
    config.num_beams = config.num_return_sequences = 1  # an answer is read as it comes: beams would rewrite it
    if temperature is not None and not (math.isfinite(temperature) and temperature >= 0):
        raise OptionError(f"temperature must be 0 (greedy) or more; got {temperature}")
    if top_p is not None and not 0 < top_p <= 1:
        raise OptionError(f"top_p must be above 0 and at most 1; got {top_p}")
    if top_k is not None and top_k < 1:
        raise OptionError(f"top_k must be at least 1; got {top_k}")
    asked = {"temperature": temperature, "top_p": top_p, "top_k": top_k}
    if temperature == 0:
        if top_p is not None or top_k is not None:
            raise OptionError("top_p and top_k have no effect at temperature 0; leave them off, or raise it")
        config.do_sample = False
    elif any(value is not None for value in asked.values()):
        config.do_sample = True
        for name, value in asked.items():
            if value is not None:
                setattr(config, name, value)
    if not config.do_sample:
        config.temperature = config.top_p = config.top_k = None
    ends = config.eos_token_id
    known = ends if isinstance(ends, list) else [] if ends is None else [ends]
    own_end = tokenizer.eos_token_id
    config.eos_token_id = sorted({*known, *([own_end] if own_end is not None else [])}) or None
    if config.pad_token_id is None:
        pad = tokenizer.pad_token_id
        config.pad_token_id = pad if pad is not None else (config.eos_token_id or [0])[0]
    return config


@contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Within this, random numbers follow the seed; the caller's own generators are left as they were."""
    if seed is None:
        yield
        return
    if not 0 <= seed < 2**63:
        raise OptionError(f"seed must be from 0 to 2**63 - 1; got {seed}")
    # manual_seed seeds every device's generator
    with torch.random.fork_rng(range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []):
        torch.manual_seed(seed)
        yield


class TokenSink(BaseStreamer):
    """Receives token ids from transformers' generate: the prompt first, then one per step.

    Args:
        stats: told of each token, and of what the weights have moved by then. pieces: gets the ids.
        on_text: gets text as it becomes complete. weights: those of the model.
    """

    def __init__(
        self,
        stats: RunStats,
        pieces: TextPieces,
        on_text: Callable[[str], None] | None,
        weights: DeviceWeights | MappedWeights,
    ):
        self._stats, self._pieces, self._on_text, self._weights = stats, pieces, on_text, weights
        self._has_prompt = False

    def put(self, value: torch.Tensor) -> None:
        if not self._has_prompt:
            self._has_prompt = True
            return
        self._stats.on_token()
        self._stats.on_bytes(self._weights.bytes_moved, self._weights.blocked_s)
        text = self._pieces.add(int(value.flatten()[0]))
        if text and self._on_text is not None:
            self._on_text(text)

    def end(self) -> None:
        """The answer is complete; what is left of it is fetched with finish."""


class StopWhen(StoppingCriteria):
    """Ends a generation when a function says so."""

    def __init__(self, is_stopped: Callable[[], bool]):
        self._is_stopped = is_stopped

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self._is_stopped(), device=input_ids.device, dtype=torch.bool)
