"""TurboQuantCache without a model around it: what it refuses, holds, reports, crops and says."""

import copy
import logging
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig
from transformers.cache_utils import DynamicSlidingWindowLayer

from turboquant import KeyBias, OptionError, TurboQuantCache, UnsupportedModelError, wrap
from turboquant.hf import ATTENTION_NAME, CausalMask, CompressedLayer, DenseLayer, turboquant_attention
from turboquant.hf.cache import layer_shape
from turboquant.store import store_bytes

LAYERS, HEADS, DIM = 3, 2, 16


def config(model_type: str = "llama", attention: str = "sdpa", **changes: Any) -> Any:
    sizes: dict[str, Any] = {
        "vocab_size": 64,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": HEADS,
    }
    made = AutoConfig.for_model(model_type, **(sizes | changes))
    made._attn_implementation = attention
    return made


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def fill(cache: TurboQuantCache, tokens: int, batch: int = 1, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    keys, values = draw(batch, HEADS, tokens, DIM, seed=seed), draw(batch, HEADS, tokens, DIM, seed=seed + 1)
    for layer in range(len(cache.layers)):
        cache.update(keys, values, layer)
    return keys, values


class Attention(nn.Module):
    """Stands for a model's attention module."""

    num_key_value_groups = 2
    is_causal = True


def ask(cache: TurboQuantCache, layer: int, tokens: int, mask: Any = None, seed: int = 0, batch: int = 1) -> Any:
    """One call of our attention with random tensors; (answer, q, keys, values)."""
    q = draw(batch, 2 * HEADS, tokens, DIM, seed=seed + 2)
    keys, values = draw(batch, HEADS, tokens, DIM, seed=seed), draw(batch, HEADS, tokens, DIM, seed=seed + 1)
    handles = cache.update(keys, values, layer)
    return turboquant_attention(Attention(), q, *handles, mask)[0].transpose(1, 2), q, keys, values


# ---------------------------------------------------------------- construction


@pytest.mark.parametrize(
    ("model_type", "message"),
    [
        ("jamba", "jamba keeps a Linear"),
        ("qwen3_next", "layer 0 of qwen3_next keeps a Linear"),
        ("mamba", "layer 0 of mamba keeps a Linear"),
        ("deepseek_v3", "deepseek_v3 uses multi-head latent attention"),
        ("gemma3n_text", "gemma3n_text"),
        ("t5", "t5 is an encoder-decoder"),
    ],
)
def test_kinds_that_cannot_be_served_are_refused_by_name(model_type: str, message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        TurboQuantCache(AutoConfig.for_model(model_type))


def test_a_model_that_takes_no_cache_is_refused() -> None:
    from transformers import RwkvConfig, RwkvForCausalLM

    model = RwkvForCausalLM(RwkvConfig(vocab_size=16, hidden_size=16, num_hidden_layers=2))
    with pytest.raises(UnsupportedModelError, match="RwkvForCausalLM"):
        wrap(model)


@pytest.mark.parametrize(
    "options",
    [
        {"bits": 5},
        {"key_bits": 1},
        {"value_bits": 8},
        {"window": -1},
        {"sinks": -2},
        {"rotation": "none"},
        {"protected_layers": [3]},
        {"key_biases": [None]},
        {"capacity_tokens": -1},
        {"decay": "4096"},
        {"decay": "128:3"},
        {"bits": 3, "decay": "4096:3"},
    ],
    ids=lambda options: " ".join(options),
)
def test_bad_options_are_refused_at_once(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError):
        TurboQuantCache(config(), **options)


def test_options_that_do_not_exist_are_refused() -> None:
    with pytest.raises(TypeError, match="windw"):
        TurboQuantCache(config(), windw=3)  # type: ignore[call-arg]
    with pytest.raises(OptionError, match="got str"):
        TurboQuantCache("llama")  # type: ignore[arg-type]


def test_protected_layers_protect_exactly_those() -> None:
    cache = TurboQuantCache(config(), 3, protected_layers=[-1])
    assert [type(layer) for layer in cache.layers] == [CompressedLayer, CompressedLayer, DenseLayer]
    report = cache.report()
    assert [(row.key_bits, row.value_bits) for row in report] == [(3, 3), (3, 3), (16, 16)]


def test_sliding_layers_keep_their_own_kind() -> None:
    types = ["sliding_attention", "full_attention", "sliding_attention"]
    cache = TurboQuantCache(config("gemma2", sliding_window=8, layer_types=types, head_dim=16), 4)
    kinds = [type(layer) for layer in cache.layers]
    assert kinds == [DynamicSlidingWindowLayer, CompressedLayer, DynamicSlidingWindowLayer]
    assert cache.is_sliding == [True, False, True]


def test_layers_have_rotations_of_their_own() -> None:
    cache = TurboQuantCache(config(), 2, window=0, sinks=0)
    keys, _ = fill(cache, 128)
    held = [layer.store.unpacked()[0] for layer in cache.layers]
    errors = [tensor - keys for tensor in held]
    assert not torch.allclose(errors[0], errors[1])
    overlap = torch.cosine_similarity(errors[0].flatten(), errors[1].flatten(), dim=0)
    assert abs(float(overlap)) < 0.1
    other = TurboQuantCache(config(), 2, window=0, sinks=0, seed=1)
    fill(other, 128)
    assert not torch.equal(other.layers[1].store.unpacked()[0], held[1])


# ---------------------------------------------------------------- bytes


def test_report_shows_what_is_held() -> None:
    cache = TurboQuantCache(config(), 3, protected_layers=[0], capacity_tokens=500)
    assert [row.kind for row in cache.report()] == ["empty"] * 3
    fill(cache, 400, batch=2)
    dense, coded, _ = cache.report()
    assert (dense.kind, dense.tokens, dense.nbytes) == ("dense", 400, 2 * 2 * HEADS * 500 * DIM * 4)
    assert (coded.kind, coded.tokens, coded.coded_tokens) == ("compressed", 400, 256)
    store = cache.layers[1].store  # type: ignore[union-attr]
    assert coded.nbytes == store_bytes(500, 2, HEADS, DIM, DIM, store.options, torch.float32)
    assert coded.nbytes == sum(coded.parts.values())
    assert coded.dense_nbytes == 2 * 2 * HEADS * 400 * DIM * 4
    assert cache.nbytes == sum(row.nbytes for row in cache.report())
    cache.reset()
    assert cache.nbytes == 0


def test_a_stated_capacity_is_allocated_before_the_first_token() -> None:
    cache = TurboQuantCache(config(), 3, protected_layers=[-1], capacity_tokens=500)
    cache.allocate(1, torch.float32, torch.device("cpu"))
    coded, _, dense = cache.layers
    assert isinstance(coded, CompressedLayer)
    assert isinstance(dense, DenseLayer)
    (slab,) = coded.store.tensors
    assert slab.nbytes == sum(coded.store.bytes_by_part().values())
    buffers = dense.keys, dense.values
    assert [(row.kind, row.tokens) for row in cache.report()] == [("empty", 0)] * 3
    for _ in range(3):
        fill(cache, 10)
    assert any(own.data_ptr() == slab.data_ptr() for own in coded.store.tensors)
    assert (dense.keys.data_ptr(), dense.values.data_ptr()) == tuple(own.data_ptr() for own in buffers)
    assert coded.store.lengths == (30,)
    assert coded.store.nbytes == store_bytes(500, 1, HEADS, DIM, DIM, coded.store.options, torch.float32)
    cache.allocate(1, torch.float32, torch.device("cpu"))  # what is there stays
    assert cache.get_seq_length() == 30


def test_nothing_is_allocated_ahead_without_a_capacity() -> None:
    cache = TurboQuantCache(config(), 3, protected_layers=[-1])
    cache.allocate(1, torch.float32, torch.device("cpu"))
    assert cache.nbytes == 0


def test_other_tokens_than_were_allocated_for_get_buffers_of_their_own() -> None:
    cache = TurboQuantCache(config(), 3, protected_layers=[-1], capacity_tokens=500)
    cache.allocate(1, torch.bfloat16, torch.device("cpu"))
    keys, values = draw(2, 3, 10, 32), draw(2, 3, 10, 8, seed=1)
    cache.update(keys, values, 0)
    cache.update(keys, values, 2)
    coded = cache.layers[0].store  # type: ignore[union-attr]
    assert coded.nbytes == store_bytes(500, 2, 3, 32, 8, coded.options, torch.float32)
    assert torch.equal(cache.layers[2].keys[:, :, :10], keys)  # type: ignore[union-attr]
    assert cache.layers[2].keys.shape == (2, 3, 500, 32)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("model_type", "changes", "heads"),
    [
        ("falcon", {"multi_query": True}, 1),
        ("falcon", {"multi_query": False}, 4),
        ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}, 2),
        ("gpt_bigcode", {"multi_query": True}, 1),
        ("llama", {}, HEADS),
    ],
)
def test_heads_of_keys_are_those_of_the_model(model_type: str, changes: dict[str, Any], heads: int) -> None:
    own = {"num_key_value_heads": HEADS} if model_type == "llama" else {}
    made = AutoConfig.for_model(model_type, hidden_size=64, num_attention_heads=4, **own, **changes)
    assert layer_shape(made, 0).num_kv_heads == heads


