"""What a run counts and times, on a clock of the test's own."""

from collections.abc import Callable
from pathlib import Path

import pytest

import streamer.stats
from streamer import StreamingEngine
from streamer.stats import TIMED_LAYERS, RunStats


class Clock:
    """A clock that goes on when it is told to, and a counter of what was spent in waiting for readers."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.blocked_s = 0.0
        self.reads = 0

    def __call__(self) -> float:
        self.reads += 1
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(streamer.stats.time, "perf_counter", clock)
    return clock


def one_pass(stats: RunStats, clock: Clock, layer_s: list[float], tokens: int = 1, blocked_s: float = 0.0) -> None:
    """A pass whose layers take layer_s each, blocked_s seconds of the first of them in waiting for readers."""
    stats.on_pass(tokens, clock.blocked_s)
    clock.blocked_s += blocked_s
    clock.now_s += blocked_s
    for index, taken_s in enumerate(layer_s):
        clock.now_s += taken_s
        stats.on_layer(index, clock.blocked_s)


def test_the_host_time_of_a_layer_is_that_of_a_pass_s_first_layers(clock: Clock) -> None:
    stats = RunStats(num_layers=12)
    stats.start(prompt_tokens=5)
    one_pass(stats, clock, [1.0] * 12, tokens=5)
    assert stats.layer_s is None
    stats.on_token()
    # later layers wait for the device once its queue is full: they must not count
    for mean_s in (0.004, 0.002, 0.009):
        one_pass(stats, clock, [mean_s] * TIMED_LAYERS + [5.0] * (12 - TIMED_LAYERS))
        stats.on_token()
    assert stats.layer_s == pytest.approx(0.004)
    one_pass(stats, clock, [0.001, 0.007] * 4 + [5.0] * 4)
    assert stats.layer_s == pytest.approx(0.004)  # the median of 4, 2, 9 and 4 ms
    assert stats.passes == 5


def test_waiting_for_readers_is_no_host_time_of_a_layer(clock: Clock) -> None:
    stats = RunStats(num_layers=3)
    stats.start(1)
    one_pass(stats, clock, [1.0] * 3)  # a prompt of one token is still the prompt
    assert stats.layer_s is None
    stats.on_token()
    for _ in range(2):
        one_pass(stats, clock, [0.01, 0.02, 0.03], blocked_s=7.0)
    assert stats.layer_s == pytest.approx(0.02)


def test_prompts_of_later_calls_and_passes_cut_short_are_not_timed(clock: Clock) -> None:
    stats = RunStats(num_layers=3)
    stats.start(1)
    stats.on_token()
    one_pass(stats, clock, [9.0] * 3, tokens=4)
    one_pass(stats, clock, [9.0])  # an error in mid-pass
    one_pass(stats, clock, [0.5] * 3)
    assert stats.layer_s == pytest.approx(0.5)
    stats.start(1)
    assert stats.layer_s is None


def test_a_pass_reads_the_clock_twice(clock: Clock) -> None:
    stats = RunStats(num_layers=48)
    stats.start(1)
    stats.on_token()
    clock.reads = 0
    one_pass(stats, clock, [0.001] * 48)
    assert clock.reads == 2


def test_bytes_of_the_decode_are_those_between_first_and_last_token() -> None:
    stats = RunStats(num_layers=1)
    for begin in (0, 5000):  # the weights' counters go on from generation to generation
        stats.start(1)
        assert (stats.decode_bytes, stats.decode_blocked_s) == (0, 0)
        for moved, blocked_s in ((1000, 3.0), (1100, 3.5), (1250, 3.75)):
            stats.on_token()
            stats.on_bytes(begin + moved, begin + blocked_s)
        assert stats.decode_bytes == 250
        assert stats.decode_blocked_s == pytest.approx(0.75)


def test_rates_need_two_tokens(clock: Clock) -> None:
    stats = RunStats(num_layers=1)
    stats.start(10)
    clock.now_s += 2.0
    stats.on_token()
    assert (stats.prefill_s, stats.prefill_tokens_per_s, stats.decode_tokens_per_s) == (2.0, 5.0, 0.0)
    clock.now_s += 4.0
    stats.on_token()
    stats.on_token()
    assert stats.decode_tokens_per_s == pytest.approx(0.5)


class Blocking:
    """Weights whose first unit waits for a reader, as its counter says."""

    def __init__(self, inner: object, clock: Clock):
        self._inner, self._clock = inner, clock
        self.blocked_s = 0.0

    def __getattr__(self, name: str) -> object:
        return getattr(self._inner, name)

    def wait(self, unit: int) -> None:
        if unit == 0:
            self._clock.now_s += 50.0
            self.blocked_s += 50.0
        self._clock.now_s += 0.25


def test_layers_of_a_model_are_timed_and_their_waiting_is_not(
    random_checkpoint: Callable[..., Path], clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three layers of two units each: half a second a layer, and 50 s of waiting a pass."""
    with StreamingEngine(random_checkpoint("llama"), device="cpu") as engine:
        gates = [gate for layer in engine.model.get_submodule("model.layers").children() for gate in layer._gates]
        weights = Blocking(gates[0]._weights, clock)
        for gate in gates:
            monkeypatch.setattr(gate, "_weights", weights)
        engine.generate_ids([1, 2, 3], max_new_tokens=4, temperature=0)
        assert weights.blocked_s == 4 * 50.0
        assert engine.stats.layer_s == pytest.approx(0.5)
        assert engine.stats.passes == 4
