"""What a run counts and times, and where it reports its progress and its automatic choices."""

import statistics
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

# Layers of a one-token pass whose work on the host is timed, the first ones: when a pass begins the device's queue is
# empty, because sampling waited for the token before. A pass of 48 layers queues more launches than the driver's queue
# holds (1024); from then on a launch waits for the device, and the clock would show the device's time.
TIMED_LAYERS = 8

# What progress is reported of.
READING_PROMPT = "reading the prompt"

# One-token passes that a median is taken over: the latest ones. model.generate may run for ever.
_TIMED_PASSES = 1024


@dataclass
class RunStats:
    """Counters of one engine; times are host clock seconds.

    Attributes:
        prompt_tokens, new_tokens: of the last generation, over all rows.
        prefill_s: from its start to the first new token. decode_s: from there to the last.
        bytes_moved: over the link to the device, in the last generation.
        decode_bytes: of them, those queued from the first new token to the last (see on_bytes).
        decode_blocked_s: seconds from the first new token to the last in which the computing thread waited for readers.
        passes: forward passes of the last generation.
        notes: automatic choices made so far, each once. on_note: called with each of them.
        on_progress: called with what is being done and the share of it that is, 0 to 1.
    """

    prompt_tokens: int = 0
    new_tokens: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    bytes_moved: int = 0
    decode_bytes: int = 0
    decode_blocked_s: float = 0.0
    passes: int = 0
    notes: list[str] = field(default_factory=list)
    on_note: Callable[[str], None] | None = None
    on_progress: Callable[[str, float], None] | None = None
    num_layers: int = 0
    _started: float = 0.0
    _first_token: float | None = None
    _at_first_token: tuple[int, float] | None = None
    _pass_began: tuple[float, float] | None = None
    _layer_times: deque[float] = field(default_factory=lambda: deque(maxlen=_TIMED_PASSES))

    def note(self, line: str) -> None:
        """Say an automatic choice, once."""
        if line not in self.notes:
            self.notes.append(line)
            if self.on_note is not None:
                self.on_note(line)

    def start(self, prompt_tokens: int) -> None:
        """A generation begins."""
        self.prompt_tokens, self.new_tokens, self.passes, self.bytes_moved = prompt_tokens, 0, 0, 0
        self.prefill_s = self.decode_s = self.decode_blocked_s = 0.0
        self.decode_bytes, self._at_first_token = 0, None
        self._pass_began = None
        self._layer_times.clear()
        self._started, self._first_token = time.perf_counter(), None

    def on_token(self, rows: int = 1) -> None:
        """A new token of each row is known."""
        now = time.perf_counter()
        self.new_tokens += rows
        if self._first_token is None:
            self._first_token = now
            self.prefill_s = now - self._started
        self.decode_s = now - self._first_token

    def on_bytes(self, moved_bytes: int, blocked_s: float = 0.0) -> None:
        """Where the weights' own counters stand when a token is known; call it right after on_token.

        Args:
            moved_bytes: over the link since the model was assembled.
            blocked_s: that the computing thread has waited for readers since then.
        """
        if self._at_first_token is None:
            self._at_first_token = moved_bytes, blocked_s
        self.decode_bytes = moved_bytes - self._at_first_token[0]
        self.decode_blocked_s = blocked_s - self._at_first_token[1]

    def on_pass(self, tokens: int, blocked_s: float = 0.0) -> None:
        """A pass over `tokens` tokens of a row begins; blocked_s as in on_bytes."""
        is_timed = tokens == 1 and self._first_token is not None
        self._pass_began = (time.perf_counter(), blocked_s) if is_timed else None

    def on_layer(self, index: int, blocked_s: float = 0.0) -> None:
        """A layer has been queued; blocked_s as in on_bytes."""
        timed = min(TIMED_LAYERS, self.num_layers)
        if self._pass_began is not None and index == timed - 1:
            began, blocked_before = self._pass_began
            self._pass_began = None
            self._layer_times.append((time.perf_counter() - began - (blocked_s - blocked_before)) / timed)
        if index == self.num_layers - 1:
            self.passes += 1
        if self._first_token is None and self.on_progress is not None and self.num_layers:
            self.on_progress(READING_PROMPT, (index + 1) / self.num_layers)

    def on_chunk(self, index: int, chunk: int, chunks: int) -> None:
        """A chunk of the prompt has been queued in a layer."""
        if self.on_progress is not None and self.num_layers:
            self.on_progress(READING_PROMPT, (index + chunk / chunks) / self.num_layers)

    @property
    def layer_s(self) -> float | None:
        """Host time of a layer in a one-token pass, waiting for readers left out: the median over the passes after the
        first new token of the mean over a pass's first TIMED_LAYERS layers. On the CPU it is computing and all.
        None before such a pass.
        """
        return statistics.median(self._layer_times) if self._layer_times else None

    @property
    def prefill_tokens_per_s(self) -> float:
        """Prompt tokens over the time to the first new token."""
        return self.prompt_tokens / self.prefill_s if self.prefill_s else 0.0

    @property
    def decode_tokens_per_s(self) -> float:
        """New tokens after the first over the time they took."""
        return (self.new_tokens - 1) / self.decode_s if self.decode_s and self.new_tokens > 1 else 0.0