@pytest.mark.parametrize("capacity", [None, 5, 700])
def test_dense_layers_hold_what_they_are_given(capacity: int | None) -> None:
    cache = TurboQuantCache(config(), 16, capacity_tokens=capacity)
    keys, values = draw(2, HEADS, 600, DIM), draw(2, HEADS, 600, DIM, seed=1)
    for start, stop in ((0, 3), (3, 4), (4, 300), (300, 600)):
        held = cache.update(keys[:, :, start:stop], values[:, :, start:stop], 0)
        assert torch.equal(held[0], keys[:, :, :stop])
        assert torch.equal(held[1], values[:, :, :stop])
    assert cache.layers[0].keys.shape[2] == (700 if capacity == 700 else 768)  # type: ignore[union-attr]


# ---------------------------------------------------------------- transformers' Cache interface


@pytest.mark.parametrize("bits", [4, 16])
def test_crop_takes_both_meanings(bits: int) -> None:
    cache = TurboQuantCache(config(), bits)
    assert cache.is_croppable
    keys, _ = fill(cache, 100)
    cache.crop(-30)
    assert cache.get_seq_length() == 70
    cache.crop(40)
    assert cache.get_seq_length() == 40
    cache.crop(50)
    assert cache.get_seq_length() == 40
    cache.crop(0)
    assert cache.get_seq_length() == 40
    more = draw(1, HEADS, 1, DIM, seed=9)
    held = cache.update(more, more, 0)[0]
    torch.testing.assert_close(held, torch.cat((keys[:, :, :40], more), 2))


