"""What a run counts and times, and where it reports its progress and its automatic choices."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass
class RunStats:
    """Counters of one engine; times are host clock seconds.

    Attributes:
        prompt_tokens, new_tokens: of the last generation, over all rows.
        prefill_s: from its start to the first new token. decode_s: from there to the last.
        bytes_moved: over the link to the device, in the last generation.
        passes: forward passes of the last generation.
        notes: automatic choices made so far, each once.
    """

    prompt_tokens: int = 0
    new_tokens: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    bytes_moved: int = 0
    passes: int = 0
    notes: list[str] = field(default_factory=list)
    on_note: Callable[[str], None] | None = None
    on_progress: Callable[[float], None] | None = None
    num_layers: int = 0
    _started: float = 0.0
    _first_token: float | None = None

    def note(self, line: str) -> None:
        """Say an automatic choice, once."""
        if line not in self.notes:
            self.notes.append(line)
            if self.on_note is not None:
                self.on_note(line)

    def start(self, prompt_tokens: int) -> None:
        """A generation begins."""
        self.prompt_tokens, self.new_tokens, self.passes, self.bytes_moved = prompt_tokens, 0, 0, 0
        self.prefill_s = self.decode_s = 0.0
        self._started, self._first_token = time.perf_counter(), None

    def on_token(self, rows: int = 1) -> None:
        """A new token of each row is known."""
        now = time.perf_counter()
        self.new_tokens += rows
        if self._first_token is None:
            self._first_token = now
            self.prefill_s = now - self._started
        self.decode_s = now - self._first_token

    def on_layer(self, index: int) -> None:
        """A layer has been queued."""
        if index == self.num_layers - 1:
            self.passes += 1
        if self._first_token is None and self.on_progress is not None and self.num_layers:
            self.on_progress((index + 1) / self.num_layers)

    def on_chunk(self, index: int, chunk: int, chunks: int) -> None:
        """A chunk of the prompt has been queued in a layer."""
        if self.on_progress is not None and self.num_layers:
            self.on_progress((index + chunk / chunks) / self.num_layers)

    @property
    def prefill_tokens_per_s(self) -> float:
        """Prompt tokens over the time to the first new token."""
        return self.prompt_tokens / self.prefill_s if self.prefill_s else 0.0

    @property
    def decode_tokens_per_s(self) -> float:
        """New tokens after the first over the time they took."""
        return (self.new_tokens - 1) / self.decode_s if self.decode_s and self.new_tokens > 1 else 0.0
