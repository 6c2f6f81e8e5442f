"""Forecasts: predictions against sums over the plan's units, and levers against plans made by hand from their text."""

import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import streamer.forecast
from make_checkpoint import SHAPES, write_checkpoint
from streamer.architecture import Architecture, read_architecture
from streamer.checkpoint import Checkpoint
from streamer.codec import as_if_packed
from streamer.errors import DoesNotFitError
from streamer.forecast import (
    COMMON_VRAM_BYTES,
    Lever,
    Machine,
    _changes,
    budget_rows,
    format_rate,
    machine_of_run,
    next_lever,
    predict,
)
from streamer.options import GIB
from streamer.plan import CacheSettings, Plan, Request, make_plan, plan_if_it_fits
from streamer.report import build_report
from streamer.runtime import build_runtime
from streamer.stats import RunStats

RAM = 200 * GIB
LINK = 50e9
ONLY_LINK = Machine(LINK)


@pytest.fixture(scope="module")
def qwen_7b(tmp_path_factory: pytest.TempPathFactory) -> Architecture:
    folder = tmp_path_factory.mktemp("shapes") / "qwen2.5-7b"
    write_checkpoint(SHAPES["qwen2.5-7b"], folder, headers_only=True)
    return read_architecture(folder, Checkpoint.open(folder))


def request_of(**changes: Any) -> Request:
    return Request(**{"context": 4096, "vram_bytes": 8 * GIB, "ram_bytes": RAM} | changes)


def streamed_of(plan: Plan) -> int:
    return sum(unit.stored_bytes for i, unit in enumerate(plan.units) if i not in plan.resident)


def staged_of(plan: Plan) -> int:
    return sum(unit.nbytes for i, unit in enumerate(plan.units) if i not in plan.resident and i not in plan.kept)


# --------------------------------------------------------------------------------------------------------- predictions


@pytest.mark.parametrize(
    ("machine", "bound_by"),
    [
        (Machine(LINK), "link"),
        (Machine(LINK, 400e9, 1e-4), "link"),
        (Machine(LINK, 5e9, 1e-4), "reader"),
        (Machine(LINK, 400e9, 0.02), "launches"),
    ],
    ids=["link alone", "link", "reader", "launches"],
)
def test_a_pass_takes_as_long_as_the_slowest_of_its_three_parts(
    machine: Machine, bound_by: str, qwen_7b: Architecture
) -> None:
    plan = make_plan(qwen_7b, request_of(ram_bytes=6 * GIB))
    assert staged_of(plan) > 0
    forecast = predict(plan, machine)
    seconds = {"link": streamed_of(plan) / LINK}
    if machine.reader_bytes_per_s is not None and machine.layer_s is not None:
        seconds |= {"reader": staged_of(plan) / machine.reader_bytes_per_s, "launches": 28 * machine.layer_s}
    assert forecast.bound_by == bound_by
    assert forecast.pass_s == pytest.approx(max(seconds.values()))
    assert forecast.pass_s == pytest.approx(seconds[bound_by])
    assert forecast.tokens_per_s == pytest.approx(1 / max(seconds.values()))


def test_what_is_not_known_is_not_predicted(qwen_7b: Architecture) -> None:
    streaming, whole = (make_plan(qwen_7b, request_of(vram_bytes=size * GIB)) for size in (8, 24))
    assert predict(streaming, Machine(None, 1e9, 1e-3)).tokens_per_s is None  # launches are not all that it takes
    assert predict(whole, Machine(LINK)).tokens_per_s is None
    found = predict(whole, Machine(layer_s=1e-3))
    assert (found.tokens_per_s, found.bound_by) == (pytest.approx(1 / 0.028), "launches")
    on_cpu = make_plan(qwen_7b, Request(context=4096, ram_bytes=RAM))
    assert predict(on_cpu, Machine(LINK, LINK, 1e-3)) == predict(on_cpu, Machine())
    assert predict(on_cpu, Machine(LINK, LINK, 1e-3)).tokens_per_s is None