def test_activate_past_recording_reaches_every_store() -> None:
    tried, never = TurboQuantCache(config(), 4), TurboQuantCache(config(), 4)
    for cache in (tried, never):
        fill(cache, 190)
        cache.activate_past_recording()
    fill(tried, 100, seed=4)
    tried.crop(-100)
    for left, right in zip(tried.layers, never.layers, strict=True):
        assert left.store.coded_tokens == 0, "drafts pushed nothing out of the window"
        assert torch.equal(left.store.unpacked()[0], right.store.unpacked()[0])


@pytest.mark.parametrize("bits", [4, 16])
def test_rows_are_repeated_reordered_and_selected(bits: int) -> None:
    cache = TurboQuantCache(config(), bits)
    assert cache.batch_size == -1
    for edit in (lambda: cache.batch_repeat_interleave(2), lambda: cache.reorder_cache(torch.tensor([0])), cache.reset):
        edit()  # nothing held yet: nothing to do
    keys, _ = fill(cache, 5, batch=3)
    assert cache.batch_size == 3
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([5, 0, 0, 1, 2, 3]))
    cache.batch_select_indices(torch.tensor([0, 1, 4]))
    cache.batch_select_indices(torch.tensor([True, False, True]))
    assert cache.batch_size == 2
    more = draw(2, HEADS, 1, DIM, seed=9)
    held = cache.update(more, more, 0)[0]
    torch.testing.assert_close(held[:, :, :5], keys[[2, 1]])


@pytest.mark.parametrize("bits", [4, 16])
def test_early_initialization_and_copies(bits: int) -> None:
    cache = TurboQuantCache(config(), bits)
    cache.early_initialization(1, HEADS, DIM, torch.float32, torch.device("cpu"))
    assert cache.is_initialized
    assert cache.get_mask_sizes(4, 0) == (4, 0)
    keys, _ = fill(cache, 7)
    twin = copy.deepcopy(cache)
    fill(cache, 3, seed=4)
    assert (cache.get_seq_length(), twin.get_seq_length()) == (10, 7)
    assert (cache.get_mask_sizes(2, 0), cache.get_max_length(), cache.is_compileable) == ((12, 0), -1, False)
    assert "CompressedLayer" in repr(cache) or bits == 16
    more = draw(1, HEADS, 1, DIM, seed=9)
    torch.testing.assert_close(twin.update(more, more, 0)[0][:, :, :7], keys)


