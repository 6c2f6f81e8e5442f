"""The plan's arithmetic: what stays, what streams, what the cache takes, and errors that name the nearest setting."""

import itertools
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import streamer.plan
import turboquant
from make_checkpoint import SHAPES, write_checkpoint
from streamer.architecture import Architecture, aligned, head_slices, read_architecture
from streamer.checkpoint import Checkpoint
from streamer.errors import DoesNotFitError, OptionError
from streamer.options import GIB
from streamer.plan import CacheSettings, Plan, Request, cache_bytes, make_plan

RAM = 200 * GIB


@pytest.fixture(scope="module")
def qwen_14b(tmp_path_factory: pytest.TempPathFactory) -> Architecture:
    folder = tmp_path_factory.mktemp("shapes") / "qwen2.5-14b"
    write_checkpoint(SHAPES["qwen2.5-14b"], folder, headers_only=True)
    return read_architecture(folder, Checkpoint.open(folder))


def plan_of(architecture: Architecture, **changes: Any) -> Plan:
    return make_plan(architecture, Request(**{"context": 4096, "vram_bytes": 24 * GIB, "ram_bytes": RAM} | changes))


def test_a_14b_shape_is_read_from_headers(qwen_14b: Architecture) -> None:
    assert (qwen_14b.num_layers, qwen_14b.layer_path, qwen_14b.is_tied) == (48, "model.layers", False)
    assert [unit.name for unit in qwen_14b.layers[7]] == ["model.layers.7.self_attn", "model.layers.7.mlp"]
    # 48 layers of 5120 x (2 x 5120 + 2 x 1024 + 3 x 13824) weights and 7168 biases, 2 bytes each
    assert qwen_14b.layer_bytes == 48 * 2 * (5120 * (2 * 5120 + 2 * 1024 + 3 * 13824) + 7168)
    assert qwen_14b.head.nbytes == 2 * 152064 * 5120


@pytest.mark.parametrize("budget", [6, 8, 12, 16, 24, 40])
def test_the_budget_is_filled_and_never_passed(budget: int, qwen_14b: Architecture) -> None:
    plan = plan_of(qwen_14b, vram_bytes=budget * GIB)
    assert plan.device_bytes <= budget * GIB
    layers = sum(unit.nbytes for layer in qwen_14b.layers for unit in layer)
    resident = sum(unit.nbytes for i, unit in enumerate(plan.units) if i in plan.resident)
    assert resident + plan.streamed_bytes == layers + aligned(qwen_14b.head.nbytes)
    if plan.streamed_bytes:
        smallest = min(unit.nbytes for i, unit in enumerate(plan.units) if i not in plan.resident)
        assert budget * GIB - plan.device_bytes < smallest, "a unit more would have fitted"
    else:
        assert plan.ring_bytes == 0


def test_streamed_layers_are_spread_evenly(qwen_14b: Architecture) -> None:
    plan = plan_of(qwen_14b, vram_bytes=16 * GIB)
    streams = [
        any(i not in plan.resident for i, unit in enumerate(plan.units) if unit.name.startswith(f"model.layers.{n}."))
        for n in range(48)
    ]
    count = sum(streams)
    assert 0 < count < 48
    for start in range(0, 48, 12):
        assert abs(sum(streams[start : start + 12]) - count / 4) <= 1


@pytest.mark.parametrize(("resident", "expected"), [(0, 0), (10, 10), (48, 48)])
def test_resident_layers_can_be_fixed(resident: int, expected: int, qwen_14b: Architecture) -> None:
    assert plan_of(qwen_14b, vram_bytes=40 * GIB, resident_layers=resident).layers_resident == expected


def test_more_resident_layers_than_there_are_is_refused(qwen_14b: Architecture) -> None:
    with pytest.raises(OptionError, match="--resident 49 was asked for and the model has 48 layers"):
        plan_of(qwen_14b, vram_bytes=40 * GIB, resident_layers=49)