def test_predictions_never_pass_the_link_and_grow_with_the_budget(qwen_7b: Architecture) -> None:
    machine = Machine(LINK, 10e9, 2e-3)
    rates = []
    for size in (5, 6, 8, 10, 12, 14, 16, 24):
        plan = make_plan(qwen_7b, request_of(vram_bytes=size * GIB, ram_bytes=6 * GIB))
        rate = predict(plan, machine).tokens_per_s
        assert rate is not None
        assert rate * streamed_of(plan) <= LINK * (1 + 1e-9)
        assert rate * staged_of(plan) <= 10e9 * (1 + 1e-9)
        assert rate * 28 * 2e-3 <= 1 + 1e-9
        rates.append(rate)
    assert rates == sorted(rates)
    assert rates[0] < rates[-1]


@pytest.mark.parametrize("changes", [{}, {"context": 32768, "cache": CacheSettings(16)}, {"ram_bytes": 6 * GIB}])
def test_budget_rows_are_the_plans_of_common_cards(changes: dict[str, Any], qwen_7b: Architecture) -> None:
    request = request_of(**changes)
    wanted = []
    for size in COMMON_VRAM_BYTES:
        try:
            plan = make_plan(qwen_7b, replace(request, vram_bytes=size), key_bias_bytes=3 * GIB)
        except DoesNotFitError:
            continue
        rate = LINK / streamed_of(plan) if streamed_of(plan) else None
        wanted.append((size, plan.layers_resident, streamed_of(plan), staged_of(plan), rate))
        if not streamed_of(plan):
            break
    rows = budget_rows(partial(make_plan, qwen_7b, key_bias_bytes=3 * GIB), request, Machine(LINK))
    found = [(r.vram_bytes, r.layers_resident, r.streamed_bytes, r.staged_bytes, r.tokens_per_s) for r in rows]
    assert len(found) >= 3
    assert found[-1][2:] == (0, 0, None)
    assert sum(not row[2] for row in found) == 1, "the first at which nothing streams is the last"
    assert [row[:4] for row in found] == [row[:4] for row in wanted]
    assert [row[4] for row in found[:-1]] == pytest.approx([row[4] for row in wanted[:-1]])


def test_budgets_that_do_not_fit_have_no_row(qwen_7b: Architecture) -> None:
    request = request_of(context=32768, cache=CacheSettings(16), vram_bytes=2 * GIB)
    rows = budget_rows(partial(make_plan, qwen_7b), request, Machine(LINK), (3 * GIB, 12 * GIB, 80 * GIB))
    assert [row.vram_bytes for row in rows] == [12 * GIB, 80 * GIB]
    assert budget_rows(partial(make_plan, qwen_7b), request, Machine(LINK), (3 * GIB,)) == ()


