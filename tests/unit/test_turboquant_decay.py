"""Temporal decay: which block has how many planes, the bytes of it, and answers over aged blocks."""

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from turboquant import CompressedKV, OptionError, Precision, StoreOptions
from turboquant.decay import DecaySchedule
from turboquant.policy import DecayStep, check_decay, parse_decay
from turboquant.store import store_bytes

HEADS, DIM = 2, 16
SINKS = 4


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def draw_kv(batch: int, tokens: int, seed: int = 0) -> Any:
    return tuple(draw(batch, HEADS, tokens, DIM, seed=2 * seed + i) for i in (0, 1))


def held_bits(store: CompressedKV, row: int) -> list[tuple[int, int]]:
    """Bits of keys and values of a row's blocks, oldest first."""
    layouts = [store._records().layout_of(block) for block in store._rows[row].blocks]
    return [(layout.key.bits, layout.value.bits) for layout in layouts]


def wanted_bits(bits: int, blocks: int, window: int, steps: tuple[DecayStep, ...]) -> list[int]:
    """By the definition: a step holds for a block when all its tokens were older as the newest block left the window.

    The last block was coded when `window` tokens had come after it; block j then had 64 tokens more for each block
    between them.
    """
    found = []
    for j in range(blocks):
        tokens_behind = window + 64 * (blocks - 1 - j)
        found.append(min([bits, *(step.bits for step in steps if tokens_behind >= step.age_tokens)]))
    return found


def pool_bytes(store: CompressedKV, row: int) -> bytes:
    runs = store._records().runs(store._rows[row].blocks)
    return b"".join(records.numpy().tobytes() for _, records, _ in runs)


# ---------------------------------------------------------------- text


def test_a_decay_is_read_step_by_step() -> None:
    assert parse_decay("off") == ()
    assert parse_decay("4096:3, 32768:2") == (DecayStep(4096, 3), DecayStep(32768, 2))
    assert parse_decay("300:2") == (DecayStep(300, 2),)


@pytest.mark.parametrize("text", ["", "4096", "4096:4", "4096:1", "4096:3,", "-1:3", "4k:3", "on"])
def test_another_text_is_refused(text: str) -> None:
    with pytest.raises(OptionError, match="is not a decay: write AGE:BITS with 2 or 3 bits"):
        parse_decay(text)


def test_a_cache_alone_knows_no_budget() -> None:
    with pytest.raises(OptionError, match="decay auto is for a plan, .*: give ages"):
        parse_decay("auto")


@pytest.mark.parametrize("text", ["4096:2,32768:3", "4096:3,4096:2", "4096:3,512:2", "4096:3,32768:3"])
def test_steps_out_of_order_are_refused(text: str) -> None:
    with pytest.raises(OptionError, match="rising ages with falling bits"):
        parse_decay(text)


def test_a_decay_within_the_window_is_refused() -> None:
    with pytest.raises(OptionError, match="age of 128 tokens, and the newest 128 are not coded: .* above 128"):
        StoreOptions(Precision(4, 4), decay=(DecayStep(128, 3),))
    StoreOptions(Precision(4, 4), window=100, decay=(DecayStep(128, 3),))


def test_a_decay_that_takes_nothing_is_refused() -> None:
    steps = parse_decay("512:3")
    check_decay(steps, [Precision(3, 3), Precision(4, 3)])
    check_decay((), [Precision(2, 2)])
    with pytest.raises(OptionError, match="takes nothing from this cache: its codes have 3 bits"):
        check_decay(steps, [Precision(3, 3), Precision(16, 2)])
    with pytest.raises(OptionError, match="takes nothing from this cache: it is not coded"):
        check_decay(steps, [Precision(16, 16)])
    check_decay(parse_decay("512:3,1024:2"), [Precision(3, 3)])  # what is older than 1024 tokens loses a bit


# ---------------------------------------------------------------- planes and bytes

_steps = st.lists(st.integers(1, 700), min_size=1, max_size=2, unique=True).map(
    lambda ages: tuple(DecayStep(age, bits) for age, bits in zip(sorted(ages), (3, 2), strict=False))
)