def test_the_ring_holds_two_layers_where_most_stream_and_one_where_most_stay(qwen_14b: Architecture) -> None:
    layer = sum(unit.nbytes for unit in qwen_14b.layers[0])
    assert plan_of(qwen_14b, resident_layers=0).ring_bytes == 2 * layer
    assert plan_of(qwen_14b, resident_layers=23).ring_bytes == 2 * layer
    assert layer <= plan_of(qwen_14b, resident_layers=25).ring_bytes <= 1.2 * layer
    tight = {"resident_layers": 0, "context": 1024, "prefill_chunk": 128}
    two = plan_of(qwen_14b, **tight, vram_bytes=5 * GIB // 2).device_bytes
    assert layer <= plan_of(qwen_14b, **tight, vram_bytes=two - 1).ring_bytes <= 1.2 * layer


def test_a_smaller_chunk_is_taken_where_it_lets_everything_stay(qwen_14b: Architecture) -> None:
    most = plan_of(qwen_14b, vram_bytes=80 * GIB).device_bytes
    less = plan_of(qwen_14b, vram_bytes=80 * GIB, prefill_chunk=512).device_bytes
    assert plan_of(qwen_14b, vram_bytes=most).prefill_chunk == 4096
    plan = plan_of(qwen_14b, vram_bytes=(most + less) // 2)
    assert plan.streamed_bytes == 0
    assert plan.prefill_chunk in (1024, 2048)
    assert plan_of(qwen_14b, vram_bytes=(most + less) // 2, prefill_chunk=4096).streamed_bytes > 0


def test_a_prompt_is_read_in_as_large_chunks_as_there_is_memory_for(qwen_14b: Architecture) -> None:
    wanted = {"resident_layers": 0, "context": 8300}
    plans = [plan_of(qwen_14b, **wanted, vram_bytes=budget * GIB) for budget in (4, 5, 6, 8)]
    assert all(plan.device_bytes <= (plan.request.vram_bytes or 0) for plan in plans)
    assert max(plan.prefill_chunk for plan in plans[:2]) < 8192
    assert plans[-1].prefill_chunk == 8192
    assert plan_of(qwen_14b, resident_layers=0, context=700).prefill_chunk == 1024


def test_a_head_too_large_to_stay_streams_in_slices(qwen_14b: Architecture) -> None:
    plan = plan_of(qwen_14b, vram_bytes=3 * GIB, context=1024)
    slices = [unit for unit in plan.units if unit.rows is not None]
    assert len(slices) > 1
    assert slices[0].rows is not None
    assert slices[-1].rows is not None
    assert (slices[0].rows[0], slices[-1].rows[1]) == (0, 152064)
    assert all(a.rows[1] == b.rows[0] for a, b in itertools.pairwise(slices) if a.rows and b.rows)
    assert max(unit.nbytes for unit in slices) <= plan.ring_bytes
    assert any("output matrix" in note for note in plan.notes)


@pytest.mark.parametrize(
    ("cache", "bytes_per_token_and_head"),
    [(CacheSettings(16), 512), (CacheSettings(4), 136), (CacheSettings(3), 104), (CacheSettings(2), 72)],
)
def test_cache_bytes_of_64_more_tokens(
    cache: CacheSettings, bytes_per_token_and_head: int, qwen_14b: Architecture
) -> None:
    """K and V of 128: planes and one fp16 scale each, and a block mean of 128 fp16 per 64 tokens (4 bytes a token)."""
    request = [Request(context=n, cache=cache) for n in (6400, 6464)]
    grown = cache_bytes(qwen_14b, request[1]) - cache_bytes(qwen_14b, request[0])
    assert grown == 48 * 8 * 64 * bytes_per_token_and_head


def test_cache_bytes_of_layers_with_bits_of_their_own(qwen_14b: Architecture) -> None:
    """A plane is 16 bytes a token of 128 coordinates: 2.5 bits leave out three of K and V, some layers one of V."""
    four, other = (
        cache_bytes(qwen_14b, Request(context=6404, cache=cache))
        for cache in (CacheSettings(4), CacheSettings(2.5, layer_bits="0-9:4,-2--1:4/3"))
    )
    blocks = (6404 - 4 - 128) // 64
    assert four - other == (36 * 3 + 2 * 1) * 8 * 64 * 16 * blocks


@pytest.mark.parametrize(("context", "full", "of_3_bits"), [(4100, 62, 0), (12420, 62, 130), (65668, 62, 448)])
def test_cache_bytes_with_decay(context: int, full: int, of_3_bits: int, qwen_14b: Architecture) -> None:
    """A plane less of K and V of 128 is 32 bytes a token; 62 blocks are between the window and an age of 4096."""
    cache = CacheSettings(4, decay="4096:3,32768:2")
    blocks = (context - 4 - 128) // 64
    given_up = of_3_bits + 2 * (blocks - full - of_3_bits)
    plain, decayed = (cache_bytes(qwen_14b, Request(context=context, cache=own)) for own in (CacheSettings(4), cache))
    assert plain - decayed == 48 * 8 * 64 * 32 * given_up


def test_a_decay_that_cannot_be_is_refused_before_anything_is_planned(qwen_14b: Architecture) -> None:
    for bits, decay, message in (
        (4, "soon", "'soon' is not a decay"),
        (4, "100:3", "age of 100 tokens, and the newest 128 are not coded"),
        (3, "4096:3", "takes nothing from this cache: its codes have 3 bits"),
    ):
        with pytest.raises(turboquant.OptionError, match=message):
            plan_of(qwen_14b, cache=CacheSettings(bits, decay=decay))


@pytest.mark.parametrize(
    ("vram_bytes", "bits", "pattern"),
    [
        (5 * GIB, 4, "off"),
        (4000 << 20, 4, r"(\d+):3"),
        (3500 << 20, 4, r"192:3,(\d+):2"),
        (3500 << 20, 3, r"(\d+):2"),
    ],
)
def test_auto_ages_no_more_than_the_budget_needs(
    vram_bytes: int, bits: int, pattern: str, qwen_14b: Architecture
) -> None:
    wanted: dict[str, Any] = {"vram_bytes": vram_bytes, "context": 32768}
    plan = plan_of(qwen_14b, **wanted, cache=CacheSettings(bits, decay="auto"))
    decay = plan.request.cache.decay
    found = re.fullmatch(pattern, decay)
    assert found is not None, decay
    assert plan.device_bytes <= vram_bytes
    notes = [note for note in plan.notes if "KV cache" in note]
    if decay == "off":
        assert notes == []
        return
    assert notes == [f"the KV cache does not fit with all its bits: older tokens keep fewer (--decay {decay})"]
    assert plan == replace(plan_of(qwen_14b, **wanted, cache=CacheSettings(bits, decay=decay)), notes=plan.notes)
    milder = decay.replace(f"{found[1]}:", f"{int(found[1]) + 64}:")
    with pytest.raises(DoesNotFitError):
        plan_of(qwen_14b, **wanted, cache=CacheSettings(bits, decay=milder))


def test_auto_ages_block_by_block(qwen_14b: Architecture) -> None:
    """On the CPU all that is short must come from the cache: each block gives a plane of K and V of 128 in 8 heads."""
    request = Request(context=32768, ram_bytes=1 << 50, cache=CacheSettings(4))
    needed = make_plan(qwen_14b, request).bytes_at("host")
    block = 48 * 8 * 64 * 32
    for blocks in (1, 2, 3, 4, 7, 50, 507, 508):
        cache = CacheSettings(4, decay="auto")
        plan = make_plan(qwen_14b, replace(request, ram_bytes=needed - block * (blocks - 1) - 1, cache=cache))
        # 509 blocks, the first of which is behind the window and 508 others
        assert plan.request.cache.decay == f"{128 + 64 * (509 - blocks)}:3"
        assert plan.bytes_at("host") == needed - block * blocks
    plan = make_plan(qwen_14b, replace(request, ram_bytes=needed - block * 508 - 1, cache=cache))
    assert plan.request.cache.decay == f"192:3,{128 + 64 * 508}:2"


def test_auto_refuses_what_no_ageing_makes_fit(qwen_14b: Architecture) -> None:
    with pytest.raises(DoesNotFitError, match="Try --context"):
        plan_of(qwen_14b, vram_bytes=3 * GIB, context=32768, cache=CacheSettings(3, decay="auto"))
    with pytest.raises(turboquant.OptionError, match="takes nothing from this cache: its codes have 2 bits"):
        plan_of(qwen_14b, context=32768, cache=CacheSettings(2, decay="auto"))


def test_bits_that_would_leave_the_decay_nothing_are_not_named(qwen_14b: Architecture) -> None:
    wanted: dict[str, Any] = {"vram_bytes": 7 * GIB // 2, "context": 32768}
    with pytest.raises(DoesNotFitError, match="Try --bits 3 "):
        plan_of(qwen_14b, **wanted, cache=CacheSettings(4, decay="16384:2"))
    plan_of(qwen_14b, **wanted, cache=CacheSettings(3, decay="16384:2"))
    with pytest.raises(DoesNotFitError, match="Try --context") as caught:
        plan_of(qwen_14b, **wanted, cache=CacheSettings(4, decay="16384:3"))
    assert "--bits" not in str(caught.value)


def test_too_small_a_budget_names_every_term_and_a_context_that_fits(qwen_14b: Architecture) -> None:
    with pytest.raises(DoesNotFitError, match="KV cache") as caught:
        plan_of(qwen_14b, vram_bytes=6 * GIB, context=32768, cache=CacheSettings(16))
    message = str(caught.value)
    context = int(message.split("--context ")[1].split()[0])
    assert plan_of(qwen_14b, vram_bytes=6 * GIB, context=context, cache=CacheSettings(16)).device_bytes <= 6 * GIB
    with pytest.raises(DoesNotFitError):
        plan_of(qwen_14b, vram_bytes=6 * GIB, context=context + 64, cache=CacheSettings(16))
    assert caught.value.largest_context == context
    assert len(message.splitlines()) == 3


@pytest.mark.parametrize(("context", "bits", "named"), [(32768, 16, 4), (65536, 4, 3), (65536, 16, 3)])
def test_where_the_cache_is_too_large_the_most_bits_that_fit_are_named(
    context: int, bits: int, named: int, qwen_14b: Architecture
) -> None:
    wanted: dict[str, Any] = {"vram_bytes": int(6.2 * GIB), "context": context}
    with pytest.raises(DoesNotFitError, match=f"Try --bits {named} .* or --context"):
        plan_of(qwen_14b, **wanted, cache=CacheSettings(bits))
    plan_of(qwen_14b, **wanted, cache=CacheSettings(named))
    with pytest.raises(DoesNotFitError):
        plan_of(qwen_14b, **wanted, cache=CacheSettings(named + 1 if named < 4 else 16))


def test_what_is_named_holds_without_the_options_that_it_names(qwen_14b: Architecture) -> None:
    """Residents or a chunk that were asked for may be what does not fit beside the smaller cache."""
    wanted: dict[str, Any] = {"vram_bytes": 6 * GIB, "context": 32768, "cache": CacheSettings(16)}
    for more, names in (
        ({"resident_layers": 2}, "--resident"),
        ({"resident_layers": 2, "prefill_chunk": 8192}, "--resident and --prefill-chunk"),
    ):
        with pytest.raises(DoesNotFitError, match=rf"\), without {names}\.$"):
            plan_of(qwen_14b, **wanted, **more)


def test_host_memory_is_laid_out_once(qwen_14b: Architecture, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def counted(*arguments: Any) -> Any:
        calls.append(arguments)
        return lay_out(*arguments)

    lay_out = streamer.plan._lay_out_host
    monkeypatch.setattr(streamer.plan, "_lay_out_host", counted)
    plan_of(qwen_14b, context=32768)
    assert len(calls) == 1


def test_no_context_fits_then_the_budget_that_would_is_named(qwen_14b: Architecture) -> None:
    with pytest.raises(DoesNotFitError, match="--vram ") as caught:
        plan_of(qwen_14b, vram_bytes=1 * GIB, context=1024)
    named = float(str(caught.value).split("--vram ")[1].removesuffix("GiB."))
    assert plan_of(qwen_14b, vram_bytes=int(named * GIB), context=1024).device_bytes <= named * GIB


@pytest.mark.parametrize("ram", [2, 4, 8, 20, 25])
def test_ram_is_filled_with_kept_weights_and_never_passed(ram: int, qwen_14b: Architecture) -> None:
    plan = plan_of(qwen_14b, ram_bytes=ram * GIB, resident_layers=0, vram_bytes=8 * GIB)
    kept = sum(plan.units[i].nbytes for i in plan.kept)
    assert plan.host == "staged"
    assert plan.kept.isdisjoint(plan.resident)
    assert kept + plan.staged_bytes == plan.streamed_bytes
    assert plan.staging_bytes >= 4 * plan.slot_bytes
    assert ram * GIB - min(unit.nbytes for unit in plan.units) < plan.bytes_at("host") <= ram * GIB
    assert any("are read from the files in every pass" in note for note in plan.notes)


def test_kept_weights_are_spread_evenly_over_a_pass(qwen_14b: Architecture) -> None:
    plan = plan_of(qwen_14b, ram_bytes=16 * GIB, resident_layers=0, vram_bytes=8 * GIB)
    streamed = [i for i in range(len(plan.units)) if i not in plan.resident]
    share = sum(plan.units[i].nbytes for i in plan.kept) / plan.streamed_bytes
    passed = kept = 0
    for i in streamed:
        passed += plan.units[i].nbytes
        kept += plan.units[i].nbytes * (i in plan.kept)
        assert abs(kept - share * passed) < 2 * qwen_14b.layer_bytes / 48, i


def test_files_are_read_around_the_page_cache_where_it_cannot_hold_them(qwen_14b: Architecture) -> None:
    wanted = {"ram_bytes": 8 * GIB, "resident_layers": 0, "vram_bytes": 8 * GIB}
    assert not plan_of(qwen_14b, **wanted, free_ram_bytes=64 * GIB).direct_io
    plan = plan_of(qwen_14b, **wanted, free_ram_bytes=20 * GIB)
    assert plan.direct_io
    assert any("around the page cache" in note for note in plan.notes)
    assert plan_of(qwen_14b, **wanted, free_ram_bytes=64 * GIB, direct_io=True).direct_io
    assert not plan_of(qwen_14b, **wanted, free_ram_bytes=1 * GIB, direct_io=False).direct_io
    # all is kept: nothing is read again
    assert not plan_of(qwen_14b, ram_bytes=64 * GIB, free_ram_bytes=32 * GIB).direct_io


def test_too_small_a_ram_budget_names_what_is_needed(qwen_14b: Architecture) -> None:
    with pytest.raises(DoesNotFitError, match="--ram ") as caught:
        plan_of(qwen_14b, ram_bytes=GIB // 2)
    named = float(str(caught.value).split("--ram ")[1].removesuffix("GiB."))
    assert plan_of(qwen_14b, ram_bytes=int(named * GIB)).bytes_at("host") <= named * GIB


def test_on_the_cpu_converted_weights_count_against_ram(random_checkpoint: Callable[..., Path]) -> None:
    folder = random_checkpoint("llama", dtype="bfloat16")
    architecture = read_architecture(folder, Checkpoint.open(folder), dtype="float32")
    plan = make_plan(architecture, Request(context=64, ram_bytes=GIB))
    assert plan.bytes_at("host") > 0
    assert any("converted" in note for note in plan.notes)
    with pytest.raises(DoesNotFitError, match="--ram") as caught:
        make_plan(architecture, Request(context=64, ram_bytes=1000))
    named = float(str(caught.value).split("--ram ")[1].removesuffix("GiB."))
    make_plan(architecture, Request(context=64, ram_bytes=int(named * GIB)))


def test_on_the_cpu_fewer_bits_or_a_context_that_fit_are_named(qwen_14b: Architecture) -> None:
    request = Request(context=32768, ram_bytes=3 * GIB)
    with pytest.raises(DoesNotFitError, match="beside Python and its libraries") as caught:
        make_plan(qwen_14b, request)
    found = re.search(r"Try --bits (\d) .* or --context (\d+) ", str(caught.value))
    assert found is not None
    make_plan(qwen_14b, replace(request, cache=CacheSettings(int(found[1]))))
    make_plan(qwen_14b, replace(request, context=int(found[2])))


def test_head_slices_cover_every_row_once(qwen_14b: Architecture) -> None:
    for limit in (1, 10240, 1 << 20, 1 << 40):
        slices = head_slices(qwen_14b.head, limit) if limit > 1 << 15 else head_slices(qwen_14b.head, 1 << 28)
        rows = [unit.rows for unit in slices if unit.rows is not None]
        assert rows[0][0] == 0
        assert rows[-1][1] == 152064
        assert all(a[1] == b[0] for a, b in itertools.pairwise(rows))


def test_everything_is_kept_beside_smaller_slots_where_it_just_fits(qwen_14b: Architecture) -> None:
    wanted = {"resident_layers": 0, "vram_bytes": 8 * GIB}
    roomy = plan_of(qwen_14b, **wanted)
    least = roomy.bytes_at("host") - roomy.staging_bytes + (32 << 20)
    plan = plan_of(qwen_14b, **wanted, ram_bytes=least)
    assert (plan.host, plan.staged_bytes) == ("pinned", 0)
    assert plan.bytes_at("host") <= least


def test_too_many_resident_layers_name_how_many_fit(qwen_14b: Architecture) -> None:
    with pytest.raises(DoesNotFitError, match="--resident ") as caught:
        plan_of(qwen_14b, resident_layers=47)
    named = int(str(caught.value).split("--resident ")[1].split(",")[0])
    assert plan_of(qwen_14b, resident_layers=named, prefill_chunk=128).device_bytes <= 24 * GIB
    with pytest.raises(DoesNotFitError):
        plan_of(qwen_14b, resident_layers=named + 1)


def test_a_little_more_memory_costs_a_layer_at_most(qwen_14b: Architecture) -> None:
    """A second layer in the ring, or a larger chunk, is taken when it fits; nothing else grows what streams."""
    plans = [plan_of(qwen_14b, vram_bytes=budget << 28) for budget in range(12, 132, 3)]
    layer = qwen_14b.layer_bytes // 48
    for fewer, more in itertools.pairwise(plans):
        assert more.streamed_bytes <= 1.06 * fewer.streamed_bytes + layer


def test_float32_prompts_count_keys_and_values_for_every_query_head(qwen_14b: Architecture) -> None:
    """Where FlashAttention does not serve, heads of a group get keys of their own (turboquant/hf/dense.py)."""

    def activations(architecture: Architecture, context: int) -> int:
        plan = plan_of(architecture, context=context, vram_bytes=80 * GIB, prefill_chunk=128)
        return next(term.nbytes for term in plan.terms if term.name == "activations")

    wide = replace(qwen_14b, dtype=torch.float32)
    # per token: hidden states in and out, rotary tables, one layer's exact keys and values, and those of 40 heads
    shared = 2 * 5120 + 6 * 128 + 2 * 8 * 128
    assert activations(qwen_14b, 30000) - activations(qwen_14b, 20000) == 10000 * 2 * shared
    assert activations(wide, 30000) - activations(wide, 20000) == 10000 * 4 * (shared + 2 * 40 * 128)
