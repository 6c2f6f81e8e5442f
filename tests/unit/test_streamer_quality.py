"""Quality of caches: what is compared at which positions, against an evaluation written out in full."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from streamer import StreamingEngine
from streamer.errors import OptionError
from streamer.quality import CacheSetting, measure_quality, measure_sensitivities, parse_setting, text_windows
from turboquant import TurboQuantCache, wrap


@pytest.fixture(scope="module")
def model(random_checkpoint: Callable[..., Path]) -> Any:
    with StreamingEngine(random_checkpoint("llama"), bits=16, device="cpu", dtype="float32") as engine:
        yield engine.assemble(300, 3)


def windows(count: int = 2, tokens: int = 260) -> torch.Tensor:
    return torch.randint(1, 120, (count, tokens), generator=torch.Generator().manual_seed(0))


def test_settings_are_read() -> None:
    assert parse_setting("3") == CacheSetting("3", {"bits": 3})
    text = "key_bits=4, value_bits=2,window=64,protected_layers=0/-1,block_means=off"
    assert parse_setting(text).options == {
        "key_bits": 4, "value_bits": 2, "window": 64, "protected_layers": (0, -1), "block_means": False
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("colour=3", "a cache has no option colour; it has bits, key_bits"),
        ("three", "bits cannot be 'three'; write as in bits=3"),
        ("block_means=maybe", "block_means cannot be 'maybe'; write as in block_means=off"),
    ],
)
def test_settings_that_cannot_be_are_refused(text: str, message: str) -> None:
    with pytest.raises(OptionError, match=re.escape(message)):
        parse_setting(text)


def test_a_text_that_is_too_short_is_refused() -> None:
    assert text_windows(range(10), 2, 4).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    with pytest.raises(OptionError, match="3 windows of 4 tokens were asked for and the text has 10 tokens"):
        text_windows(range(10), 3, 4)


def test_windows_begin_as_texts_do() -> None:
    assert text_windows([9, 1, 2, 3, 4], 2, 3, bos=9).tolist() == [[9, 1, 2], [9, 3, 4]]
    assert text_windows([9, 1, 2, 3, 4], 2, 2, bos=1).tolist() == [[9, 1], [2, 3]]
    with pytest.raises(OptionError, match="2 windows of 4 tokens were asked for and the text has 6 tokens"):
        text_windows([9, 1, 2, 3, 4, 5], 2, 4, bos=9)


@pytest.mark.parametrize("step", [1, 7, 100])
def test_figures_are_those_of_an_evaluation_in_full(step: int, model: Any) -> None:
    """Window by window: whole logits with and without the cache, positions 40 to the last but one."""
    options = {"bits": 3, "window": 16, "sinks": 2}
    ids = windows()
    (found,) = measure_quality(model, ids, [CacheSetting("mine", options)], prefill=40, step=step)
    divergences, same, loss = [], [], []
    with torch.inference_mode():
        for row in ids:
            exact = model(input_ids=row[None]).logits[0].double().log_softmax(-1)
            cache = TurboQuantCache(model, **options)
            parts = [model(input_ids=row[None, :40], past_key_values=cache, use_cache=True).logits]
            for start in range(40, len(row), step):
                half = len(row) // 2
                if start <= half:
                    at_half = start, cache.nbytes
                part = row[None, start : start + step]
                parts.append(model(input_ids=part, past_key_values=cache, use_cache=True).logits)
            mine = torch.cat(parts, 1)[0].double().log_softmax(-1)
            divergences.append((exact.exp() * (exact - mine)).sum(-1)[40:-1])
            same.append((exact.argmax(-1) == mine.argmax(-1))[40:-1])
            loss.append(-mine[40:-1].gather(-1, row[41:, None])[:, 0])
    divergence = torch.cat(divergences)
    assert found.positions == divergence.numel() == 2 * (260 - 41)
    assert found.kl_mean == pytest.approx(float(divergence.mean()), rel=1e-3)
    assert found.kl_p99 == pytest.approx(float(divergence.quantile(0.99)), rel=1e-3)
    assert found.kl_mean > 1e-6  # the cache is really compressed
    assert found.top1 == pytest.approx(float(torch.cat(same).double().mean()), abs=3 / divergence.numel())
    assert found.perplexity == pytest.approx(float(torch.cat(loss).mean().exp()), rel=1e-4)
    assert found.nbytes == cache.nbytes
    assert found.bytes_per_token == (cache.nbytes - at_half[1]) / (260 - at_half[0])
    layers = model.config.num_hidden_layers
    heads, dim = model.config.num_key_value_heads, model.config.head_dim
    assert found.uncompressed_nbytes == 2 * 4 * layers * heads * dim * 260


def test_an_uncompressed_setting_changes_nothing(model: Any) -> None:
    found = measure_quality(model, windows(1), [parse_setting("16"), parse_setting("2")], prefill=100, step=5)
    assert found[0].kl_mean < 1e-9
    assert found[0].top1 == 1
    assert found[0].perplexity == pytest.approx(found[0].reference_perplexity, rel=1e-6)
    assert found[1].kl_mean > found[0].kl_mean
    assert found[1].reference_perplexity == found[0].reference_perplexity


@pytest.mark.parametrize(("prefill", "step"), [(0, 1), (259, 1), (10, 0)])
def test_calls_that_do_not_fit_are_refused(prefill: int, step: int, model: Any) -> None:
    with pytest.raises(OptionError, match="do not fit windows of 260: prefill from 1 to 258, steps of 1 or more"):
        measure_quality(model, windows(1), [parse_setting("3")], prefill=prefill, step=step)


def test_sensitivities_are_those_of_one_side_of_one_layer(random_checkpoint: Callable[..., Path]) -> None:
    """With a hundredth of the keys in one layer its attention is flat, and their code costs next to nothing."""
    flat = wrap(AutoModelForCausalLM.from_pretrained(random_checkpoint("llama"), dtype=torch.float32).eval())
    with torch.no_grad():
        flat.model.layers[1].self_attn.k_proj.weight *= 0.01
    found = measure_sensitivities(flat, windows(), [0, 1])
    assert len(found) == 2
    assert all(side > 0 for layer in found for side in layer)
    assert found[1][0] < found[0][0] / 100
    for side, bits in enumerate(("2/16", "16/2")):
        setting = parse_setting(f"16,window=16,layer_bits=1:{bits}")
        assert found[1][side] == measure_quality(flat, windows(), [setting], prefill=64, step=64)[0].kl_mean
