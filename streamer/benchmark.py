"""Timing a model's generation, and watching the host memory that it takes."""

import itertools
import statistics
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer

from streamer.errors import OptionError
from streamer.weights import current_device

_HOST_SAMPLE_S = 0.05

# Memory that the system refuses would never be filled.
_MOST_SETTLING = 200


@dataclass(frozen=True)
class Timing:
    """Times of one greedy generation, by the host's clock.

    Attributes:
        first_token_s: from the call to the first new token. step_s: of each token after it.
    """

    first_token_s: float
    step_s: tuple[float, ...]

    @property
    def tokens_per_s(self) -> float | None:
        """Median over the tokens after the first; None if there is none."""
        return 1 / statistics.median(self.step_s) if self.step_s else None

    @property
    def tokens_per_s_p20(self) -> float | None:
        """Four of five tokens came at this rate or faster."""
        return self._at(0.8)

    @property
    def tokens_per_s_p80(self) -> float | None:
        """One of five tokens came at this rate or faster."""
        return self._at(0.2)

    def _at(self, share: float) -> float | None:
        """Rate of the step that `share` of the steps are shorter than."""
        steps = sorted(self.step_s)
        return 1 / steps[min(int(share * len(steps)), len(steps) - 1)] if steps else None


class _Clock(BaseStreamer):
    """Receives the prompt first, then each token as soon as the host knows it."""

    def __init__(self) -> None:
        self.times = list[float]()

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing to end."""


def timed_generate(model: Any, ids: torch.Tensor, new_tokens: int) -> Timing:
    """The times of a greedy generation of exactly new_tokens tokens.

    Args:
        model: of transformers, or an engine's; not warmed up here: a first call does more than later ones.
        ids: [1, T] token ids, on the device where the model takes them. new_tokens: at least 1.
    Returns:
        the time to the first token, and new_tokens - 1 times between tokens.
    Raises:
        OptionError: fewer than 1 token.
    Source: own.
    """
    if new_tokens < 1:
        raise OptionError(f"at least 1 token is generated; got {new_tokens}")
    clock = _Clock()
    with torch.inference_mode(), current_device(ids.device):
        if ids.is_cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),  # random ids may hold the padding id, and mean a token
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            num_beams=1,
            use_cache=True,
            pad_token_id=0,
            streamer=clock,
        )
    first, *_ = tokens = clock.times[1:]  # the first put is the prompt
    return Timing(first - start, tuple(later - earlier for earlier, later in itertools.pairwise(tokens)))


def settle(model: Any, ids: torch.Tensor, weights: Any) -> int:
    """Generate until the weights are as fast as they get: after a warm start, host memory fills while tokens come.

    Args:
        model, ids: as in timed_generate. weights: DeviceWeights or MappedWeights of the model.
    Returns:
        generations of two tokens that were made, at most 200.
    """
    made = 0
    while not weights.is_settled and made < _MOST_SETTLING:
        timed_generate(model, ids[:, :1], 2)
        made += 1
    return made


def random_ids(vocab_size: int, tokens: int) -> torch.Tensor:
    """[1, tokens] int64 random token ids below vocab_size, on the CPU; the same ones each time."""
    return torch.randint(0, vocab_size, (1, tokens), generator=torch.Generator().manual_seed(1))


def unmapped_host_bytes() -> int | None:
    """Resident host memory of this process that is no file's page: what it allocated, page-locked memory included.

    Returns:
        bytes; None where the system does not say (it is Linux that does).
    Source: own; RssAnon and RssShmem of /proc/self/status.
    """
    status = Path("/proc/self/status")
    if not status.is_file():
        return None
    fields = dict(line.split(":", 1) for line in status.read_text(encoding="utf-8").splitlines() if ":" in line)
    if "RssAnon" not in fields:
        return None
    return sum(int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "RssShmem"))


class HostPeak:
    """Within this, watches `unmapped_host_bytes` 20 times a second.

    Attributes:
        peak_bytes: the largest value seen; None where the system does not say.
    """

    def __init__(self) -> None:
        self.peak_bytes = unmapped_host_bytes()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="tq-stream-host-peak", daemon=True)

    def _watch(self) -> None:
        while not self._stopped.wait(_HOST_SAMPLE_S):
            self._sample()

    def _sample(self) -> None:
        found = unmapped_host_bytes()
        if found is not None:
            self.peak_bytes = max(self.peak_bytes or 0, found)

    def __enter__(self) -> "HostPeak":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped.set()
        self._thread.join()
        self._sample()