def test_moving_to_host_memory_is_refused() -> None:
    cache = TurboQuantCache(config(), 4)
    for move in (cache.layers[0].offload, cache.layers[0].prefetch):
        with pytest.raises(UnsupportedModelError, match="does not move to host memory"):
            move()


# ---------------------------------------------------------------- foreign attention


def test_foreign_attention_gets_the_layer_and_hears_of_it_once(caplog: pytest.LogCaptureFixture) -> None:
    cache = TurboQuantCache(config(), 3, window=10)
    with caplog.at_level(logging.WARNING, "turboquant"):
        first = draw(1, HEADS, 300, DIM)
        held = cache.update(first, first, 0)
        assert held[0] is first, "a first prompt is read as it is"
        new = draw(1, HEADS, 2, DIM, seed=5)
        keys, values = cache.update(new, new, 0)
        cache.update(new, new, 1)
    assert keys.shape == (1, HEADS, 302, DIM)
    assert torch.equal(keys[:, :, 300:], new)
    assert 0 < float((keys[:, :, :300] - first).norm() / first.norm()) < 0.25
    assert torch.equal(values[:, :, 300:], new)
    assert [record.message for record in caplog.records] == [
        "attention is sdpa: compressed layers are unpacked for each call; wrap(model) or "
        "attn_implementation='turboquant' reads them in place"
    ]


@pytest.mark.parametrize(("attention", "bits"), [(ATTENTION_NAME, 4), ("sdpa", 16)])
def test_nothing_is_said_where_nothing_is_unpacked(attention: str, bits: int, caplog: pytest.LogCaptureFixture) -> None:
    fill(TurboQuantCache(config(attention=attention), bits), 3)
    assert caplog.records == []


@pytest.mark.parametrize(
    "use",
    [
        lambda keys: keys.shape,
        lambda keys: keys[:, :, -1],
        lambda keys: keys.transpose(2, 3),
        lambda keys: torch.matmul(torch.ones(1), keys),
        lambda keys: torch.cat((torch.ones(1), keys)),
    ],
    ids=["shape", "index", "transpose", "matmul", "cat"],
)
def test_code_that_reads_the_keys_itself_is_told_so(use: Any) -> None:
    cache = TurboQuantCache(config(attention=ATTENTION_NAME), 4)
    keys, _ = cache.update(draw(1, HEADS, 3, DIM), draw(1, HEADS, 3, DIM), 0)
    with pytest.raises(UnsupportedModelError, match='reads the cached keys itself.*attn_implementation="sdpa"'):
        use(keys)


# ---------------------------------------------------------------- our attention


@pytest.mark.parametrize(
    ("module", "options", "message"),
    [
        (Attention(), {"dropout": 0.1}, "model.eval"),
        (Attention(), {"is_causal": False}, "not causal"),
        (Attention(), {"position_bias": torch.zeros(1)}, "argument position_bias"),
    ],
)
def test_what_attention_cannot_honour_is_refused(module: nn.Module, options: dict[str, Any], message: str) -> None:
    x = draw(1, HEADS, 3, DIM)
    with pytest.raises(UnsupportedModelError, match=message):
        turboquant_attention(module, x, x, x, None, **options)


def test_a_module_that_says_it_is_not_causal_is_refused_and_a_silent_one_is_served() -> None:
    x = draw(1, HEADS, 3, DIM)
    looks_ahead = nn.Module()
    looks_ahead.is_causal = False  # type: ignore[assignment]
    with pytest.raises(UnsupportedModelError, match="Module is not causal"):
        turboquant_attention(looks_ahead, x, x, x, None)
    out, _ = turboquant_attention(nn.Module(), x, x, x, None)
    torch.testing.assert_close(out[:, 0], x[:, :, 0], atol=1e-6, rtol=1e-6)  # the first token sees itself alone