@settings(max_examples=60, deadline=None)
@given(
    steps=_steps,
    bits=st.sampled_from([3, 4]),
    window=st.integers(0, 130),
    chunks=st.lists(st.integers(1, 400), min_size=1, max_size=8),
    pads=st.tuples(st.integers(0, 200), st.integers(0, 200)),
)
def test_bits_and_bytes_after_any_appends(
    steps: tuple[DecayStep, ...], bits: int, window: int, chunks: list[int], pads: tuple[int, int]
) -> None:
    steps = tuple(DecayStep(step.age_tokens + window, step.bits) for step in steps)
    tokens = sum(chunks)
    pads = (min(pads[0], chunks[0]), 0)
    options = StoreOptions(Precision(bits, bits), window, SINKS, capacity_tokens=tokens, decay=steps)
    store = CompressedKV(options)
    predicted = store_bytes(tokens, 2, HEADS, DIM, DIM, options, torch.float32)
    keys, values = draw_kv(2, tokens)
    start = 0
    for size in chunks:
        store.append(keys[:, :, start : start + size], values[:, :, start : start + size], pads if not start else None)
        start += size
        assert store.nbytes == predicted
        for row, length in enumerate(store.lengths):
            blocks = max(0, (length - SINKS - window) // 64)
            wanted = wanted_bits(bits, blocks, window, steps)
            assert held_bits(store, row) == [(b, b) for b in wanted]
    # the same bytes as alone, and at once
    for row in (0, 1):
        alone = CompressedKV(options)
        alone.append(keys[row : row + 1, :, pads[row] :], values[row : row + 1, :, pads[row] :])
        assert pool_bytes(store, row) == pool_bytes(alone, 0)


def test_a_full_row_uses_every_record_that_was_set_aside() -> None:
    options = StoreOptions(Precision(4, 4), window=16, capacity_tokens=2000, decay=parse_decay("300:3,1000:2"))
    store = CompressedKV(options)
    store.append(*draw_kv(3, 2000))
    assert store._records().free == []
    undecayed = StoreOptions(Precision(4, 4), window=16, capacity_tokens=2000)
    saved = store_bytes(2000, 3, HEADS, DIM, DIM, undecayed, torch.float32) - store.nbytes
    # of 30 blocks of 64 tokens the newest 5 stay, 11 lose a plane and 14 two, of keys and values each
    assert saved == 3 * (11 + 2 * 14) * 64 * 2 * HEADS * DIM // 8


def test_without_a_stated_capacity_records_return_to_the_pool() -> None:
    store = CompressedKV(StoreOptions(Precision(4, 4), window=0, sinks=0, decay=parse_decay("320:3,640:2")))
    sizes = []
    for t in range(60):
        store.append(*draw_kv(1, 64, seed=t))
        sizes.append(store.bytes_by_part()["codes"])
    full, aged, most_aged = (64 * 2 * HEADS * DIM * bits // 8 for bits in (4, 3, 2))
    assert Counter(bits for bits, _ in held_bits(store, 0)) == {4: 5, 3: 5, 2: 50}
    assert sum(records for layout, records in store._records().held() if layout.key.bits > 2) == 5 + 5
    # in the end each block costs what one of 2 bits costs, and slabs are at most a sixteenth too large
    assert sizes[-1] <= 5 * full + 5 * aged + 50 * most_aged * 17 / 16


def test_a_growing_cache_ages_as_one_of_a_stated_capacity() -> None:
    decay = parse_decay("200:3,400:2")
    stores = [
        CompressedKV(StoreOptions(Precision(4, 3), window=32, capacity_tokens=capacity, decay=decay))
        for capacity in (None, 900)
    ]
    for store in stores:
        store.append(*draw_kv(1, 900))
    assert held_bits(stores[0], 0) == held_bits(stores[1], 0)
    assert set(held_bits(stores[0], 0)) == {(4, 3), (3, 3), (2, 2)}
    assert pool_bytes(stores[0], 0) == pool_bytes(stores[1], 0)


def test_an_uncompressed_side_does_not_age() -> None:
    store = CompressedKV(StoreOptions(Precision(4, 16), window=0, decay=parse_decay("64:2")))
    keys, values = draw_kv(1, 64 * 6 + 4)
    store.append(keys, values)
    assert held_bits(store, 0) == [(2, 16)] * 5 + [(4, 16)]
    torch.testing.assert_close(store.unpacked()[1], values, atol=1e-5, rtol=0)


# ---------------------------------------------------------------- rows, crops, drafts


def test_rows_that_share_a_block_share_the_aged_one() -> None:
    store = CompressedKV(StoreOptions(Precision(4, 4), window=0, sinks=0, decay=parse_decay("256:2")))
    store.append(*draw_kv(2, 256))
    store.select_rows([1, 1, 1])
    store.append(*draw_kv(3, 256, seed=5))
    ids = [row.blocks for row in store._rows]
    assert ids[0][:4] == ids[1][:4] == ids[2][:4], "four shared blocks have aged, once"
    assert [bits for bits, _ in held_bits(store, 2)] == [2] * 4 + [4] * 4
    named = [block for row in ids for block in row]
    assert store._records().uses == [named.count(block) for block in range(len(store._records()))]


def test_what_is_cropped_and_comes_again_is_as_old_as_its_place_says() -> None:
    options = StoreOptions(Precision(4, 4), window=16, sinks=2, decay=parse_decay("200:3,400:2"))
    keys, values = draw_kv(1, 1200)
    store = CompressedKV(options)
    store.append(keys[:, :, :900], values[:, :, :900])
    before = held_bits(store, 0)
    store.crop(500)
    assert held_bits(store, 0) == before[: (400 - 2) // 64], "planes that are gone stay gone"
    store.append(keys[:, :, 400:], values[:, :, 400:])
    assert [bits for bits, _ in held_bits(store, 0)] == wanted_bits(4, (1200 - 2 - 16) // 64, 16, options.decay)


def test_drafts_that_are_taken_back_age_nothing() -> None:
    options = StoreOptions(Precision(4, 4), window=16, sinks=2, decay=parse_decay("100:3,200:2"))
    keys, values = draw_kv(1, 700)
    tried, never = CompressedKV(options), CompressedKV(options)
    for store in (tried, never):
        store.append(keys[:, :, :500], values[:, :, :500])
        store.record_past()
    for start in range(500, 700, 40):
        tried.append(*draw_kv(1, 120, seed=7))
        tried.crop(120)
        for store in (tried, never):
            store.append(keys[:, :, start : start + 40], values[:, :, start : start + 40])
    for store in (tried, never):
        store.commit()
    assert held_bits(tried, 0) == held_bits(never, 0)
    assert [bits for bits, _ in held_bits(tried, 0)] == wanted_bits(4, (700 - 2 - 16) // 64, 16, options.decay)


def test_a_copy_ages_on_its_own() -> None:
    store = CompressedKV(StoreOptions(Precision(4, 4), window=0, decay=parse_decay("128:3")))
    store.append(*draw_kv(1, 300))
    other = copy.deepcopy(store)
    before = pool_bytes(store, 0)
    other.append(*draw_kv(1, 300, seed=3))
    assert pool_bytes(store, 0) == before
    assert len(held_bits(other, 0)) == 9


# ---------------------------------------------------------------- answers


@pytest.mark.parametrize("pads", [[0, 0], [0, 333]], ids=str)
@pytest.mark.parametrize("tokens", [1, 3])
def test_answers_over_aged_blocks_are_attention_over_what_they_decode_to(tokens: int, pads: list[int]) -> None:
    options = StoreOptions(Precision(4, 4), window=32, decay=parse_decay("200:3,500:2"))
    store = CompressedKV(options)
    exact = draw_kv(2, 1000)
    store.append(*exact, pads=pads)
    assert len(set(held_bits(store, 0))) == 3
    q = draw(2, 2 * HEADS, tokens, DIM, seed=9)
    got = store.attend(q, scale=0.25)
    keys, values = (side.repeat_interleave(2, 1) for side in store.unpacked())
    for b, pad in enumerate(pads):
        visible = torch.ones(tokens, 1000 - pad, dtype=torch.bool).tril(1000 - pad - tokens)
        weights = (0.25 * q[b] @ keys[b, :, pad:].mT).masked_fill(~visible, -torch.inf).softmax(-1)
        torch.testing.assert_close(got[b], weights @ values[b, :, pad:], atol=2e-6, rtol=1e-5)
    # each part has the error of its bits (docs/math.md), and a little for having aged
    errors = []
    for part in (slice(4, 4 + 64 * 7), slice(4 + 64 * 7, 4 + 64 * 12), slice(4 + 64 * 12, 4 + 64 * 15)):
        wrong = store.unpacked()[1][0, :, part] - exact[1][0, :, part]
        errors.append(float(wrong.square().sum() / exact[1][0, :, part].square().sum()))
    assert errors == pytest.approx([0.134, 0.0352, 0.0092], rel=0.25)


def test_mixed_widths_are_told_once_a_block_has_aged() -> None:
    """Attention over blocks of one width alone is the faster kernel."""
    store = CompressedKV(
        StoreOptions(Precision(4, 4), window=0, sinks=0, capacity_tokens=640, decay=parse_decay("256:2"))
    )
    store.append(*draw_kv(1, 256))
    assert not store._records().is_mixed
    store.append(*draw_kv(1, 64))
    assert store._records().is_mixed


def on_kernels(monkeypatch: pytest.MonkeyPatch, options: StoreOptions, keys: torch.Tensor, values: torch.Tensor) -> Any:
    """A store on kernels (Triton's interpreter) with its first tokens."""
    monkeypatch.setattr("turboquant.store.kernels_serve", lambda device, *dims: True)
    store = CompressedKV(options)
    store.append(keys, values)
    return store


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).norm() / want.norm())


@pytest.mark.parametrize("steps", ["eager", "graph"])
def test_kernels_age_as_plain_pytorch_does(monkeypatch: pytest.MonkeyPatch, steps: str) -> None:
    """A chunk, then single tokens, which a graph may have appended: blocks age when they are known to be there."""
    options = StoreOptions(Precision(4, 4), window=16, sinks=2, decay=parse_decay("100:3,170:2"))
    keys, values = draw_kv(1, 278)
    plain = CompressedKV(options)
    plain.append(keys, values)
    store = on_kernels(monkeypatch, options, keys[:, :, :270], values[:, :, :270])
    q = draw(1, 2 * HEADS, 1, DIM, seed=9)
    if steps == "graph":
        store.reserve(8)
        monkeypatch.setattr("turboquant.store.is_capturing", lambda: True)
    for t in range(270, 278):
        store.append(keys[:, :, t : t + 1], values[:, :, t : t + 1])
    monkeypatch.setattr("turboquant.store.is_capturing", lambda: False)
    if steps == "graph":
        store.advance(8)
    assert held_bits(store, 0) == held_bits(plain, 0)
    assert [bits for bits, _ in held_bits(plain, 0)] == [2, 3, 4, 4]
    # float16 centroids and scales; a coordinate on a threshold may fall to either side
    assert relative_error(store.attend(q, scale=0.25), plain.attend(q, scale=0.25)) < 0.01
    monkeypatch.setattr("turboquant.store.kernels_serve", lambda device, *dims: False)
    for ours, theirs in zip(store.unpacked(), plain.unpacked(), strict=True):
        assert relative_error(ours, theirs) < 0.01


def test_attention_of_a_graph_reads_blocks_that_age_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel that reads one width only would be the wrong one to capture."""
    options = StoreOptions(Precision(4, 4), window=16, sinks=2, decay=parse_decay("100:2"))
    store = on_kernels(monkeypatch, options, *draw_kv(1, 90))
    told = []
    monkeypatch.setattr("turboquant.store.attend_packed", lambda *args, **kwargs: told.append(kwargs["is_mixed"]))
    q = draw(1, 2 * HEADS, 1, DIM)
    store.attend(q, scale=0.25)
    store.reserve(120)
    store.attend(q, scale=0.25)
    assert told == [False, True]


def test_a_schedule_without_steps_leaves_all() -> None:
    schedule = DecaySchedule((), 0)
    assert schedule.most_blocks is None
    assert list(schedule.due(0, 100)) == []
