"""What a compressed cache costs a model's answers, on text: KL divergence, perplexity, agreement, bytes per token.

Teacher-forced, with real caches: each window of a text is read once with an uncompressed cache and once with each
setting, step by step together, so that no logits but those of one step are held.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from transformers import DynamicCache

from streamer.errors import OptionError
from turboquant.hf import TurboQuantCache

# What a setting may say, by the names of TurboQuantCache's arguments, and how its text is read.
_OPTIONS: Mapping[str, Callable[[str], Any]] = MappingProxyType({
    "bits": lambda text: float(text) if "." in text else int(text),
    "key_bits": int,
    "value_bits": int,
    "layer_bits": lambda text: text.replace("+", ","),
    "window": int,
    "sinks": int,
    "seed": int,
    "rotation": str,
    "block_means": lambda text: {"on": True, "off": False}[text],
    "protected_layers": lambda text: tuple(int(part) for part in text.split("/")),
    "skip_below": float,
    "decay": lambda text: text.replace("/", ","),
})


# Settings of a calibration whose caches, nearly uncompressed, are held at a time.
_SETTINGS_AT_ONCE = 4
CALIBRATION_CACHES = _SETTINGS_AT_ONCE + 1


@dataclass(frozen=True)
class CacheSetting:
    """A cache to judge. name: as it was asked for. options: arguments of TurboQuantCache."""

    name: str
    options: Mapping[str, Any]


def parse_setting(text: str) -> CacheSetting:
    """A setting from text: "3", or "bits=3,window=64,protected_layers=0/-1".

    Raises:
        OptionError: an option that a cache does not have, or a value that it cannot be.
    Source: own.
    """
    options: dict[str, Any] = {}
    for part in text.split(","):
        name, equals, value = part.strip().partition("=")
        if not equals:
            name, value = "bits", name
        if name not in _OPTIONS:
            raise OptionError(f"{text!r}: a cache has no option {name}; it has {', '.join(_OPTIONS)}")
        try:
            options[name] = _OPTIONS[name](value)
        except (ValueError, KeyError):
            raise OptionError(f"{text!r}: {name} cannot be {value!r}; write as in {_example(name)}") from None
    return CacheSetting(text, MappingProxyType(options))


def _example(name: str) -> str:
    examples = {
        "rotation": "qr",
        "block_means": "off",
        "layer_bits": "0-3:4+-1:4/3",
        "protected_layers": "0/-1",
        "skip_below": "1e-4",
        "decay": "512:3/1024:2",
    }
    return f"{name}={examples.get(name, '3')}"


@dataclass(frozen=True)
class Quality:
    """What one setting did to the answers.

    Attributes:
        setting: its name. positions: tokens whose predictions were compared.
        kl_mean, kl_p99: KL divergence of the prediction from the uncompressed one, in nats: mean and 99th percentile.
        perplexity, reference_perplexity: of the text, with this cache and uncompressed.
        top1: share of positions with the same most likely token.
        bytes_per_token: growth of all bytes that the cache holds over the second half of a window, per token.
        nbytes, uncompressed_nbytes: all bytes at a window's end, and what an uncompressed cache holds then.
    """

    setting: str
    positions: int
    kl_mean: float
    kl_p99: float
    perplexity: float
    reference_perplexity: float
    top1: float
    bytes_per_token: float
    nbytes: int
    uncompressed_nbytes: int


class _Tally:
    """Sums over the positions of one setting."""

    def __init__(self) -> None:
        self.kl: list[torch.Tensor] = []
        self.loss = self.reference_loss = 0.0
        self.same = 0
        self.half_bytes = self.half_tokens = 0
        self.nbytes = 0

    def add(self, reference: torch.Tensor, found: torch.Tensor, next_ids: torch.Tensor) -> None:
        """Log-probabilities [T, V] float32 of both, and the tokens [T] that followed."""
        self.kl.append((reference.exp() * (reference - found)).sum(-1).double().cpu())
        self.same += int((reference.argmax(-1) == found.argmax(-1)).sum())
        self.loss -= float(found.gather(-1, next_ids[:, None]).double().sum())
        self.reference_loss -= float(reference.gather(-1, next_ids[:, None]).double().sum())

    def quality(self, setting: str, tokens: int, uncompressed_nbytes: int) -> Quality:
        kl = torch.cat(self.kl)
        return Quality(
            setting=setting,
            positions=kl.numel(),
            kl_mean=float(kl.mean()),
            kl_p99=float(kl.quantile(0.99)),
            perplexity=math.exp(self.loss / kl.numel()),
            reference_perplexity=math.exp(self.reference_loss / kl.numel()),
            top1=self.same / kl.numel(),
            bytes_per_token=(self.nbytes - self.half_bytes) / (tokens - self.half_tokens),
            nbytes=self.nbytes,
            uncompressed_nbytes=uncompressed_nbytes,
        )


def text_windows(ids: Sequence[int], count: int, tokens: int, *, bos: int | None = None) -> torch.Tensor:
    """The first `count` windows of a text, one after another: [count, tokens].

    Args:
        ids: token ids of the text. count, tokens: of windows, and of each.
        bos: the token that begins texts; where this text has it, each window begins with it, as models expect.
    Raises:
        OptionError: the text is shorter.
    Source: own.
    """
    begin = [ids[0]] if len(ids) and ids[0] == bos else []
    each = tokens - len(begin)
    if len(ids) < len(begin) + count * each:
        raise OptionError(
            f"{count} windows of {tokens} tokens were asked for and the text has {len(ids)} tokens: give fewer or "
            "shorter windows, or a longer text"
        )
    starts = range(len(begin), len(begin) + count * each, each)
    return torch.tensor([[*begin, *ids[start : start + each]] for start in starts])


@torch.inference_mode()
def measure_quality(
    model: Any,
    windows: torch.Tensor,
    settings: Sequence[CacheSetting],
    *,
    prefill: int = 128,
    step: int = 1,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Quality]:
    """Read each window with an uncompressed cache and with each setting, and compare what is predicted.

    Args:
        model: of transformers under our attention (`wrap`), or an engine's. windows: [W, T] token ids.
        settings: caches to judge.
        prefill: tokens of the first call, which reads them exactly; the positions after them count.
        step: tokens of each later call. 1 is decoding; calls of more than 64 unpack the codes and see their own
            tokens exactly.
        on_progress: called with tokens read and tokens in all.
    Returns:
        one Quality for each setting, in order.
    Raises:
        OptionError: prefill or step do not fit the windows. UnsupportedModelError: no cache for this model.
    Source: own; the protocol of KL divergence under teacher forcing is the field's.
    """
    count, tokens = windows.shape
    if not 1 <= prefill < tokens - 1 or step < 1:
        raise OptionError(
            f"a prefill of {prefill} tokens and steps of {step} do not fit windows of {tokens}: "
            f"prefill from 1 to {tokens - 2}, steps of 1 or more"
        )
    tallies = [_Tally() for _ in settings]
    uncompressed = 0
    calls = _calls(tokens, prefill, step)
    half = max((stop for _, stop in calls if stop <= tokens // 2), default=prefill)
    for w in range(count):
        ids = windows[w : w + 1].to(model.device)
        reference = DynamicCache(config=model.config)
        caches = [TurboQuantCache(model, **setting.options) for setting in settings]
        for start, stop in calls:
            wanted = _log_probabilities(model, ids[:, start:stop], reference)
            next_ids = ids[0, start + 1 : stop + 1]  # the window's last token has no next
            for cache, tally in zip(caches, tallies, strict=True):
                found = _log_probabilities(model, ids[:, start:stop], cache)
                if start and next_ids.numel():  # the first call is exact
                    tally.add(wanted[: next_ids.numel()], found[: next_ids.numel()], next_ids)
                if stop == half:
                    tally.half_bytes, tally.half_tokens = cache.nbytes, stop
                if stop == tokens:
                    tally.nbytes = cache.nbytes
            if on_progress is not None:
                on_progress(w * tokens + stop, count * tokens)
        layers: list[Any] = reference.layers
        uncompressed = sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
    return [tally.quality(setting.name, tokens, uncompressed) for setting, tally in zip(settings, tallies, strict=True)]


def measure_sensitivities(
    model: Any,
    windows: torch.Tensor,
    layers: Sequence[int],
    *,
    prefill: int = 64,
    step: int = 64,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[tuple[float, float]]:
    """What 2-bit keys, and 2-bit values, of one layer alone cost a model's answers: see `assign_bits`.

    Args:
        model, windows, prefill, step: see measure_quality. layers: to measure.
        on_progress: called with sides measured and sides in all.
    Returns:
        for each layer the mean KL divergence with 2-bit keys, and with 2-bit values, all else uncompressed.
    Raises:
        OptionError, UnsupportedModelError: see measure_quality.
    Source: own.
    """
    found: list[float] = []
    # a window that leaves most of a short text to the codes
    names = [f"bits=16,window=16,layer_bits={layer}:{bits}" for layer in layers for bits in ("2/16", "16/2")]
    for first in range(0, len(names), _SETTINGS_AT_ONCE):
        settings = [parse_setting(name) for name in names[first : first + _SETTINGS_AT_ONCE]]
        found += [q.kl_mean for q in measure_quality(model, windows, settings, prefill=prefill, step=step)]
        if on_progress is not None:
            on_progress(len(found), len(names))
    return list(zip(found[::2], found[1::2], strict=True))


def _calls(tokens: int, prefill: int, step: int) -> list[tuple[int, int]]:
    """Token ranges of the calls that read a window."""
    starts = range(prefill, tokens, step)
    return [(0, prefill), *((start, min(start + step, tokens)) for start in starts)]


def _log_probabilities(model: Any, ids: torch.Tensor, cache: Any) -> torch.Tensor:
    """[T, V] float32 of the predictions after each token of ids [1, T]."""
    logits: torch.Tensor = model(input_ids=ids, past_key_values=cache, use_cache=True).logits
    return logits[0].float().log_softmax(-1)