@pytest.mark.parametrize("tokens", [1, 5, 64, 65, 200])
def test_later_turns_agree_whether_read_in_place_or_unpacked(tokens: int) -> None:
    """Up to 64 queries are answered from the codes, more over the unpacked layer: the same answer."""
    cache = TurboQuantCache(config(attention=ATTENTION_NAME), 2, window=0)
    ask(cache, 0, 260)
    store = cache.layers[0].store  # type: ignore[union-attr]
    old_keys, old_values = store.unpacked()
    got, q, keys, values = ask(cache, 0, tokens, seed=5)
    if tokens <= 64:
        held_keys, held_values = store.unpacked()  # what has left the window (of 0) is read as it was coded
    else:
        held_keys, held_values = torch.cat((old_keys, keys), 2), torch.cat((old_values, values), 2)
    hidden = torch.ones(tokens, 260 + tokens, dtype=torch.bool).tril(260)
    want = nn.functional.scaled_dot_product_attention(q, held_keys, held_values, hidden, enable_gqa=True)
    torch.testing.assert_close(got, want, atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize("sizes", [[100], [40, 60], [1, 98, 1]], ids=str)
@pytest.mark.parametrize("old", [0, 150])
def test_a_prompt_in_chunks_reads_itself_uncompressed(sizes: list[int], old: int) -> None:
    caches = [TurboQuantCache(config(attention=ATTENTION_NAME), 2, window=0) for _ in range(2)]
    at_once, in_chunks = caches
    for cache in caches:
        if old:
            ask(cache, 0, old, seed=20)
    want, q, keys, values = ask(at_once, 0, 100)
    layer = in_chunks.layers[0]
    got = []
    with layer.prompt(100):  # type: ignore[union-attr]
        start = 0
        for size in sizes:
            part = slice(start, start + size)
            handles = in_chunks.update(keys[:, :, part], values[:, :, part], 0)
            got.append(turboquant_attention(Attention(), q[:, :, part], *handles, None)[0].transpose(1, 2))
            start += size
    torch.testing.assert_close(torch.cat(got, 2), want, atol=2e-6, rtol=1e-4)
    for left, right in zip(layer.store.unpacked(), at_once.layers[0].store.unpacked(), strict=True):  # type: ignore[union-attr]
        assert torch.equal(left, right)


def test_a_prompt_that_ends_early_leaves_nothing() -> None:
    cache = TurboQuantCache(config(attention=ATTENTION_NAME), 2)
    layer: Any = cache.layers[0]

    def stop_in_the_middle() -> None:
        with layer.prompt(100):
            ask(cache, 0, 40)
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        stop_in_the_middle()
    assert layer.get_seq_length() == 0
    ask(cache, 0, 30)
    assert layer.get_seq_length() == 30


def test_padding_that_grows_from_call_to_call() -> None:
    """A prompt fed in pieces by generate: a row may be padding beyond its first piece."""
    cache = TurboQuantCache(config(attention=ATTENTION_NAME), 4)
    padding = torch.arange(30)[None, :] >= torch.tensor([0, 25])[:, None]
    for start in (0, 10, 20):
        seen = padding[:, : start + 10]
        mask = CausalMask.make(seen, seen, tuple((~seen).sum(-1).tolist()), None)
        out = ask(cache, 0, 10, mask, batch=2, seed=start)[0]
        assert bool(out.isfinite().all())
    assert cache.layers[0].store.lengths == (30, 5)  # type: ignore[union-attr]


def test_padding_that_was_stored_as_tokens_is_masked() -> None:
    """A first call with a mask of another form (image blocks) says nothing of padding; later calls do."""
    cache = TurboQuantCache(config(attention=ATTENTION_NAME), 4)
    padding = torch.arange(9)[None, :] >= torch.tensor([0, 4])[:, None]
    full = torch.ones(8, 8, dtype=torch.bool).tril() & padding[:, None, None, :8]
    ask(cache, 0, 8, full, batch=2)
    keys, values = cache.layers[0].store.unpacked()  # type: ignore[union-attr]
    mask = CausalMask.make(padding, padding, (0, 4), None)
    got, q, new_keys, new_values = ask(cache, 0, 1, mask, batch=2, seed=7)
    keys, values = torch.cat((keys, new_keys), 2), torch.cat((values, new_values), 2)
    want = nn.functional.scaled_dot_product_attention(q, keys, values, padding[:, None, None], enable_gqa=True)
    torch.testing.assert_close(got, want, atol=2e-6, rtol=1e-4)


def test_key_biases_are_taken_as_given() -> None:
    bias = KeyBias(torch.ones(HEADS, DIM), torch.empty(0))
    cache = TurboQuantCache(config(), 4, key_biases=[None, bias, None])
    fill(cache, 3)
    assert [row.parts["bias"] for row in cache.report()] == [0, bias.nbytes, 0]
