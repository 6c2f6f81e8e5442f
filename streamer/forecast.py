"""Forecast: how fast a plan decodes on a machine whose rates are known, and which change of one option gains most.

A pass moves the streamed weights over the link, reads those that are not kept in host memory from the files, and
queues the kernels of every layer. The three run at the same time, so the slowest is the time of the pass; what it
takes beside them (output matrix, sampling, the device's own work) is not modelled, so a prediction is a limit.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from streamer.architecture import Architecture
from streamer.errors import DoesNotFitError
from streamer.options import GIB, format_size
from streamer.plan import SPARE_VRAM_BYTES, Plan, Request, plan_if_it_fits
from streamer.stats import RunStats

# Memory of common cards.
COMMON_VRAM_BYTES = tuple(size * GIB for size in (6, 8, 12, 16, 24, 32, 48, 80))

# A change of an option is worth a line from here on.
_WORTH = 1.05

# A pass that the known rates explain less than this much of is bound by something else: the device's own work.
_EXPLAINED = 0.7

# Share of the decode time spent in waiting for readers from which on they, not the link, are what binds.
_BLOCKED = 0.1

Bound = Literal["link", "reader", "launches", "computing"]


@dataclass(frozen=True)
class Machine:
    """Measured rates of a machine; None = not known.

    Attributes:
        link_bytes_per_s: from page-locked host memory to the device.
        reader_bytes_per_s: of the threads that read weights from the files in every pass.
        layer_s: host time that queuing one layer's kernels takes in a one-token pass.
    """

    link_bytes_per_s: float | None = None
    reader_bytes_per_s: float | None = None
    layer_s: float | None = None


@dataclass(frozen=True)
class Forecast:
    """The least time of a decode pass.

    Attributes:
        pass_s, tokens_per_s: of one row; None when the rates that it takes are not known, and on the CPU.
        bound_by: the slowest of "link", "reader" (reading the files) and "launches" (queuing kernels).
    """

    pass_s: float | None
    tokens_per_s: float | None
    bound_by: Bound | None


@dataclass(frozen=True)
class BudgetRow:
    """What a GPU budget buys.

    Attributes:
        vram_bytes: the budget. layers_resident: that stay on the GPU. streamed_bytes: over the link per pass.
        staged_bytes: of these, read from the files in every pass.
        tokens_per_s: at most; None when nothing that is known bounds it, as when nothing streams. Where files are read
            in every pass and the rate of that is not known, they may bind before.
    """

    vram_bytes: int
    layers_resident: int
    streamed_bytes: int
    staged_bytes: int
    tokens_per_s: float | None


@dataclass(frozen=True)
class Lever:
    """The change of one option that gains most.

    Attributes:
        bound_by: what the run is bound by; None if that is not known.
        option: what to type, e.g. "--vram 8GiB", or "a GPU with 24 GiB"; None = nothing gains.
        reason: what it does, to be read after the option; without one, why nothing gains.
        tokens_per_s: predicted; None without an option.
    """

    bound_by: Bound | None
    option: str | None
    reason: str
    tokens_per_s: float | None


def predict(plan: Plan, machine: Machine) -> Forecast:
    """The least time of a decode pass of a plan: max(streamed / link, staged / reader, layers * layer_s).

    Rates that are unknown are left out, but for the link's: without it a plan that streams has no forecast.
    Source: own; checked against sums over the units (tests/unit/test_streamer_forecast.py).
    """
    is_known = machine.link_bytes_per_s is not None or not plan.streamed_bytes
    if plan.request.vram_bytes is None or not is_known:
        return Forecast(None, None, None)
    seconds: dict[Bound, float] = {}
    if plan.streamed_bytes and machine.link_bytes_per_s:
        seconds["link"] = plan.streamed_bytes / machine.link_bytes_per_s
    if plan.staged_bytes and machine.reader_bytes_per_s:
        seconds["reader"] = plan.staged_bytes / machine.reader_bytes_per_s
    if machine.layer_s:
        seconds["launches"] = _num_layers(plan) * machine.layer_s
    if not seconds:
        return Forecast(None, None, None)
    bound_by = max(seconds, key=lambda name: seconds[name])
    return Forecast(seconds[bound_by], 1 / seconds[bound_by], bound_by)


def budget_rows(
    planned: Callable[[Request], Plan],
    request: Request,
    machine: Machine,
    sizes: Sequence[int] = COMMON_VRAM_BYTES,
) -> tuple[BudgetRow, ...]:
    """What the request's GPU budget and others buy, all else as asked.

    Args:
        planned: the plan of a run for a request, or DoesNotFitError.
        request: for a GPU. sizes: other budgets in bytes. Those that the plan does not fit are left out, and so are
            those that buy no more than the one before; the request's own is not.
    Returns:
        rows by ascending budget.
    """
    rows: list[BudgetRow] = []
    for size in sorted({*sizes, request.vram_bytes or 0}):
        is_own = size == request.vram_bytes
        if rows and not rows[-1].streamed_bytes and not is_own:
            continue  # nothing is left to buy
        try:
            plan = planned(replace(request, vram_bytes=size))
        except DoesNotFitError:
            continue
        forecast = predict(plan, machine)
        row = BudgetRow(size, plan.layers_resident, plan.streamed_bytes, plan.staged_bytes, forecast.tokens_per_s)
        if is_own or not rows or replace(row, vram_bytes=rows[-1].vram_bytes) != rows[-1]:
            rows.append(row)
    return tuple(rows)


def machine_of_run(plan: Plan, stats: RunStats, link_bytes_per_s: float | None) -> Machine:
    """The rates of a run's machine: the link's as measured, the others as the last generation met them.

    The readers' rate is known only when the computing thread waited for them; else they were fast enough.
    """
    reader = None
    staged_bytes = plan.staged_bytes * max(0, stats.new_tokens - 1)
    if stats.decode_s and staged_bytes and stats.decode_blocked_s >= _BLOCKED * stats.decode_s:
        reader = staged_bytes / stats.decode_s
    return Machine(link_bytes_per_s, reader, stats.layer_s)


def next_lever(
    architecture: Architecture,
    request: Request,
    plan: Plan,
    machine: Machine,
    *,
    measured_tokens_per_s: float | None = None,
    device_bytes: int,
    host_bytes: int | None = None,
    needed_tokens: int | None = None,
    key_bias_bytes: int = 0,
    packing: tuple[str, Architecture] | None = None,
) -> Lever:
    """The change of one option with the largest predicted gain, among those that this machine can honour.

    A bigger --vram (the next common size that gains), no --resident, a bigger --ram where files are read in every
    pass, a step fewer --bits of a compressed cache, a --context of what the run needed, packed weights; if none of them
    gains, a GPU with more memory. --bits is not offered to an uncompressed cache: how long a compressed one takes to
    read is not known from such a run. Nothing here is allocated, and a setting that does not fit is no candidate.

    Args:
        request, plan: of the run, for a GPU. machine: its rates (machine_of_run).
        measured_tokens_per_s: of the run. What it missed of the prediction, candidates are taken to miss too.
        device_bytes: memory of the device that this process could have; host_bytes: of the host, None = any.
        needed_tokens: prompt and answer of the run; None = --context is not touched.
        key_bias_bytes: as in make_plan.
        packing: the command that packs the weights, and the architecture as that would make it; None where they are
            packed, or would get no smaller.
    """
    forecast = predict(plan, machine)
    measured = measured_tokens_per_s or forecast.tokens_per_s
    if forecast.pass_s is None or measured is None:
        return Lever(None, None, "the rate of the link is not known", None)
    reached = min(1.0, measured * forecast.pass_s)
    bound_by = forecast.bound_by if reached >= _EXPLAINED else "computing"
    if not plan.streamed_bytes:
        return Lever(bound_by, None, "nothing streams", None)
    if bound_by in ("launches", "computing"):
        return Lever(bound_by, None, "moving fewer bytes gains nothing", None)
    search = _Search(architecture, plan, machine, reached, _WORTH * measured, key_bias_bytes)
    gains = [search.gain(option, change) for option, change in _changes(request, plan, host_bytes, needed_tokens)]
    vram_bytes = request.vram_bytes or 0
    # budgets one after the other, the smallest that gains: not the price of a bigger one
    own = [size for size in COMMON_VRAM_BYTES if vram_bytes < size <= device_bytes]
    whole = device_bytes // GIB * GIB  # of cards whose memory is a little less than its name says
    own += [whole] if whole > max([vram_bytes, *own]) else []
    if packing is not None:
        gains.append(replace(search, architecture=packing[1]).gain(packing[0], request))
    gains.append(search.first_gain((f"--vram {size // GIB}GiB", replace(request, vram_bytes=size)) for size in own))
    best = max((gain for gain in gains if gain is not None), key=lambda gain: gain[0], default=None)
    if best is None:
        larger = [size for size in COMMON_VRAM_BYTES if size - SPARE_VRAM_BYTES > max(device_bytes, vram_bytes)]
        best = search.first_gain(
            (f"a GPU with {size // GIB} GiB", replace(request, vram_bytes=size - SPARE_VRAM_BYTES)) for size in larger
        )
    if best is None:
        return Lever(bound_by, None, "no single option gains 5 % or more", None)
    return Lever(bound_by, best[1], best[2], best[0])


def format_rate(tokens_per_s: float) -> str:
    """Tokens per second for people, two digits or all before the point: 0.45, 4.0, 12, 110."""
    return f"{tokens_per_s:#.2g}" if tokens_per_s < 9.95 else f"{tokens_per_s:.0f}"


@dataclass(frozen=True)
class _Search:
    """Candidates, each against the least rate that is worth a line."""

    architecture: Architecture
    before: Plan
    machine: Machine
    reached: float
    least_tokens_per_s: float
    key_bias_bytes: int

    def gain(self, option: str, request: Request) -> tuple[float, str, str] | None:
        """Tokens per second, option and what it does; None if it does not fit or gains too little."""
        plan = plan_if_it_fits(self.architecture, request, key_bias_bytes=self.key_bias_bytes)
        rate = predict(plan, self.machine).tokens_per_s if plan is not None else None
        if plan is None or rate is None or rate * self.reached < self.least_tokens_per_s:
            return None
        return rate * self.reached, option, _what_changes(plan, self.before)

    def first_gain(self, candidates: Iterable[tuple[str, Request]]) -> tuple[float, str, str] | None:
        """The first candidate that gains."""
        gains = (self.gain(option, request) for option, request in candidates)
        return next((gain for gain in gains if gain is not None), None)


def _changes(
    request: Request, plan: Plan, host_bytes: int | None, needed_tokens: int | None
) -> Iterator[tuple[str, Request]]:
    """Changes of one option but --vram: what to type, and the request."""
    if request.resident_layers is not None:
        yield "leaving out --resident", replace(request, resident_layers=None)
    if plan.staged_bytes:
        # to keep all of them beside what is held; where that is too much, what there is
        wanted = -(-(plan.bytes_at("host") + plan.staged_bytes) // GIB)
        size = min(wanted, host_bytes // GIB) if host_bytes is not None else wanted
        yield f"--ram {size}GiB", replace(request, ram_bytes=size * GIB)
    cache = request.cache
    if cache.fewest_bits < cache.bits < 16:
        bits = math.ceil(cache.bits) - 1
        yield f"--bits {bits}", replace(request, cache=replace(cache, bits=bits))
    if needed_tokens is not None and (rounded := -(-needed_tokens // 256) * 256) < request.context:
        yield f"--context {rounded}", replace(request, context=rounded)


def _num_layers(plan: Plan) -> int:
    return len({unit.group for unit in plan.units if unit.rows is None})


def _what_changes(plan: Plan, before: Plan) -> str:
    """What a plan does that the one before did not, to be read after an option."""
    if plan.is_coded and not before.is_coded:
        return f"codes the weights, without loss, in about {100 * plan.coded_share:.0f} % of their bytes"
    if not plan.streamed_bytes:
        return "keeps the whole model on the GPU"
    if plan.layers_resident > before.layers_resident:
        return f"keeps {plan.layers_resident} of {_num_layers(plan)} layers on the GPU"
    if plan.streamed_bytes < before.streamed_bytes:
        return f"moves {format_size(plan.streamed_bytes)} per pass instead of {format_size(before.streamed_bytes)}"
    if not plan.staged_bytes:
        return "keeps the streamed weights in memory"
    kept_bytes = plan.streamed_bytes - plan.staged_bytes
    return f"keeps {format_size(kept_bytes)} of {format_size(plan.streamed_bytes)} streamed weights in memory"