@pytest.mark.parametrize(("own", "sizes"), [(9, [6, 8, 9, 12, 16]), (40, [6, 8, 12, 16, 40])])
def test_the_budget_that_was_asked_for_has_a_row(own: int, sizes: list[int], qwen_7b: Architecture) -> None:
    request = request_of(vram_bytes=own * GIB, context=16384, cache=CacheSettings(16))
    rows = {row.vram_bytes // GIB: row for row in budget_rows(partial(make_plan, qwen_7b), request, Machine(LINK))}
    assert list(rows) == sizes
    assert rows[own].streamed_bytes == streamed_of(make_plan(qwen_7b, request))


def test_budgets_that_buy_no_more_have_no_row(qwen_7b: Architecture) -> None:
    def sizes(own: int) -> list[int]:
        rows = budget_rows(
            partial(make_plan, qwen_7b), request_of(vram_bytes=own * GIB, resident_layers=0), Machine(LINK)
        )
        assert len({(row.layers_resident, row.streamed_bytes, row.tokens_per_s) for row in rows}) == 1
        return [row.vram_bytes // GIB for row in rows]

    assert sizes(6) == [6]
    assert sizes(9) == [6, 9]


def test_a_report_says_whether_its_rates_count_on_the_files(qwen_7b: Architecture) -> None:
    plan = make_plan(qwen_7b, request_of(ram_bytes=6 * GIB))
    open_one, known = (
        build_report(qwen_7b, plan, None, None, machine=Machine(LINK, reader), planned=partial(make_plan, qwen_7b))
        for reader in (None, 2e9)
    )
    assert predict(plan, Machine(LINK)).tokens_per_s == open_one.forecast.tokens_per_s
    assert f"slower than {staged_of(plan) * LINK / streamed_of(plan) / 1e9:.1f} GB/s, they allow less" in str(open_one)
    assert str(open_one).count("if the files keep up") == sum(row.staged_bytes > 0 for row in open_one.budgets) > 1
    assert "that is the time of reading the files at 2.0 GB/s; the link alone would allow more" in str(known)
    assert "they allow less" not in str(known)
    assert "if the files keep up" not in str(known)
    row = next(row for row in known.budgets if row.vram_bytes == 8 * GIB)
    assert row.tokens_per_s == pytest.approx(2e9 / staged_of(plan))


# -------------------------------------------------------------------------------------------------------------- levers


def lever_of(
    architecture: Architecture, request: Request, machine: Machine = ONLY_LINK, *, share: float = 1.0, **more: Any
) -> tuple[Lever, Plan]:
    """The lever of a run that reached `share` of its prediction, on a device of 80 GiB unless `more` says otherwise."""
    plan = make_plan(architecture, request)
    rate = predict(plan, machine).tokens_per_s
    assert rate is not None
    settings = {"measured_tokens_per_s": share * rate, "device_bytes": 80 * GIB} | more
    return next_lever(architecture, request, plan, machine, **settings), plan


def applied(option: str, request: Request) -> Request:
    """What a user who follows the option would ask for."""
    if option == "leaving out --resident":
        return replace(request, resident_layers=None)
    if found := re.fullmatch(r"a GPU with (\d+) GiB", option):
        return replace(request, vram_bytes=int(found[1]) * GIB - (512 << 20))
    found = re.fullmatch(r"--(\w+) (\d+)(GiB)?", option)
    assert found is not None
    value = int(found[2]) * (GIB if found[3] else 1)
    if found[1] == "bits":
        return replace(request, cache=replace(request.cache, bits=value))
    return replace(request, **{{"vram": "vram_bytes", "ram": "ram_bytes"}.get(found[1], found[1]): value})


SMALL = {"resident_layers": 0, "vram_bytes": 8 * GIB}
STAGED = {"ram_bytes": 6 * GIB}
LONG = {"context": 65536, "cache": CacheSettings(4), "vram_bytes": 14 * GIB}
READER = Machine(LINK, 10e9, 1e-4)
SOME = r"keeps \d+ of 28 layers on the GPU"


@pytest.mark.parametrize(
    ("changes", "machine", "device_gib", "more", "option", "reason"),
    [
        ({}, ONLY_LINK, 80, {}, "--vram 12GiB", SOME),
        ({"vram_bytes": 14 * GIB}, ONLY_LINK, 80, {}, "--vram 16GiB", "keeps the whole model on the GPU"),
        ({}, ONLY_LINK, 8, {}, "a GPU with 12 GiB", SOME),
        # a card's memory is a little less than its name says
        ({}, ONLY_LINK, 11.7, {}, "--vram 11GiB", SOME),
        (SMALL, ONLY_LINK, 80, {}, "leaving out --resident", SOME),
        (STAGED, READER, 8, {}, "--ram", "keeps the streamed weights in memory"),
        (
            STAGED,
            READER,
            8,
            {"host_bytes": 8 * GIB},
            "--ram 8GiB",
            r"keeps [\d.]+ GiB of 7.4 GiB streamed weights in .*",
        ),
        (STAGED, READER, 80, {"host_bytes": 8 * GIB}, "--vram 12GiB", SOME),
        (STAGED, READER, 8, {"host_bytes": 6 * GIB}, "a GPU with 12 GiB", SOME),
        (LONG, ONLY_LINK, 14, {}, "--bits 3", SOME),
        (LONG, ONLY_LINK, 14, {"needed_tokens": 700}, "--context 768", SOME),
    ],
    ids=[
        *("vram", "vram for all", "other GPU", "odd card", "resident", "ram", "some ram", "vram before ram", "no ram"),
        *("bits", "context"),
    ],
)
def test_a_lever_does_what_it_says(
    changes: dict[str, Any],
    machine: Machine,
    device_gib: float,
    more: dict[str, Any],
    option: str,
    reason: str,
    qwen_7b: Architecture,
) -> None:
    request = request_of(**changes)
    machine = replace(machine, layer_s=1e-4)
    lever, before = lever_of(qwen_7b, request, machine, share=0.9, device_bytes=int(device_gib * GIB), **more)
    assert lever.option is not None
    assert lever.option == option or (option == "--ram" and re.fullmatch(r"--ram \d+GiB", lever.option))
    assert re.fullmatch(reason, lever.reason)
    after = make_plan(qwen_7b, applied(lever.option, request))
    rate, rate_before = predict(after, machine).tokens_per_s, predict(before, machine).tokens_per_s
    assert rate is not None
    assert rate_before is not None
    assert lever.tokens_per_s == pytest.approx(0.9 * rate)
    assert rate >= 1.05 * rate_before
    assert lever.bound_by == predict(before, machine).bound_by
    if reason == SOME:
        assert f"keeps {after.layers_resident} of 28" in lever.reason
    if option == "--ram":
        assert staged_of(after) == 0


def test_packing_is_offered_where_it_gains_most(qwen_7b: Architecture) -> None:
    packed = as_if_packed(qwen_7b)
    assert packed is not None
    request, machine = request_of(resident_layers=0), replace(ONLY_LINK, layer_s=1e-4)
    lever, before = lever_of(qwen_7b, request, machine, device_bytes=4 * GIB, packing=("tq-stream pack M", packed))
    assert lever.option == "leaving out --resident", "a budget that is not used gains more"
    request = request_of()
    lever, before = lever_of(qwen_7b, request, machine, device_bytes=8 * GIB, packing=("tq-stream pack M", packed))
    assert (lever.option, lever.reason) == (
        "tq-stream pack M",
        "codes the weights, without loss, in about 70 % of their bytes",
    )
    after = make_plan(packed, request)
    assert lever.tokens_per_s == predict(after, machine).tokens_per_s
    assert after.layers_resident > before.layers_resident
    assert after.streamed_bytes < before.streamed_bytes / 1.42


def test_only_what_gets_smaller_is_taken_to(random_checkpoint: Callable[..., Path]) -> None:
    for dtype, is_smaller in (("float32", False), ("bfloat16", True)):
        folder = random_checkpoint("llama", dtype=dtype)
        with Checkpoint.open(folder) as checkpoint:
            assert (as_if_packed(read_architecture(folder, checkpoint)) is not None) == is_smaller
    with Checkpoint.open(folder) as checkpoint:
        assert as_if_packed(read_architecture(folder, checkpoint, dtype="float32")) is None


def test_the_lever_of_the_largest_gain_is_named(qwen_7b: Architecture) -> None:
    """Against every option that the text names, tried by hand."""
    named = set()
    for changes in (LONG, LONG | STAGED, LONG | SMALL, {"context": 16384, "cache": CacheSettings(4)} | STAGED):
        for host_bytes, device_gib in ((RAM, 16), (4 * GIB, 16), (RAM, 12)):
            request = request_of(**changes)
            more = {"host_bytes": host_bytes, "device_bytes": device_gib * GIB, "needed_tokens": 8000}
            found, plan = lever_of(qwen_7b, request, READER, **more)
            options = ["--context 8192", "--bits 3", "leaving out --resident"]
            options += ["--ram 100GiB"] if host_bytes == RAM else []
            larger = [size for size in (12, 16) if request.vram_bytes < size * GIB <= device_gib * GIB]
            options += [f"--vram {size}GiB" for size in larger[:1]]
            rates = {o: predict(make_plan(qwen_7b, applied(o, request)), READER).tokens_per_s or 0 for o in options}
            assert max(rates.values()) > 1.05 * (predict(plan, READER).tokens_per_s or 0)
            assert found.tokens_per_s == pytest.approx(max(rates.values()))
            named.add(str(found.option).split()[0])
    assert len(named) >= 3


@pytest.mark.parametrize(
    ("changes", "machine", "share", "bound_by", "reason"),
    [
        ({"vram_bytes": 24 * GIB}, Machine(layer_s=1e-3), 1.0, "launches", "nothing streams"),
        ({"vram_bytes": 24 * GIB}, Machine(layer_s=1e-3), 0.5, "computing", "nothing streams"),
        ({}, Machine(LINK, None, 0.02), 1.0, "launches", "moving fewer bytes gains nothing"),
        # half of the link's rate, though nothing else is known to bind: what does is not the weights
        ({}, Machine(LINK), 0.5, "computing", "moving fewer bytes gains nothing"),
    ],
)
def test_where_nothing_gains_it_says_so(
    changes: dict[str, Any], machine: Machine, share: float, bound_by: Any, reason: str, qwen_7b: Architecture
) -> None:
    lever, _ = lever_of(qwen_7b, request_of(**changes), machine, share=share)
    assert lever == Lever(bound_by, None, reason, None)


def test_a_link_that_hardly_binds_is_worth_no_option(qwen_7b: Architecture) -> None:
    link_s = streamed_of(make_plan(qwen_7b, request_of())) / LINK
    for share, is_worth_it in ((0.9, True), (0.97, False)):
        # at nine tenths of its prediction: what is missed is no gain of an option's
        lever, _ = lever_of(qwen_7b, request_of(), Machine(LINK, layer_s=share * link_s / 28), share=0.9)
        assert lever.bound_by == "link"
        assert (lever.option is not None) == is_worth_it
        assert is_worth_it or lever.reason == "no single option gains 5 % or more"


def test_levers_that_would_not_hold_are_not_offered(qwen_7b: Architecture) -> None:
    tight = {"device_bytes": 8 * GIB}
    # a compressed cache may take longer to read than an uncompressed one: a run with 16 bits does not tell
    assert "--bits" not in str(lever_of(qwen_7b, request_of(context=16384, cache=CacheSettings(16)), **tight)[0].option)
    assert "--bits" not in str(lever_of(qwen_7b, request_of(context=65536, cache=CacheSettings(2)), **tight)[0].option)
    long = {"device_bytes": 14 * GIB}
    both = request_of(**LONG | {"cache": CacheSettings(4, key_bits=4, value_bits=4)})
    assert "--bits" not in str(lever_of(qwen_7b, both, **long)[0].option)  # it would change nothing
    between = request_of(**LONG | {"cache": CacheSettings(3.5)})
    assert [option for option, _ in _changes(between, make_plan(qwen_7b, between), None, None)] == ["--bits 3"]
    decaying = request_of(**LONG | {"cache": CacheSettings(4, decay="4096:3")})
    assert "--bits" not in str(lever_of(qwen_7b, decaying, **long)[0].option)  # 3 bits would leave it nothing to take
    # the run needs its context
    needed = lever_of(qwen_7b, request_of(**LONG), needed_tokens=65530, **long)[0]
    assert needed.option == "--bits 3"
    assert lever_of(qwen_7b, request_of(), device_bytes=200 * GIB)[0].option == "--vram 12GiB"


def test_a_run_of_one_token_or_an_unknown_link_has_no_lever(qwen_7b: Architecture) -> None:
    request = request_of()
    plan = make_plan(qwen_7b, request)
    found = next_lever(qwen_7b, request, plan, Machine(), measured_tokens_per_s=3.0, device_bytes=80 * GIB)
    assert found == Lever(None, None, "the rate of the link is not known", None)
    unmeasured = next_lever(qwen_7b, request, plan, Machine(LINK, layer_s=1e-4), device_bytes=80 * GIB)
    assert unmeasured == lever_of(qwen_7b, request, Machine(LINK, layer_s=1e-4))[0]


def test_a_lever_takes_a_handful_of_plans(qwen_7b: Architecture, monkeypatch: pytest.MonkeyPatch) -> None:
    """The closing line of a run must not wait for it: each plan is arithmetic over all units."""
    calls = []

    def counted(*arguments: Any, **more: Any) -> Plan | None:
        calls.append(arguments)
        return plan_if_it_fits(*arguments, **more)

    monkeypatch.setattr(streamer.forecast, "plan_if_it_fits", counted)
    lever_of(qwen_7b, request_of(**LONG | STAGED | SMALL), READER, needed_tokens=700, host_bytes=RAM)
    assert 4 <= len(calls) <= 12
    calls.clear()
    lever_of(qwen_7b, request_of(), Machine(LINK, None, 0.02))  # bound by launches: no plan is worth making
    assert calls == []


def test_an_assembled_model_has_the_levers_of_its_headers(random_checkpoint: Callable[..., Path]) -> None:
    """After assembly the layers of the architecture's model are streamed modules: plans must not change for it."""
    folder = random_checkpoint("llama")
    checkpoint = Checkpoint.open(folder)
    fresh, used = (read_architecture(folder, checkpoint) for _ in range(2))
    on_cpu = make_plan(used, Request(context=64, ram_bytes=GIB))
    runtime = build_runtime(used, on_cpu, [None] * 3, checkpoint, torch.device("cpu"), RunStats(), has_cap=False)
    least = make_plan(fresh, Request(context=4096, vram_bytes=4 * GIB, ram_bytes=2 * GIB, resident_layers=0))
    request = replace(least.request, vram_bytes=least.device_bytes, resident_layers=0)
    machine, more = Machine(1e6, layer_s=1e-4), {"needed_tokens": 64}
    assert lever_of(used, request, machine, **more)[0] == lever_of(fresh, request, machine, **more)[0]
    assert lever_of(fresh, request, machine, **more)[0].option is not None
    runtime.close()


# --------------------------------------------------------------------------------------------------- rates of a run


def run_stats(new_tokens: int, decode_s: float, blocked_s: float) -> RunStats:
    stats = RunStats(num_layers=28)
    stats.start(10)
    stats.new_tokens, stats.decode_s, stats.decode_blocked_s = new_tokens, decode_s, blocked_s
    return stats


def test_the_readers_rate_is_known_when_the_run_waited_for_them(qwen_7b: Architecture) -> None:
    plan = make_plan(qwen_7b, request_of(**STAGED))
    waited = machine_of_run(plan, run_stats(11, 20.0, 8.0), LINK)
    assert waited.reader_bytes_per_s == pytest.approx(10 * staged_of(plan) / 20)
    assert waited.link_bytes_per_s == LINK
    assert predict(plan, waited).tokens_per_s == pytest.approx(0.5)  # as measured
    for stats in (run_stats(11, 20.0, 1.0), run_stats(1, 0.0, 0.0), run_stats(0, 0.0, 0.0)):
        assert machine_of_run(plan, stats, LINK) == Machine(LINK)
    assert machine_of_run(make_plan(qwen_7b, request_of()), run_stats(11, 20.0, 8.0), None) == Machine()


@pytest.mark.parametrize(
    ("rate", "text"),
    [(0.0449, "0.045"), (0.5, "0.50"), (0.999, "1.0"), (4.04, "4.0"), (9.94, "9.9"), (9.96, "10"), (114.6, "115")],
)
def test_rates_are_given_with_two_digits(rate: float, text: str) -> None:
    assert format_rate(rate) == text
